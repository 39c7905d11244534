"""How far rows lie from guarded decoding's reference rows here: the bound below which a choice is re-checked.

The model writes a text of its own behind random tokens, at width 1. The same tokens are then decoded in passes of each
width, as trees where they can be verified, and in the reference's blocks; every pass is committed, so rows also differ
by what such passes leave in the cache. A choice flips when the difference of two scores changes its sign; so
the change of that difference is what is measured, for the two best tokens of each row, without noise and with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from localspec.exactness import Bound
from localspec.protocols import LanguageModel, Scores
from localspec.sampling import Tolerance
from localspec.schedule.passes import Clock, Passes
from localspec.types import Logits, TokenIds

WIDTHS = (2, 8, 4, 3, 6, 12, 5, 16, 24, 32)
"""Beside width 1, in the order in which trials take them."""

CONTEXTS = (300, 701, 20, 133)
"""A shallow one must not come first: llama.cpp's flash attention on a CPU gives all widths the same bits there and not
from 257 tokens on, and a bound of 0 would follow."""

FACTOR = 1.5
"""Safety: the tolerance over what was measured, for a user's text is another one."""

RARE = 1e-5
"""Share of choices that change by more than what is taken as measured, if the largest tenth of changes falls off
exponentially. The largest change that was seen counts at least."""

BLOCK = 16
LOOSE = 64
QUICK_SECONDS = 4.0

_WIDTHS_AT_ONCE = 2  # beside width 1; more tokens say more than the same ones in more widths
_MOST_TRIALS = 12
_TAIL = 0.1  # the largest changes, by which rarer ones are judged
_DRAWS = 3  # noisy choices per row


def measure(
    model: LanguageModel,
    *,
    seconds: float = QUICK_SECONDS,
    contexts: Sequence[int] = CONTEXTS,
    on_progress: Callable[[float, str], None] | None = None,
    clock: Clock = perf_counter,
) -> Bound:
    """The bound, from trials until the time is over, one at least. One sequence of the model must be free; it must be
    able to take tokens back."""
    known = model.capabilities
    block = min(BLOCK, known.max_width)
    end = clock() + seconds
    with Passes(model, seed=2, clock=clock) as passes:
        # all widths of a trial together run about three passes per token
        affordable = int(seconds * 1e3 / 3.0 / max(passes.time(1), 1e-3))
        loose = max(block, min(LOOSE, affordable, model.info.context_length // 2) // block * block)
        room = model.info.context_length - loose - block
        found = _Found(block, [width for width in WIDTHS if width <= min(known.max_width, loose)])
        fitting = [context for context in contexts if context <= room] or [max(room, 1)]
        for number in range(_MOST_TRIALS):
            context = fitting[number % len(fitting)]
            if number and clock() >= end:
                break
            if on_progress is not None:
                on_progress(number / _MOST_TRIALS, f"how far rows lie apart behind {context} tokens")
            passes.truncate(min(passes.length, context))
            if not passes.grow(context, end if number else float("inf")):
                break
            found.add_trial(passes, loose, number)
    return found.bound(loose)


class _Found:
    """The largest changes so far."""

    def __init__(self, block: int, widths: Sequence[int]) -> None:
        self._block, self._widths = block, widths
        self._rng = np.random.default_rng(3)
        self._changes: dict[int, list[NDArray[np.float64]]] = {}  # by width: some may be the reference's bits
        self._shift = 0.0
        self._num_rows, self._one = 0, np.zeros(2, np.int64)
        self._gaps: list[NDArray[np.float64]] = []

    def add_trial(self, passes: Passes, count: int, turn: int) -> None:
        """Compare `count` tokens that the model writes, in the widths whose turn it is."""
        ids, alone = passes.write(count, self._rng)
        want = _rows(partial(passes.walk, ids, self._block))
        pairs = self._pairs(want)
        self._compare(1, alone, want, pairs)
        for number in range(turn * _WIDTHS_AT_ONCE, (turn + 1) * _WIDTHS_AT_ONCE if self._widths else 0):
            width = self._widths[number % len(self._widths)]
            self._compare(width, _rows(partial(passes.walk, ids, width)), want, pairs)
        known = passes.model.capabilities
        if known.trees and known.exact_trees and known.max_width >= 8:
            self._compare(8, _rows(partial(passes.walk_trees, ids, 8)), want, pairs)

    def bound(self, loose: int) -> Bound:
        """What follows."""
        difference = max(_rare(np.concatenate(changes)) for changes in self._changes.values())
        tolerance = Tolerance(FACTOR * difference, FACTOR * self._shift)
        gaps = np.concatenate(self._gaps)
        rows, other = (int(count) for count in self._one)
        close = float(np.mean(gaps <= tolerance.difference))
        return Bound(tolerance, self._block, loose, tuple(sorted(self._changes)), self._num_rows, (rows, other), close)

    def _pairs(self, want: Logits) -> list[TokenIds]:
        """Per draw [T, 2] the best two tokens of each row; the first draw is without noise."""
        draws = []
        for draw in range(1 + _DRAWS):
            scores = want.astype(np.float64)
            if draw:
                scores += self._rng.gumbel(size=scores.shape)
            best = np.argpartition(-scores, 1, axis=1)[:, :2]
            values = np.take_along_axis(scores, best, axis=1)
            self._gaps.append(np.abs(values[:, 0] - values[:, 1]))
            draws.append(best.astype(np.int32))
        return draws

    def _compare(self, width: int, rows: Logits, want: Logits, pairs: Sequence[TokenIds]) -> None:
        count = len(rows)
        apart = rows.astype(np.float64) - want[:count]
        for best in pairs:
            changes = np.take_along_axis(apart, best[:count], axis=1)
            self._changes.setdefault(width, []).append(np.abs(changes[:, 0] - changes[:, 1]))
            self._shift = max(self._shift, float(np.abs(changes).max(initial=0.0)))
        self._num_rows += count
        if width == 1:
            other = np.count_nonzero(rows.argmax(axis=1) != want[:count].argmax(axis=1))
            self._one += (count, int(other))


def _rare(changes: NDArray[np.float64]) -> float:
    """What changes exceed as seldom as `RARE`, and the largest at least."""
    common = float(np.quantile(changes, 1.0 - _TAIL))
    excess = float(np.mean(changes[changes >= common] - common))
    return max(float(changes.max()), common + excess * math.log(_TAIL / RARE))


def _rows(walk: Callable[[Callable[[int, Scores], None]], None]) -> Logits:
    """[T, V] the rows that a walk shows."""
    parts: list[Logits] = []
    walk(lambda _, scores: parts.append(np.array(scores.rows(range(scores.num_rows)))))
    return np.concatenate(parts)
