"""Estimates, the plan and the guard, by themselves: against slow references and worked-out cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localspec.schedule.acceptance import Reliability
from localspec.schedule.guard import Guard
from localspec.schedule.plan import Rate, Valuation
from localspec.tree.token_tree import TokenTree
from tests.schedule.test_live import STAIRS, live

# ---------------------------------------------------------------- the plan


@given(st.lists(st.floats(0.0, 1.0), max_size=9), st.floats(0.0, 0.3))
def test_the_best_number_of_nodes_is_the_best_of_all(chances: list[float], rate: float) -> None:
    """Against trying every set of nodes: a staircase's first drop is not its end."""
    reach = sorted(chances, reverse=True)
    prices = Valuation(live(), rate, 0, 15)
    choice = prices.best(reach)

    def value(chosen: tuple[float, ...]) -> float:
        return sum(chosen) - rate * (STAIRS.at(max(1 + len(chosen), 2), 0) - STAIRS.at(2, 0))

    best = max(value(chosen) for size in range(len(reach) + 1) for chosen in combinations(reach, size))
    assert choice.value == pytest.approx(max(best, 0.0), abs=1e-9)
    assert value(tuple(reach[: choice.nodes])) == pytest.approx(choice.value, abs=1e-9)


def test_free_places_in_a_pass_are_always_used() -> None:
    """Up to four tokens cost the same: three guesses are free however unlikely they are."""
    assert Valuation(live(), 10.0, 0, 15).best([0.05, 0.04, 0.03, 0.02]).nodes == 3


def test_a_guess_pays_for_the_pass_that_it_drops() -> None:
    chances = [0.9, 0.8, 0.7]
    free, dear = (Valuation(live(), 0.1, 0, 16, restart_ms=ms) for ms in (0.0, 30.0))
    assert free.best(chances).nodes == 3 and dear.best(chances).nodes == 0
    assert dear.total(chances) == pytest.approx(free.total(chances) - 3.0)
    assert dear.total([]) == 0.0 and dear.width(0) == free.width(0)


def test_a_second_step_of_the_stairs_is_seen_from_before_the_first() -> None:
    """A fifth token alone does not pay for the step; four more together do."""
    prices = Valuation(live(), 1.0 / 6.0, 0, 15)
    sure = [0.9**depth for depth in range(1, 8)]
    assert prices.best(sure[:4]).nodes == 3
    assert prices.best(sure).nodes == 7
    assert prices.worth_expanding(sure[:4], sure[3:4], 0.9, lambda width: 1.0) == 1
    assert prices.worth_expanding([0.1], [0.1], 0.5, lambda width: 0.1) == 1  # the step is paid anyway
    assert prices.worth_expanding([0.1], [0.1], 0.5, lambda width: 5.0) == 0
    assert prices.worth_expanding([0.5], [], 0.9, lambda width: 1.0) == 0


def test_the_rate_is_tokens_over_time_and_forgets() -> None:
    rate = Rate(0.1)
    assert rate.value == pytest.approx(0.1)
    for _ in range(500):
        rate.add(2.0, 10.0)
    assert rate.value == pytest.approx(0.2, rel=1e-3)
    for _ in range(1000):
        rate.add(1.0, 10.0)
    assert rate.value == pytest.approx(0.1, rel=0.1)


# ---------------------------------------------------------------- estimates


def test_estimates_start_at_what_the_drafter_says_and_end_at_what_is_true() -> None:
    rng = np.random.default_rng(0)
    reliability = Reliability()
    for chance in (0.05, 0.28, 0.5, 0.7, 0.95, 0.999):
        assert reliability.chances([math.log(chance)])[0] == pytest.approx(min(chance, 0.99), rel=0.15)
    for _ in range(4000):  # in truth every chance is half of what is said
        chance = float(rng.choice([0.28, 0.56, 0.91]))
        tree = TokenTree.from_parents(np.array([7]), np.array([-1]), [math.log(chance)])
        reliability.observe(tree, [7 if rng.random() < chance / 2 else 8])
    for chance in (0.28, 0.56, 0.91):
        assert reliability.chances([math.log(chance)])[0] == pytest.approx(chance / 2, abs=0.07)
    assert reliability.chance_at(0) == pytest.approx(0.29, abs=0.1)


