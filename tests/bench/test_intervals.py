"""Speeds and intervals, on inputs whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from localspec.bench.intervals import Interval, Timed, per_prompt, ratio, speed


def test_equal_prompts_leave_no_doubt() -> None:
    prompts = {name: [Timed(50, 1000.0)] * 3 for name in "abc"}
    found = speed(prompts)
    assert found == Interval(50.0, pytest.approx(50.0), pytest.approx(50.0))  # type: ignore[arg-type]


def test_a_hiccup_in_one_repeat_changes_nothing() -> None:
    calm = {name: [Timed(10, 100.0), Timed(10, 100.0), Timed(10, 100.0)] for name in "ab"}
    hiccup = {name: [Timed(10, 100.0), Timed(10, 9000.0), Timed(10, 100.0)] for name in "ab"}
    assert speed(calm) == speed(hiccup)


def test_speed_is_all_tokens_over_all_time() -> None:
    """10 tokens in 1 s and 30 in 1 s: 20 a second, not the mean of anything else."""
    assert speed({"a": [Timed(10, 1000.0)], "b": [Timed(30, 1000.0)]}).value == 20.0


def test_two_prompts_can_be_drawn_in_three_ways() -> None:
    """A quarter of the resamples holds only the slow one and a quarter only the fast one, so the interval ends at
    their own speeds."""
    found = speed({"slow": [Timed(10, 1000.0)], "fast": [Timed(30, 1000.0)]})
    assert (found.low, found.high) == pytest.approx((10.0, 30.0))


def test_one_prompt_gives_no_interval() -> None:
    assert speed({"a": [Timed(10, 1000.0), Timed(10, 1200.0)]}) == Interval(pytest.approx(1e4 / 1100))  # type: ignore[arg-type]
    assert str(Interval(1.5)) == "1.50"


def test_a_ratio_is_paired() -> None:
    """Prompts differ tenfold in speed, but each is exactly twice as fast: the ratio has no spread."""
    plain = {str(i): [Timed(20, 100.0 * (i + 1))] for i in range(10)}
    fast = {str(i): [Timed(20, 50.0 * (i + 1))] for i in range(10)}
    found = ratio(fast, plain)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    assert (speed(plain).high or 0) - (speed(plain).low or 0) > 10.0


def test_a_ratio_takes_the_prompts_that_both_have() -> None:
    plain = {"a": [Timed(10, 100.0)], "b": [Timed(10, 1.0)]}
    found = ratio({"a": [Timed(10, 50.0)], "c": [Timed(10, 1.0)]}, plain)
    assert found is not None and found.value == 2.0
    assert ratio({"c": [Timed(10, 1.0)]}, plain) is None


def test_answers_of_other_lengths_count_by_the_token() -> None:
    assert per_prompt([Timed(10, 100.0), Timed(20, 200.0), Timed(30, 300.0)]) == Timed(20, 200.0)


def test_the_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """300 experiments of 20 prompts with known mean. Of a 95% interval at least 88% must hold it (a percentile
    bootstrap of 20 skewed values is known to reach about 92%) and not all of them. Fixed seed: no false alarm."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        ms = 100.0 * rng.lognormal(0.0, 0.4, 20)
        found = speed({str(i): [Timed(10, float(value))] for i, value in enumerate(ms)})
        truth = 1e3 * 10 / (100.0 * np.exp(0.4**2 / 2))
        assert found.low is not None and found.high is not None
        hits += found.low <= truth <= found.high
    assert 0.88 * 300 <= hits < 300
