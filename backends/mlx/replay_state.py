"""One sequence of a model whose state depends on the path by which it was reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from localspec.protocols import Tokens
from localspec.replay import History
from localspec.tree.mask import check_path
from localspec.types import NodeIndices, TokenIds

from .border import translated
from .layout import Layout, chain
from .memory import Snapshot, arrays_in, restore, snapshot, states_in
from .state import MlxState, Owner

_CHUNK = 512  # tokens per pass of a replay


class ReplayState(MlxState):
    """Dropping tokens goes back to a snapshot and runs what stays once more; pending nodes form a chain.

    There is a snapshot before each pass of pending nodes, so a drafter that grows its chain token by token
    never replays, and one at some of the committed lengths (`History`).
    """

    def __init__(
        self,
        caches: list[Any],
        run: Callable[[mx.array, list[Any], Layout], None],
        owner: Owner,
        on_fork: Callable[[MlxState], MlxState],
        on_close: Callable[[], None],
    ) -> None:
        super().__init__(caches, owner, on_fork, on_close)
        self._run = run
        self._states = list(states_in(caches))
        self._empty = snapshot(self._states)
        self._history: History[Snapshot] = History()
        self._noted: list[tuple[int, Tokens]] = []  # (number of the first node, tokens), ascending
        self._marks: list[tuple[int, Snapshot]] = []  # (pending nodes that it holds, snapshot), ascending
        self._num_replayed = 0

    @property
    def num_replayed(self) -> int:
        """Tokens that were run again so far because others were dropped."""
        return self._num_replayed

    # ------------------------------------------------------------ for the model

    def note(self, tokens: Sequence[Tokens]) -> None:
        """Tokens are about to be added. They may still be on the device, and are read when they are kept."""
        number = self.num_pending
        for segment in tokens:
            self._noted.append((number, segment))
            number += len(segment)

    def add(self, parents: NodeIndices) -> Layout:
        """Append pending nodes, which must go on the chain; returns their layout."""
        self._marks.append((self.num_pending, snapshot(self._states)))
        return super().add(parents)

    def forget(self, num_pending: int) -> None:
        """Drop the pending nodes from `num_pending` on; passes are forgotten whole."""
        while self._marks and self._marks[-1][0] >= num_pending:
            restore(self._states, self._marks.pop()[1])
        self._noted = [(number, tokens) for number, tokens in self._noted if number < num_pending]
        super().forget(num_pending)

    def arrays(self) -> list[mx.array]:
        """What must be computed for the state to exist."""
        return [*super().arrays(), *(array for state in self._states for array in arrays_in(vars(state)))]

    # ------------------------------------------------------------ protocol

    def keep(self, path: Sequence[int]) -> None:
        """Commit the beginning of the chain, drop the rest, replaying what was kept of a pass that is dropped
        in part. Raises ValueError for a non-path, and BackendError if a replay fails: `length` then says how
        many tokens are left."""
        self.check_open()
        nodes = [int(node) for node in path]
        check_path(self._parents, nodes)
        if not self._marks:
            return
        count, ids, length = len(nodes), self._pending_ids(), self._length
        whole = count == self.num_pending
        number, taken = (count, None) if whole else next(m for m in reversed(self._marks) if m[0] <= count)
        self._forget_pending()
        self._commit(ids[:number])
        if taken is not None:
            restore(self._states, taken)
            self._rewind(self._length)
        self._replay(ids[number:count])
        self._history.mark(snapshot(self._states))
        self.companions.keep(nodes, length)  # what the pass that was verified saw, not the replay

    def truncate(self, length: int) -> None:
        """Drop what is pending and everything from `length` on. Raises BackendError if a replay fails."""
        self.check_open()
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate {self._length} tokens to {length}")
        if length == self._length and not self._marks:
            return
        self._forget_pending()
        self.companions.truncate(length)
        mark = self._history.rewind(length)
        again = self._history.since(mark)
        self._length = mark.length if mark is not None else 0
        self._history.rewind(self._length)
        restore(self._states, mark.snapshot if mark is not None else self._empty)
        self._rewind(self._length)
        if len(again):
            self._replay(again)
            self._history.mark(snapshot(self._states))

    def copy_from(self, other: MlxState) -> None:
        """Become a copy of another state's committed tokens."""
        assert isinstance(other, ReplayState)
        super().copy_from(other)
        self._states = list(states_in(self.caches))
        self._history = other._history.copy()

    def close(self) -> None:
        """Give the memory back."""
        restore(self._states, self._empty)
        self._history = History()
        self._forget_pending()
        super().close()

    # ------------------------------------------------------------ inside

    def _pending_ids(self) -> TokenIds:
        """[P] the newest first: then the older ones are there too."""
        return np.concatenate([tokens.numpy() for _, tokens in reversed(self._noted)][::-1])

    def _forget_pending(self) -> None:
        self._marks, self._noted = [], []
        self._parents = self._parents[:0]

    def _commit(self, ids: TokenIds) -> None:
        self._history.extend(ids.tolist())
        self._length += len(ids)

    def _replay(self, ids: TokenIds) -> None:
        """Run committed tokens once more, as a chain behind what there is."""
        for start in range(0, len(ids), _CHUNK):
            part = ids[start : start + _CHUNK]
            layout = Layout(self._length, chain(len(part)), len(part))
            before = snapshot(self._states)
            try:
                with translated("replaying kept tokens"):
                    self._run(mx.array(part), self.caches, layout)
                    mx.async_eval(*self.arrays())
            except Exception:
                restore(self._states, before)
                self._rewind(self._length)
                self.companions.truncate(self._length)
                raise
            self._commit(part)
            self._num_replayed += len(part)
