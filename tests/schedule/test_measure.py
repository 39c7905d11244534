"""Measured costs: right on a machine whose clock is ours, robust against its noise, bounded in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from localspec.protocols import Capabilities, Scores, Step, WidthClass
from localspec.schedule import measure
from localspec.schedule.cost import Costs
from localspec.testing.reference import Array, Cell, ReferenceModel

STEPS = {1: 5.0, 2: 8.0, 3: 8.0, 4: 6.0, 8: 12.0, 16: 20.0, 32: 41.0, 64: 90.0}


def staircase(width: int, context: int) -> float:
    """Milliseconds; falls from 3 to 4, as some processors do."""
    return STEPS[max(step for step in STEPS if step <= width)] * (1.0 + context / 1000.0)


class Clockwork(ReferenceModel):
    """A model whose passes move a clock by known times. Its rows are all alike and cost nothing."""

    def __init__(
        self,
        pass_ms: Callable[[int, int], float] = staircase,
        context_length: int = 4096,
        known: Capabilities | None = None,
    ) -> None:
        super().__init__(64, context_length=context_length, width_class=WidthClass(2))
        self.pass_ms, self.now, self.widths = pass_ms, 0.0, list[int]()
        self.capabilities = known or self.capabilities

    def clock(self) -> float:
        return self.now / 1e3

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        [step] = steps
        self.widths.append(step.num_tokens)
        self.now += self.pass_ms(step.num_tokens, step.state.length)
        return super().forward(steps)

    def compute(self, token: int, position: int, cells: list[Cell]) -> tuple[Array, Cell]:
        nothing = np.zeros((2, 2, 16))
        return self.embedding[token], Cell(token, nothing, nothing)


def measured(model: Clockwork, seconds: float = 60.0, **settings: Sequence[int]) -> Costs:
    return measure.costs(model, seconds=seconds, clock=model.clock, **settings)  # type: ignore[arg-type]


def test_a_known_staircase_is_found_exactly() -> None:
    curve = measured(Clockwork(), contexts=(64, 512)).target
    assert curve.widths == measure.WIDTHS and curve.contexts == (64, 512)
    assert curve.ms == pytest.approx(np.array([[staircase(w, c) for w in curve.widths] for c in curve.contexts]))
