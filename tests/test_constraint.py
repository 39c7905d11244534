"""Constraints without a model that takes time: the vocabulary of the bundled pair, and models of random weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from localspec import noise
from localspec.bench.grammar import is_valid
from localspec.bench.schemas import random_schemas
from localspec.constraint import Constraint, Grammar, constrain, obey
from localspec.constraint import guidance as guidance_module
from localspec.constraint.obey import CUT
from localspec.context import Context
from localspec.drafters import DraftModel, Forced, make_drafter
from localspec.engine.answer import Generation
from localspec.engine.session import Session
from localspec.errors import BackendMissingError, GrammarError, SettingError
from localspec.loading import get_backend
from localspec.protocols import (
    Drafter,
    DraftRequest,
    HostTokens,
    LanguageModel,
    Outcome,
    Proposal,
    SavedDraft,
    SequenceState,
    Step,
    Tokenizer,
    chain_parents,
)
from localspec.sampling import Sampler, SamplingParams, Tolerance
from localspec.testing.reference import ReferenceModel
from localspec.types import Logits, TokenIds

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ROOT = Path(__file__).resolve().parent.parent
VOCABS = ROOT.parent / "shared" / "vocabs"


class Vocabulary:
    """As much of a model as a grammar needs: the tokenizer, and a row of logits a little longer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.num_tokens + 7


@cache
def model() -> LanguageModel:
    """The bundled pair's vocabulary; constraints look at nothing else of a model."""
    tokenizer = get_backend("mlx").open_tokenizer(ROOT / "models" / "tiny" / "target.gguf")
    return cast(LanguageModel, Vocabulary(tokenizer))


def follow(grammar: Grammar) -> Constraint:
    constraint = constrain(model(), grammar)
    assert constraint is not None
    return constraint


def text_of(tokens: TokenIds) -> str:
    return b"".join(model().tokenizer.token_bytes(int(token)) for token in tokens).decode()


def walk(constraint: Constraint, rng: np.random.Generator, most: int = 2000) -> tuple[TokenIds, bool]:
    """(an answer of allowed tokens chosen at random, did it end?)"""
    output = np.zeros(0, np.int32)
    while len(output) < most:
        token = int(rng.choice(constraint.mask(output).nonzero()[0]))
        if token in model().tokenizer.stop_tokens:
            return output, True
        output = np.append(output, np.int32(token))
    return output, False


# ---------------------------------------------------------------- masks


def test_whatever_the_masks_allow_is_valid_for_200_random_schemas() -> None:
    rng = np.random.default_rng(1)
    for schema in random_schemas(200):
        constraint = follow(Grammar.json_schema(schema))
        output, ended = walk(constraint, rng)
        assert ended, schema
        assert is_valid(text_of(output), schema), (schema, text_of(output))
        assert constraint.complete(output)
        assert constraint.accepts(text_of(output))


@pytest.mark.parametrize("pattern", [r"(yes|no), because [a-z ]{5,20}\.", r"[0-9]{3}-[A-Z]{2}", "ä[öü]+😀{1,2}"])
def test_whatever_the_masks_allow_matches_the_regular_expression(pattern: str) -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        output, ended = walk(follow(Grammar.regex(pattern)), rng)
        assert ended and re.fullmatch(pattern, text_of(output))


@pytest.mark.parametrize(
    "source",
    ['start: sum\nsum: NUMBER ("+" NUMBER)~1..3\nNUMBER: /[0-9]{1,3}/', 'root ::= [0-9]{1,3} ("+" [0-9]{1,3}){1,3}'],
)
def test_lark_and_gbnf_say_the_same(source: str) -> None:
    output, ended = walk(follow(Grammar.lark(source)), np.random.default_rng(3))
    assert ended and re.fullmatch(r"[0-9]{1,3}(\+[0-9]{1,3}){1,3}", text_of(output))


