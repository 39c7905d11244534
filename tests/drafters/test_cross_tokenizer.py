"""Drafting across tokenizers: the suite of drafters, and that translation loses, replaces and doubles nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from localspec.bench.accounting import WordStarts, cut
from localspec.context import Context
from localspec.drafters import CrossTokenizer, Draft, make_drafter
from localspec.drafters.byte_encoder import ByteEncoder, incomplete
from localspec.drafters.continuation import Prefixes, continuations
from localspec.drafters.mirror import Mirror, Tail
from localspec.engine.session import Session
from localspec.errors import SettingError
from localspec.fingerprint import Relation, Vocabulary, relate
from localspec.loading import get_backend
from localspec.protocols import Drafter, DraftRequest, Outcome, Tokenizer
from localspec.sampling import Sampler, SamplingParams
from localspec.testing.alignment import fuzz, random_strings
from localspec.testing.drafters import DrafterConformance
from localspec.testing.reference import ReferenceModel
from localspec.types import TokenIds

VOCABULARIES = Path(__file__).resolve().parents[2].parent / "shared" / "vocabs"
FAMILIES = ("gpt-2", "llama-spm", "llama-bpe", "qwen35", "phi-3", "starcoder")


class Pieces:
    """The longest piece that fits, from the left. Special tokens come first, then the pieces, then all bytes.

    space: puts a space in front of all text, as sentencepiece does.
    """

    chat_template = None

    def __init__(self, special: list[str], pieces: list[bytes], *, bos: int | None = None, space: bool = False) -> None:
        self.texts = [text.encode() for text in special] + pieces + [bytes([byte]) for byte in range(256)]
        self.num_tokens = len(self.texts)
        self.num_special = len(special)
        self.bos = bos
        self.space = space
        self.stop_tokens = frozenset({0})
        self.template_tokens: Mapping[str, str] = {"eos_token": special[0]}
        self._ids = {text: token for token, text in reversed(list(enumerate(self.texts))) if token >= self.num_special}

    def encode(self, text: str, *, special: bool) -> TokenIds:
        raw = (" " if self.space else "").encode() + text.encode()
        ids, start = [], 0
        while start < len(raw):
            size = next(size for size in range(12, 0, -1) if raw[start : start + size] in self._ids)
            ids.append(self._ids[raw[start : start + size]])
            start += len(self.texts[ids[-1]])
        return np.array(ids, np.int32)

    def token_bytes(self, token: int) -> bytes:
        return self.texts[token] if 0 <= token < self.num_tokens else b""

    def is_special(self, token: int) -> bool:
        return token < self.num_special


class Folded(Pieces):
    """Normalises: capital letters become small ones."""

    def encode(self, text: str, *, special: bool) -> TokenIds:
        return super().encode(text.replace("A", "a"), special=special)


def trained(size: int, text: str) -> Pieces:
    """Pieces that the tokenizers library learns from a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    pieces = [tokenizer.decode([token]).encode() for token in range(256, tokenizer.get_vocab_size())]
    return Pieces(
        ["<|end|>", f"<|{size}|>"], [piece for piece in pieces if "\ufffd".encode() not in piece and len(piece) < 13]
    )


@cache
def tokenizers() -> dict[str, Tokenizer]:
    text = Path(__file__).read_text(encoding="utf-8")
    return {
        "small": trained(60, text),
        "large": trained(400, text),
        "spaced": Pieces(
            ["</s>", "<s>"], [b" the", b"the", b" ", b"  ", b"ing", "é".encode(), "😀".encode()], bos=1, space=True
        ),
        "folded": Folded(["<|end|>"], [b"aaa", b" a", "世界".encode()]),
    }


def relation(target: str, draft: str) -> Relation:
    return relate(tokenizers()[target], tokenizers()[draft])


# ---------------------------------------------------------------- as a drafter


def speaking(model: ReferenceModel, tokenizer: Tokenizer) -> ReferenceModel:
    model.tokenizer = tokenizer  # type: ignore[assignment]
    return model


class TestBytes(DrafterConformance):
    mode, shape = "bytes", "chain"
    max_tokens = 8

    def drafter(self, target: ReferenceModel) -> Drafter:
        pieces = Pieces(["\0"], [bytes([a, b]) for a in range(8) for b in range(8)])
        model = speaking(ReferenceModel(pieces.num_tokens, seed=9, context_length=400), pieces)
        draft = Draft.of(target, model)
        return CrossTokenizer(model, draft.relation, draft.num_rows, mode=self.mode, num=4, shape=self.shape)