def test_only_edges_below_what_was_emitted_are_counted() -> None:
    """The tree 5 -> 6, with 9 beside 5: emitted 5, 1. So 6 was wrong, and nothing is known of what hangs below 9."""
    reliability = Reliability()
    logs = [math.log(0.7), math.log(0.7), math.log(0.16), math.log(0.42)]
    tree = TokenTree.from_parents(np.array([5, 6, 9, 4]), np.array([-1, 0, -1, 2]), logs)
    reliability.observe(tree, [5, 1])
    assert sum(reliability._seen) == pytest.approx(3.0)
    assert sum(reliability._true) == pytest.approx(1.0)
    reliability.observe(tree, [5])  # the emission ended here: what follows is not known
    assert sum(reliability._seen) == pytest.approx(5.0)


def test_a_depth_that_is_not_guessed_any_more_is_hoped_for_again() -> None:
    reliability = Reliability()
    deep = TokenTree.from_parents(np.array([5, 6]), np.array([-1, 0]), [math.log(0.9)] * 2)
    for _ in range(30):
        reliability.observe(deep, [5, 1])
    low = reliability.chance_at(1)
    short = TokenTree.from_parents(np.array([5]), np.array([-1]), [math.log(0.9)])
    for _ in range(100):
        reliability.observe(short, [5, 1])
    assert low < 0.1 and reliability.chance_at(1) > 0.4
    assert reliability.chance_at(0) == pytest.approx(1.0, abs=0.1)


def test_a_drafter_that_is_right_at_every_depth_is_not_corrected_by_depth() -> None:
    """Each depth's factor is learned from few cases; where nothing is to be corrected it would only add noise."""
    errors = []
    for seed in range(20):
        rng, reliability = np.random.default_rng(seed), Reliability()
        for _ in range(150):
            chances = rng.choice([0.3, 0.6, 0.9], 3)
            tokens, parents = np.arange(3, dtype=np.int32), np.arange(-1, 2, dtype=np.int32)
            tree = TokenTree.from_parents(tokens, parents, np.log(chances).tolist())
            right = int(np.argmin(np.append(rng.random(3) < chances, False)))
            reliability.observe(tree, [*range(right), 9])
        factors = [
            reliability.chances([math.log(0.6)], [depth])[0] / reliability.chances([math.log(0.6)])[0]
            for depth in range(3)
        ]
        errors.append(max(abs(factor - 1.0) for factor in factors))
    assert np.median(errors) < 0.03


@given(st.lists(st.floats(-8.0, 0.0), min_size=2, max_size=2))
def test_a_better_guess_never_counts_less_at_the_start(logs: list[float]) -> None:
    reliability = Reliability()
    low, high = sorted(logs)
    assert 0.0 <= reliability.chances([low])[0] <= reliability.chances([high])[0] + 1e-12 <= 1.0 + 1e-12


# ---------------------------------------------------------------- the guard


Gains = Callable[[np.random.Generator], tuple[float, float]]
PLAIN_MS = 10.0


def play(guard: Guard, rounds: int, gains: Gains, rng: np.random.Generator, price: float = 0.5) -> tuple[int, float]:
    """(rounds it worked in, tokens won or lost). gains: function of the generator to (accepted, extra ms).  price: of a
    trial, in tokens."""
    worked, total = 0, 0.0
    for _ in range(rounds):
        if guard.allows(price):
            accepted, extra = gains(rng)
            guard.observe(accepted, extra, PLAIN_MS)
            total += accepted - extra / PLAIN_MS
            worked += 1
        else:
            guard.idle(PLAIN_MS, PLAIN_MS, price)
    return worked, total


@pytest.mark.parametrize("loss", [0.1, 0.4, 2.0])
def test_a_drafter_that_loses_costs_little(loss: float) -> None:
    """Finding out costs the limit, trying again about 1.2% of the time, whatever a trial loses."""
    guard = Guard()
    _, total = play(guard, 4000, lambda rng: (0.0, 10.0 * loss), np.random.default_rng(1), loss)
    assert guard.parked
    assert total > -(8.0 + 2.0 * loss) - 0.015 * 4000


def test_a_drafter_that_wins_is_kept_although_single_rounds_lose() -> None:
    """Every second round or so brings nothing: 0.4 tokens a round are won all the same."""

    def gains(rng: np.random.Generator) -> tuple[float, float]:
        return 0.75 + 0.5 * float(rng.geometric(0.4) - 1), 11.0  # as smoothed by what was expected

    kept = []
    for seed in range(20):
        guard = Guard()
        worked, total = play(guard, 2000, gains, np.random.default_rng(seed))
        kept.append(worked / 2000)
        assert total > 0.7 * 2000 * 0.4
    assert np.mean(kept) > 0.95


