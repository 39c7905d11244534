"""Trained heads on llama.cpp: rows against plain numpy, and what becomes of a head's memory when its sequence is
cut, copied, shortened, or shares a pass with others."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from localspec.drafters import HeadDrafter, Nothing
from localspec.engine.session import Session
from localspec.errors import BackendError, FailureError, HeadFileError, PairMismatchError, UnsupportedModelError
from localspec.formats.head_conversion import write_head_gguf
from localspec.loading import get_backend
from localspec.protocols import DraftHead, HostTokens, LanguageModel, LoadSettings, SequenceState, Step, chain_parents
from localspec.sampling import SamplingParams
from localspec.testing.files import write_gguf
from localspec.testing.gguf_architectures import write_architecture
from localspec.testing.gguf_heads import BLOCK_KINDS, write_block_head, write_eagle3_head
from localspec.testing.heads import HeadConformance
from localspec.types import Logits
from tests.backends.numpy_heads import BlockReference, StepReference

BACKEND = get_backend("llamacpp")
pytestmark = pytest.mark.skipif(not BACKEND.is_installed(), reason="needs llama.cpp: pip install llama-cpp-python")

SETTINGS = LoadSettings(context=256, num_sequences=3, threads=1, extra_buffers=False)
CLOSE = 2e-3  # rows of float32 files differ by float16 keys and values, in another order
LOOSE = 5e-3  # where a step's own state goes into the next one
Features = NDArray[np.float32]


def module(name: str) -> Any:
    """A module of the backend, which is loaded under a name of the core's choosing."""
    return import_module(f"{type(BACKEND).__module__}.{name}")


@pytest.fixture(scope="module")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("target") / "target.gguf", quantization="F32", num_layers=4)


@contextmanager
def loaded(target: Path, head: Path, settings: LoadSettings = SETTINGS) -> Iterator[tuple[LanguageModel, Any]]:
    model = BACKEND.load(target, settings)
    try:
        opened = BACKEND.load_head(head, model)
        try:
            yield model, opened
        finally:
            opened.close()
    finally:
        model.close()


def write_head(path: Path, target: Path, kind: str) -> Path:
    if kind == "eagle3":
        return write_eagle3_head(path, target)
    return write_block_head(path, target, kind=kind)


def ids(count: int, start: int = 0) -> list[int]:
    return [(index * 37 + 11) % 250 + 3 for index in range(start, start + count)]


def forward(
    model: LanguageModel, state: SequenceState, tokens: Sequence[int], parents: Sequence[int] | None = None
) -> Logits:
    above = chain_parents(state, len(tokens)) if parents is None else np.array(parents, np.int32)
    [scores] = model.forward([Step(state, (HostTokens(np.array(tokens, np.int32)),), above)])
    return scores.rows(range(scores.num_rows)).copy()


def commit(model: LanguageModel, state: SequenceState, tokens: Sequence[int]) -> None:
    forward(model, state, tokens)
    state.keep(range(len(tokens)))


def listen(model: Any, state: Any, head: Any) -> list[tuple[int, Features]]:
    """What a companion of this state is handed: (token, features) of each committed one."""
    heard: list[tuple[int, Features]] = []

    class Listener(module("companion").Companion):  # type: ignore[misc]
        num_missing = 0
        is_closed = False

        @property
        def end(self) -> int:
            return len(heard)

        def feed(self, tokens: NDArray[np.int32], features: Features) -> None:
            heard.extend(zip(tokens.tolist(), features.copy(), strict=True))

        def truncate(self, length: int) -> None:
            del heard[length:]

        def save(self) -> object:
            raise NotImplementedError

        def close(self) -> None:
            pass

    listener = Listener()
    listener.head = head
    state.recording = module("companion").Recording(model.memory.taps, [listener])
    return heard


def features_of(model: LanguageModel, head: Any, tokens: Sequence[int]) -> Features:
    """[T, W] hidden states of a text, read in one pass."""
    state = model.open()
    try:
        heard = listen(model, state, head)
        commit(model, state, tokens)
        return np.array([row for _, row in heard])
    finally:
        state.close()


def assert_close(got: Logits, want: Logits, tolerance: float = CLOSE) -> None:
    assert np.array_equal(np.isfinite(got), np.isfinite(want))
    some = np.isfinite(want)
    assert np.abs(got[some] - want[some]).max() <= tolerance * want[some].std()


