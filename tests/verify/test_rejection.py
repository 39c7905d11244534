"""Rejection is exact in distribution, and the test that says so would notice if it were not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from localspec.context import Context
from localspec.drafters import DraftModel, Ngram
from localspec.engine.session import Session
from localspec.host_scores import HostScores
from localspec.protocols import Drafter, HostTokens, Proposal, Step, chain_parents
from localspec.sampling import Law, Sampler, SamplingParams
from localspec.testing.reference import ReferenceModel
from localspec.types import Logits
from localspec.verify import Rejection, Trial, Walk, make_acceptance, rejection

VOCABULARY = 6
NUM_SEEDS = 4000
ALARM = 1e-3
"""Each test below is one chi-square test at this level. Seeds are fixed, so a passing run stays
passing; over fresh seeds each would raise a false alarm once in 1 / ALARM runs."""


def law_of_two_tokens(
    target: ReferenceModel, prompt: list[int], params: SamplingParams
) -> dict[tuple[int, int], float]:
    """P(first, second) by the target's own rows."""
    joint: dict[tuple[int, int], float] = {}
    context = Context(prompt)
    sampler = Sampler(params, 0)
    first = sampler.law(row_after(target, prompt), context)
    for a, p in zip(first.ids.tolist(), first.probs.tolist(), strict=True):
        context.append(a)
        second = sampler.law(row_after(target, [*prompt, a]), context)
        context.truncate(len(prompt))
        for b, q in zip(second.ids.tolist(), second.probs.tolist(), strict=True):
            joint[a, b] = p * q
    return joint


def row_after(target: ReferenceModel, tokens: list[int]) -> Logits:
    state = target.open()
    step = Step(state, (HostTokens(np.array(tokens, np.int32)),), chain_parents(state, len(tokens)), (len(tokens) - 1,))
    [scores] = target.forward([step])
    row: Logits = scores.rows((0,))[0].copy()
    state.close()
    return row


def p_value(target: ReferenceModel, make: Callable[[], Drafter], params: SamplingParams) -> float:
    """Chi-square of the first two tokens over many seeds against the target's law."""
    prompt = [1, 2, 3, 1, 2]
    law = law_of_two_tokens(target, prompt, params)
    seen: Counter[tuple[int, ...]] = Counter()
    with Session(target, make(), acceptance="rejection") as session:
        for seed in range(NUM_SEEDS):
            answer = session.generate(prompt, replace(params, seed=seed, max_tokens=2, ignore_eos=True))
            seen[answer.tokens] += 1
    assert set(seen) <= set(law), "a pair of tokens the target cannot say"
    pairs = [pair for pair in law if law[pair] * NUM_SEEDS >= 5]
    rest = 1.0 - sum(law[pair] for pair in pairs)
    observed = [seen[pair] for pair in pairs] + ([NUM_SEEDS - sum(seen[p] for p in pairs)] if rest > 1e-9 else [])
    expected = [law[pair] * NUM_SEEDS for pair in pairs] + ([rest * NUM_SEEDS] if rest > 1e-9 else [])
    return float(stats.chisquare(observed, np.array(expected) * sum(observed) / sum(expected)).pvalue)


def target() -> ReferenceModel:
    return ReferenceModel(VOCABULARY, seed=2, sharpness=1.5)


def draft_model() -> Drafter:
    return DraftModel(target().perturbed(0.8), num=2)


def cautious() -> Drafter:
    """Ends its chain at unlikely tokens, which must not change their law."""
    return DraftModel(target().perturbed(0.8), num=3, min_prob=0.3)


def lookup() -> Drafter:
    return Ngram(num=2, max=2, min=1)


@pytest.mark.slow
@pytest.mark.parametrize("make", [draft_model, cautious, lookup])
@pytest.mark.parametrize(
    "params",
    [SamplingParams(temperature=1.0), SamplingParams(temperature=0.8, top_k=4, top_p=0.95, presence_penalty=0.5)],
)
def test_two_tokens_follow_the_targets_law(make: Callable[[], Drafter], params: SamplingParams) -> None:
    assert p_value(target(), make, params) > ALARM


def always_accept(p: Law, q: Law) -> Law:
    """A planted bug: after a rejection draw from the target's whole law, not from what is left."""
    return p


@pytest.mark.slow
def test_a_planted_bug_fails_the_same_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forgotten residual is the classical mistake; the test must see it."""
    monkeypatch.setattr(rejection, "residual", always_accept)
    assert p_value(target(), draft_model, SamplingParams(temperature=1.0)) < ALARM


def trial(rows: Logits, tokens: list[int], laws: list[Law] | None, seed: int, parents: list[int]) -> Trial:
    proposal = Proposal(
        "test",
        (HostTokens(np.array(tokens, np.int32)),),
        np.array(parents, np.int32),
        None if laws is None else tuple(laws),
    )
    sampler = Sampler(SamplingParams(temperature=1.0), seed)
    return Trial(proposal, HostScores(rows), Context([0]), sampler, frozenset(), True)


def test_siblings_are_tried_against_what_the_one_before_left() -> None:
    """Two siblings drawn without replacement: the emitted token follows p (fixed seeds, p > 0.001)."""
    p, q = np.array([0.5, 0.2, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
    rows = np.log(np.tile(p, (3, 1))).astype(np.float32)
    counts = np.zeros(4)
    rng = np.random.default_rng(0)
    ids = np.arange(4, dtype=np.int32)
    for seed in range(8000):
        first = int(rng.choice(4, p=q))
        without = np.where(ids == first, 0.0, q)
        without /= without.sum()
        second = int(rng.choice(4, p=without))
        verdict = Rejection().accept(trial(rows, [first, second], [Law(ids, q), Law(ids, without)], seed, [-1, -1]))
        counts[verdict.tokens[0]] += 1
    assert stats.chisquare(counts, p * 8000).pvalue > 0.001


def test_a_guess_the_target_cannot_say_is_never_accepted() -> None:
    rows = np.array([[0.0, -np.inf, 0.0]] * 2, np.float32)
    for seed in range(50):
        assert Rejection().accept(trial(rows, [1], None, seed, [-1])).tokens[0] != 1


def test_the_residual_is_what_is_left() -> None:
    p = Law(np.array([4, 2, 9], np.int32), np.array([0.5, 0.3, 0.2]))
    q = Law(np.array([9, 4, 7], np.int32), np.array([0.1, 0.7, 0.2]))
    left = rejection.residual(p, q)
    assert left.ids.tolist() == [4, 2, 9]
    assert left.probs.tolist() == pytest.approx([0.0, 0.75, 0.25])
    assert rejection.residual(p, p) is p


def test_the_walk_leaves_the_context_as_it_was_even_if_it_fails() -> None:
    class Broken(HostScores):
        def rows(self, indices: object) -> Logits:
            raise RuntimeError("device lost")

    for rule in (Walk(), Rejection()):
        broken = trial(np.zeros((2, 3), np.float32), [1], None, 0, [-1])
        broken = Trial(
            broken.proposal, Broken(np.zeros((2, 3), np.float32)), broken.context, broken.sampler, frozenset(), True
        )
        with pytest.raises(RuntimeError, match="device lost"):
            rule.accept(broken)
        assert len(broken.context) == 1


def test_rules_are_found_by_name() -> None:
    assert make_acceptance("walk").needs_law is False
    assert make_acceptance("rejection").needs_law is True
    with pytest.raises(Exception, match="Did you mean 'rejection'"):
        make_acceptance("rejecton")
