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
    """Tokens of random laws; a share of them is taken greedily."""
    rng = np.random.default_rng(seed)
    test = DistributionTest("drafter", 1.0, "rejection", num_drafted=1)
    for _ in range(num_tokens):
        probs = rng.dirichlet(np.full(30, 0.3))
        law = Law(np.arange(100, 130, dtype=np.int32), probs)
        token = int(probs.argmax()) if rng.random() < leak else int(rng.choice(30, p=probs))
        test.add(law, 100 + token, rng.random())
    return test


def test_tokens_of_their_law_pass_as_often_as_the_level_says() -> None:
    """200 trials, p-values against uniform; fixed seeds, false alarm 1 in 1,000 over fresh ones."""
    values = [drawn(400, 0.0, seed).p_value for seed in range(200)]
    assert stats.kstest(values, "uniform").pvalue > 1e-3


@pytest.mark.slow
def test_the_stated_power_is_the_real_one() -> None:
    """At the smallest leak that is said to be noticed 99 times of 100, at most 5 of 100 trials miss it; over fresh
    seeds the chance of more than 5 is 0.05%."""
    leak = drawn(1000, 0.0, 0).smallest_leak
    assert 0.05 < leak < 0.35
    missed = sum(drawn(1000, leak, seed).passed for seed in range(1, 101))
    assert missed <= 5
    assert drawn(1000, leak / 4, 500).smallest_leak == pytest.approx(leak, rel=0.1)


def test_an_impossible_token_fails_at_once_and_few_tokens_say_nothing() -> None:
    test = drawn(300, 0.0, 1)
    assert test.passed and test.enough
    test.add(Law(np.array([1, 2], np.int32), np.array([0.5, 0.5])), 3, 0.5)
    assert not test.passed and "1 of them impossible" in test.line()
    assert not drawn(NUM_BINS, 0.0, 1).enough
