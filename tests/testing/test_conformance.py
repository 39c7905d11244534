"""The reference passes the suite that defines a backend, and the suite catches planted faults."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from unittest import SkipTest

import numpy as np
import pytest

from localspec.protocols import LanguageModel, Scores, Step, WidthClass
from localspec.testing.conformance import BackendConformance
from localspec.testing.reference import Cell, ReferenceModel, ReferenceState
from localspec.tree.mask import check_path

REFERENCE = ReferenceModel(64, seed=1, context_length=256)
PADDED = ReferenceModel(64, seed=1, context_length=256, width_class=WidthClass(3))


class TestReference(BackendConformance):
    def model(self) -> LanguageModel:
        return REFERENCE


class TestReferenceWithPadding(BackendConformance):
    """The suite pads as the engine does; rows must not notice."""

    def model(self) -> LanguageModel:
        return PADDED


class WrongMask(ReferenceModel):
    """Nodes see their elder siblings too."""

    def visible(self, state: ReferenceState) -> list[Cell]:
        siblings = [
            cell for cell, parent in zip(state.pending, state.parents, strict=False) if parent == state.parents[-1]
        ]
        return super().visible(state) + siblings


class WrongPosition(ReferenceModel):
    """Nodes stand at their number, not at their depth."""

    def position(self, state: ReferenceState) -> int:
        return state.length + len(state.parents) - 1


class WrongNodeState(ReferenceState):
    """Commits the youngest sibling instead of the node that was named last."""

    def keep(self, path: Sequence[int]) -> None:
        self.check_open()
        check_path(np.array(self.parents, np.int32), list(path))
        nodes = list(path)
        if nodes:
            nodes[-1] = max(n for n, parent in enumerate(self.parents) if parent == self.parents[nodes[-1]])
        self.committed += [self.pending[node] for node in nodes]
        self.pending, self.parents = [], []


class WrongNode(ReferenceModel):
    def open(self) -> ReferenceState:
        self.num_open += 1
        return WrongNodeState(self)


class Leak(ReferenceModel):
    """The second sequence of a pass sees the first one's newest cell."""

    leaked: list[Cell]

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        self.leaked = []
        return super().forward(steps)

    def run(self, state: ReferenceState, step: Step) -> Scores:
        scores = super().run(state, step)
        self.leaked = state.pending[-1:]
        return scores

    def visible(self, state: ReferenceState) -> list[Cell]:
        return self.leaked + super().visible(state)


class StaleState(ReferenceState):
    """Forgets the numbers of dropped nodes but leaves the last of them in the cache."""

    def keep(self, path: Sequence[int]) -> None:
        leftovers = [cell for node, cell in enumerate(self.pending) if node not in path]
        super().keep(path)
        if leftovers and self.committed:
            self.committed[-1] = leftovers[-1]


class StalePendingNode(ReferenceModel):
    def open(self) -> ReferenceState:
        self.num_open += 1
        return StaleState(self)


def failures(model: ReferenceModel) -> list[str]:
    """Names of the suite's tests that fail on this model."""

    class Suite(BackendConformance):
        num_random_rounds = 10

        def model(self) -> LanguageModel:
            return model

    failed = []
    for name, test in inspect.getmembers(Suite(), inspect.ismethod):
        if name.startswith("test_"):
            model.num_open = 0
            try:
                test()
            except AssertionError:
                failed.append(name)
            except SkipTest:
                pass
    return failed


@pytest.mark.parametrize("fault", [WrongMask, WrongPosition, WrongNode, Leak, StalePendingNode])
def test_the_suite_fails_on_a_planted_fault(fault: type[ReferenceModel]) -> None:
    assert failures(fault(64, seed=1, context_length=256)), f"{fault.__name__} went unnoticed"


def test_the_suite_finds_nothing_wrong_with_the_reference() -> None:
    """So the failures above are the faults' doing."""
    assert failures(ReferenceModel(64, seed=1, context_length=256)) == []
