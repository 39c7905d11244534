"""The best tokens of a row of logits, with or without noise, looking at each logit once.

Rows are long (152k tokens) and few of their tokens matter, so everything starts from the best logit of
each group of 64 (`noise.py` has the groups): a token among the k best stands in a group whose best logit,
with the best noise of the group, is among the k best. The results are those of the whole formulas, bit by bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from localspec import noise
from localspec.types import Logits, TokenIds

_SLACK = np.float32(1e-3)  # more than rounding can lift a sum
_LOOK = 48  # groups opened at first, and 20 more for each token asked: seldom too few, and then a second look helps
_MEMBERS = (np.arange(noise.GROUP, dtype=np.int32) * noise.STRIDE)[:, None]


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
        best = piece[: levels * noise.STRIDE].reshape(levels, noise.STRIDE).max(axis=0)
        if rest:
            np.maximum(best[:rest], piece[levels * noise.STRIDE :], out=best[:rest])
        parts.append(best)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _at_least(
    row: Logits, groups: NDArray[np.integer], floors: NDArray[np.floating] | np.floating
) -> tuple[NDArray[np.int32], Logits]:
    """(ids, scores) of the tokens in some groups (ascending) that reach the floor (one for all, or one per group),
    in no order."""
    ids = (noise.first_of(groups) + _MEMBERS).reshape(-1)
    scores = row.take(ids, mode="clip")
    hits = (scores.reshape(noise.GROUP, -1) >= floors).reshape(-1).nonzero()[0]
    ids, scores = ids.take(hits), scores.take(hits)
    inside = ids < len(row)  # the last block may not be full
    return (ids, scores) if inside.all() else (ids[inside], scores[inside])


def top_ids(row: Logits, k: int) -> TokenIds:
    """[min(k, V)] ids of the best scores, best first, ties by lower id."""
    size = len(row)
    if k >= size:
        return best_first(row, np.arange(size))
    if noise.num_groups(size) <= 4 * k:
        return best_first(row, np.flatnonzero(row >= _kth(row, k)))[:k]
    maxima = group_maxima(row)
    floor = _kth(maxima, k)
    ids, scores = _at_least(row, (maxima >= floor).nonzero()[0], floor)
    return ids[np.lexsort((ids, -scores))[:k]]


def _kth(values: Logits, k: int) -> np.float32:
    """The k-th best value."""
    place = len(values) - k
    copy = values.copy()
    copy.partition(place)
    return np.float32(copy[place])


def gumbel_argmax(row: Logits, temperature: float, low_high: tuple[int, int]) -> int:
    """argmax_v of (row - max) / temperature + g(key, v), the lowest id among equals."""
    ids, sums, _ = _leaders(row, 1, temperature, low_high)
    return int(ids[sums == sums.max()].min())


def row_top(
    row: Logits, k: int, temperature: float = 0.0, low_high: tuple[int, int] | None = None
) -> tuple[TokenIds, Logits]:
    """([k] ids best first, [k] what they were ranked by) of a row: by logit, or with a temperature and a key
    by (logit - best) / temperature + noise (values have best / temperature added again). k at most V."""
    if temperature == 0.0:
        best = top_ids(row, k)
        return best, row[best]
    if low_high is None:
        raise ValueError("a noisy ranking needs a key per row")
    ids, sums, peak = _leaders(row, k, temperature, low_high)
    order = np.lexsort((ids, -sums))[:k]
    return ids[order], sums[order] + peak


def _leaders(row: Logits, k: int, temperature: float, low_high: tuple[int, int]) -> tuple[TokenIds, Logits, np.float32]:
    """(ids, noisy sums, best logit / temperature): at least the k best tokens, in no order."""
    inverse = np.float32(1.0 / temperature)
    maxima = group_maxima(row)
    peak = maxima.max()
    noises = noise.ceilings(low_high, len(maxima))
    bounds = (maxima - peak) * inverse
    bounds += noises  # no token of the group comes above this
    floor = _kth(bounds, min(_LOOK + 20 * k, len(bounds)))
    while True:
        groups = (bounds >= floor).nonzero()[0]
        ids, scores = _at_least(row, groups, (floor - noises[groups]) * np.float32(temperature) + (peak - _SLACK))
        sums = (scores - peak) * inverse + noise.gumbel(low_high, ids)
        if np.count_nonzero(sums >= floor + _SLACK) >= k or len(ids) == len(row):
            return ids, sums, peak * inverse
        floor = np.float32(_kth(sums, k) - 2 * _SLACK if len(sums) >= k else -np.inf)