def test_the_mask_of_another_output_is_not_given_again() -> None:
    """Old bug, found by the next test: llguidance gave its last mask again after going back and on, if lexer and number
    of lexemes were the same."""
    grammar, rng = Grammar.json_schema(PERSON), np.random.default_rng(909)
    first, second = (walk(follow(grammar), rng)[0] for _ in range(2))
    asked = follow(grammar)
    before, after = asked.mask(second[:43]), asked.mask(first[:37])
    assert np.array_equal(after, follow(grammar).mask(first[:37])) and not np.array_equal(after, before)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_mask_depends_on_the_output_alone_not_on_what_was_asked_before(data: st.DataObject) -> None:
    grammar = Grammar.json_schema(PERSON)
    asked = follow(grammar)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    outputs = [walk(follow(grammar), rng)[0] for _ in range(2)]
    for _ in range(8):
        output = outputs[data.draw(st.integers(0, 1))]
        output = output[: data.draw(st.integers(0, len(output)))]
        if data.draw(st.booleans()):  # a guess that breaks the grammar, in between
            asked.mask(np.append(output, np.int32(data.draw(st.integers(0, model().vocab_size - 1)))))
        assert np.array_equal(asked.mask(output), follow(grammar).mask(output))
        some = rng.integers(0, model().vocab_size, 50).tolist()
        assert asked.allows(output, some) == [bool(asked.mask(output)[token]) for token in some]
        assert asked.complete(output) == follow(grammar).complete(output)
        assert np.array_equal(asked.forced(output), follow(grammar).forced(output))


def test_an_output_that_breaks_the_grammar_allows_nothing() -> None:
    constraint = follow(Grammar.regex("ab"))
    wrong = model().tokenizer.encode("xy", special=False)
    assert not constraint.mask(wrong).any()
    assert not constraint.complete(wrong)
    assert len(constraint.forced(wrong)) == 0
    assert constraint.mask(wrong[:0]).any(), "it must be able to go back"


def test_special_tokens_are_never_part_of_text_and_the_end_comes_where_it_may() -> None:
    tokenizer = model().tokenizer
    constraint = follow(Grammar.regex("(?s:.*)"))
    allowed = set(constraint.mask(np.zeros(0, np.int32)).nonzero()[0].tolist())
    special = {token for token in range(tokenizer.num_tokens) if tokenizer.is_special(token)}
    assert allowed & special == tokenizer.stop_tokens
    assert max(allowed) < tokenizer.num_tokens, "rows of padding were allowed"
    begun = tokenizer.encode('{"name": "', special=False)
    allowed = set(follow(Grammar.json_schema(PERSON)).mask(begun).nonzero()[0].tolist())
    assert allowed and not allowed & special


def test_forced_tokens_are_the_only_ones_allowed() -> None:
    name, value = "a rather long name", {"const": "and a long value"}
    schema = {"type": "object", "properties": {name: value}, "required": [name], "additionalProperties": False}
    constraint = follow(Grammar.json_schema(schema))
    output = np.zeros(0, np.int32)
    num_forced = 0
    while not constraint.complete(output):
        forced = constraint.forced(output)
        for token in forced:
            assert constraint.mask(output).nonzero()[0].tolist() == [token]
            output = np.append(output, token)
        num_forced += len(forced)
        if not len(forced):
            output = np.append(output, np.int32(constraint.mask(output).nonzero()[0][0]))
    assert num_forced >= 4


def test_white_space_between_tokens_of_json_has_an_end() -> None:
    constraint = follow(Grammar.json_schema(PERSON))
    encode = model().tokenizer.encode
    space = int(encode(" ", special=False)[0])
    output = encode("{", special=False)
    most = 200
    while len(output) < most and constraint.mask(output)[space]:
        output = np.append(output, np.int32(space))
    assert 32 <= len(output) < most


def test_an_answer_may_come_behind_a_thought() -> None:
    constraint = follow(Grammar.regex("[0-9]+").behind("</think>"))
    assert constraint.accepts("Let me see <b> 12.</think>\n\n42")
    assert constraint.accepts("</think>42")
    assert not constraint.accepts("42")
    assert not constraint.accepts("hm</think>\n\nforty")
    assert not constraint.accepts("hm</think>x</think>42")
    assert Grammar.regex("a").behind("") == Grammar.regex("a")


