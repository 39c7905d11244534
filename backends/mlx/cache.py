"""A layer's keys and values: committed rows, then one row per pending node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from .layout import Layout

BLOCK = 1024
"""Cells of a block. Reading some hundreds that a mask leaves out takes a GPU some hundredths of a millisecond, building
a kernel for another number of them 50 ms and more."""

if TYPE_CHECKING:
    from .together import JointLayout


def whole_blocks(num_cells: int, size: int) -> int:
    """That many cells, rounded up to whole blocks of `size`."""
    return -(-num_cells // size) * size


class Pass:
    """What the caches and the grafts of a model need to know of the forward pass in progress.

    blocks: attention over several rows is given whole blocks of cells, and a mask that leaves out the unused ones.
    Where its kernel is built for one number of cells, it then serves a whole block of tokens.
    """

    def __init__(self, blocks: bool = False) -> None:
        self.blocks = blocks
        self.layout: Layout | JointLayout | None = None
        self.positions: mx.array | None = None  # [T] or [B, T], where they are not the row numbers
        self.rows: mx.array | None = None  # [R] rows whose logits are wanted; None: all
        self.record: dict[int, mx.array] | None = None  # taps that were reached, where a pass is to be recorded
        self.hidden: mx.array | None = None  # stands for what the layers give, so that only the output matrix runs
        self.shift = 0  # added to the offset that models see; only ever set by the self-check

    def begin(self, layout: Layout | JointLayout, rows: tuple[int, ...] | None) -> None:
        """Set everything for one pass."""
        positions = layout.positions
        self.layout = layout
        self.positions = None if positions is None else mx.array(positions)
        self.rows = None if rows is None else mx.array(rows, mx.int32)

    def shows_blocks(self, num_new: int) -> bool:
        """Is attention over that many new rows given whole blocks?"""
        return self.blocks and num_new > 1

    def num_shown(self, num_rows: int, num_new: int) -> int:
        """Cells that attention is given, where `num_rows` are in use."""
        return whole_blocks(num_rows, BLOCK) if self.shows_blocks(num_new) else num_rows

    def first_shown(self, first: int, num_new: int) -> int:
        """The first cell that attention is given, where those before `first` are seen by none."""
        return first - first % BLOCK if self.shows_blocks(num_new) else first

    def end(self) -> None:
        """Forget the pass, so that nothing of it is kept alive."""
        self.layout = self.positions = self.rows = self.record = self.hidden = None


class TreeCache(KVCache):
    """mlx-lm's plain cache, with a mask that knows about trees and windows.

    Sliding-window layers get one too, at full length: a ring buffer cannot give dropped rows back.
    window: tokens that a row of this layer sees, where the model does not say so in its call.
    """

    def __init__(self, current: Pass, window: int | None = None) -> None:
        self._current = current
        self._window = window
        self.num_rows = 0
        super().__init__()

    @property
    def offset(self) -> int:
        """Where models believe the new rows begin: the number of rows before them."""
        return self.num_rows + self._current.shift

    @offset.setter
    def offset(self, value: int) -> None:
        self.num_rows = value

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append rows; all that attention is given."""
        self.append(keys, values)
        return self._first_cells(self._current.num_shown(self.num_rows, keys.shape[2]))

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Write rows behind the others. As mlx-lm's own, but for room in whole steps: it cuts off what is left of the
        last one before it adds others."""
        start, end = self.num_rows, self.num_rows + keys.shape[2]
        if self.keys is None or end > self.keys.shape[2]:
            step = BLOCK if self._current.blocks else KVCache.step
            self._reserve(whole_blocks(end, step), keys, values)
        cells: Any = self.keys
        cells[:, :, start:end] = keys
        cells = self.values
        cells[:, :, start:end] = values
        self.num_rows = end

    def _reserve(self, num_cells: int, keys: mx.array, values: mx.array) -> None:
        """Room for that many cells of rows like these."""
        num_more = num_cells - (0 if self.keys is None else self.keys.shape[2])
        room = [mx.zeros((*new.shape[:2], num_more, new.shape[3]), new.dtype) for new in (keys, values)]
        if self.keys is not None:
            room = [mx.concatenate([old, new], axis=2) for old, new in zip(self.arrays(), room, strict=True)]
        self.keys, self.values = room

    def keys_and_values(self) -> Any:
        """All rows, and the unused cells that the pass's mask leaves out, for layers that read another layer's."""
        layout = self._current.layout
        return self._first_cells(
            self.num_rows if layout is None else self._current.num_shown(self.num_rows, layout.num_new)
        )

    def _first_cells(self, num: int) -> Any:
        keys: Any = self.keys
        values: Any = self.values
        if num == keys.shape[2]:
            return keys, values
        return keys[:, :, :num], values[:, :, :num]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:  # noqa: N803 - as models call it
        """The mask of the N new rows."""
        layout = self._current.layout
        if layout is None or layout.num_new != N:
            raise ValueError(f"the model asked for a mask of {N} rows in a pass of {layout and layout.num_new}")
        num_shown = self._current.num_shown(layout.num_cells, layout.num_new)
        return layout.mask(window_size or self._window, return_array, num_shown)

    @property
    def start_position(self) -> int:
        """Where chunked layers believe their oldest row to stand: here none is ever given up."""
        return 0

    def maybe_trim_front(self) -> None:
        """Chunked layers ask for this before a pass; their masks leave out what is over."""

    def keep_rows(self, start: int, rows: mx.array | None, count: int) -> None:
        """Make `rows` (None: those that are there) the `count` rows from `start` on, and the last."""
        if rows is not None:
            for cells in self.arrays():
                cells[..., start : start + count, :] = mx.take(cells, rows, axis=2)
        self.num_rows = start + count

    def copy(self) -> TreeCache:
        """The same rows. Shares memory until either is written to: arrays are values in MLX."""
        other = TreeCache(self._current, self._window)
        other.num_rows = self.num_rows
        if self.keys is not None:
            other.keys, other.values = (mx.array(cells) for cells in self.arrays())
        return other

    def arrays(self) -> list[mx.array]:
        """What must be computed for this layer's rows to exist."""
        cells: Any = (self.keys, self.values)
        return [] if self.keys is None else list(cells)

    def drop(self) -> None:
        """Give the memory back."""
        self.keys = self.values = None
        self.num_rows = 0
