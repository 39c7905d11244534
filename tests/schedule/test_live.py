"""What passes cost: the table, and what rounds correct in it."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from localspec.protocols import WidthClass
from localspec.schedule.cost import Costs, Curve
from localspec.schedule.live import LiveCosts

STAIRS = Curve(
    (1, 2, 4, 5, 8, 9, 16), (0, 1000), ((10.0, 10.0, 10.0, 16.0, 16.0, 24.0, 24.0), (20.0,) * 3 + (32.0,) * 4)
)


def live(curve: Curve = STAIRS, low: int = 2, high: int | None = None) -> LiveCosts:
    return LiveCosts(Costs(curve, None, 0.0), WidthClass(low, high), 16, optimism=1.0)


def test_a_curve_is_read_between_its_points_and_beyond_them() -> None:
    assert STAIRS.at(3, 0) == 10.0 and STAIRS.at(6, 0) == 16.0
    assert STAIRS.at(1, 512) == pytest.approx(10.0 + 10.0 * 0.512)
    assert STAIRS.at(1, 2048) == pytest.approx(10.0 + 10.0 * 2.048)  # the last slope
    assert STAIRS.at(40, 0) == 24.0  # it does not rise there
    assert Curve.from_dict(STAIRS.as_dict()) == STAIRS
    costs = Costs(STAIRS, None, 0.2, "by hand", ("a note",))
    assert Costs.from_dict(costs.as_dict()) == costs


@pytest.mark.parametrize(
    ("widths", "contexts", "ms"),
    [((), (0,), ((),)), ((2, 1), (0,), ((1.0, 1.0),)), ((1,), (0,), ((0.0,),)), ((1, 2), (0,), ((1.0,),))],
)
def test_a_curve_that_is_none_is_refused(
    widths: tuple[int, ...], contexts: tuple[int, ...], ms: tuple[tuple[float, ...], ...]
) -> None:
    with pytest.raises(ValueError, match=r"curve|ascending|no time"):
        Curve(widths, contexts, ms)


def test_rounds_correct_the_table_and_a_stall_hardly_does() -> None:
    costs = live()
    for _ in range(40):
        costs.observe_verify(4, 0, 15.0)
    assert costs.verify_ms(4, 0) == pytest.approx(15.0, rel=0.05)
    assert 16.0 < costs.verify_ms(5, 0) < 24.0  # others follow a little: the machine got slower
    before = costs.verify_ms(4, 0)
    costs.observe_verify(4, 0, 5000.0)
    assert costs.verify_ms(4, 0) < 1.1 * before


def test_a_width_looks_a_little_cheaper_until_it_was_tried() -> None:
    hopeful = LiveCosts(Costs(STAIRS, None, 0.0), WidthClass(2), 16)
    assert hopeful.verify_ms(2, 0) == 10.0 and hopeful.verify_ms(5, 0) == pytest.approx(14.4)
    for _ in range(30):
        hopeful.observe_verify(5, 0, 16.0)
    assert hopeful.verify_ms(5, 0) == pytest.approx(16.0, rel=0.02)


def test_a_width_that_looked_dear_in_busy_rounds_is_tried_again() -> None:
    costs = LiveCosts(Costs(STAIRS, None, 0.0), WidthClass(2), 16)
    for _ in range(6):
        costs.observe_verify(4, 0, 25.0)
    assert costs.verify_ms(4, 0) > costs.verify_ms(5, 0) + 2.0
    for _ in range(300):
        costs.observe_verify(5, 0, 16.0)
    assert costs.verify_ms(4, 0) < 12.0 and costs.verify_ms(5, 0) == pytest.approx(16.0, rel=0.02)
    for _ in range(5):
        costs.observe_verify(2, 0, 7.0)  # plain decoding's own width is remembered
    for _ in range(300):
        costs.observe_verify(5, 0, 16.0)
    assert costs.verify_ms(2, 0) == pytest.approx(7.0, rel=0.15)


def test_passes_in_a_row_are_told_apart_from_first_ones() -> None:
    """A device that reuses graphs: 6 ms in a row, 9 behind another width. Staying is worth more than changing."""
    flat = Curve((1, 2, 3, 4), (0,), ((9.0, 9.0, 9.0, 9.0),))
    costs = LiveCosts(Costs(flat, None, 0.0), WidthClass(1), 4, optimism=1.0)
    for width in [1] * 8 + [4] * 8 + [1, 4, 1, 4] + [4] * 8:
        costs.observe_verify(width, 0, 6.0 if (1, width) == costs._last else 9.0)
    assert costs.verify_ms(4, 0) == pytest.approx(6.0, rel=0.1)
    assert costs.verify_ms(1, 0) == pytest.approx(9.0, rel=0.1), "a change costs"
    assert costs.settled_ms(0, 0)[0] == pytest.approx(6.0, rel=0.1), "but not every round"
    assert costs.plain_ms(0) == pytest.approx(6.0, rel=0.1), "gains are judged by plain decoding in a row"


def test_a_pass_is_priced_behind_the_last_one_though_what_that_took_is_learned_later() -> None:
    """Old bug: what a round taught was put off until the next pass, and so was that its pass had another width. So the
    next round seemed to change nothing where it went back, and paid for it."""
    flat = Curve((1, 2, 3, 4), (0,), ((9.0, 9.0, 9.0, 9.0),))
    costs = LiveCosts(Costs(flat, None, 0.0), WidthClass(3), 4, optimism=1.0)
    for width in [3] * 8 + [4] * 8 + [3, 4, 3, 4] + [4] * 8:
        costs.observe_verify(width, 0, 6.0 if (1, width) == costs._last else 9.0)
    assert costs.by_nodes(0)[1] == [4, 4, 4, 4], "padded, as another width costs more"
    costs.ran(3)
    assert costs.verify_ms(3, 0) == pytest.approx(6.0, rel=0.1) and costs.verify_ms(4, 0) == pytest.approx(9.0, rel=0.1)
    assert costs.by_nodes(0)[1] == [3, 3, 3, 4]
    costs.ran(3)
    costs.observe_verify(3, 0, 9.0)  # the first of the two; the second is yet to be told
    costs.observe_verify(3, 0, 6.0)
    assert costs.verify_ms(3, 0) < costs.verify_ms(4, 0)


def record_graphs(costs: LiveCosts, widths: Sequence[int], contexts: Sequence[int]) -> None:
    """Passes on a device that takes 1.4 ms more for the first one of a width, and 3.4 for the second, which it
    records."""
    for width, context in zip(widths, contexts, strict=True):
        place = costs.ran(width)
        ms = GRAPHS.at(width, 0) + (1.4, 3.4, 0.0)[min(place, 2)]
        costs.observe_verify(width, context, ms, place=place)


GRAPHS = Curve((3, 4), (0,), ((5.3, 5.8),))


def test_what_the_second_pass_of_a_row_takes_longer_is_part_of_a_change() -> None:
    """Old bug: it counted as one in a row, so a width that was seldom seen seemed dear for ever."""
    costs = LiveCosts(Costs(GRAPHS, None, 0.0), WidthClass(3), 4, optimism=1.0)
    widths = [4] * 30 + [3] * 4 + [4] * 30 + [3] * 4 + [4] * 30
    record_graphs(costs, widths, [0] * len(widths))
    for width in (3, 4):
        assert costs.in_a_row_ms(width, 0) == pytest.approx(GRAPHS.at(width, 0), rel=0.03)
    assert 3.2 < costs.change_ms(3, 0) < 5.0
    assert costs.change_ms(4, 0) == 0.0, "it is the width that ran last"
    ms, width = costs.settled_ms(2, 0)
    assert 4.9 < ms < 5.5 and width == 3, "hoped to be quick until it was seen more often"
    assert costs.verify_ms(3, 0) == pytest.approx(6.7, rel=0.05), "who keeps to no width may change for one pass"
    costs.keep(4)
    assert costs.verify_ms(3, 0) > 8.5, "who leaves one pays all of it"
    assert costs.verify_ms(4, 0) == pytest.approx(5.8, rel=0.03)
    other = LiveCosts(Costs(GRAPHS, None, 0.0), WidthClass(3), 4, optimism=1.0)
    other.recall(json.loads(json.dumps(costs.as_dict())))
    other.ran(4)
    assert other.change_ms(3, 0) == pytest.approx(costs.change_ms(3, 0), rel=0.2)
    before = {load: {**one, "second": None} for load, one in costs.as_dict().items()}
    for one in before.values():
        del one["second"]
    other.recall(before)
    assert other.change_ms(3, 0) < 2.0, "what earlier versions kept says nothing of it"


def test_an_answer_in_the_width_of_the_last_one_finds_it_recorded() -> None:
    """Old error: all widths were taken to be alike where an answer begins. On a GPU the second pass takes
    3 ms more where the last answer had another one, which is half a round of perhaps 15."""
    costs = LiveCosts(Costs(GRAPHS, None, 0.0), WidthClass(3), 4, optimism=1.0)
    for width in (4, 4, 3, 3, 4, 3, 4, 4):
        costs.begin()
        record_graphs(costs, [width] * 12, [0] * 12)
    costs.begin()
    assert costs.second_ms(4, 0) == 0.0 and 2.0 < costs.second_ms(3, 0) < 4.0
    assert costs.ran(3) == 0 and costs.second_ms(3, 0) > 2.0, "one pass of it is none in a row"
    costs.keep(3)
    assert costs.second_ms(4, 0) > 2.0, "nor is 4 recorded any more"
    assert costs.change_ms(3, 0) == costs.second_ms(3, 0), "the first one is over"
    assert costs.ran(3) == 1 and costs.second_ms(3, 0) == 0.0 and costs.second_ms(4, 0) > 2.0
    costs.begin()
    assert [costs.ran(3) for _ in range(3)] == [0, 2, 3]
    costs.begin()
    costs.keep(4)
    before = costs.by_nodes(0)[0][3]
    costs.ran(4)
    costs.begin()
    costs.keep(3)
    assert costs.by_nodes(0)[0][3] > before
    costs.ran(3)
    assert costs.by_nodes(0)[0][3] == costs.verify_ms(4, 0) > 9.0, "prices know at once"


def test_a_single_pass_of_another_width_leaves_nothing_recorded() -> None:
    """Old error: only a row of passes was taken to do that. An answer's last pass, which had no room for guesses, was
    the narrowest one, and the next answer paid 2 ms for it that nobody expected."""
    costs = LiveCosts(Costs(GRAPHS, None, 0.0), WidthClass(3), 4)
    assert [costs.ran(width) for width in (4, 4, 4, 3, 4, 4, 4)] == [0, 1, 2, 0, 0, 1, 2]
    costs.begin()
    assert [costs.ran(4) for _ in range(3)] == [0, 2, 3]


@pytest.mark.parametrize(("often", "slower"), [(0.04, 1.4), (0.2, 1.3), (0.4, 1.3), (None, 0.1)])
def test_noise_does_not_make_widths_that_do_not_run_seem_dear_or_quick(often: float | None, slower: float) -> None:
    """Old bug: what passes showed was shared between their width and the machine, and as one followed the mean and the
    other the mean of logarithms, these wandered apart for as long as no other width ran: behind 3,000 passes of four
    tokens on an H200 those of three were taken to cost as much, and with noise of a tenth a quarter less."""
    flat, chance = Curve((3, 4), (0,), ((5.3, 5.8),)), np.random.default_rng(0)
    costs = LiveCosts(Costs(flat, None, 0.0), WidthClass(3), 4, optimism=1.0)

    def play(width: int, count: int, machine: float = 1.0) -> float:
        noise = np.exp(chance.normal(0.0, slower, count))
        took = noise if often is None else np.where(chance.random(count) < often, slower, 1.0)
        for one in took.tolist():
            costs.ran(width)
            costs.observe_verify(width, 0, machine * flat.at(width, 0) * one, place=2)
        return float(np.mean(took))

    play(3, 40)
    usual = play(4, 3000)
    for width in (3, 4):
        assert costs.in_a_row_ms(width, 0) == pytest.approx(flat.at(width, 0) * usual, rel=0.1)
    play(4, 30, machine=2.0)
    assert costs.in_a_row_ms(3, 0) > 1.7 * 5.3, "but where all take longer, the machine is slower"
    play(3, 30)
    play(4, 30)
    for width in (3, 4):
        assert costs.in_a_row_ms(width, 0) == pytest.approx(flat.at(width, 0) * usual, rel=0.1)


def test_the_first_passes_of_answers_stand_behind_a_prompt() -> None:
    """Old bugs: they counted as passes in a row, and as contexts are short there the slow ones looked like passes that
    become quicker as a text grows."""
    costs = LiveCosts(Costs(GRAPHS, None, 0.0), WidthClass(3), 4, optimism=1.0)
    for _ in range(15):
        costs.begin()
        record_graphs(costs, [4] * 12, range(20, 260, 20))
    for context in (20, 250, 400):
        assert costs.in_a_row_ms(4, context) == pytest.approx(5.8, rel=0.04)
    costs.begin()
    assert costs.verify_ms(4, 20) == pytest.approx(7.2, rel=0.05)
    costs.keep(3)
    assert costs.verify_ms(3, 20) < 5.8 < costs.verify_ms(4, 20), "the first pass may have any width"


def test_who_leaves_a_width_for_good_is_not_held_back() -> None:
    """Old bug, found on reading: plain decoding went on in the wide passes that guesses had been kept to."""
    costs = LiveCosts(Costs(Curve((1, 6), (0,), ((5.0, 7.2),)), None, 0.0), WidthClass(1), 6, optimism=1.0)
    for width in [1] * 20 + [6] * 20 + [1] * 20 + [6] * 20 + [1] * 20 + [6] * 20:
        place = costs.ran(width)
        costs.observe_verify(width, 0, {1: 5.0, 6: 7.2}[width] + (1.4, 3.4, 0.0)[min(place, 2)], place=place)
    costs.keep(6)
    assert costs.by_nodes(0)[1][0] == 6, "one round is not worth it"
    costs.keep(0)
    assert costs.by_nodes(0)[1][0] == 1
    costs.keep(6)
    costs.begin()
    assert costs.by_nodes(0)[1][0] == 1
    assert costs.verify_ms(1, 0, lanes=4) < 4 * 7.2, "nor is a pass that is shared"


FLAT = Curve(STAIRS.widths, (0,), STAIRS.ms[:1])


def test_growth_with_the_context_is_learned_where_the_table_does_not_know_it() -> None:
    """What was seen of two widths at some contexts is expected of others at all contexts."""
    costs = LiveCosts(Costs(FLAT, None, 0.0), WidthClass(1), 16, optimism=1.0)
    for context in (*range(0, 300, 20), *range(100, 400, 20)):
        for width in (1, 4):
            costs.observe_verify(width, context, FLAT.at(width, 0) + 0.004 * width * context)
    for width, context in ((1, 0), (4, 300), (16, 0), (16, 300), (8, 600)):
        assert costs.verify_ms(width, context) == pytest.approx(FLAT.at(width, 0) + 0.004 * width * context, rel=0.1)
    assert costs.plain_ms(600) == pytest.approx(costs.plain_ms(0) + 2.4, rel=0.1)


def test_noise_is_not_taken_for_growth_with_the_context() -> None:
    for seed in range(20):
        costs, rng = LiveCosts(Costs(FLAT, None, 0.0), WidthClass(1), 16, optimism=1.0), np.random.default_rng(seed)
        for context in range(20):  # one short answer on a machine that does other things
            costs.observe_verify(4, context, FLAT.at(4, 0) * float(rng.uniform(0.9, 1.1)))
        assert costs.verify_ms(4, 400) == pytest.approx(FLAT.at(4, 0), rel=0.5)


def test_a_plan_keeps_to_the_widths_that_are_built() -> None:
    rising = Curve((1, 64), (0,), ((5.0, 68.0),))
    costs = LiveCosts(Costs(rising, None, 0.0), WidthClass(1), 100, steps=(1, 4, 8, 16))
    ms, widths = costs.by_nodes(0)
    assert costs.max_width == 16 and widths == [1] + [4] * 3 + [8] * 4 + [16] * 8
    assert ms[1] == ms[3] == costs.verify_ms(4, 0)
    narrow = LiveCosts(Costs(rising, None, 0.0), WidthClass(2, 6), 100, steps=(1, 4, 8, 16))
    assert narrow.by_nodes(0)[1] == [4] * 4


def test_a_width_that_nobody_measured_is_padded_to_one_that_was() -> None:
    coarse = Curve((1, 2, 4, 8), (0,), ((5.0, 6.0, 7.0, 9.0),))
    ms, widths = live(coarse).by_nodes(0)
    assert widths == [2, 2, 4, 4, 8, 8, 8, 8] and ms[4] == pytest.approx(live(coarse).verify_ms(8, 0))


def test_one_stall_does_not_shut_a_width_out() -> None:
    costs = live(STAIRS)
    for _ in range(4):
        costs.observe_verify(4, 0, STAIRS.at(4, 0))
        costs.observe_verify(8, 0, STAIRS.at(8, 0))
    before = costs.verify_ms(4, 0)
    costs.observe_verify(4, 0, 50.0 * STAIRS.at(4, 0))
    assert costs.verify_ms(4, 0) < 1.2 * before
    for _ in range(60):
        costs.observe_verify(4, 0, 3.0 * STAIRS.at(4, 0))
        costs.observe_verify(8, 0, STAIRS.at(8, 0))
    assert costs.verify_ms(4, 0) > 2.0 * before, "what lasts is believed"


def test_a_wider_pass_is_taken_where_it_is_quicker() -> None:
    falling = Curve((1, 2, 3, 4), (0,), ((27.0, 38.0, 46.0, 33.0),))
    ms, widths = live(falling).by_nodes(0)
    assert widths[:4] == [4, 4, 4, 4] and ms[0] == pytest.approx(33.0)
    assert live(falling, high=3).by_nodes(0)[1][:3] == [2, 2, 3]  # the class ends before


@pytest.mark.parametrize(("early", "less"), [(True, 0.0), (False, 0.42)])
def test_passes_that_begin_early_say_nothing_of_wider_ones(early: bool, less: float) -> None:
    """They seem to take less than the table says. When that was believed of all widths, wide passes looked as quick."""
    table = Curve((1, 4, 16), (0,), ((12.0, 12.5, 13.0),))
    costs = LiveCosts(Costs(table, None, 0.0), WidthClass(1), 16, steps=(1, 4, 16), optimism=1.0)
    for _ in range(300):
        costs.observe_verify(1, 0, 7.0, early=early)
    assert costs.plain_ms(0) == pytest.approx(7.0, rel=0.05)
    assert 1.0 - costs.verify_ms(16, 0) / 13.0 == pytest.approx(less, abs=0.03)
    assert costs.by_nodes(0)[1][0] == 1
    costs.observe_verify(16, 0, 20.0)
    assert costs.verify_ms(16, 0) > 10.0, "a pass of its own is believed at once"
