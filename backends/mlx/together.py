"""One pass over several sequences: their rows side by side on the batch axis, each as wide as the widest.

Models see one cache per layer as ever; it hands every sequence's new rows to that sequence's own cache, and gives
back all rows, shorter sequences padded at the end. What a row sees, and where it stands, is said by one mask and one
table of positions for all. The padding's rows are dropped after the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from localspec.types import NodeIndices

from .cache import TreeCache
from .layout import Layout


class JointLayout:
    """The layouts of B sequences, all with the same number of new rows."""

    is_chain = False

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self._layouts = layouts
        self.num_new = layouts[0].num_new
        self._masks: dict[int | None, mx.array] = {}

    @property
    def positions(self) -> NodeIndices:
        """[B, T] positions of the new rows."""
        return np.stack([layout.places for layout in self._layouts])

    @property
    def num_cells(self) -> int:
        """Rows in the longest cache once the new ones are there."""
        return max(layout.num_cells for layout in self._layouts)

    def mask(self, window: int | None, as_array: bool, num_shown: int) -> mx.array:
        """[B, 1, T, num_shown] true where a new row may see a cell of its own sequence."""
        if window not in self._masks:
            parts = [layout.seen(window) for layout in self._layouts]
            padded = [np.pad(part, ((0, 0), (0, num_shown - part.shape[1]))) for part in parts]
            self._masks[window] = mx.array(np.stack(padded)[:, None])
        return self._masks[window]


class JointCache:
    """One layer's caches of B sequences, as the model's layer sees them."""

    def __init__(self, lanes: Sequence[TreeCache]) -> None:
        self._lanes = lanes

    @property
    def offset(self) -> int:
        """Positions are not read from here; models that do so are found out by the self-check."""
        return max(lane.offset for lane in self._lanes)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append [B, H, T, D] rows; all rows, [B, H, cells, D]."""
        parts = [
            lane.update_and_fetch(keys[index : index + 1], values[index : index + 1])
            for index, lane in enumerate(self._lanes)
        ]
        return _stacked([part[0] for part in parts]), _stacked([part[1] for part in parts])

    def keys_and_values(self) -> tuple[mx.array, ...]:
        """All rows, for layers that read another layer's."""
        parts = [lane.keys_and_values() for lane in self._lanes]
        return tuple(_stacked(list(cells)) for cells in zip(*parts, strict=True))

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:  # noqa: N803 - as models call it
        """The mask of the N new rows of each."""
        return self._lanes[0].make_mask(N, return_array, window_size)


def _stacked(parts: Sequence[mx.array]) -> mx.array:
    """[B, H, cells, D] of B times [1, H, cells', D], padded at the end."""
    most = max(part.shape[2] for part in parts)
    return mx.concatenate([mx.pad(part, [(0, 0), (0, 0), (0, most - part.shape[2]), (0, 0)]) for part in parts])