def test_accepts_reads_text_however_it_is_cut() -> None:
    constraint = follow(Grammar.json_schema(PERSON))
    assert constraint.accepts('{"name": "Ann", "age": 7, "tags": []}')
    assert not constraint.accepts('{"name": "Ann", "age": 7')
    assert not constraint.accepts('{"name": "Ann", "age": 151, "tags": []}')


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Grammar.json_schema({"type": "objec"}), "JSON schema cannot be followed: Invalid type"),
        (lambda: Grammar.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda: Grammar.json_schema({"$ref": "#/nowhere"}), "nowhere"),
        (lambda: Grammar.json_schema({"$ref": "#"}), "no answer satisfies it"),
        (lambda: Grammar.regex(r"[^\x00-\x{10ffff}]"), "no answer satisfies it"),
        (lambda: Grammar.json_schema("{"), "not JSON"),
        (lambda: Grammar.json_schema("[1]"), "got list, expected an object"),
        (lambda: Grammar.json_schema(False), "allows no answer"),
        (lambda: Grammar.json_schema({"const": {1, 2}}), "what JSON cannot say"),
        (lambda: Grammar.regex("a(b"), "regular expression cannot be followed"),
        (lambda: Grammar.regex("(?=a)b"), "look-ahead"),
        (lambda: Grammar.lark("start: nothing"), "unknown name"),
        (lambda: Grammar.lark("root ::= [0-9"), "grammar cannot be followed"),
        (lambda: Grammar.lark(""), "grammar cannot be followed"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(make: Callable[[], Grammar], words: str) -> None:
    with pytest.raises(SettingError) as caught:
        follow(make())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_lenient_leaves_out_what_cannot_be_enforced() -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True}
    constraint = follow(Grammar.json_schema(schema, lenient=True))
    assert constraint.accepts("[true, true]")
    assert not constraint.accepts("[1]")


def test_a_model_without_an_end_is_refused() -> None:
    class Endless:
        stop_tokens: frozenset[int] = frozenset()

        def __getattr__(self, name: str) -> Any:
            return getattr(model().tokenizer, name)

    endless = cast(LanguageModel, Vocabulary(cast(Tokenizer, Endless())))
    with pytest.raises(SettingError, match="token that ends the answer"):
        constrain(endless, Grammar.regex("a"))


def test_without_llguidance_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guidance_module, "find_spec", lambda name: None)
    with pytest.raises(BackendMissingError, match=r"localspec\[grammar\]"):
        constrain(model(), Grammar.regex("a"))
    assert constrain(model(), None) is None


def test_a_grammar_that_gets_too_costly_ends_in_an_error_of_ours() -> None:
    constraint = follow(Grammar.regex("ab"))
    broken = cast(Any, constraint)
    broken._matcher.consume_token(int(model().tokenizer.encode("x", special=False)[0]))  # puts it into its error state
    with pytest.raises(GrammarError, match="too costly"):
        constraint.mask(np.zeros(0, np.int32))
    assert not constraint.complete(np.zeros(0, np.int32))
    assert not constraint.accepts("ab")


def test_ignore_eos_contradicts_a_grammar() -> None:
    with pytest.raises(SettingError, match="ignore_eos"):
        SamplingParams(grammar=Grammar.regex("a"), ignore_eos=True)


# ---------------------------------------------------------------- spelling


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=12).map(lambda text: text.encode("utf-8", "replace")), st.binary(max_size=12)))
def test_bytes_are_spelled_exactly(raw: bytes) -> None:
    spelling = guidance_module.Spelling(model().tokenizer, model().vocab_size)
    assert b"".join(spelling.tokens[token] for token in spelling(raw)) == raw


