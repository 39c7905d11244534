"""One sequence: its caches, and the tree of nodes that are not committed yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from localspec.protocols import Tokens
from localspec.tree.mask import check_path
from localspec.types import NodeIndices

from .companion import Companions
from .layout import Layout
from .memory import copied, rows_in
from .scores import Ledger


class Owner(Protocol):
    """The model whose sequence it is."""

    @property
    def ledger(self) -> Ledger:
        """Whoever waits for the device does so by it."""
        ...


class MlxState:
    """`protocols.SequenceState`. Dropping nodes costs nothing; keeping a branch gathers its rows."""

    def __init__(
        self,
        caches: list[Any],
        owner: Owner,
        on_fork: Callable[[MlxState], MlxState],
        on_close: Callable[[], None],
    ) -> None:
        self.caches = caches
        self._rows = list(rows_in(caches))
        self.owner = owner
        self._on_fork = on_fork
        self._on_close = on_close
        self._length = 0
        self._parents: NodeIndices = np.zeros(0, np.int32)
        self._closed = False
        self.companions = Companions()

    @property
    def length(self) -> int:
        """Number of committed tokens."""
        return self._length

    @property
    def num_pending(self) -> int:
        """Number of pending nodes."""
        return len(self._parents)

    @property
    def parents(self) -> NodeIndices:
        """[P] parents of the pending nodes."""
        return self._parents

    @property
    def num_replayed(self) -> int:
        """Rewinding is free here."""
        return 0

    def check_open(self) -> None:
        """Raise ValueError once closed."""
        if self._closed:
            raise ValueError("this state is closed")

    # ------------------------------------------------------------ for the model

    def note(self, tokens: Sequence[Tokens]) -> None:
        """Tokens are about to be added; who replays remembers them."""

    def add(self, parents: NodeIndices) -> Layout:
        """Append pending nodes, whose rows the coming pass writes; returns their layout."""
        self._parents = np.concatenate([self._parents, parents])
        return Layout(self._length, self._parents, len(parents))

    def forget(self, num_pending: int) -> None:
        """Drop the pending nodes from `num_pending` on, whether their rows were written or not."""
        self._parents = self._parents[:num_pending]
        self.companions.forget(num_pending)
        self._rewind(self._length + num_pending)

    def arrays(self) -> list[mx.array]:
        """What must be computed for all rows to exist."""
        return [*(array for cache in self._rows for array in cache.arrays()), *self.companions.arrays()]

    # ------------------------------------------------------------ protocol

    def keep(self, path: Sequence[int]) -> None:
        """Commit one path, drop the rest. Does not wait for the device. Raises ValueError for a non-path."""
        self.check_open()
        nodes = [int(node) for node in path]
        check_path(self._parents, nodes)
        settled = next((i for i, node in enumerate(nodes) if i != node), len(nodes))  # rows already in place
        moved = nodes[settled:]
        start = self._length + settled
        rows = mx.array(moved, mx.int32) + self._length if moved else None
        for cache in self._rows:
            cache.keep_rows(start, rows, len(moved))
        self.companions.keep(nodes, self._length)
        self._length += len(nodes)
        self._parents = self._parents[:0]

    def truncate(self, length: int) -> None:
        """Drop what is pending and everything from `length` on."""
        self.check_open()
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate {self._length} tokens to {length}")
        self._parents = self._parents[:0]
        self._length = length
        self.companions.truncate(length)
        self._rewind(length)

    def wait(self) -> None:
        """Return once the device has computed all rows."""
        self.check_open()
        self.owner.ledger.fetch(*self.arrays())

    def fork(self) -> MlxState:
        """A copy that shares memory until written to. Raises ValueError while nodes are pending."""
        self.check_open()
        if len(self._parents):
            raise ValueError("cannot fork while nodes are pending")
        return self._on_fork(self)

    def save(self) -> MlxSaved:
        """A copy outside of the open sequences, which shares memory until either is written to. Raises ValueError
        while nodes are pending."""
        self.check_open()
        if len(self._parents):
            raise ValueError("cannot save while nodes are pending")
        held = object.__new__(type(self))
        vars(held).update(vars(self))
        held.copy_from(self)
        return MlxSaved(held, sum(array.nbytes for array in self.arrays()))

    def reopened(self) -> MlxState:
        """An open copy of a saved state."""
        return self._on_fork(self)

    def copy_from(self, other: MlxState) -> None:
        """Become a copy of another state's committed tokens."""
        self.caches = [copied(cache) for cache in other.caches]
        self._rows = list(rows_in(self.caches))
        self._length = other._length
        self.companions = other.companions.copy()

    def close(self) -> None:
        """Give the memory back."""
        if self._closed:
            return
        self._closed = True
        for cache in self._rows:
            cache.drop()
        self.companions.truncate(0)
        self._length, self._parents = 0, self._parents[:0]
        self._on_close()

    def _rewind(self, num_rows: int) -> None:
        for cache in self._rows:
            cache.num_rows = num_rows


@dataclass(frozen=True, slots=True)
class MlxSaved:
    """A state outside of the open ones. `protocols.SavedState`."""

    held: MlxState
    num_bytes: int

    def open(self) -> MlxState:
        """A new sequence that holds the same. Raises BackendError when all are in use."""
        return self.held.reopened()