class TestTreeOfBytes(TestBytes):
    shape = "tree"


class TestIntersection(TestBytes):
    mode = "intersection"
    draws = True


class TestTreeOfIntersection(TestIntersection):
    shape = "tree"


def test_a_perfect_drafter_of_shuffled_tokens_is_right_in_both_modes() -> None:
    """The same weights under other ids: every guess is the sample, if noise and ids are the target's."""
    target = ReferenceModel(48, seed=5, context_length=200)
    order = np.random.default_rng(0).permutation(47)

    class Shuffled(Pieces):
        def __init__(self) -> None:
            super().__init__(["\0"], [])
            self.texts = [b"\0", *(bytes([byte]) for byte in order)]
            self.num_tokens = 48
            self._ids = {text: token for token, text in enumerate(self.texts) if token}

    draft = speaking(ReferenceModel(48, seed=5, context_length=200), Shuffled())
    rows = np.concatenate([[47], order])
    draft.embedding, draft.head = target.embedding[rows], target.head[rows]
    for mode in ("intersection", "bytes"):
        for temperature in (0.0, 1.2):
            related = Draft.of(target, draft)
            drafter = CrossTokenizer(draft, related.relation, related.num_rows, mode=mode, num=3)
            with Session(target, drafter) as session:
                params = SamplingParams(temperature=temperature, seed=1, max_tokens=24, ignore_eos=True)
                stats = session.generate([1, 2, 3], params).stats
            assert stats.acceptance_rate == 1.0, (mode, temperature)
            assert stats.accepted_length == 4.0
            assert stats.drafter_counts[f"{mode}_rounds"] == stats.num_rounds


def test_settings_are_checked_and_leave_no_sequence_open() -> None:
    target, draft = ReferenceModel(257), ReferenceModel(100)
    related = Draft.of(target, draft)
    for settings in ({"mode": "magic"}, {"specials": "drop"}, {"guess": "wild"}):
        with pytest.raises(SettingError):
            CrossTokenizer(draft, related.relation, related.num_rows, **settings)  # type: ignore[arg-type]
    assert draft.num_open == 0


# ---------------------------------------------------------------- fingerprints


def test_padding_does_not_make_another_vocabulary_but_a_token_does() -> None:
    same = relate(Pieces(["</s>"], [b"ab"]), Pieces(["</s>"], [b"ab"]))
    assert same.same and not same.first_difference and same.target_share == 1.0
    other = relate(Pieces(["</s>"], [b"ab", b"cd"]), Pieces(["</s>"], [b"ab", b"ce"]))
    assert not other.same and other.first_difference.startswith("token 2 is 'cd'")
    assert other.num_shared == 257 and other.coverage({1: 3, 2: 1}) == 0.75
    assert other.to_target[1] == 1 and other.to_target[2] == -1
    assert other.coverage({1: 1, len(other.target): 2, -1: 1}) == 0.25
    assert other.coverage_of(np.array([1, len(other.target), -1, -1], np.int32)) == 0.25


def test_of_two_tokens_with_the_same_bytes_the_one_that_encoding_uses_counts() -> None:
    vocabulary = Vocabulary(Pieces(["</s>"], [b"a", b"\n"]))
    assert vocabulary.texts.count(b"a") == 2 and vocabulary.ids[b"a"] == 1


def test_special_tokens_are_shared_by_text_and_roles_are_reported() -> None:
    found = relate(Pieces(["</s>", "<s>"], [], bos=1), Pieces(["<|end|>", "</s>"], []))
    assert found.to_draft[0] == 1 and found.to_target[0] == -1
    assert any(words.startswith("BOS") for words in found.roles) and any(
        "special in the target" in w for w in found.roles
    )


# ---------------------------------------------------------------- translation


def test_alignment_holds_on_random_bytes_for_every_pair_of_small_vocabularies() -> None:
    """A sample of `localspec bench tokenizers --fuzz 20000`, which does it with real ones."""
    vocabularies = [Vocabulary(tokenizer) for tokenizer in tokenizers().values()]
    relations = [relate(a, b) for a in vocabularies for b in vocabularies if a is not b]
    assert fuzz(vocabularies, relations, 100) == 100 * 12