@pytest.mark.parametrize("name", ["llama-spm", "qwen35", "phi-3", "gpt-2", "llama-bpe"])
def test_bytes_are_spelled_exactly_by_other_tokenizers(name: str) -> None:
    path = VOCABS / f"ggml-vocab-{name}.gguf"
    if not path.is_file():
        pytest.skip("needs the vocabularies in ../shared/vocabs")
    tokenizer = get_backend("mlx").open_tokenizer(path)
    spelling = guidance_module.Spelling(tokenizer, tokenizer.num_tokens)
    for raw in (b"hello world", b' {"a": 1}', b"\n\n", "é é".encode(), b"\xff\xfea", b"name", b"", b" "):
        assert b"".join(spelling.tokens[token] for token in spelling(raw)) == raw
    constraint = constrain(cast(LanguageModel, Vocabulary(tokenizer)), Grammar.regex("hello world"))
    assert constraint is not None
    output = np.zeros(0, np.int32)
    while not constraint.complete(output):
        output = np.append(output, np.int32(constraint.mask(output).nonzero()[0][0]))
    assert b"".join(tokenizer.token_bytes(int(token)) for token in output) == b"hello world"


# ---------------------------------------------------------------- the sampler


def brute_force(row: Logits, context: Context, params: SamplingParams, seed: int, allowed: TokenIds) -> int:
    """argmax over the allowed tokens of log p + noise, by the definition."""
    if params.temperature == 0.0:
        return int(allowed[row[allowed].argmax()])
    scaled = (row[allowed] - row[allowed].max()) / np.float32(params.temperature)
    noises = noise.gumbel(noise.key(seed, noise.Purpose.TOKEN, len(context)), allowed)
    return int(allowed[(scaled + noises).argmax()])