def test_a_parked_drafter_comes_back_when_the_text_changes() -> None:
    guard = Guard()
    rng = np.random.default_rng(2)
    play(guard, 3000, lambda rng: (0.0, 5.0), rng)
    assert guard.parked
    worked, _ = play(guard, 1500, lambda rng: (3.0, 12.0), rng)
    assert not guard.parked and worked > 500


def test_credit_is_bounded_and_pays_for_reading_too() -> None:
    guard = Guard()
    play(guard, 200, lambda rng: (0.0, 10.0), np.random.default_rng(3))
    for _ in range(100_000):
        guard.idle(10.0, 10.0, 1.0)
    trials = 0
    while guard.allows(1.0):
        trials += 1
    assert 1 <= trials <= 4
    assert not guard.allows(50.0)
    for _ in range(100_000):
        guard.idle(10.0, 10.0, 50.0)
    assert guard.allows(50.0)


def test_the_first_trial_of_an_answer_is_made_in_advance_and_paid_for_later() -> None:
    guard = Guard()
    play(guard, 200, lambda rng: (0.0, 10.0), np.random.default_rng(3))
    assert guard.parked
    while guard.allows(1.0):
        pass
    assert not guard.allows(1.0)
    guard.idle(10.0, 10.0, 1.0)
    guard.begin()
    assert guard.allows(1.0)
    guard.begin()
    assert not guard.allows(1.0)  # not before the last one is paid for
    rounds = 0
    while not guard.allows(1.0):
        guard.idle(10.0, 10.0, 1.0)
        rounds += 1
        guard.begin()
    assert 90 <= rounds <= 150  # 0.8% of them


@pytest.mark.parametrize(("real", "rounds"), [(1.0, 126), (4.0, 501), (0.2, 26), (1000.0, 1126)])
def test_a_trial_is_paid_for_as_what_it_really_took(real: float, rounds: int) -> None:
    """It was taken to cost 1. Of a thousand (kernels were built) no more than the limit is owed."""
    guard = Guard()
    play(guard, 200, lambda rng: (0.0, 10.0), np.random.default_rng(3))
    while guard.allows(1.0):
        pass
    while not guard.allows(1.0):
        guard.idle(10.0, 10.0, 1.0)
    guard.spent(1.0, real)
    waited = 0
    while not guard.allows(1.0):
        guard.idle(10.0, 10.0, 1.0)
        waited += 1
    assert waited == pytest.approx(rounds, abs=2)


@pytest.mark.parametrize(("before", "rounds"), [([1.0], 126), ([30.0], 1126), ([1.0, 30.0, 1.0], 1126)])
def test_what_is_done_once_for_all_trials_does_not_forbid_the_next_ones(before: list[float], rounds: int) -> None:
    """A kernel was built in one of them: it counts as the one before, unless one of the last took as long. So after a
    restart."""
    guard = Guard()
    play(guard, 200, lambda rng: (0.0, 10.0), np.random.default_rng(3))
    for real in before:
        guard.spent(1.0, real)
    again = Guard()
    again.recall(guard.as_dict())
    while again.allows(1.0):
        pass
    while not again.allows(1.0):
        again.idle(10.0, 10.0, 1.0)
    again.spent(1.0, 30.0)
    waited = 0
    while not again.allows(1.0):
        again.idle(10.0, 10.0, 1.0)
        waited += 1
    assert waited == pytest.approx(rounds, abs=2)


@pytest.mark.parametrize(("brought", "expected"), [(1.6, 3), (5.0, 1)])
def test_a_trial_that_gained_is_followed_up_at_once(brought: float, expected: int) -> None:
    """Some that gain little end the parking, or a single one that gains much."""
    guard = Guard()
    play(guard, 200, lambda rng: (0.0, 10.0), np.random.default_rng(3))
    for _ in range(150):
        guard.idle(10.0, 10.0, 1.0)
    trials = 0
    while guard.parked:
        assert guard.allows(1.0)
        guard.observe(brought, 12.0, PLAIN_MS)
        trials += 1
    assert trials == expected