@pytest.mark.slow
@pytest.mark.skipif(not VOCABULARIES.is_dir(), reason="needs the vocabularies in ../shared/vocabs")
def test_alignment_holds_for_every_pair_of_six_real_vocabularies() -> None:
    """A sample of `localspec bench tokenizers FILE... --fuzz 20000`."""
    backend = get_backend("llamacpp")
    if not backend.is_installed():
        pytest.skip("needs llama.cpp")
    paths = [VOCABULARIES / f"ggml-vocab-{name}.gguf" for name in FAMILIES]
    vocabularies = [Vocabulary(backend.open_tokenizer(path)) for path in paths]
    relations = [relate(a, b) for a in vocabularies for b in vocabularies if a is not b]
    assert len(relations) == 30 and fuzz(vocabularies, relations, 40) == 40 * 30


@pytest.mark.skipif(not VOCABULARIES.is_dir(), reason="needs the vocabularies in ../shared/vocabs")
@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "starcoder"])
def test_both_backends_have_the_same_bytes_for_every_token(name: str) -> None:
    path = VOCABULARIES / f"ggml-vocab-{name}.gguf"
    found = []
    for backend in map(get_backend, ("llamacpp", "mlx")):
        if not backend.is_installed():
            pytest.skip(f"needs {backend.report().install_command}")
        found.append(Vocabulary(backend.open_tokenizer(path)))
    one, other = found
    assert len(one) == len(other)
    assert [token for token in range(len(one)) if one.texts[token] != other.texts[token]] == []
    assert one.special == other.special and (one.bos, one.eos) == (other.bos, other.eos)


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "phi-3", "starcoder", "falcon"])
@pytest.mark.skipif(not VOCABULARIES.is_dir(), reason="needs the vocabularies in ../shared/vocabs")
def test_llama_cpp_agrees_with_its_vectors_and_its_bytes_with_the_text(name: str) -> None:
    backend = get_backend("llamacpp")
    if not backend.is_installed():
        pytest.skip("needs llama.cpp")
    path = VOCABULARIES / f"ggml-vocab-{name}.gguf"
    tokenizer = backend.open_tokenizer(path)
    texts = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text(encoding="utf-8").split("\n")
    for text, line in zip(texts, lines, strict=False):
        ids = tokenizer.encode(text, special=False).tolist()
        assert ids == [int(token) for token in line.split()], repr(text)
        back = b"".join(tokenizer.token_bytes(token) for token in ids)
        assert back in (text.encode(), b" " + text.encode())


def tokens_of(name: str, raw: bytes) -> list[int]:
    return ByteEncoder(Vocabulary(tokenizers()[name])).encode(raw).ids


@pytest.mark.parametrize("name", ["small", "large", "spaced", "folded"])
def test_encoding_writes_the_bytes_that_were_asked_for(name: str) -> None:
    vocabulary = Vocabulary(tokenizers()[name])
    for raw in random_strings(200, seed=3):
        assert b"".join(vocabulary.texts[token] for token in tokens_of(name, raw)) == raw


def test_a_space_is_not_put_in_front_nor_lost() -> None:
    vocabulary = Vocabulary(tokenizers()["spaced"])
    for raw, first in ((b"the", b"the"), (b" the", b" the"), (b"  the", b"  ")):
        assert vocabulary.texts[tokens_of("spaced", raw)[0]] == first


def test_a_round_encodes_a_bounded_tail() -> None:
    """O(new text): the longest stretch that is encoded does not grow with the conversation."""
    longest: list[int] = []

    class Watched(Pieces):
        def encode(self, text: str, *, special: bool) -> TokenIds:
            longest.append(len(text))
            return super().encode(text, special=special)

    words = " the thing, and then 世界 😀 aaa" * 300
    draft = Watched(["</s>"], [b" the", b"aaa", b"and"])
    found = relate(tokenizers()["small"], draft)
    mirror = Mirror(found)
    tokens = np.array(tokens_of("small", words.encode()), np.int32)
    mirror.begin(tokens[:3000])
    longest.clear()
    for end in range(3000, 3300, 3):
        mirror.follow(tokens[:end])
    assert max(longest) < 400