@pytest.mark.parametrize("few", [0, 4096, 10**6])
@pytest.mark.parametrize("temperature", [0.0, 0.8, 3.0])
def test_the_choice_is_the_best_of_the_allowed(few: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are allowed, and whether the row is cut down to them or not."""
    monkeypatch.setattr("localspec.sampling._FEW", few)
    rng = np.random.default_rng(4)
    constraint = follow(Grammar.json_schema(PERSON))
    output, _ = walk(constraint, rng)
    params = SamplingParams(temperature=temperature)
    for length in range(len(output)):
        context = Context([5, 6])
        context.extend(output[:length])
        row = rng.normal(size=model().vocab_size).astype(np.float32) * 4
        sampler = Sampler(params, 9, constraint)
        allowed = constraint.mask(output[:length]).nonzero()[0].astype(np.int32)
        expected = brute_force(row, context, params, 9, allowed)
        assert sampler.choose(row, context) == expected
        ids, chances = sampler.guesses(row, context, 16)
        assert ids[0] == expected
        finite = ids[np.isfinite(chances)]
        assert set(finite.tolist()) <= set(allowed.tolist())
        law = sampler.law(row, context)
        assert law.probs.sum() == pytest.approx(1.0)
        assert set(law.ids[law.probs > 0].tolist()) <= set(allowed.tolist())


@pytest.mark.parametrize(
    "settings_of",
    [
        {"top_k": 40},
        {"top_p": 0.9},
        {"min_p": 0.2},
        {"top_k": 5, "top_p": 0.5, "min_p": 0.1},
        {"repetition_penalty": 1.5, "presence_penalty": 0.3, "frequency_penalty": 0.2},
        {"logit_bias": {20: 50.0, 3: float("inf"), 65: float("-inf")}},
    ],
)
@pytest.mark.parametrize("few", [0, 4096])
def test_every_setting_works_inside_the_grammar(
    settings_of: dict[str, Any], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localspec.sampling._FEW", few)
    rng = np.random.default_rng(5)
    constraint = follow(Grammar.json_schema(PERSON))
    sampler = Sampler(SamplingParams(temperature=0.9, **settings_of), 3, constraint)
    context = Context([5, 6])
    while len(context) < 300:
        row = rng.normal(size=model().vocab_size).astype(np.float32) * 3
        token = sampler.choose(row, context)
        assert constraint.mask(context.output)[token]
        assert sampler.guesses(row, context, 4)[0][0] == token
        assert sampler.law(row, context).probability(token) > 0.0
        if token in model().tokenizer.stop_tokens:
            break
        context.append(token)
    assert is_valid(text_of(context.output), PERSON)


def test_banning_all_that_the_grammar_allows_is_an_error() -> None:
    constraint = follow(Grammar.regex("a"))
    allowed = constraint.mask(np.zeros(0, np.int32)).nonzero()[0].tolist()
    sampler = Sampler(SamplingParams(logit_bias=dict.fromkeys(allowed, -np.inf)), 0, constraint)
    row = np.zeros(model().vocab_size, np.float32)
    with pytest.raises(SettingError, match="nothing can be said here"):
        sampler.choose(row, Context([5]))
    assert len(sampler.guesses(row, Context([5]), 4)[0]) == 0
    assert len(sampler.law(row, Context([5])).ids) == 0


# ---------------------------------------------------------------- drafters


def request(grammar: Grammar | None, said: str = "", most: int = 16) -> DraftRequest:
    context = Context([5, 6])
    context.extend(model().tokenizer.encode(said, special=False))
    sampler = Sampler(SamplingParams(), 0, None if grammar is None else follow(grammar))
    stops = model().tokenizer.stop_tokens
    return DraftRequest(context=context, max_nodes=most, max_depth=most, sampler=sampler, stop_tokens=stops, trees=True)


def proposal_of(texts: list[str], parents: list[int]) -> Proposal:
    ids = [int(model().tokenizer.encode(text, special=False)[0]) for text in texts]
    nodes = np.array(parents, np.int32)
    chances = tuple(-0.1 * place for place in range(len(ids)))
    return Proposal("x", (HostTokens(np.array(ids, np.int32)),), nodes, log_q=chances, sources=tuple(texts))


def test_guesses_against_the_grammar_are_cut_with_what_hangs_from_them() -> None:
    asked = request(Grammar.regex("[ab]c[de]"))
    made = proposal_of(["a", "x", "c", "c", "e", "q", "d"], [-1, -1, 0, 1, 2, 2, 3])
    mark = len(asked.context)
    kept = obey(made, asked)
    assert kept.sources == ("a", "c", "e")
    assert kept.parents.tolist() == [-1, 0, 1]
    assert kept.log_q == (0.0, -0.2, -0.4)
    assert kept.counts[CUT] == 4
    assert len(asked.context) == mark
    nothing = obey(proposal_of(["x"], [-1]), asked)
    assert nothing.num_nodes == 0 and nothing.because == "the grammar forbids what was guessed"
    assert obey(kept, asked) is kept
    assert obey(made, request(None)) is made


def test_drawn_guesses_are_not_taken_back() -> None:
    made = proposal_of(["x"], [-1])
    made = replace(made, laws=(Sampler(SamplingParams(), 0).law(np.zeros(9, np.float32), Context([1])),))
    assert obey(made, request(Grammar.regex("a"))) is made


def test_what_the_grammar_forces_is_guessed() -> None:
    grammar = Grammar.json_schema(
        {"type": "object", "properties": {"temperature": {"type": "integer"}}, "required": ["temperature"]}
    )
    drafter = Forced()
    made = drafter.propose(request(grammar, '{"te'))
    text = text_of(made.tokens[0].numpy())
    assert text and 'mperature"'.startswith(text)
    assert drafter.propose(request(grammar, '{"te', most=1)).num_nodes == 1
    assert drafter.propose(request(None, "te")).because == "there is no grammar"
    assert make_drafter("grammar", None).name == "grammar"


# ---------------------------------------------------------------- whole answers, random weights

REFERENCE_GRAMMARS = (
    Grammar.regex(r"[\x01-\x08]{4,9}\x02"),
    Grammar.lark('start: "\\x01" pair+\npair: "\\x02" "\\x03" /[\\x04-\\x0a]/'),
)

DRAFTERS = (
    "draft_model:num=4",
    "draft_model:num=12,shape=tree",
    "draft_model:num=12,shape=3-2-1",
    "draft_model:num=6,guess=greedy,min_prob=0.1",
    "ngram:min=1,max=2",
    "ngram:min=1,max=2,shape=tree",
    "grammar",
    "draft_model:num=5+ngram:min=1+grammar",
)


def answer(target: ReferenceModel, drafter: Drafter, params: SamplingParams, acceptance: str) -> Generation:
    with Session(target, drafter, acceptance=acceptance) as session:
        return session.generate([1, 2, 3], params)


@pytest.mark.parametrize("grammar", REFERENCE_GRAMMARS)
@pytest.mark.parametrize("temperature", [0.0, 0.8, 2.0])
@pytest.mark.parametrize("host_scores", [True, False])
def test_text_under_a_grammar_equals_plain_decoding(grammar: Grammar, temperature: float, host_scores: bool) -> None:
    target = ReferenceModel(16, host_scores=host_scores)
    draft = target.perturbed(0.3)
    for seed in range(3):
        params = SamplingParams(temperature=temperature, seed=seed, max_tokens=24, grammar=grammar)
        plain = answer(target, make_drafter("nothing", None), params, "walk")
        for spec in DRAFTERS:
            assert answer(target, make_drafter(spec, draft), params, "walk").tokens == plain.tokens
            if temperature == 0.0:
                assert answer(target, make_drafter(spec, draft), params, "rejection").tokens == plain.tokens
        assert plain.complete or plain.finish_reason == "length"


class Chosen:
    """Guesses two tokens that it chose, not drew: one against the grammar, one in it."""

    name = "chosen"
    needs_trees = False

    def attach(self, state: SequenceState) -> None: ...

    def begin(self, context: Context) -> None: ...

    def propose(self, request: DraftRequest) -> Proposal:
        """A wrong sibling before the right one."""
        ids = np.array([9, 2], np.int32)[: request.max_nodes]
        return Proposal(self.name, (HostTokens(ids),), np.full(len(ids), -1, np.int32))

    def observe(self, outcome: Outcome) -> None: ...

    def save(self) -> tuple[SavedDraft, ...]:
        return ()

    def restore(self, saved: Sequence[SavedDraft]) -> None: ...

    def close(self) -> None: ...


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chain", "tree", "chosen"])
def test_rejection_keeps_to_the_law_inside_the_grammar(kind: str) -> None:
    """Chi-square over the nine answers of two tokens; a false alarm once in 10,000 runs for each kind."""
    target = ReferenceModel(16)
    draft = target.perturbed(0.5)
    grammar = Grammar.regex(r"[\x01\x02\x05][\x01\x02\x05]")
    params = SamplingParams(temperature=1.5, grammar=grammar)
    counts: dict[tuple[int, ...], int] = {}
    trials = 1500
    with Session(target, make_drafter("nothing", None), acceptance="rejection") as session:
        made_by: dict[str, Drafter] = {
            "chain": DraftModel(draft, num=2),
            "tree": DraftModel(draft, num=5, shape="tree"),
            "chosen": Chosen(),
        }
        session.use(made_by[kind])
        for seed in range(trials):
            made = session.generate([1, 2, 3], replace(params, seed=seed)).tokens[:2]
            counts[made] = counts.get(made, 0) + 1
    expected = {
        (first, second): probability(target, params, [], first) * probability(target, params, [first], second)
        for first in (1, 2, 5)
        for second in (1, 2, 5)
    }
    assert counts.keys() <= expected.keys()
    observed = [counts.get(pair, 0) for pair in expected]
    assert chisquare(observed, [trials * p for p in expected.values()]).pvalue > 1e-4


def probability(target: ReferenceModel, params: SamplingParams, said: list[int], token: int) -> float:
    """Of a token behind the prompt and what was said, by the model and the grammar."""
    state = target.open()
    ids = np.array([1, 2, 3, *said], np.int32)
    [scores] = target.forward([Step(state, (HostTokens(ids),), chain_parents(state, len(ids)))])
    row = scores.rows([len(ids) - 1])[0]
    state.close()
    context = Context([1, 2, 3])
    context.extend(said)
    return Sampler(params, 0, constrain(target, params.grammar)).law(row, context).probability(token)


def test_an_answer_that_was_cut_off_says_so() -> None:
    target = ReferenceModel(16)
    grammar = Grammar.regex(r"[\x01-\x08]{6}")
    whole = answer(target, make_drafter("nothing", None), SamplingParams(grammar=grammar, max_tokens=20), "walk")
    assert whole.complete is True and whole.finish_reason == "stop" and not whole.note
    exact = answer(target, make_drafter("nothing", None), SamplingParams(grammar=grammar, max_tokens=6), "walk")
    assert exact.complete is True and exact.finish_reason == "length"
    cut = answer(target, make_drafter("nothing", None), SamplingParams(grammar=grammar, max_tokens=4), "walk")
    assert cut.complete is False and "cut off" in cut.note
    assert cut.as_dict()["complete"] is False
    free = answer(target, make_drafter("nothing", None), SamplingParams(max_tokens=4), "walk")
    assert free.complete is None


def test_a_stop_string_may_leave_an_answer_whole_or_not() -> None:
    target = ReferenceModel(16)
    grammar = Grammar.regex(r"[\x01-\x08]{4,20}")
    free = answer(target, make_drafter("nothing", None), SamplingParams(grammar=grammar, max_tokens=20), "walk")
    for place in range(1, len(free.text)):
        stop = free.text[place : place + 2]
        params = SamplingParams(grammar=grammar, max_tokens=20, stop=(stop,))
        cut = answer(target, make_drafter("nothing", None), params, "walk")
        if cut.stop_string is not None:
            assert cut.complete == (len(cut.text) >= 4)


def test_a_draft_model_with_fewer_rows_guesses_inside_the_grammar() -> None:
    target, draft = ReferenceModel(24), ReferenceModel(16)
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=12, grammar=REFERENCE_GRAMMARS[0])
    plain = answer(target, make_drafter("nothing", None), params, "walk")
    for acceptance in ("walk", "rejection"):
        made = answer(target, make_drafter("draft_model:num=4", draft), params, acceptance)
        assert made.stats.num_drafted
        assert acceptance == "rejection" or made.tokens == plain.tokens


def test_a_full_context_is_a_cut_off_answer_too() -> None:
    target = ReferenceModel(16, context_length=10)
    made = answer(target, DraftModel(target), SamplingParams(grammar=Grammar.regex(r"[\x01-\x08]{20}")), "walk")
    assert made.finish_reason == "context" and made.complete is False


def test_json_dumps_of_a_schema_is_what_is_kept() -> None:
    assert json.loads(Grammar.json_schema(PERSON).source) == PERSON
    assert Grammar.json_schema(json.dumps(PERSON)) == Grammar.json_schema(PERSON)


@pytest.mark.parametrize("settings_of", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("few", [0, 4096])
def test_a_decision_inside_a_grammar_holds_for_all_rows_within_the_tolerance(
    settings_of: dict[str, Any], temperature: float, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localspec.sampling._FEW", few)
    rng = np.random.default_rng(6)
    constraint = follow(Grammar.json_schema(PERSON))
    output, _ = walk(constraint, rng)
    sampler = Sampler(SamplingParams(temperature=temperature, **settings_of), 9, constraint)
    num_clear = 0
    for length in range(len(output)):
        context = Context([5, 6])
        context.extend(output[:length])
        row = rng.normal(size=model().vocab_size).astype(np.float32) * 4
        token, is_clear = sampler.decide(row, context, Tolerance(0.2, 0.1))
        assert token == sampler.choose(row, context)
        num_clear += is_clear
        for _ in range(5 if is_clear else 0):
            other = row + rng.uniform(-0.1, 0.1, len(row)).astype(np.float32)
            assert sampler.choose(other, context) == token
    assert num_clear
