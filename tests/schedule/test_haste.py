"""A machine that is slower for a while: followed at once, forgotten at once, and not taken for a width's own cost."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from localspec.protocols import WidthClass
from localspec.schedule.cost import Costs, Curve
from localspec.schedule.drafting import ModelTimes
from localspec.schedule.haste import Haste
from localspec.schedule.live import LiveCosts

TABLE = Curve((1, 2, 4, 8), (0, 500), ((10.0, 10.0, 12.0, 18.0),) * 2)


def run(costs: LiveCosts, widths: Iterable[int], slower: float) -> None:
    for width in widths:
        costs.observe_verify(width, 100, slower * TABLE.at(width, 100))


def test_behind_a_busy_minute_widths_that_were_not_used_since_cost_what_they_did() -> None:
    costs = LiveCosts(Costs(TABLE, None, 0.0), WidthClass(2), 8)
    run(costs, [2, 2, 4, 8] * 20, 1.0)
    run(costs, [2, 2, 4, 8] * 30, 3.0)
    assert costs.verify_ms(4, 100) == pytest.approx(36.0, rel=0.1)
    run(costs, [2] * 15, 1.0)
    for width in (2, 4, 8):
        assert costs.verify_ms(width, 100) == pytest.approx(TABLE.at(width, 100), rel=0.15)


def test_while_it_is_busy_a_width_that_nobody_tried_is_slower_too() -> None:
    costs = LiveCosts(Costs(TABLE, None, 0.0), WidthClass(2), 8, optimism=1.0)
    run(costs, [2] * 42, 3.0)  # the first two tell little
    assert costs.verify_ms(8, 100) == pytest.approx(3.0 * 18.0, rel=0.2)


def test_a_width_that_costs_more_than_the_table_says_is_told_from_a_slow_machine() -> None:
    costs = LiveCosts(Costs(TABLE, None, 0.0), WidthClass(2), 8, optimism=1.0)
    for _ in range(100):
        costs.observe_verify(4, 100, 18.0)
        costs.observe_verify(2, 100, 10.0)
    assert costs.verify_ms(4, 100) == pytest.approx(18.0, rel=0.08)
    assert costs.verify_ms(2, 100) == pytest.approx(10.0, rel=0.08)


@pytest.mark.parametrize("wrong", [0.85, 1.7])
def test_a_table_that_is_wrong_about_wide_passes_says_nothing_of_plain_ones(wrong: float) -> None:
    """A few plain passes, then none: what these take must not drift, for all gains are judged by it."""
    costs = LiveCosts(Costs(TABLE, None, 0.0), WidthClass(2), 8, optimism=1.0)
    run(costs, [2, 2, 2], 1.0)
    for count in range(60):
        run(costs, [4, 8, 4], wrong)
        if count in (2, 10, 59):
            assert costs.plain_ms(100) == pytest.approx(10.0, rel=0.15)
            assert costs.verify_ms(4, 100) == pytest.approx(wrong * 12.0, rel=0.15)


def test_a_draft_models_times_are_forgotten_as_quickly() -> None:
    times = ModelTimes(TABLE)

    def rounds(count: int, slower: float) -> None:
        for length in [1, 2, 3] * count:
            times.observe(times.prices(100, 1).chain(length), slower * 10.0 * length, 1)

    rounds(20, 1.0)
    rounds(30, 3.0)
    assert times.prices(100, 1).chain(3) == pytest.approx(90.0, rel=0.1)
    rounds(5, 1.0)
    assert times.prices(100, 1).chain(3) == pytest.approx(30.0, rel=0.15)


def test_whatever_a_clock_says_the_factor_stays_within_reason() -> None:
    haste = Haste()
    for _ in range(500):
        haste.observe(1.0, 1e6)
    assert haste.factor == 10.0
    assert haste.observe(0.0, 5.0) == 0.5, "nothing was expected: nothing is learned"
    for _ in range(500):
        haste.observe(1.0, 1e-6)
    assert haste.factor == 0.2
