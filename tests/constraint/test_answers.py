"""Drafters and whole answers inside a grammar, with models of random weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare

from localspec.constraint import Grammar, constrain, obey
from localspec.constraint.obey import CUT
from localspec.context import Context
from localspec.drafters import DraftModel, Forced, make_drafter
from localspec.engine.answer import Generation
from localspec.engine.session import Session
from localspec.protocols import (
    Drafter,
    DraftRequest,
    HostTokens,
    Outcome,
    Proposal,
    SavedDraft,
    SequenceState,
    Step,
    chain_parents,
)
from localspec.sampling import Sampler, SamplingParams
from localspec.testing.reference import ReferenceModel
from tests.constraint.following import PERSON, follow, model, text_of

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
