"""Guarded decoding on a model whose rows and cache change with the width of a pass, as a GPU's do: text equals plain
decoding where without guarding it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from localspec.context import Context
from localspec.drafters import DraftModel, Ngram, Nothing
from localspec.engine.round import Lane, Room, RoundResult, run_round
from localspec.engine.session import Generation, Session
from localspec.errors import SettingError, UnsupportedModelError
from localspec.exactness import Bound, Exactness
from localspec.loading import Pair
from localspec.protocols import Drafter, HostTokens, Rewind, Scores, Step, WidthClass, chain_parents
from localspec.sampling import HostScores, Sampler, SamplingParams, Tolerance
from localspec.schedule import bound as measuring
from localspec.terminal import summary
from localspec.testing.reference import ReferenceModel
from localspec.verify import Walk, make_acceptance

VOCABULARY = 60
SHARPNESS = 4.0
PROMPTS = [[(7 * number + 3 * place) % 50 + 1 for place in range(6)] for number in range(8)]
SETTINGS = {
    "greedy": SamplingParams(),
    "plain temperature": SamplingParams(temperature=0.8),
    "truncated": SamplingParams(temperature=1.0, top_k=12, top_p=0.9, min_p=0.02),
    "penalties": SamplingParams(temperature=0.7, repetition_penalty=1.2, presence_penalty=0.3),
    "greedy with penalties": SamplingParams(repetition_penalty=1.3, logit_bias={4: 1.0}),
}


class Rounding(ReferenceModel):
    """Rows, and what a pass leaves in the cache, are rounded by a grid that depends on the width of the pass."""

    grid = 0.05

    def __init__(self, *, host_scores: bool = True) -> None:
        super().__init__(VOCABULARY, seed=2, sharpness=SHARPNESS, host_scores=host_scores, context_length=256)
        self.capabilities = replace(self.capabilities, width_class=WidthClass(1, None, "none", measured=False))
        self.widths: list[int] = []

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        before = [step.state.num_pending for step in steps]
        found: list[Scores] = []
        for step, start, scores in zip(steps, before, super().forward(steps), strict=True):
            width = step.num_tokens
            self.widths.append(width)
            shift = np.random.default_rng(width).uniform(0.0, self.grid, self.vocab_size)
            rows = np.array(scores.rows(range(scores.num_rows)))
            rows = (np.round((rows + shift) / self.grid) * self.grid - shift).astype(np.float32)
            found.append(HostScores(rows, self.generation))
            for cell in step.state.pending[start:]:  # type: ignore[attr-defined]
                cell.values[:] *= 1.0 + 1.5e-3 * np.sin(width)
        return found


@pytest.fixture(scope="module")
def bound() -> Bound:
    return measuring.measure(Rounding(), seconds=2.0, contexts=(6, 20))


def drafters(target: ReferenceModel) -> dict[str, Drafter]:
    helper = ReferenceModel(VOCABULARY, seed=2, sharpness=SHARPNESS, context_length=256).perturbed(0.3)
    return {
        "chain": DraftModel(helper, num=4),
        "tree": DraftModel(helper, num=8, shape="tree"),
        "lookup": Ngram(min=1),
    }


def answers(target: ReferenceModel, exactness: Exactness, params: SamplingParams) -> dict[str, list[Generation]]:
    """By drafter, of all prompts; a session each."""
    found = {}
    for name, drafter in {"plain": Nothing(), **drafters(target)}.items():
        with Session(target, drafter, exactness=exactness) as session:
            found[name] = [
                session.generate(prompt, replace(params, seed=number, max_tokens=40, ignore_eos=True))
                for number, prompt in enumerate(PROMPTS)
            ]
    return found


def num_unequal(found: dict[str, list[Generation]]) -> int:
    return sum(
        one.tokens != want.tokens
        for name in ("chain", "tree", "lookup")
        for one, want in zip(found[name], found["plain"], strict=True)
    )


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("host_scores", [True, False])
def test_text_equals_plain_decoding_where_rows_change_with_the_width(
    name: str, host_scores: bool, bound: Bound
) -> None:
    target = Rounding(host_scores=host_scores)
    guarded = answers(target, Exactness.guarded(bound), SETTINGS[name])
    assert num_unequal(guarded) == 0
    for group in guarded.values():
        stats = [one.stats for one in group]
        assert 0 < sum(s.num_rechecked for s in stats) < 0.5 * sum(s.num_tokens for s in stats)
    assert sum(one.stats.num_accepted for one in guarded["chain"]) > 100, "nothing was speculated"
    assert sum(one.stats.num_changed for group in guarded.values() for one in group) > 0, "the plant is too weak"


@pytest.mark.parametrize("name", SETTINGS)
def test_without_guarding_or_with_a_bound_of_zero_it_does_not(name: str, bound: Bound) -> None:
    nothing = replace(bound, tolerance=Tolerance(0.0, 0.0))
    assert num_unequal(answers(Rounding(), Exactness.off(), SETTINGS[name])) > 0
    assert num_unequal(answers(Rounding(), Exactness.guarded(nothing), SETTINGS[name])) > 0
