"""What asking a drafter takes: learned from rounds, with what a round takes besides its passes told apart."""

from __future__ import annotations

import numpy as np
import pytest

from localspec.schedule.cost import Costs, Curve, HeadCosts
from localspec.schedule.drafting import DraftTimes, HeadTimes, ModelTimes, times_of
from localspec.schedule.experience import Experience
from localspec.testing.reference import ReferenceModel


def flat(ms: float) -> Curve:
    return Curve((1, 16), (0,), ((ms, ms),))


def rounds(times: DraftTimes, lengths: list[int], start: float, each: float) -> None:
    for length in lengths:
        times.observe(times.prices(0, 1).chain(length), start + each * length, 1)


def test_a_heads_times_follow_what_it_takes_and_it_never_has_to_catch_up() -> None:
    times = HeadTimes(HeadCosts(flat(2.0), flat(0.5)))
    assert times.prices(0, 1).chain(3) == pytest.approx(3.0)
    for _ in range(200):
        times.observe(times.prices(0, 1).chain(3), 6.0, 1)
    assert times.prices(0, 1).chain(3) == pytest.approx(6.0, rel=0.05)
    assert times.missed_ms(500, 0) == 0.0 and not times.is_shared


def test_what_a_round_takes_besides_its_passes_is_not_taken_for_a_part_of_each() -> None:
    times = ModelTimes(flat(0.6))
    rounds(times, np.random.default_rng(0).integers(1, 5, 200).tolist(), 0.7, 0.5)
    prices = times.prices(0, 1)
    assert prices.start == pytest.approx(1.2, rel=0.06) and prices.extend(1) == pytest.approx(0.5, rel=0.06)


def test_a_second_pass_is_not_dear_because_all_rounds_had_one() -> None:
    """Else nobody would ever make one, and nothing would show that it is not."""
    times = ModelTimes(flat(0.6))
    rounds(times, [1] * 200, 0.7, 0.5)
    prices = times.prices(0, 1)
    assert prices.start == pytest.approx(1.2, rel=0.05) and prices.extend(1) < 0.8


def test_a_slower_machine_is_noticed_and_one_stall_is_not() -> None:
    times = ModelTimes(flat(0.6))
    rounds(times, [3] * 50, 0.0, 0.6)
    times.observe(times.prices(0, 1).chain(3), 500.0, 1)
    assert times.prices(0, 1).chain(3) == pytest.approx(1.8, rel=0.2)
    rounds(times, [1, 2, 3, 4] * 50, 0.0, 1.8)
    assert times.prices(0, 1).extend(1) == pytest.approx(1.8, rel=0.1)


def test_a_lane_pays_its_part_of_drafting() -> None:
    times = times_of("draft_model", Costs(flat(1.0), Curve((1, 16), (0,), ((1.0, 2.0),))))
    assert times.prices(0, 1).extend(1) == 1.0 and times.prices(0, 16).extend(1) == pytest.approx(2.0 / 16)
    rounds(times, [2] * 50, 0.0, 3.0)
    assert times.prices(0, 16).extend(1) == pytest.approx(2.0 / 16)  # learned apart


def test_nothing_is_priced_without_a_draft_model() -> None:
    experience = Experience(Costs(flat(1.0)), ReferenceModel().capabilities)
    assert experience.times("draft_model").prices(0, 1).chain(4) == 0.0
