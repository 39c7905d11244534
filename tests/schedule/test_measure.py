"""Measured costs: right on a machine whose clock is ours, robust against its noise, bounded in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from localspec.engine.overhead import round_overhead
from localspec.errors import UnsupportedModelError
from localspec.protocols import Rewind, Scores, Step, WidthClass
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
        beside: Clockwork | None = None,
    ) -> None:
        super().__init__(64, context_length=context_length, width_class=WidthClass(2))
        self.pass_ms, self.widths, self.tokens = pass_ms, list[int](), set[int]()
        self.hands: list[float] = [0.0] if beside is None else beside.hands

    @property
    def now(self) -> float:
        return self.hands[0]

    def clock(self) -> float:
        return self.hands[0] / 1e3

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        [step] = steps
        self.widths.append(step.num_tokens)
        self.hands[0] += self.pass_ms(step.num_tokens, step.state.length)
        return super().forward(steps)

    def compute(self, token: int, position: int, cells: list[Cell]) -> tuple[Array, Cell]:
        nothing = np.zeros((1, 2, 2, 16))
        self.tokens.add(token)
        return self.embedding[token], Cell(token, nothing, nothing, nothing)


def measured(
    model: Clockwork, seconds: float = 60.0, contexts: Sequence[int] = (64,), draft: Clockwork | None = None
) -> Costs:
    return measure.costs(model, draft, seconds=seconds, contexts=contexts, clock=model.clock)


def expected(costs: Costs) -> Array:
    curve = costs.target
    return np.array([[staircase(width, context) for width in curve.widths] for context in curve.contexts])


# ---------------------------------------------------------------- right


def test_a_known_staircase_is_found_exactly_with_its_fall() -> None:
    costs = measured(Clockwork(), contexts=(64, 512))
    assert costs.target.widths == measure.WIDTHS and costs.target.contexts == (64, 512)
    assert np.array(costs.target.ms) == pytest.approx(expected(costs))
    assert costs.target.at(4, 64) < costs.target.at(3, 64)


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_interruptions_do_not_move_the_medians(share: float) -> None:
    """25 repeats a point or more, the first not counted. At a share of 0.2 half of a point's repeats are hit with a
    chance of 0.1%; for any of 15 points that is a false alarm of 1.6% per seed, and the seed is fixed."""
    rng = np.random.default_rng(5)

    def interrupted(width: int, context: int) -> float:
        return staircase(width, context) * (1.0 if rng.random() > share else rng.uniform(2.0, 10.0))

    costs = measured(Clockwork(interrupted), seconds=1e3)
    assert np.array(costs.target.ms) == pytest.approx(expected(costs))


def test_a_machine_that_gets_slower_does_not_tilt_the_curve() -> None:
    model = Clockwork()
    model.pass_ms = lambda width, context: staircase(width, context) * (1.0 + model.now / 60e3)
    costs = measured(model, seconds=12.0)
    ratio = np.array(costs.target.ms) / expected(costs)
    assert ratio.max() > 1.05, "the drift should be seen in the times"
    assert ratio.max() / ratio.min() < 1.05


def test_a_slow_first_pass_of_each_width_is_left_out() -> None:
    seen = set[int]()

    def warming(width: int, context: int) -> float:
        slow = 1.0 if width in seen else 50.0
        seen.add(width)
        return staircase(width, context) * slow

    costs = measured(Clockwork(warming))
    assert np.array(costs.target.ms) == pytest.approx(expected(costs))


def test_what_is_built_for_a_width_is_not_its_price_however_long_it_takes() -> None:
    """Ten times all the time there is, for every width of either model; half a minute was seen."""
    seen = set[tuple[int, int]]()

    def building(number: int, pass_ms: Callable[[int, int], float]) -> Callable[[int, int], float]:
        def ms(width: int, context: int) -> float:
            slow = 0.0 if (number, width) in seen else 40_000.0
            seen.add((number, width))
            return slow + pass_ms(width, context)

        return ms

    model = Clockwork(building(0, staircase))
    draft = Clockwork(building(1, lambda width, context: 0.1 * width), beside=model)
    for one in (model, draft):
        one.capabilities = replace(one.capabilities, width_steps=(1, 16, 64))
    costs = measured(model, seconds=4.0, draft=draft)
    assert costs.target.widths == (1, 2, 16, 64)
    assert np.array(costs.target.ms) == pytest.approx(expected(costs))
    assert costs.draft is not None and costs.draft.widths == (1, 2, 16)
    assert np.array(costs.draft.ms[0]) == pytest.approx([0.1, 0.2, 1.6])


def test_points_that_scatter_are_measured_more_often() -> None:
    rng = np.random.default_rng(0)
    model = Clockwork(lambda width, context: width * (rng.uniform(0.5, 1.5) if width == 12 else 1.0))
    measured(model, seconds=30.0)
    assert model.widths.count(12) > 1.3 * model.widths.count(10)


def test_tokens_are_not_all_alike() -> None:
    model = Clockwork()
    measured(model)
    assert len(model.tokens) > 60


def test_the_draft_model_is_measured_up_to_its_own_width() -> None:
    model = Clockwork()
    draft = Clockwork(lambda width, context: 0.1 * width, beside=model)
    costs = measured(model, draft=draft)
    assert costs.draft is not None and costs.draft.widths[-1] == measure.DRAFT_WIDTH
    assert np.array(costs.draft.ms) == pytest.approx(0.1 * np.array([costs.draft.widths]))
    assert np.array(costs.target.ms) == pytest.approx(expected(costs))


# ---------------------------------------------------------------- bounded


def test_it_ends_when_the_time_does() -> None:
    model = Clockwork()
    costs = measured(model, seconds=4.0, contexts=(64, 512, 2048))
    assert model.clock() < 4.0 + 2 * STEPS[64] * 3.1 / 1e3
    assert costs.target.contexts[0] == 64


def test_contexts_that_there_is_no_time_for_are_left_out_and_said() -> None:
    model = Clockwork(lambda width, context: float(width) * (1.0 if width <= 64 else 30.0))
    costs = measured(model, seconds=5.0, contexts=(64, 512, 2048))
    assert costs.target.contexts == (64,)
    assert "contexts of 512 tokens and more were not measured" in costs.notes[0]
    assert np.array(costs.target.ms) == pytest.approx(np.array([costs.target.widths]))


def attention(width: int, context: int) -> float:
    """Milliseconds of a large target on a small machine: attention takes as long as width times context says."""
    return 8.0 + 2.0 * width + width * context / 400.0


def exact(costs: Costs, pass_ms: Callable[[int, int], float]) -> Array:
    curve = costs.target
    return np.array([[pass_ms(width, context) for width in curve.widths] for context in curve.contexts])


def test_with_time_enough_all_widths_are_measured_behind_the_second_context() -> None:
    model = Clockwork(attention)
    costs = measure.quick(model, clock=model.clock)
    assert costs.target.contexts == (64, 512) and costs.target.widths == measure.QUICK_WIDTHS
    assert np.array(costs.target.ms) == pytest.approx(exact(costs, attention))
    assert "behind" not in costs.notes[0] and model.clock() < measure.QUICK_SECONDS + 0.2


@pytest.mark.parametrize("seconds", [2.5, 3.0, 4.0])
def test_with_little_time_the_second_context_has_few_widths_and_the_others_go_by_them(seconds: float) -> None:
    model = Clockwork(attention)
    draft = Clockwork(lambda width, context: 0.05 * attention(width, context), beside=model)
    costs = measure.costs(model, draft, seconds=seconds, contexts=(64, 512, 2048), clock=model.clock)
    first, second = costs.target.contexts
    assert first == 64 and 256 <= second <= 512
    [note] = [note for note in costs.notes if note.startswith("behind")]
    assert note.startswith(f"behind {second} tokens widths 1, 2, 4, 8, 16")
    assert 64 in costs.target.widths and "64" not in note.partition("widths")[2], "the widest went by the others"
    assert np.array(costs.target.ms) == pytest.approx(exact(costs, attention)), "attention is a line over the width"
    assert costs.draft is not None and costs.draft.contexts == (first, second)
    assert model.clock() < seconds + 0.2


def test_where_reading_takes_longer_than_passes_said_the_second_context_is_nearer() -> None:
    """Passes behind few tokens do not tell that deeper in the text each token takes three times as long."""
    model = Clockwork(lambda width, context: attention(width, 0) * (1.0 if context < 128 else 3.0))
    costs = measured(model, seconds=4.5, contexts=(64, 512))
    assert costs.target.contexts == (64, 256)


def test_a_width_that_was_not_measured_is_not_cheaper_deep_in_the_text_whatever_scatter_says() -> None:
    first = {1: 9.0, 2: 10.0, 4: 12.0, 10: 20.0, 16: 30.0, 64: 90.0}
    row = measure._filled((1, 2, 4, 10, 16, 64), first, {1: 9.5, 4: 10.5, 16: 32.5})
    assert row == pytest.approx((9.5, 10.0, 10.5, 20.5, 32.5, 100.0))


def test_with_next_to_no_time_a_few_widths_are_measured_once() -> None:
    costs = measured(Clockwork(), seconds=0.0)
    assert costs.target.widths[:2] == (1, 2)


@pytest.mark.parametrize("length", [8, 70, 600])
def test_a_short_context_is_measured_as_far_as_it_goes(length: int) -> None:
    costs = measured(Clockwork(context_length=length), contexts=(64, 512, 2048))
    assert costs.target.widths[-1] + costs.target.contexts[-1] <= length
    assert 1 in costs.target.widths and 2 in costs.target.widths


def test_widths_end_where_the_model_or_its_class_does() -> None:
    model = Clockwork()
    model.capabilities = replace(model.capabilities, width_class=WidthClass(7, 24))
    assert measured(model).target.widths == (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24)
    model.capabilities = replace(model.capabilities, width_class=WidthClass(2), max_width=9)
    assert measured(model).target.widths == (1, 2, 3, 4, 5, 6, 8)


def test_a_model_that_takes_nothing_back_is_measured_at_width_one() -> None:
    model = Clockwork()
    model.capabilities = replace(model.capabilities, rewind=Rewind.NEVER)
    costs = measure.costs(model, contexts=(64, 512), overhead=round_overhead, clock=model.clock)
    assert costs.target.widths == (1,) and costs.target.contexts == (64,)


def test_no_sequence_stays_open() -> None:
    model = Clockwork()
    draft = Clockwork(beside=model)
    measured(model, draft=draft)
    assert (model.num_open, draft.num_open) == (0, 0)
    draft.pass_ms = lambda width, context: 1 / 0
    with pytest.raises(ZeroDivisionError):
        measured(model, draft=draft)
    assert (model.num_open, draft.num_open) == (0, 0)


def test_progress_rises_to_the_end() -> None:
    shares: list[float] = []
    model = Clockwork()
    measure.quick(model, on_progress=lambda share, what: shares.append(share), clock=model.clock)
    assert shares == sorted(shares) and shares[-1] == 1.0


# ---------------------------------------------------------------- the rest of a round


def test_the_overhead_is_a_rounds_own_time() -> None:
    model = ReferenceModel(64, context_length=16)
    assert 0.0 < round_overhead(model) < 100.0
    assert model.num_open == 0


def test_the_overhead_of_a_model_that_takes_nothing_back_is_refused() -> None:
    model = ReferenceModel(64)
    model.capabilities = replace(model.capabilities, rewind=Rewind.NEVER)
    with pytest.raises(UnsupportedModelError):
        round_overhead(model)


def test_assumed_costs_say_that_they_are() -> None:
    costs = measure.assumed(ReferenceModel(64), ReferenceModel(64))
    assert not costs.measured and "assumed" in costs.notes[0] and costs.draft is not None
    assert Costs.from_dict(costs.as_dict()) == costs