# ---------------------------------------------------------------- the contract


@cache
def beside(kind: str, batch: bool = False) -> tuple[LanguageModel, DraftHead]:
    """A head of this kind and its target, kept for all tests of the suite."""
    folder = Path(tempfile.mkdtemp(prefix="localspec-heads-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if kind == "mtp":
        target = write_architecture(folder / "target.gguf", "qwen35", mtp=True)
    else:
        target = write_gguf(folder / "target.gguf", quantization="F32", num_layers=4)
    model = BACKEND.load(target, LoadSettings(context=512, num_sequences=4, threads=1, batch=batch))
    head = BACKEND.load_head(target if kind == "mtp" else write_head(folder / "head.gguf", target, kind), model)
    return model, head


class OfKind(HeadConformance):
    """Bits are not promised: what a head reads is cut into passes elsewhere, and its kernels change with the width."""

    tolerance = 0.02
    kind: ClassVar[str] = "dspark"
    batch: ClassVar[bool] = False

    def head(self) -> DraftHead:
        return beside(self.kind, self.batch)[1]

    def target(self) -> LanguageModel:
        return beside(self.kind, self.batch)[0]


class TestDSpark(OfKind):
    pass


class TestDSparkInStreams(OfKind):
    batch = True


class TestJetSpec(OfKind):
    kind = "jetspec"


class TestDFlash2(OfKind):
    kind = "dflash2"


class TestEagle3(OfKind):
    kind = "eagle3"


class TestMtp(OfKind):
    kind = "mtp"


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("kind", BLOCK_KINDS)
@pytest.mark.parametrize("own_embedding", [True, False])
def test_rows_are_those_of_plain_numpy(kind: str, own_embedding: bool, target_path: Path, tmp_path: Path) -> None:
    """The greedy path, whose bias llama.cpp adds, and a tree of other guesses, whose bias we exchange."""
    path = write_block_head(tmp_path / "head.gguf", target_path, kind=kind, own_embedding=own_embedding)
    reference, text, anchor = BlockReference(path, target_path), ids(21), 40
    with loaded(target_path, path) as (model, head):
        state = model.open()
        guesses = head.open(state)
        commit(model, state, text[:9])
        commit(model, state, text[9:])
        base, hidden = reference.base(features_of(model, head, text), anchor)
        row = guesses.start(anchor).rows([0])
        assert_close(row[0], reference.row(base, hidden, 0, anchor))
        greedy = int(row[0].argmax())
        tree = [(greedy, -1), (77, -1), (greedy, 1), (13, 0), (99, 1)]
        scores = guesses.extend(HostTokens(np.array([t for t, _ in tree[:2]], np.int32)), [-1, -1])
        first = scores.rows([0, 1]).copy()
        for number, (token, _) in enumerate(tree[:2]):
            assert_close(first[number], reference.row(base, hidden, 1, token))
        later = guesses.extend(HostTokens(np.array([t for t, _ in tree[2:]], np.int32)), [p for _, p in tree[2:]])
        for row, (token, _) in zip(later.rows([0, 1, 2]), tree[2:], strict=True):
            assert_close(row, reference.row(base, hidden, 2, token))
        sure = guesses.confidence()
        assert head.info.confident == kind.startswith("dspark") == (sure is not None)
        if sure is not None:
            want = [reference.confidence(hidden, 2, token) for token, _ in tree[2:]]
            assert np.allclose(sure, want, atol=1e-4) and np.ptp(want) > 0.01
        assert head.info.levels == 5 - reference.first
        deepest = list(range(2, head.info.levels - 1))
        for node in deepest:
            guesses.extend(HostTokens(np.array([5], np.int32)), [2 if node == 2 else node + 2])
        with pytest.raises(ValueError, match="levels"):
            guesses.extend(HostTokens(np.array([5], np.int32)), [4 + len(deepest)])


def test_a_block_that_begins_at_the_anchor_without_a_markov_part(target_path: Path, tmp_path: Path) -> None:
    """DeepSpec's own DFlash heads: as many guesses as slots."""
    path = write_block_head(tmp_path / "head.gguf", target_path, kind="dflash", change={"sample_from_anchor": True})
    reference, text = BlockReference(path, target_path), ids(12)
    with loaded(target_path, path) as (model, head):
        assert head.info.kind == "dflash" and head.info.levels == 5
        state = model.open()
        guesses = head.open(state)
        commit(model, state, text)
        base, hidden = reference.base(features_of(model, head, text), 9)
        want = [reference.row(base, hidden, slot, 0) for slot in range(3)]
        assert_close(chain_behind(guesses, 9, [4, 5]), np.array(want))


@pytest.mark.parametrize("kind", ["dspark", "dflash"])
def test_a_smaller_vocabulary_is_scattered(kind: str, target_path: Path, tmp_path: Path) -> None:
    own = [*range(5, 60, 3), 200, 210]
    path = write_block_head(tmp_path / "head.gguf", target_path, kind=kind, own_tokens=own)
    reference, text = BlockReference(path, target_path), ids(12)
    with loaded(target_path, path) as (model, head):
        state = model.open()
        guesses = head.open(state)
        commit(model, state, text)
        base, hidden = reference.base(features_of(model, head, text), 9)
        row = guesses.start(9).rows([0])[0]
        assert np.flatnonzero(np.isfinite(row)).tolist() == sorted(own)
        assert_close(row, reference.row(base, hidden, 0, 9))
        behind = guesses.extend(HostTokens(np.array([own[3], 7], np.int32)), [-1, -1]).rows([0, 1])
        for found, token in zip(behind, [own[3], 7], strict=True):
            assert_close(found, reference.row(base, hidden, 1, token))


def chain_behind(guesses: Any, anchor: int, tokens: Sequence[int]) -> Logits:
    """[T + 1, V] rows of a chain of guesses."""
    rows = [guesses.start(anchor).rows([0])[0].copy()]
    for number, token in enumerate(tokens):
        rows.append(guesses.extend(HostTokens(np.array([token], np.int32)), [number - 1]).rows([0])[0].copy())
    return np.array(rows)


EAGLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "normed": {"norm_before_residual": True, "norm_before_fc": True},
    "own tokens": {"own_tokens": [*range(3, 200, 3), 210]},
}


@pytest.mark.parametrize("variant", EAGLES)
def test_eagle3_rows_are_those_of_plain_numpy(variant: str, target_path: Path, tmp_path: Path) -> None:
    """A chain, then a tree level by level, each node against a chain of numpy's."""
    path = write_eagle3_head(tmp_path / "head.gguf", target_path, **EAGLES[variant])
    reference, text, anchor = StepReference(path, target_path), ids(80), 40
    with loaded(target_path, path) as (model, head):
        assert head.info.kind == "eagle3" and head.info.levels is None and not head.info.one_pass and head.info.trees
        state = model.open()
        guesses = head.open(state)
        commit(model, state, text[:67])
        commit(model, state, text[67:])
        features = features_of(model, head, text)
        assert_close(chain_behind(guesses, anchor, [9, 33]), reference.rows(features, [*text, anchor], [9, 33]))
        assert_tree_is_right(guesses, reference, features, [*text, anchor])
        assert guesses.confidence() is None


def test_mtp_rows_are_those_of_plain_numpy(tmp_path: Path) -> None:
    path = write_architecture(tmp_path / "target.gguf", "qwen35", mtp=True)
    reference, text, anchor = StepReference(path, path), ids(70), 40
    with loaded(path, path) as (model, head):
        assert head.info.kind == "mtp" and head.info.taps == (-2,) and head.info.num_parameters > 0
        state = model.open()
        guesses = head.open(state)
        commit(model, state, text[:11])
        commit(model, state, text[11:])
        features = features_of(model, head, text)
        want = reference.rows(features, [*text, anchor], [9, 33])
        assert_close(chain_behind(guesses, anchor, [9, 33]), want, LOOSE)
        assert_tree_is_right(guesses, reference, features, [*text, anchor])


@pytest.mark.parametrize("name", ["qwen3next", "qwen35moe"])
def test_mtp_layers_of_experts_run(name: str, tmp_path: Path) -> None:
    """Without a reference of their experts: what they guess depends on the text and on the path, and only on them."""
    path = write_architecture(tmp_path / "target.gguf", name, mtp=True)
    with loaded(path, path) as (model, head):
        found = []
        for text, guess in ((ids(20), 9), (ids(20), 9), (ids(20), 10), ([5, *ids(19)], 9)):
            state = model.open()
            guesses = head.open(state)
            commit(model, state, text)
            found.append(chain_behind(guesses, 40, [guess]))
            state.close()
    assert np.array_equal(found[0], found[1]) and np.isfinite(found[0]).all()
    assert np.array_equal(found[0][0], found[2][0]) and not np.allclose(found[0][1], found[2][1], atol=0.1)
    assert not np.allclose(found[0][0], found[3][0], atol=0.1)


def assert_tree_is_right(guesses: Any, reference: StepReference, features: Features, tokens: Sequence[int]) -> None:
    first = guesses.start(tokens[-1]).rows([0]).copy()
    level = guesses.extend(HostTokens(np.array([7, 50, 90], np.int32)), [-1, -1, -1]).rows([0, 1, 2]).copy()
    below = guesses.extend(HostTokens(np.array([8, 9, 60, 61], np.int32)), [1, 1, 0, 2]).rows([0, 1, 2, 3]).copy()
    deepest = guesses.extend(HostTokens(np.array([30], np.int32)), [4]).rows([0]).copy()
    for got, path in (
        (first[0], []),
        (level[1], [50]),
        (below[0], [50, 8]),
        (below[2], [7, 60]),
        (below[3], [90, 61]),
        (deepest[0], [50, 9, 30]),
    ):
        assert_close(got, reference.rows(features, tokens, path)[-1], LOOSE)


# ---------------------------------------------------------------- what a head is told


def test_a_head_hears_what_is_kept_and_no_more(target_path: Path, tmp_path: Path) -> None:
    """A pass cut into several, a chain, a branch of a tree, nothing, a truncation."""
    path = write_block_head(tmp_path / "head.gguf", target_path)
    settings = LoadSettings(context=256, num_sequences=3, threads=1, extra_buffers=False, trees=True)
    with loaded(target_path, path, settings) as (model, head):
        state = model.open()
        heard = listen(model, state, head)
        text = ids(150)
        commit(model, state, text[:140])  # flash attention cuts after 63
        forward(model, state, [text[140], 7, text[141], 9, text[142]], [-1, 0, 0, 1, 2])
        state.keep([0, 2, 4])
        forward(model, state, [9, 9, 9])
        state.keep(())
        commit(model, state, text[143:145])
        state.truncate(142)
        commit(model, state, text[142:])
        want = features_of(model, head, text)
        assert [token for token, _ in heard] == text
        assert np.abs(np.array([row for _, row in heard]) - want).max() < 1e-3 * want.std()


def test_lanes_of_one_pass_each_hear_their_own(target_path: Path, tmp_path: Path) -> None:
    path = write_block_head(tmp_path / "head.gguf", target_path)
    settings = LoadSettings(context=256, num_sequences=3, threads=1, extra_buffers=False, batch=True)
    with loaded(target_path, path, settings) as (model, head):
        assert model.capabilities.batches
        texts = [ids(7), ids(4, 50), ids(9, 90)]
        states = [model.open() for _ in texts]
        heard = [listen(model, states[index], head) if index != 1 else [] for index in range(3)]
        steps = [
            Step(state, (HostTokens(np.array(text, np.int32)),), chain_parents(state, len(text)), ())
            for state, text in zip(states, texts, strict=True)
        ]
        model.forward([steps[2], steps[0], steps[1]])
        for state, text in zip(states, texts, strict=True):
            state.keep(range(len(text)))
        for state in states:
            state.close()
        assert not heard[1]
        for index in (0, 2):
            want = features_of(model, head, texts[index])
            assert [token for token, _ in heard[index]] == texts[index]
            assert np.allclose([row for _, row in heard[index]], want, atol=1e-4)


def test_replayed_tokens_are_heard_once(tmp_path: Path) -> None:
    """Recurrent layers: what was kept behind a rejected guess is run again, and its features are known already."""
    target = write_architecture(tmp_path / "target.gguf", "qwen3next")
    path = write_block_head(tmp_path / "head.gguf", target)
    with loaded(target, path) as (model, head):
        state = model.open()
        heard, text = listen(model, state, head), ids(30)
        commit(model, state, text[:10])
        for start in range(10, 26, 2):
            forward(model, state, [*text[start : start + 2], 9, 8])
            state.keep([0, 1])
        assert state.num_replayed > 0
        state.truncate(20)
        commit(model, state, text[20:])
        want = features_of(model, head, text)
        assert [token for token, _ in heard] == text
        assert np.abs(np.array([row for _, row in heard]) - want).max() < 5e-3 * want.std()


# ---------------------------------------------------------------- a head's memory


def behind(guesses: Any, anchor: int = 40) -> Logits:
    """[3, V] the rows of a short chain that leaves the greedy path."""
    rows = [guesses.start(anchor).rows([0])[0].copy()]
    for number, token in enumerate((17, 80)):
        rows.append(guesses.extend(HostTokens(np.array([token], np.int32)), [number - 1]).rows([0])[0].copy())
    return np.array(rows)


@pytest.mark.parametrize("kind", ["dspark", "dflash-window", "jetspec", "eagle3"])
def test_memory_follows_the_sequence(kind: str, target_path: Path, tmp_path: Path) -> None:
    """Kept branches, truncation, forks and saved states: each time as if the text had been read in one go."""
    path = write_head(tmp_path / "head.gguf", target_path, kind)
    with loaded(target_path, path) as (model, head):
        text = ids(100)

        def fresh(tokens: Sequence[int]) -> Logits:
            state = model.open()
            guesses = head.open(state)
            commit(model, state, tokens)
            rows = behind(guesses)
            state.close()
            return rows

        state = model.open()
        guesses = head.open(state)
        commit(model, state, text[:80])
        behind(guesses)
        forward(model, state, [text[80], 7, text[81], 9, text[82]], [-1, 0, 0, 1, 2])
        state.keep([0, 2, 4])
        whole = fresh(text[:83])
        assert_close(behind(guesses), whole)
        assert np.abs(behind(guesses) - fresh(text[:82])).max() > 0.05 * whole.std()
        copy = state.fork()
        saved = state.save()
        commit(model, state, ids(5, 500))
        state.truncate(83)
        assert_close(behind(guesses), whole)
        state.truncate(60)
        assert_close(behind(guesses), fresh(text[:60]))
        copied = head.open(copy)
        assert np.array_equal(behind(copied), behind(copied))
        assert_close(behind(copied), whole)
        commit(model, copy, text[83:90])
        assert_close(behind(copied), fresh(text[:90]))
        copy.close()
        back = saved.open()
        assert saved.num_bytes > 0
        assert_close(behind(head.open(back)), whole)
        back.close()


@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_a_copy_is_the_same_to_the_last_bit(kind: str, target_path: Path, tmp_path: Path) -> None:
    path = write_head(tmp_path / "head.gguf", target_path, kind)
    with loaded(target_path, path) as (model, head):
        state = model.open()
        guesses = head.open(state)
        commit(model, state, ids(70))
        want = behind(guesses)
        state.truncate(70)
        assert np.array_equal(behind(guesses), want)
        copy = state.fork()
        assert np.array_equal(behind(head.open(copy)), want)
        saved = state.save()
        state.close()
        assert np.array_equal(behind(head.open(saved.open())), want)


def test_a_head_that_comes_late_sees_less(target_path: Path, tmp_path: Path) -> None:
    """As if the text had begun where it came: rotation knows distances only."""
    path = write_block_head(tmp_path / "head.gguf", target_path)
    reference, text = BlockReference(path, target_path), ids(30)
    with loaded(target_path, path) as (model, head):
        state = model.open()
        commit(model, state, text[:10])
        guesses = head.open(state)
        assert guesses.start(40).num_rows == 1  # nothing seen yet is no fault
        commit(model, state, text[10:])
        features = features_of(model, head, text)
        base, hidden = reference.base(features[10:], 40)
        assert_close(guesses.start(40).rows([0])[0], reference.row(base, hidden, 0, 40))
        state.truncate(5)
        commit(model, state, text[5:30])
        base, hidden = reference.base(features[5:], 40)
        assert_close(guesses.start(40).rows([0])[0], reference.row(base, hidden, 0, 40))


def test_a_late_eagle3_head_and_one_that_is_cut_far_back(
    monkeypatch: pytest.MonkeyPatch, target_path: Path, tmp_path: Path
) -> None:
    """Of the pair at a cut beyond what is remembered the token is the old one; everything else is exact."""
    monkeypatch.setattr(module("step_head"), "_NUM_RECENT", 64)
    path = write_eagle3_head(tmp_path / "head.gguf", target_path)
    reference, text = StepReference(path, target_path), ids(120)
    with loaded(target_path, path) as (model, head):
        state = model.open()
        commit(model, state, text[:10])
        guesses = head.open(state)
        assert guesses.start(40).num_rows == 1
        commit(model, state, text[10:])
        features = features_of(model, head, text)
        want = reference.rows(features[10:], [*text[10:], 40], [9])
        assert_close(chain_behind(guesses, 40, [9]), want)
        state.truncate(100)
        assert_close(chain_behind(guesses, 40, [9]), reference.rows(features[10:100], [*text[10:100], 40], [9]))
        state.truncate(20)
        commit(model, state, [5, 6, 7])
        other = features_of(model, head, [*text[:20], 5, 6, 7])
        got, kept = chain_behind(guesses, 40, [9]), [*text[10:21], 6, 7, 40]  # text[20] where 5 is
        assert_close(got, reference.rows(other[10:], kept, [9]))
        state.truncate(0)
        commit(model, state, text[:4])
        assert_close(chain_behind(guesses, 40, [9]), reference.rows(features[:4], [*text[:4], 40], [9]))


@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_closing_ends_the_feeding(kind: str, target_path: Path, tmp_path: Path) -> None:
    path = write_head(tmp_path / "head.gguf", target_path, kind)
    with loaded(target_path, path) as (model, head):
        states = [model.open() for _ in range(3)]
        for state in states:
            head.open(state).close()
        opened = [head.open(state) for state in states]  # their places were given back
        for state in states:
            assert state.recording is not None  # type: ignore[attr-defined]
        opened[0].close()
        opened[0].close()
        with pytest.raises(ValueError, match="closed"):
            opened[0].start(3)
        commit(model, states[0], ids(4))
        states[1].close()
        forward(model, states[2], ids(3))
        again = head.open(states[2])  # a second view of the same memory
        assert again.room == opened[2].room > 0
        other = BACKEND.load(target_path, SETTINGS)
        foreign = other.open()
        with pytest.raises(ValueError, match="another model"):
            head.open(foreign)
        other.close()


def test_text_is_the_same_to_the_last_bit_with_taps(tiny_pair: Any, tmp_path: Path) -> None:
    """Chains, trees, single tokens padded and prompts that are cut: rows with and without a head beside them."""
    path = write_block_head(tmp_path / "head.gguf", tiny_pair.target, taps=[2, 8, 13])
    settings = LoadSettings(context=512, num_sequences=2, threads=2, trees=True)
    model = BACKEND.load(tiny_pair.target, settings)

    def rows() -> list[Logits]:
        state = model.open()
        if head is not None:
            head.open(state)
        commit(model, state, ids(90))
        found = [forward(model, state, [5, 9])]
        state.keep([0])
        found.append(forward(model, state, ids(8, 200), [-1, 0, 0, 1, 2, 2, 5, 3]))
        state.keep([0, 2, 5, 6])
        found.append(forward(model, state, ids(6, 300)))
        state.close()
        return found

    head: DraftHead | None = None
    try:
        plain = rows()
        head = BACKEND.load_head(path, model)
        tapped = rows()
        head.close()
        head = None
        after = rows()
    finally:
        model.close()
    for want, got, last in zip(plain, tapped, after, strict=True):
        assert np.array_equal(want, got) and np.array_equal(want, last)


@pytest.mark.parametrize("kind", ["dspark", "dflash2", "eagle3", "mtp"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_is_written_with_a_head_is_what_is_written_without(kind: str, temperature: float) -> None:
    """In sessions, over two turns; the target of the MTP layer runs tokens again."""
    model, head = beside(kind)
    texts = []
    for drafter in ("nothing", head.info.kind):
        made = Nothing() if drafter == "nothing" else HeadDrafter(head, num=4)
        with Session(model, made) as session:
            asked = SamplingParams(temperature=temperature, max_tokens=20, seed=3)
            first = session.generate(ids(30), asked)
            second = session.generate([*ids(30), *first.tokens, *ids(10, 70)], asked)
            texts.append([*first.tokens, *second.tokens])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 3


# ---------------------------------------------------------------- refusals


Spoil = Callable[[Path, Path], Path]
WRONG: dict[str, tuple[type[FailureError] | type[PairMismatchError], str, Spoil]] = {
    "taps beyond the target": (
        UnsupportedModelError,
        "output of layer 3",
        lambda path, target: write_block_head(path, target, taps=[1, 4]),
    ),
    "no block size": (
        HeadFileError,
        "block_size",
        lambda path, target: write_block_head(path, target, change={"block_size": 1}),
    ),
    "another vocabulary": (
        PairMismatchError,
        "vocabulary",
        lambda path, target: write_block_head(path, write_gguf(path.with_name("o.gguf"), num_merges=20, num_layers=4)),
    ),
    "another number of tokens that it can guess": (
        HeadFileError,
        "beyond the vocabulary",
        lambda path, target: write_block_head(path, target, own_tokens=[3, 4, 5000]),
    ),
    "another hidden size": (
        PairMismatchError,
        "hidden size",
        lambda path, target: write_block_head(path, target, change={"embedding_length": 32}),
    ),
    "other taps than its matrix is made for": (
        PairMismatchError,
        "fc.weight",
        lambda path, target: write_block_head(path, target, change={"target_layers": [1, 2, 3]}),
    ),
    "EAGLE-3 with four taps": (
        UnsupportedModelError,
        "three taps",
        lambda path, target: write_eagle3_head(path, target, taps=[0, 1, 2, 3]),
    ),
    "EAGLE-3 for another target": (
        PairMismatchError,
        "hidden size",
        lambda path, target: write_eagle3_head(path, target, change={"target_hidden_size": 32}),
    ),
    "a target without an MTP layer": (UnsupportedModelError, "no MTP layer", lambda path, target: target),
    "a whole model": (UnsupportedModelError, "such a head", lambda path, target: write_gguf(path)),
    "no file": (FailureError, "no such file", lambda path, target: target.with_name("nothing")),
    "a folder": (HeadFileError, "localspec convert", lambda path, target: path.parent),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused(what: str, target_path: Path, tmp_path: Path) -> None:
    error, words, spoil = WRONG[what]
    path = spoil(tmp_path / "head.gguf", target_path)
    model = BACKEND.load(target_path, SETTINGS)
    try:
        with pytest.raises(error, match=words):
            BACKEND.load_head(path, model)
        head = BACKEND.load_head(write_block_head(tmp_path / "right.gguf", target_path), model)  # nothing was left
        head.close()
    finally:
        model.close()


def test_targets_that_hide_their_states_are_refused(tmp_path: Path) -> None:
    """llama.cpp would end the process."""
    target = write_gguf(tmp_path / "target.gguf", architecture="qwen2", num_layers=4)
    model = BACKEND.load(target, SETTINGS)
    try:
        with pytest.raises(UnsupportedModelError, match="hidden states of qwen2"):
            BACKEND.load_head(write_block_head(tmp_path / "head.gguf", target), model)
    finally:
        model.close()


def test_a_build_without_the_functions_is_told(
    monkeypatch: pytest.MonkeyPatch, target_path: Path, tmp_path: Path
) -> None:
    taps = module("taps")
    missing = {**taps._FUNCTIONS, "get_layer": (("_Z7nothing", "?nothing"), [], None)}
    monkeypatch.setattr(taps, "_FUNCTIONS", missing)
    taps.functions.cache_clear()
    model = BACKEND.load(target_path, SETTINGS)
    try:
        with pytest.raises(UnsupportedModelError, match="_Z7nothing"):
            BACKEND.load_head(write_block_head(tmp_path / "head.gguf", target_path), model)
    finally:
        taps.functions.cache_clear()
        model.close()


def test_a_head_is_loaded_before_its_target_has_open_sequences(target_path: Path, tmp_path: Path) -> None:
    path = write_block_head(tmp_path / "head.gguf", target_path)
    model = BACKEND.load(target_path, SETTINGS)
    try:
        state = model.open()
        with pytest.raises(BackendError, match="before its target has open sequences"):
            BACKEND.load_head(path, model)
        state.close()
        head = BACKEND.load_head(path, model)
        head.close()
        head.close()
    finally:
        model.close()


def test_several_heads_of_one_target_do_not_disturb_each_other(target_path: Path, tmp_path: Path) -> None:
    """They read other layers, hear the same sequence, and go one after another."""
    paths = {
        "dspark": write_block_head(tmp_path / "d.gguf", target_path, taps=[2, 1]),
        "eagle3": write_eagle3_head(tmp_path / "e.gguf", target_path, taps=[3, 0, 2]),
    }
    text, alone = ids(40), {}
    for kind, path in paths.items():
        with loaded(target_path, path) as (model, head):
            state = model.open()
            guesses = head.open(state)
            commit(model, state, text)
            alone[kind] = chain_behind(guesses, 40, [9, 12])
    model = BACKEND.load(target_path, SETTINGS)
    try:
        heads = {kind: BACKEND.load_head(path, model) for kind, path in paths.items()}
        assert model.memory.taps.layers == (2, 1, 3, 0)  # type: ignore[attr-defined]
        state = model.open()
        beside = {kind: head.open(state) for kind, head in heads.items()}
        commit(model, state, text)
        copy = state.fork()
        for kind, guesses in beside.items():
            assert np.array_equal(chain_behind(guesses, 40, [9, 12]), alone[kind])
            assert np.array_equal(chain_behind(heads[kind].open(copy), 40, [9, 12]), alone[kind])
        saved = state.save()
        heads["dspark"].close()
        commit(model, state, ids(70, 300))  # nobody is fed that is gone
        state.truncate(40)
        with pytest.raises(ValueError, match="closed"):
            beside["dspark"].start(40)
        assert_close(chain_behind(beside["eagle3"], 40, [9, 12]), alone["eagle3"], LOOSE)
        back = saved.open()
        assert np.array_equal(chain_behind(heads["eagle3"].open(back), 40, [9, 12]), alone["eagle3"])
        heads["eagle3"].close()
        for one in (state, copy, back):
            commit(model, one, ids(70, 300))
            one.close()
        again = BACKEND.load_head(paths["dspark"], model)
        assert model.memory.taps.layers == (2, 1)  # type: ignore[attr-defined]
        again.close()
    finally:
        model.close()


# ---------------------------------------------------------------- a trained head


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shared_models: Path, root: Path) -> Path:
    """The development head in float32, for the bundled target, which was quantised from the one it was trained for."""
    path = tmp_path_factory.mktemp("trained") / "dspark.gguf"
    write_head_gguf(path, shared_models / "dspark", root / "models" / "tiny" / "target.gguf", "F32")
    return path


@pytest.mark.shared
def test_a_trained_head_says_what_numpy_says(trained: Path, tiny_pair: Any) -> None:
    reference = BlockReference(trained, tiny_pair.target)
    with loaded(tiny_pair.target, trained) as (model, head):
        assert head.info.kind == "dspark" and head.info.taps == (1, 7, 12) and head.info.levels == 7
        text = model.tokenizer.encode("def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n", special=True).tolist()
        state = model.open()
        guesses = head.open(state)
        commit(model, state, text[:-1])
        base, hidden = reference.base(features_of(model, head, text[:-1]), text[-1])
        scores, previous = guesses.start(text[-1]), text[-1]
        for slot in range(7):
            row = scores.rows([0])[0].copy()
            assert_close(row, reference.row(base, hidden, slot, previous))
            sure = guesses.confidence()
            assert sure is not None and abs(sure[0] - reference.confidence(hidden, slot, previous)) < 1e-3
            previous = int(np.argsort(row)[-1 if slot != 2 else -2])  # once not the likeliest
            if slot < 6:
                scores = guesses.extend(HostTokens(np.array([previous], np.int32)), [slot - 1])


@pytest.mark.shared
def test_a_trained_head_guesses_well(trained: Path, tiny_pair: Any) -> None:
    """Taps off by one, or slots, would still give the right text, and next to no accepted guesses."""
    prompt = "def fibonacci(n):\n    if n < 2:\n        return n\n    return "
    with loaded(tiny_pair.target, trained) as (model, head):
        text = model.tokenizer.encode(prompt, special=True).tolist()
        state = model.open()
        guesses = head.open(state)
        commit(model, state, text[:-1])
        anchor, num_rounds, num_tokens = text[-1], 12, 0
        for _ in range(num_rounds):
            chain, scores = [anchor], guesses.start(anchor)
            for level in range(7):
                chain.append(int(scores.argmax().numpy()[0]))
                if level < 6:
                    scores = guesses.extend(HostTokens(np.array(chain[-1:], np.int32)), [level - 1])
            best = forward(model, state, chain).argmax(axis=1)
            accepted = next((index for index in range(7) if best[index] != chain[index + 1]), 7)
            state.keep(range(accepted + 1))
            num_tokens, anchor = num_tokens + accepted + 1, int(best[accepted])
    assert num_tokens > 2 * num_rounds
