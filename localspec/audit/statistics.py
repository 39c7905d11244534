"""The chi-square test that the audit makes, and its power. Written out here because scipy, with which the tests
compare it, is a heavy thing to install for two functions."""

from __future__ import annotations

import math
from collections.abc import Callable

_TINY = 1e-300


def chi_square_tail(x: float, freedom: float) -> float:
    """P(X > x) for chi-square with `freedom` degrees of freedom: the upper regularised gamma function.

    Series below the mean, continued fraction (Lentz) above it: Numerical Recipes, section 6.2.
    """
    a, z = freedom / 2, x / 2
    if z <= 0:
        return 1.0
    scale = math.exp(-z + a * math.log(z) - math.lgamma(a))
    if z < a + 1:
        term = total = 1 / a
        n = a
        while abs(term) > total * 1e-16:
            n += 1
            term *= z / n
            total += term
        return 1.0 - total * scale
    b = z + 1 - a
    c, d = 1 / _TINY, 1 / b
    h = d
    for i in range(1, 10_000):
        step = -i * (i - a)
        b += 2
        d = 1 / _bounded(step * d + b)
        c = _bounded(b + step / c)
        h *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return scale * h


def _bounded(x: float) -> float:
    return x if abs(x) > _TINY else _TINY


def chi_square_limit(level: float, freedom: float) -> float:
    """The x with P(X > x) = level, by bisection."""
    low, high = 0.0, freedom + 10.0
    while chi_square_tail(high, freedom) > level:
        high *= 2
    return _root(lambda x: chi_square_tail(x, freedom) < level, low, high)


def power(level: float, freedom: float, shift: float) -> float:
    """Chance that a test at `level` notices a noncentrality of `shift`: a Poisson mixture of chi-squares."""
    limit, mean = chi_square_limit(level, freedom), shift / 2
    spread = 12 * math.sqrt(mean + 1) + 12
    total = 0.0
    for count in range(max(0, int(mean - spread)), int(mean + spread) + 1):
        weight = math.exp(-mean + count * math.log(mean) - math.lgamma(count + 1)) if mean else float(count == 0)
        total += weight * chi_square_tail(limit, freedom + 2 * count)
    return min(total, 1.0)


def shift_for_power(level: float, freedom: float, wanted: float) -> float:
    """The noncentrality that a test at `level` notices with chance `wanted`."""
    high = freedom + 10.0
    while power(level, freedom, high) < wanted:
        high *= 2
    return _root(lambda shift: power(level, freedom, shift) > wanted, 0.0, high)


def _root(beyond: Callable[[float], bool], low: float, high: float) -> float:
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return (low + high) / 2
