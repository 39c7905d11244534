"""A draft model's state: what is fed, in which passes, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from localspec.context import Context
from localspec.drafters.draft_cache import DraftCache
from localspec.protocols import Rewind, Scores, Step
from localspec.testing.reference import ReferenceModel


def noted_widths(model: ReferenceModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the tokens of each pass."""
    widths: list[int] = []
    forward = model.forward

    def noting(given: Sequence[Step]) -> list[Scores]:
        widths.extend(step.num_tokens for step in given)
        return forward(given)

    monkeypatch.setattr(model, "forward", noting)
    return widths


@pytest.mark.parametrize("missed", [1, 2, 5, 7, 21, 45, 130])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_where_widths_are_dear_what_was_missed_is_read_in_few_of_them(
    missed: int, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are those of one pass, and nothing is read twice."""
    steps = (1, 16, 64)
    model, usual = ReferenceModel(48, seed=5), ReferenceModel(48, seed=5)
    model.capabilities = replace(model.capabilities, width_steps=steps)
    widths = noted_widths(model, monkeypatch)
    rows = []
    for one in (model, usual):
        cache, context = DraftCache(one), Context([3, 4, 5, 6])
        cache.begin(context)
        cache.start(num_rows)
        if one is model:
            widths.clear()
        context.extend([(7 * place) % 40 for place in range(missed)])
        rows.append(cache.start(num_rows).rows(range(num_rows)))
    assert np.array_equal(rows[0], rows[1])
    assert set(widths) <= {1, 2, 3, 64}
    assert len(widths) <= 1 + -(-(missed + num_rows) // 64)


def test_where_passes_are_reused_a_few_missed_tokens_are_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As guesses are, so that all passes are alike. The rows are those of one pass."""
    model, usual = ReferenceModel(48, seed=5), ReferenceModel(48, seed=5)
    model.capabilities = replace(model.capabilities, reuses_passes=True)
    widths = noted_widths(model, monkeypatch)
    rows = []
    for one in (model, usual):
        cache, context = DraftCache(one), Context([3, 4, 5, 6, 7, 8])
        cache.begin(context)
        found = [cache.start().rows((0,))]
        for missed in (1, 2, 3, 5):
            context.extend([(7 * place) % 40 for place in range(missed)])
            found.append(cache.start().rows((0,)))
        rows.append(found)
    assert np.array_equal(rows[0], rows[1])
    assert widths == [5, 1, *[1] * 2, *[1] * 3, 4, 9]  # what is fed is committed by nobody here, and fed again
    batched = replace(model.capabilities, batches=True)
    assert batched.reading(2) == (2, 2)  # others are in that pass, and wait for the narrower ones


def test_what_cannot_be_dropped_for_nothing_is_not_padded() -> None:
    known = replace(ReferenceModel(48).capabilities, width_steps=(1, 16, 64))
    assert [known.reading(count) for count in (2, 5, 64, 200)] == [(2, 2), (5, 64), (64, 64), (64, 64)]
    for rewind in (Rewind.REPLAY, Rewind.NEVER):
        assert replace(known, rewind=rewind).reading(5) == (5, 5)


def test_reading_what_was_missed_is_not_padded_beyond_the_context() -> None:
    model = ReferenceModel(48, seed=5, context_length=40)
    model.capabilities = replace(model.capabilities, width_steps=(1, 8, 64))
    usual = ReferenceModel(48, seed=5, context_length=40)
    rows = []
    for one in (model, usual):
        cache = DraftCache(one)
        cache.begin(Context([(7 * place) % 40 for place in range(35)]))
        rows.append(cache.start().rows((0,)))
    assert np.array_equal(rows[0], rows[1])