def test_a_word_that_grows_is_split_anew_and_only_that() -> None:
    found = relate(Pieces(["</s>"], [b"hel", b"lo"]), Pieces(["</s>"], [b"hello", b"hel"]))
    mirror = Mirror(found)
    target = [*tokens_of("small", b""), 1]
    mirror.begin(np.array(target, np.int32))
    assert [found.draft.texts[token] for token in mirror.ids] == [b"hel"]
    assert mirror.follow(np.array([*target, 2], np.int32)) == 0
    assert [found.draft.texts[token] for token in mirror.ids] == [b"hello"]


@pytest.mark.parametrize(
    ("specials", "want"), [("map", [b"</s>", b"<x>"]), ("skip", [b"</s>"]), ("text", [b"</s>", b"<x>"])]
)
def test_special_tokens_are_mapped_sent_as_text_or_left_out(specials: str, want: list[bytes]) -> None:
    found = relate(Pieces(["</s>", "<x>"], []), Pieces(["</s>"], [b"q", b"<x>"]))
    mirror = Mirror(found, specials)
    mirror.begin(np.array([0, 1], np.int32))
    texts = [found.draft.texts[token] for token in mirror.ids]
    assert b"".join(texts) == b"".join(want)
    assert (mirror.ids[0] == 0) == (specials != "text")


def test_a_bos_is_never_doubled() -> None:
    bos = Pieces(["</s>", "<s>"], [], bos=1)
    other = Pieces(["</s>", "<begin>"], [], bos=1)
    for target, draft in ((bos, other), (bos, bos), (Pieces(["</s>", "<begin>"], []), other)):
        mirror = Mirror(relate(target, draft))
        mirror.begin(np.array([1, 70], np.int32))
        assert mirror.ids[0] == draft.bos and len(mirror.ids) == 2
    mirror = Mirror(relate(bos, Pieces(["</s>"], [])))
    mirror.begin(np.array([1, 70], np.int32))
    assert len(mirror.ids) == 1


def test_a_guess_that_would_change_the_last_word_is_known() -> None:
    """ "the" and "re" would have been another token; behind " " it is a word of its own."""
    found = relate(Pieces(["</s>"], [b" the", b" there", b"re"]), Pieces(["</s>"], [b"re"]))
    mirror = Mirror(found)
    tokens = np.array([1], np.int32)
    mirror.begin(tokens)
    tail = Tail(mirror, ByteEncoder(found.target), tokens)
    assert tail.encode(b"re")[1] is False and tail.encode(b" the")[1] is True


def test_unfinished_characters_are_counted() -> None:
    for raw, count in (
        (b"a", 0),
        ("é".encode(), 0),
        (b"\xc3", 1),
        (b"\xf0\x9f", 2),
        (b"a\xf0\x9f\x98", 3),
        (b"\x80", 0),
    ):
        assert incomplete(raw) == count


def test_prefixes_are_found_and_a_token_is_not_longer_than_itself() -> None:
    vocabulary = Vocabulary(Pieces(["</s>"], [b"jo", b"joint", b"join", b"\xff\xff", b"jp"]))
    prefixes = Prefixes(vocabulary)

    def longer(text: bytes) -> set[bytes]:
        return {vocabulary.texts[token] for token in prefixes.longer_than(text).tolist()}

    assert longer(b"jo") == {b"join", b"joint"} and longer(b"j") == {b"jo", b"join", b"joint", b"jp"}
    assert longer(b"joint") == set() and longer(b"\xff") == {b"\xff\xff"} and longer(b"\xff\xff") == set()


