"""Recursive rejection on trees follows the target's law, and the test has the power to see if it did not.

The target is a Markov chain (a row depends on the last token only), so one long answer is many thousand
independent draws from six known laws. Chi-square over all transitions at level ALARM: with fixed seeds a
passing run stays passing; over fresh seeds each test would raise a false alarm once in 1 / ALARM runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from localspec.context import Context
from localspec.drafters import DraftModel, guesser
from localspec.engine.session import Session
from localspec.host_scores import HostScores
from localspec.protocols import (
    Capabilities,
    Drafter,
    DraftRequest,
    ModelInfo,
    Rewind,
    SavedState,
    Scores,
    Step,
    WidthClass,
)
from localspec.sampling import Law, Sampler, SamplingParams
from localspec.testing.reference import ByteTokenizer
from localspec.types import Logits
from localspec.verify import rejection

VOCABULARY = 6
NUM_TOKENS = 12_000
ALARM = 1e-3


class MarkovState:
    """Counts; a row needs no memory."""

    num_replayed = 0

    def __init__(self) -> None:
        self.length = 0
        self.num_pending = 0

    def keep(self, path: Sequence[int]) -> None:
        self.length, self.num_pending = self.length + len(path), 0

    def truncate(self, length: int) -> None:
        self.length, self.num_pending = length, 0

    def wait(self) -> None:
        pass

    def fork(self) -> MarkovState:
        raise NotImplementedError

    def save(self) -> SavedState:
        raise NotImplementedError

    def close(self) -> None:
        pass


class MarkovModel:
    """A `LanguageModel` whose next row depends on the last token only: logits [V, V]."""

    def __init__(self, logits: Logits) -> None:
        self.table = logits
        self.vocab_size = len(logits)
        self.tokenizer = ByteTokenizer(self.vocab_size)
        self.info = ModelInfo("markov", Path("markov"), "markov", "F32", 0, 1 << 20, 1 << 20, "numpy", "markov")
        self.capabilities = Capabilities(Rewind.FREE, True, 4096, 64, WidthClass(1), True)

    def open(self) -> MarkovState:
        return MarkovState()

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        scores: list[Scores] = []
        for step in steps:
            ids = np.concatenate([segment.numpy() for segment in step.tokens])
            assert isinstance(step.state, MarkovState)
            step.state.num_pending += len(ids)
            scores.append(HostScores(self.table[ids if step.rows is None else ids[list(step.rows)]]))
        return scores

    def close(self) -> None:
        pass


def logits(seed: int, spread: float = 1.2) -> Logits:
    return (spread * np.random.default_rng(seed).standard_normal((VOCABULARY, VOCABULARY))).astype(np.float32)


TARGET = MarkovModel(logits(0))
DRAFT = MarkovModel(logits(0) + logits(1, 1.5))  # a bad drafter: many siblings are tried


def laws(params: SamplingParams) -> NDArray[np.float64]:
    """[V, V] the target's law behind each token."""
    table = np.zeros((VOCABULARY, VOCABULARY))
    for token in range(VOCABULARY):
        law = Sampler(params, 0).law(TARGET.table[token], Context([token]))
        table[token, law.ids] = law.probs
    return table


def transitions(make: Callable[[], Drafter], params: SamplingParams, seed: int = 0) -> NDArray[np.int64]:
    """[V, V] how often each token followed each, in one long answer."""
    settings = SamplingParams(
        temperature=params.temperature, top_k=params.top_k, seed=seed, max_tokens=NUM_TOKENS, ignore_eos=True
    )
    with Session(TARGET, make(), acceptance="rejection") as session:
        tokens = np.array([0, *session.generate([0], settings).tokens])
    counts = np.zeros((VOCABULARY, VOCABULARY), np.int64)
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    return counts


def p_value(make: Callable[[], Drafter], params: SamplingParams) -> float:
    counts, law = transitions(make, params), laws(params)
    assert not counts[law == 0.0].any(), "a token the target cannot say"
    expected = law * counts.sum(axis=1, keepdims=True)
    possible = law > 0.0
    statistic = float((((counts - expected) ** 2)[possible] / expected[possible]).sum())
    return float(stats.chi2.sf(statistic, possible.sum() - VOCABULARY))


def tree() -> Drafter:
    return DraftModel(DRAFT, num=8, shape="tree")


def bush() -> Drafter:
    return DraftModel(DRAFT, shape="3-2-1")


def cautious() -> Drafter:
    """Does not go on below unlikely draws."""
    return DraftModel(DRAFT, num=8, shape="tree", min_prob=0.3)


FREE, TRUNCATED = SamplingParams(temperature=1.0), SamplingParams(temperature=0.8, top_k=3)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "params"), [(tree, FREE), (bush, FREE), (cautious, FREE), (tree, TRUNCATED)])
def test_transitions_follow_the_targets_law(make: Callable[[], Drafter], params: SamplingParams) -> None:
    """TRUNCATED leaves fewer candidates than some nodes have places for children."""
    assert p_value(make, params) > ALARM


def test_the_power_is_stated() -> None:
    """If 10% of the tokens came from the drafter's law instead, the test would notice in 99 of 100 runs."""
    p, leak = laws(FREE), 0.1
    q = np.exp(DRAFT.table - DRAFT.table.max(axis=1, keepdims=True))
    q /= q.sum(axis=1, keepdims=True)
    wrong = (1 - leak) * p + leak * q
    stationary = np.linalg.matrix_power(p, 200)[0]
    shift = NUM_TOKENS * float((stationary[:, None] * (wrong - p) ** 2 / p).sum())
    freedom = VOCABULARY * (VOCABULARY - 1)
    assert stats.ncx2.sf(stats.chi2.isf(ALARM, freedom), freedom, shift) > 0.99


# ---------------------------------------------------------------- planted biases


def forget_the_residual(p: Law, q: Law) -> Law:
    """After a rejection, draw from the target's whole law."""
    return p


@pytest.mark.slow
def test_a_forgotten_residual_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection, "residual", forget_the_residual)
    assert p_value(bush, FREE) < ALARM


draws = guesser._draws


def stated_with_replacement(
    request: DraftRequest, row: Logits, path: Sequence[int], count: int
) -> list[tuple[int, Law]]:
    """Siblings are drawn without replacement, but the law stated for each is the first one's."""
    made = draws(request, row, path, count)
    return [(token, made[0][1]) for token, _ in made]


@pytest.mark.slow
def test_a_law_that_forgets_the_elder_siblings_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guesser, "_draws", stated_with_replacement)
    assert p_value(bush, FREE) < ALARM


def unlikely_ones_taken_back(
    request: DraftRequest, row: Logits, path: Sequence[int], count: int
) -> list[tuple[int, Law]]:
    """The form of the tree depends on what was drawn."""
    return [(token, law) for token, law in draws(request, row, path, count) if law.probability(token) > 0.25]


@pytest.mark.slow
def test_a_form_that_depends_on_the_draws_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guesser, "_draws", unlikely_ones_taken_back)
    assert p_value(bush, FREE) < ALARM
