"""Where the rows of one pass stand in their sequence, and which cells each may see."""

from __future__ import annotations

from functools import cached_property

import mlx.core as mx
import numpy as np

from localspec.tree.mask import ancestor_mask, depths, is_chain
from localspec.types import BoolMask, NodeIndices, Positions


def chain(num_tokens: int) -> NodeIndices:
    """[T] parents of tokens that follow one another behind the committed ones."""
    return np.arange(-1, num_tokens - 1, dtype=np.int32)


class Layout:
    """One pass over the last `num_new` of a sequence's pending nodes.

    The cache holds the committed tokens, then one row per pending node in the order in which they
    were given; so a chain's row number is its position, and a tree's is not.
    """

    def __init__(self, num_committed: int, parents: NodeIndices, num_new: int) -> None:
        self.num_committed = num_committed
        self.num_new = num_new
        self._parents = parents
        self._masks: dict[int | None, mx.array] = {}

    def widened(self, num_new: int) -> Layout:
        """The same nodes, of which the last `num_new` are new."""
        return Layout(self.num_committed, self._parents, num_new)

    @cached_property
    def is_chain(self) -> bool:
        """Do all pending nodes follow one another?"""
        return is_chain(self._parents)

    @cached_property
    def _places(self) -> Positions:
        """[P] position of every pending node."""
        return self.num_committed + depths(self._parents)

    @property
    def places(self) -> Positions:
        """[T] positions of the new rows."""
        return self._places[len(self._parents) - self.num_new :]

    @property
    def positions(self) -> Positions | None:
        """[T] positions of the new rows, or None where they are simply the row numbers."""
        return None if self.is_chain else self.places

    @property
    def num_cells(self) -> int:
        """Rows in the cache once the new ones are there."""
        return self.num_committed + len(self._parents)

    def mask(self, window: int | None, as_array: bool, num_shown: int) -> mx.array | str | None:
        """[T, num_shown] true where a new row may see a cell, in the forms mlx-lm's attention takes: "causal", or
        None where a single row sees everything. Cells behind the last row are seen by none."""
        if window is not None and self.num_cells <= window:
            window = None
        if self.is_chain and window is None and num_shown == self.num_cells:
            if self.num_new == 1:
                return None
            if not as_array:
                return "causal"
        if window not in self._masks:
            unused = mx.zeros((self.num_new, num_shown - self.num_cells), mx.bool_)
            self._masks[window] = mx.concatenate([self._mask(window), unused], axis=1)
        return self._masks[window]

    def _mask(self, window: int | None) -> mx.array:
        seen = self._ancestors()
        if window is None:  # the committed part is all ones: made on the device, not sent there
            everything = mx.ones((self.num_new, self.num_committed), mx.bool_)
            return mx.concatenate([everything, mx.array(seen)], axis=1)
        return mx.array(self.seen(window))

    def seen(self, window: int | None) -> BoolMask:
        """[T, cells] true where a new row may see a cell."""
        places = np.concatenate([np.arange(self.num_committed, dtype=np.int32), self._places])
        near = np.ones((self.num_new, len(places)), np.bool_)
        if window is not None:
            near = places[len(places) - self.num_new :, None] - places[None] < window
        near[:, self.num_committed :] &= self._ancestors()
        return near

    def _ancestors(self) -> BoolMask:
        """[T, P] true where the column is the new row's ancestor or itself."""
        size = len(self._parents)
        if self.is_chain:
            return np.tri(self.num_new, size, size - self.num_new, dtype=np.bool_)
        return ancestor_mask(self._parents)[size - self.num_new :]