def test_the_chance_of_the_next_bytes_counts_all_ways_to_write_what_is_there() -> None:
    """Weights against the sum over all token sequences that write the bytes, of a chain of order one."""
    texts = [b"a", b"b", b"ab", b"bb", b"abb", b"c"]
    vocabulary = Vocabulary(Pieces(["</s>"], texts))
    first = 1
    rng = np.random.default_rng(3)
    rows = np.full((3, len(vocabulary)), -np.inf, np.float32)
    rows[:, first : first + len(texts)] = rng.normal(size=(3, len(texts)))
    a, b = first, first + 1
    found = continuations(rows, [a, b], vocabulary.texts, Prefixes(vocabulary), 16)
    logs = rows - np.log(np.exp(rows.astype(np.float64)).sum(axis=1, keepdims=True))
    want = {}  # behind "?ab", written as a, b: replace nothing, b, or a and b
    for token in range(first, first + len(texts)):
        text = vocabulary.texts[token]
        want[token, 0] = logs[0, a] + logs[1, b] + logs[2, token]
        if text.startswith(b"b") and len(text) > 1:
            want[token, 1] = logs[0, a] + logs[1, token]
        if text.startswith(b"ab") and len(text) > 2:
            want[token, 2] = logs[0, token]
    got = dict(zip(zip(found.ids.tolist(), found.behind.tolist(), strict=True), found.values.tolist(), strict=True))
    assert got.keys() == want.keys()
    assert all(abs(got[key] - value) < 1e-4 for key, value in want.items())
    assert found.values.tolist() == sorted(found.values.tolist(), reverse=True)


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_a_drafter_that_stepped_back_guesses_what_a_fresh_one_does(shape: str) -> None:
    """Guesses that replace the last tokens leave nothing wrong in the draft model's state."""
    target = ReferenceModel(9, seed=1, context_length=200)
    pieces = Pieces(["\0"], [bytes([a, b]) for a in range(8) for b in range(8)])
    model = speaking(ReferenceModel(pieces.num_tokens, seed=9, context_length=400), pieces)
    related = Draft.of(target, model)

    def made() -> CrossTokenizer:
        return CrossTokenizer(model, related.relation, related.num_rows, mode="bytes", num=4, shape=shape)

    following, context = made(), Context([1, 2, 3])
    following.begin(context)
    sampler = Sampler(SamplingParams(), 0)
    stepped_back = 0
    for token in np.random.default_rng(0).integers(0, 8, 20).tolist():
        request = DraftRequest(
            context=context, max_nodes=8, max_depth=4, sampler=sampler, stop_tokens=frozenset(), trees=shape == "tree"
        )
        fresh = made()
        fresh.begin(context)
        want, got = fresh.propose(request), following.propose(request)
        fresh.close()
        assert got.tree().token.tolist() == want.tree().token.tolist()
        assert got.parents.tolist() == want.parents.tolist()
        stepped_back += got.counts["stepped_back"]
        emitted = got.tree().token[: len(got.tree()) // 2].tolist() if shape == "chain" else []
        context.extend([*emitted, token])
        following.observe(Outcome(got.tree(), tuple(range(len(emitted))), (*emitted, token)))
    following.close()
    assert stepped_back


def test_free_writing_holds_back_the_last_token() -> None:
    target = ReferenceModel(257, seed=3, context_length=200)
    draft = speaking(ReferenceModel(300, seed=4, context_length=200), Pieces(["\0"], [b"ab", b"cd"]))
    related = Draft.of(target, draft)
    drafter = CrossTokenizer(draft, related.relation, related.num_rows, mode="bytes", num=3)
    with Session(target, drafter) as session:
        stats = session.generate(list(b"hello"), SamplingParams(max_tokens=8, ignore_eos=True)).stats
    assert stats.drafter_counts["held_back"] >= stats.num_rounds - 1 and stats.num_drafted


# ---------------------------------------------------------------- whose the gap is


def test_a_vocabulary_is_cut_to_the_share_of_text_that_was_asked_for() -> None:
    pieces = [bytes([97 + a, 97 + b]) for a in range(10) for b in range(10)]
    model = speaking(ReferenceModel(400), Pieces(["</s>"], pieces))
    draft = Draft.of(model, model)
    tokens = np.random.default_rng(0).integers(1, 101, 4000).astype(np.int32)
    for share in (1.0, 0.95, 0.5):
        relation = cut(draft, tokens.tolist(), share).relation
        assert not relation.same and share <= relation.coverage_of(tokens) < share + 0.02
    assert draft.relation.coverage_of(tokens) == 1.0


def test_a_model_agrees_with_its_own_text_at_every_word_start() -> None:
    model = ReferenceModel(257, seed=2, context_length=200)
    draft, prompt = Draft.of(model, model), np.array(list(b"abc"), np.int32)
    with Session(model, make_drafter("nothing", None)) as session:
        answer = session.generate(prompt.tolist(), SamplingParams(max_tokens=24, ignore_eos=True)).tokens
    spaced = [*answer[:3], 32, *answer[3:]]  # a place that the model did not write
    starts = WordStarts(draft, 2)
    for text in (answer, spaced):
        agreed, places = starts.agreement(prompt, text)
        assert places == sum(text[place] == 32 for place in range(1, len(text) - 1))
        assert agreed == 2 * places or text is spaced
    starts.close()
    assert model.num_open == 0
