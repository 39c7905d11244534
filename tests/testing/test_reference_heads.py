"""The reference heads pass the suite of heads, and the suite finds planted faults."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from localspec.protocols import DraftHead, Tokens
from localspec.testing.heads import HeadConformance
from localspec.testing.reference import Cell, ReferenceModel
from localspec.testing.reference_head import ReferenceBlockHead, ReferenceHead, ReferenceHeadState
from localspec.types import Probabilities

_TARGET = ReferenceModel(40, seed=3, context_length=200)


class TestReferenceHead(HeadConformance):
    _head = ReferenceHead(_TARGET)

    def target(self) -> ReferenceModel:
        return _TARGET

    def head(self) -> DraftHead:
        return self._head


class TestReferenceBlockHead(TestReferenceHead):
    _head = ReferenceBlockHead(_TARGET)


class _FeedsAll(ReferenceHeadState):
    """Also what was dropped is remembered."""

    def truncate(self, length: int) -> None:
        memory = list(self._memory)
        super().truncate(length)
        self._memory = [*self._memory[:-1], *memory[-1:]] if self._memory else []


class _FeedsTwice(ReferenceHeadState):
    def feed(self, cells: Sequence[Cell]) -> None:
        super().feed(cells)
        if self._memory:
            self._memory[-1] = self._memory[-1] + (0.1 if len(cells) > 3 else 0.0)


class _KeepsGuesses(ReferenceHeadState):
    def extend(self, tokens: Tokens, parents: Sequence[int]) -> object:  # type: ignore[override]
        scores = super().extend(tokens, parents)
        if self._memory:
            self._memory[-1] = self._memory[-1] * 1.01
        return scores


class _SaysNothing(ReferenceHeadState):
    def confidence(self) -> Probabilities | None:
        return np.full(1, 1.5)


@pytest.mark.parametrize(
    ("fault", "test"),
    [
        (_FeedsAll, "test_what_is_dropped_leaves_no_trace"),
        (_FeedsTwice, "test_prefill_in_chunks_is_prefill"),
        (_KeepsGuesses, "test_start_forgets_earlier_guesses"),
        (_SaysNothing, "test_confidence_is_a_chance_per_row"),
    ],
)
def test_the_suite_finds_planted_faults(
    fault: type[ReferenceHeadState], test: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localspec.testing.reference_head.ReferenceHeadState", fault)
    with pytest.raises(AssertionError):
        getattr(TestReferenceHead(), test)()
