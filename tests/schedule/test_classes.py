"""Width classes are found where they are planted, and a claim that does not hold is cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from localspec.host_scores import HostScores
from localspec.protocols import LoadSettings, Scores, Step, WidthClass
from localspec.schedule import classes
from localspec.schedule.classes import Classes, class_to_use, is_inside, worth_a_deeper_look
from localspec.testing.reference import ReferenceModel

WIDTHS = (1, 2, 3, 4, 8, 16)


class Rounding(ReferenceModel):
    """Rows change with the width of their pass and their place in it, as kernels do: error(width, place) is added to
    the logit of token 3."""

    def __init__(self, error: Callable[[int, int], float], context_length: int = 128) -> None:
        super().__init__(64, context_length=context_length)
        self.error = error

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        [step] = steps
        [scores] = super().forward(steps)
        rows = scores.rows(range(scores.num_rows)).copy()
        for place, row in enumerate(rows):
            row[3] += self.error(step.num_tokens, place)
        return [HostScores(rows, self.generation)]


def ticking(seconds: float) -> Callable[[], float]:
    """A clock that moves with every look at it."""
    ticks = itertools.count()
    return lambda: seconds * next(ticks)


def found(error: Callable[[int, int], float]) -> Classes:
    return classes.find(Rounding(error), WIDTHS, contexts=(5,), seconds=60.0, clock=ticking(1.0))


def test_equal_rows_are_one_group() -> None:
    result = found(lambda width, place: 0.0)
    assert result.groups == (WIDTHS,) and result.largest == 0.0
    assert result.between(8, 16).num_rows >= 8 and set(result.contexts) == {5}


def test_without_time_the_most_telling_widths_are_compared() -> None:
    result = classes.find(Rounding(lambda width, place: float(width == 1)), WIDTHS, contexts=(5,), seconds=0.0)
    assert result.groups == ((1,), (2, 4, 8))


def test_a_first_width_that_differs_is_found_with_how_much_and_how_often() -> None:
    result = found(lambda width, place: 100.0 if width == 1 else 0.0)
    assert result.groups == ((1,), (2, 3, 4, 8, 16))
    assert result.largest == pytest.approx(100.0)
    one = result.against(WidthClass(2))[1]
    assert one.other_best == 1.0, "a hundred on one token makes it the best everywhere"
    small = found(lambda width, place: 1e-4 if width == 1 else 0.0).against(WidthClass(2))[1]
    assert small.num_unequal == small.num_rows and small.num_other_best == 0


def test_a_difference_at_one_place_of_a_pass_is_found() -> None:
    result = found(lambda width, place: 1e-5 if (width, place) == (8, 6) else 0.0)
    assert result.groups == ((1, 2, 3, 4, 16), (8,))


def test_a_difference_that_comes_through_the_cache_is_found() -> None:
    """What a pass of width 4 leaves in the cache is off; its own rows are not."""

    class Leaving(ReferenceModel):
        def forward(self, steps: Sequence[Step]) -> list[Scores]:
            before = [len(step.state.pending) for step in steps]  # type: ignore[attr-defined]
            scores = super().forward(steps)
            for step, start in zip(steps, before, strict=True):
                for cell in step.state.pending[start:] if step.num_tokens == 4 else ():  # type: ignore[attr-defined]
                    cell.values[:] *= 1.0 + 1e-6
            return scores

    result = classes.find(Leaving(64, context_length=128), WIDTHS, contexts=(5,), seconds=60.0, clock=ticking(1.0))
    assert result.groups == ((1, 2, 3, 8, 16), (4,))


def test_trials_go_on_while_there_is_time_and_join_their_evidence() -> None:
    model = Rounding(lambda width, place: 0.0)
    result = classes.find(model, (1, 2), contexts=(5, 20), seconds=200.0, clock=ticking(1.0))
    assert len(result.contexts) >= 2 and set(result.contexts) == {5, 20}
    assert result.between(1, 2).num_rows >= 2 * 2
    assert model.num_open == 0


def test_the_result_can_be_stored() -> None:
    result = found(lambda width, place: float(width > 3))
    assert Classes.from_dict(result.as_dict()) == result


# ---------------------------------------------------------------- the class to use


def test_a_claim_that_holds_stays_as_it_is() -> None:
    claimed = WidthClass(2, None, "read in the source")
    result = found(lambda width, place: float(width == 1))
    assert class_to_use(claimed, result) == (claimed, "")


def test_a_claim_that_does_not_hold_is_cut_and_said() -> None:
    result = found(lambda width, place: float(width > 4))
    best, words = class_to_use(WidthClass(1, None, "a guess"), result)
    assert (best.min_width, best.max_width, best.measured) == (1, 4, True)
    assert "were said to give equal rows, but do not here" in words and "1, 2, 3, 4 | 8, 16" in words
    assert "widths 1, 2, 3, 4 gave identical rows" in best.evidence


def test_the_last_run_keeps_the_open_end_of_a_measured_claim_only() -> None:
    result = found(lambda width, place: float(width < 3))
    assert class_to_use(WidthClass(1), result)[0].max_width is None
    assert class_to_use(WidthClass(1, measured=False), result)[0].max_width == 16


def test_an_unmeasured_claim_becomes_a_measured_one_without_complaint() -> None:
    result = found(lambda width, place: 0.0)
    best, words = class_to_use(WidthClass(1, None, "nobody looked", measured=False), result)
    assert (best.min_width, best.max_width, best.measured, words) == (1, 16, True, "")


def test_among_runs_the_most_valuable_one_is_taken() -> None:
    result = found(lambda width, place: float(width > 4))
    best, _ = class_to_use(WidthClass(1), result, lambda one: float(is_inside(16, one)))
    assert (best.min_width, best.max_width) == (8, None)


def test_neighbours_of_another_group_are_not_bridged() -> None:
    result = found(lambda width, place: float(width == 3))
    assert result.groups == ((1, 2, 4, 8, 16), (3,))
    best, _ = class_to_use(WidthClass(1), result)
    assert (best.min_width, best.max_width) == (4, None)


def deep(
    error: Callable[[int, int, int], float],
    contexts: Sequence[int] = (300, 600),
    seconds: float = 600.0,
    rows: int | None = None,
) -> Classes:
    """Found with an error that depends on the context as well: error(width, place, context)."""

    class Deep(Rounding):
        def forward(self, steps: Sequence[Step]) -> list[Scores]:
            context = steps[0].state.length
            self.error = lambda width, place: error(width, place, context)
            return super().forward(steps)

    model = Deep(lambda width, place: 0.0, context_length=700)
    return classes.find(model, (1, 2, 4), contexts=contexts, seconds=seconds, rows=rows, clock=ticking(1.0))


@pytest.mark.slow
def test_width_one_joins_a_class_where_it_was_found_equal_deep_into_the_context() -> None:
    claimed = WidthClass(2, None, "read in the source")
    best, words = class_to_use(claimed, deep(lambda width, place, context: 0.0))
    assert (best.min_width, best.max_width, best.measured, words) == (1, None, True, "")
    assert "contexts of 300 to 600" in best.evidence
    shallow = deep(lambda width, place, context: 0.0, (20, 300))
    assert class_to_use(claimed, shallow) == (claimed, "")
    late = deep(lambda width, place, context: float(width == 1 and context > 500))
    assert class_to_use(claimed, late) == (claimed, "")


@pytest.mark.slow
def test_width_one_alone_is_the_class_where_wider_passes_cost_more_than_they_bring() -> None:
    claimed = WidthClass(2, None, "read in the source")
    result = deep(lambda width, place, context: float(width == 1))
    narrow, words = class_to_use(claimed, result, lambda one: float(one.max_width == 1))
    assert (narrow.min_width, narrow.max_width, words) == (1, 1, "") and "cost more" in narrow.evidence
    assert class_to_use(claimed, result, lambda one: float(one.max_width is None)) == (claimed, "")


@pytest.mark.slow
def test_a_deeper_look_is_taken_only_where_it_decides() -> None:
    claimed = WidthClass(2, None, "read in the source")
    shallow = deep(lambda width, place, context: 0.0, (20, 300))
    assert worth_a_deeper_look(claimed, shallow) == ((1, 2, 4), 11)
    assert worth_a_deeper_look(WidthClass(1), shallow) == ((), 0)
    assert worth_a_deeper_look(replace(claimed, measured=False), shallow) == ((), 0)
    assert worth_a_deeper_look(claimed, deep(lambda width, place, context: 0.0)) == ((), 0)
    assert worth_a_deeper_look(claimed, deep(lambda width, place, context: float(width == 1), (20,))) == ((), 0)
    both = shallow.plus(deep(lambda width, place, context: 0.0, (600,)))
    assert class_to_use(claimed, both)[0].min_width == 1 and set(both.contexts) == {20, 300, 600}
    other = shallow.plus(deep(lambda width, place, context: float(width == 1), (600,)))
    assert other.groups == ((1,), (2, 4)) and class_to_use(claimed, other) == (claimed, "")
    wide = classes.find(Rounding(lambda width, place: 0.0), WIDTHS, contexts=(5,), seconds=60.0, clock=ticking(1.0))
    assert wide.plus(other).groups == ((1,), (2, 3, 4, 8, 16)), "old bug: widths tested once went with width 1"
    assert other.between(2, 4).num_rows > shallow.between(2, 4).num_rows


def test_a_machine_that_was_slow_to_look_looks_at_as_many_rows_as_decide() -> None:
    """Old bug: 12 rows, and 4 more deep in the context, were too few to let width 1 join, so it stayed alone and
    nothing was ever guessed."""
    claimed, cheap = WidthClass(2, None, "read in the source"), lambda one: float(one.max_width == 1)
    short = deep(lambda width, place, context: 0.0, (20,), seconds=0.0)
    assert class_to_use(claimed, short, cheap)[0].max_width == 1
    widths, rows = worth_a_deeper_look(claimed, short)
    assert (widths, rows) == ((1, 2, 4), 31)
    both = short.plus(deep(lambda width, place, context: 0.0, (600,), seconds=0.0, rows=rows))
    best, _ = class_to_use(claimed, both, cheap)
    assert (best.min_width, best.max_width, best.plain_only) == (1, None, False)


@pytest.mark.real
def test_the_bundled_target_keeps_what_its_backend_says(tiny_pair: object) -> None:
    from localspec.loading import BUNDLED, bundled_path, load_model

    model = load_model(bundled_path(BUNDLED, "target"), "llamacpp", LoadSettings(context=256, threads=1))
    try:
        result = classes.find(model, (1, 2, 3, 4, 8), contexts=(20,), seconds=0.0)
        claimed = model.capabilities.width_class
        assert class_to_use(claimed, result) == (claimed, "")
        assert (2, 4, 8) in result.groups or (1, 2, 4, 8) in result.groups
    finally:
        model.close()
