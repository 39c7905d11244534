"""A suffix array over texts that do not change any more: where some words occurred, and what followed.

Beside an automaton, which can grow, it takes a hundredth of the memory (eight bytes a token and the tokens
themselves), and its counts are the widths of its intervals. Source: Manber and Myers (1990), with prefix doubling up
to a bounded depth.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localspec.types import TokenIds

_WIDTH = 4  # bytes of a token: big-endian, so that bytes compare as the numbers do
_SEAM = 0xFFFF_FFFF  # behind each text, and never asked for
_MOST_LOOKED_AT = 256


@dataclass(frozen=True, slots=True)
class Found:
    """Occurrences of some words: an interval of the array, and how many tokens they have in common."""

    low: int
    high: int
    length: int

    def __len__(self) -> int:
        """How often they occur."""
        return self.high - self.low


class SuffixArray:
    """Suffixes of `texts`, oldest first, in the order of their first `depth` tokens. Longer words are not found."""

    def __init__(self, texts: Sequence[TokenIds], depth: int = 64) -> None:
        self.depth = depth
        seam = np.array([_SEAM], np.uint32)
        parts = [part for text in texts for part in (text.astype(np.uint32), seam)]
        self._tokens: NDArray[np.uint32] = np.concatenate(parts) if parts else np.zeros(0, np.uint32)
        self._bytes = self._tokens.astype(">u4").tobytes()
        self._order = _sorted(self._tokens, depth)

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self._tokens) - int(np.count_nonzero(self._tokens == _SEAM))

    def find(self, words: TokenIds) -> Found:
        """All occurrences of at most `depth` tokens, in O(log T)."""
        wanted = words.astype(">u4").tobytes()
        low, high = self._range(wanted, 0, len(self._order), 0)
        return Found(low, high, len(words))

    def longest(self, words: TokenIds, least: int = 1) -> Found | None:
        """The longest suffix of `words`, of at least that many tokens, that occurs; None if there is none."""
        low, high = least - 1, min(len(words), self.depth)
        best: Found | None = None
        while low < high:  # what occurs, occurs without its beginning, too
            middle = (low + high + 1) // 2
            found = self.find(words[len(words) - middle :])
            if len(found):
                low, best = middle, found
            else:
                high = middle - 1
        return best

    def follow(self, found: Found, token: int) -> Found | None:
        """Those occurrences that go on with a token; None if none does."""
        if found.length >= self.depth:
            return None
        wanted = token.to_bytes(_WIDTH, "big")
        low, high = self._range(wanted, found.low, found.high, found.length)
        return Found(low, high, found.length + 1) if low < high else None

    def followers(self, found: Found) -> tuple[dict[int, int], int]:
        """(token -> how often it follows, most frequent first and of equals the latest; of how many occurrences: all,
        or where there are very many a sample)."""
        if found.length >= self.depth:
            return {}, 0
        step = max(1, len(found) // _MOST_LOOKED_AT)
        starts = np.sort(self._order[found.low : found.high : step])[::-1]
        counts = Counter(self._tokens[starts + found.length].tolist())
        counts.pop(_SEAM, None)
        return dict(counts.most_common()), len(starts)

    def _range(self, wanted: bytes, low: int, high: int, skip: int) -> tuple[int, int]:
        """The part of an interval whose suffixes have these bytes behind `skip` tokens."""
        raw, order, size, ahead = self._bytes, self._order, len(wanted), _WIDTH * skip

        def key(place: int) -> bytes:
            start = _WIDTH * int(order[place]) + ahead
            return raw[start : start + size]

        places = range(low, high)
        return low + bisect_left(places, wanted, key=key), low + bisect_right(places, wanted, key=key)


def _sorted(tokens: NDArray[np.uint32], depth: int) -> NDArray[np.int32]:
    """[T] places in the order of the first `depth` tokens from there on."""
    size = len(tokens)
    if not size:
        return np.zeros(0, np.int32)
    _, rank = np.unique(tokens, return_inverse=True)
    rank = rank.astype(np.int64) + 1
    order = np.argsort(rank, kind="stable")
    done = 1
    while done < depth:
        behind = np.zeros(size, np.int64)
        behind[:-done] = rank[done:]
        key = rank * (size + 1) + behind
        order = np.argsort(key, kind="stable")
        ordered = key[order]
        rank = np.empty(size, np.int64)
        rank[order] = np.concatenate([[1], 1 + np.cumsum(ordered[1:] != ordered[:-1])])
        done *= 2
        if rank[order[-1]] == size:
            break
    return order.astype(np.int32)
