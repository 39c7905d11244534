"""Speeds and ratios of speeds with confidence intervals, over prompts.

A prompt's time is the median over its repeats, which takes out most of a machine's hiccups. The intervals are
percentile bootstraps over the prompts (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13): they
say how far the figure would move with other prompts of the same kind. Ratios are paired: each resample takes the
same prompts for both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer: tokens, and the milliseconds they took."""

    num_tokens: int
    ms: float


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and the ends of its interval; no ends where a single prompt gives none."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.low is None else f" ({self.low:.2f} to {self.high:.2f})")


def per_prompt(repeats: Sequence[Timed]) -> Timed:
    """Median tokens, and that many times the median time of a token."""
    num_tokens = median(timed.num_tokens for timed in repeats)
    return Timed(round(num_tokens), num_tokens * median(timed.ms / timed.num_tokens for timed in repeats))


def speed(prompts: Mapping[str, Sequence[Timed]]) -> Interval:
    """Tokens per second over all prompts, each given with its repeats."""
    tokens, ms = _columns(prompts, list(prompts))
    picks = _picks(len(tokens))
    resampled = 1e3 * tokens[picks].sum(axis=1) / ms[picks].sum(axis=1)
    return _interval(1e3 * tokens.sum() / ms.sum(), resampled, len(tokens))


def ratio(mine: Mapping[str, Sequence[Timed]], other: Mapping[str, Sequence[Timed]]) -> Interval | None:
    """How many times as fast as the other, over the prompts that both have; None without any."""
    shared = [prompt for prompt in mine if prompt in other]
    if not shared:
        return None
    (tokens, ms), (other_tokens, other_ms) = _columns(mine, shared), _columns(other, shared)
    picks = _picks(len(shared))

    def of(take: NDArray[np.intp], axis: int) -> NDArray[np.float64]:
        fast = tokens[take].sum(axis=axis) / ms[take].sum(axis=axis)
        return np.asarray(fast / (other_tokens[take].sum(axis=axis) / other_ms[take].sum(axis=axis)))

    return _interval(float(of(np.arange(len(shared)), 0)), of(picks, 1), len(shared))


def _columns(
    prompts: Mapping[str, Sequence[Timed]], names: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[P] tokens and [P] milliseconds."""
    timed = [per_prompt(prompts[name]) for name in names]
    return np.array([one.num_tokens for one in timed], float), np.array([one.ms for one in timed])


def _picks(count: int) -> NDArray[np.intp]:
    """[NUM_RESAMPLES, P] which prompts each resample takes: the same ones every time."""
    return np.random.default_rng(0).integers(count, size=(NUM_RESAMPLES, count))


def _interval(value: float, resampled: NDArray[np.float64], count: int) -> Interval:
    if count < 2:
        return Interval(float(value))
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(resampled, [tail, 1.0 - tail])
    return Interval(float(value), float(low), float(high))
