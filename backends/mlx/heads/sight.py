"""What the slots of a block see: the context's rows, which need not be all of its tokens, and each other."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from localspec.types import Positions

from ..cache import Pass


class Sight:
    """Of one block of B slots, worked out once for layers that are alike.

    places: [R] positions of the context's rows, ascending; the block's rows come behind them.  start: position of the
    first slot.  from_anchor: do windows count from there, or from each slot?
    """

    def __init__(self, current: Pass, places: Positions, start: int, size: int, from_anchor: bool) -> None:
        self.start = start
        self._current, self._places, self._size, self._from_anchor = current, places, size, from_anchor
        self._found: dict[tuple[int | None, bool], tuple[int, mx.array | None]] = {}

    def cells(self, window: int | None, causal: bool) -> tuple[int, mx.array | None]:
        """(the first cell that attention is given, [B, cells] true where a slot sees a cell from there on; None where
        it sees all)."""
        if (window, causal) not in self._found:
            self._found[window, causal] = self._cells(window, causal)
        return self._found[window, causal]

    def _cells(self, window: int | None, causal: bool) -> tuple[int, mx.array | None]:
        size, num_rows, current = self._size, len(self._places), self._current
        slots = np.arange(self.start, self.start + size)
        context, first = np.ones((size, num_rows), np.bool_), 0
        if window is not None:
            counted = np.full(size, self.start) if self._from_anchor else slots
            reach = window if self._from_anchor else window - 1
            context = self._places[None] >= counted[:, None] - reach
            seen = np.flatnonzero(context.any(axis=0))
            first = current.first_shown(int(seen[0]) if len(seen) else num_rows, size)
        block = slots[None] <= slots[:, None] if causal else np.ones((size, size), np.bool_)
        unused = np.zeros((size, current.num_shown(num_rows + size, size) - num_rows - size), np.bool_)
        mask = np.concatenate([context[:, first:], block, unused], axis=1)
        return first, None if mask.all() and not current.shows_blocks(size) else mx.array(mask)
