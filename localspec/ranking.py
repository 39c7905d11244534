"""The best tokens of a row of logits, with or without noise, looking at each logit once.

Rows are long (152k tokens) and few of their tokens matter, so everything starts from the best logit of
each group of 64 (`noise.py` has the groups): a token among the k best stands in a group whose best logit,
with the best noise of the group, is among the k best. The results are those of the whole formulas, bit by bit.

What is left after that one pass is short arrays, where each call of numpy costs more than its work: hence few calls,
in place, `argmax` for `max` and ids in ascending order, so that the first of equals is the lowest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from localspec import noise
from localspec.types import Logits, TokenIds

_SLACK = np.float32(1e-3)  # more than rounding can lift a sum
_LOOK = 68  # groups opened at first, and 20 more for each further token: seldom too few, and then a second look helps
_MEMBERS = np.arange(0, noise.BLOCK, noise.STRIDE)[:, None]


def best_first(row: Logits, ids: NDArray[np.integer]) -> TokenIds:
    """`ids`, ascending, ordered by score, ties by lower id."""
    return ids[np.argsort(-row[ids], kind="stable")].astype(np.int32)


def group_maxima(row: Logits) -> Logits:
    """[noise.num_groups(V)] the best score of each group."""
    parts = []
    for start in range(0, len(row), noise.BLOCK):
        piece = row[start : start + noise.BLOCK]
        levels, rest = divmod(len(piece), noise.STRIDE)
        if not levels:
            parts.append(piece)
            continue
        half = (levels + 1) // 2  # two long streams are read faster than one that is added to
        lower, upper = piece[: half * noise.STRIDE], piece[(levels - half) * noise.STRIDE : levels * noise.STRIDE]
        best = np.maximum.reduce(np.maximum(lower, upper).reshape(half, noise.STRIDE))
        if rest:
            np.maximum(best[:rest], piece[levels * noise.STRIDE :], out=best[:rest])
        parts.append(best)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _at_least(
    row: Logits, groups: NDArray[np.intp], floors: NDArray[np.floating] | np.floating
) -> tuple[NDArray[np.intp], Logits]:
    """(ids, scores) of the tokens in some groups (ascending) that reach the floor (one for all, or one per group), by
    ascending id."""
    size = len(row)
    ids = noise.first_of(groups) + _MEMBERS[: -(-size // noise.STRIDE)]
    scores = row.take(ids, mode="clip")
    hits = (scores >= floors).reshape(-1).nonzero()[0]
    ids, scores = ids.take(hits), scores.take(hits)
    if size > noise.BLOCK:  # members of the first block's groups come between those of the second's
        order = ids.argsort()
        ids, scores = ids.take(order), scores.take(order)
    if len(ids) and ids[-1] >= size:  # the last level may not be full
        inside = ids.searchsorted(size)
        ids, scores = ids[:inside], scores[:inside]
    return ids, scores


def reaching(row: Logits, floor: np.floating, maxima: Logits) -> tuple[TokenIds, Logits]:
    """(ids, scores) of the tokens that reach a floor, best first, ties by lower id. maxima: `group_maxima(row)`."""
    ids, scores = _at_least(row, (maxima >= floor).nonzero()[0], floor)
    order = (-scores).argsort(kind="stable")
    return ids.take(order).astype(np.int32), scores.take(order)


def top(row: Logits, k: int) -> tuple[TokenIds, Logits]:
    """([min(k, V)] ids, [min(k, V)] scores) of the best scores, best first, ties by lower id."""
    size = len(row)
    if noise.num_groups(size) <= 4 * k:
        ids = best_first(row, np.flatnonzero(row >= _kth(row, k)) if k < size else np.arange(size))[:k]
        return ids, row[ids]
    maxima = group_maxima(row)
    ids, scores = reaching(row, _kth(maxima, k), maxima)
    return ids[:k], scores[:k]


def top_ids(row: Logits, k: int) -> TokenIds:
    """[min(k, V)] ids of the best scores, best first, ties by lower id."""
    return top(row, k)[0]


def _kth(values: Logits, k: int) -> np.float32:
    """The k-th best value."""
    place = len(values) - k
    copy = values.copy()
    copy.partition(place)
    return np.float32(copy[place])


def gumbel_argmax(row: Logits, temperature: float, low_high: tuple[int, int]) -> int:
    """argmax_v of (row - max) / temperature + g(key, v), the lowest id among equals."""
    ids, sums, _ = _leaders(row, 1, temperature, low_high)
    return int(ids[sums.argmax()])


def row_top(
    row: Logits, k: int, temperature: float = 0.0, low_high: tuple[int, int] | None = None
) -> tuple[TokenIds, Logits]:
    """([k] ids best first, [k] what they were ranked by) of a row: by logit, or with a temperature and a key
    by (logit - best) / temperature + noise (values have best / temperature added again). k at most V."""
    if temperature == 0.0:
        return top(row, k)
    if low_high is None:
        raise ValueError("a noisy ranking needs a key per row")
    ids, sums, peak = _leaders(row, k, temperature, low_high)
    order = (-sums).argsort(kind="stable")[:k]
    return ids.take(order).astype(np.int32), sums.take(order) + peak


def _leaders(
    row: Logits, k: int, temperature: float, low_high: tuple[int, int]
) -> tuple[NDArray[np.intp], Logits, np.float32]:
    """(ids, noisy sums, best logit / temperature): at least the k best tokens, by ascending id."""
    inverse = np.float32(1.0 / temperature)
    maxima = group_maxima(row)
    peak = maxima[maxima.argmax()]
    noises = noise.ceilings(low_high, len(maxima))
    bounds = maxima - peak
    bounds *= inverse
    bounds += noises  # no token of the group comes above this
    floor = _kth(bounds, min(_LOOK + 20 * (k - 1), len(bounds)))
    while True:
        groups = (bounds >= floor).nonzero()[0]
        floors = floor - noises.take(groups)
        floors *= np.float32(temperature)
        floors += peak - _SLACK
        ids, sums = _at_least(row, groups, floors)
        sums -= peak
        sums *= inverse
        sums += noise.gumbel(low_high, ids)
        if np.count_nonzero(sums >= floor + _SLACK) >= k or len(ids) == len(row):
            return ids, sums, peak * inverse
        floor = np.float32(_kth(sums, k) - 2 * _SLACK if len(sums) >= k else -np.inf)
