"""The chi-square functions of the audit against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from localspec.audit.distribution import LEVEL, NUM_BINS, POWER, DistributionTest
from localspec.audit.statistics import chi_square_limit, chi_square_tail, power, shift_for_power
from localspec.sampling import Law


@pytest.mark.parametrize("freedom", [1, 2, 9, 19, 60, 400])
def test_tails_and_limits_are_scipys(freedom: int) -> None:
    for x in (0.0, 0.1, 1.0, 5.0, 19.0, 45.0, 90.0, 500.0):
        assert chi_square_tail(x, freedom) == pytest.approx(stats.chi2.sf(x, freedom), rel=1e-8, abs=1e-14)
    for level in (0.5, 1e-3, 1e-6):
        assert chi_square_limit(level, freedom) == pytest.approx(stats.chi2.isf(level, freedom), rel=1e-6)


@pytest.mark.parametrize("freedom", [1, 19, 60])
def test_power_is_that_of_scipys_noncentral_chi_square(freedom: int) -> None:
    limit = stats.chi2.isf(LEVEL, freedom)
    for shift in (0.0, 1.0, 20.0, 300.0):
        assert power(LEVEL, freedom, shift) == pytest.approx(
            stats.ncx2.sf(limit, freedom, shift) if shift else LEVEL, abs=1e-8
        )
    assert power(LEVEL, freedom, shift_for_power(LEVEL, freedom, POWER)) == pytest.approx(POWER, abs=1e-6)


def drawn(num_tokens: int, leak: float, seed: int) -> DistributionTest:
    """Tokens of random laws; a share of them is taken from the drafter's law instead."""
    rng = np.random.default_rng(seed)
    test = DistributionTest("drafter", 1.0, "rejection", num_drafted=1)
    ids = np.arange(100, 130, dtype=np.int32)
    for _ in range(num_tokens):
        p, q = rng.dirichlet(np.full(30, 0.3), 2)
        law, guessed = Law(ids, p), Law(ids[::-1], (0.7 * p + 0.3 * q)[::-1])
        token = int(rng.choice(guessed.ids, p=guessed.probs) if rng.random() < leak else rng.choice(ids, p=p))
        test.add(law, token, rng.random(), guessed)
    return test


@pytest.mark.slow
def test_tokens_of_their_law_pass_as_often_as_the_level_says() -> None:
    """40 trials, p-values of both orders against uniform; fixed seeds, false alarm 1 in 500 over fresh ones."""
    tests = [drawn(200, 0.0, seed) for seed in range(40)]
    for values in ([test.likely.p_value for test in tests], [test.overrated.p_value for test in tests]):
        assert stats.kstest(values, "uniform").pvalue > 1e-3


@pytest.mark.slow
def test_the_stated_power_is_the_real_one() -> None:
    """At the smallest leak that is said to be noticed 99 times of 100, at most 3 of 30 trials miss it; over fresh
    seeds the chance of more than 3 is 0.02%."""
    leak = drawn(600, 0.0, 0).overrated.smallest_leak
    assert 0.1 < leak <= 1.0
    missed = sum(drawn(600, leak, seed).overrated.p_value >= LEVEL for seed in range(1, 31))
    assert missed <= 3


def test_an_impossible_token_fails_at_once_and_few_tokens_say_nothing() -> None:
    test = drawn(300, 0.0, 1)
    assert test.passed and test.enough
    test.add(Law(np.array([1, 2], np.int32), np.array([0.5, 0.5])), 3, 0.5, None)
    assert not test.passed and "1 of them impossible" in test.line()
    few = drawn(NUM_BINS, 0.0, 1)
    assert few.passed and not few.enough and "too few" in few.line()
