"""One sequence in llama.cpp's cache, its pending tree included, by means of sequence ids.

A cell of the cache (one token's keys and values) belongs to any number of ids; a token sees the cells
that share an id with it. So each leaf of a tree has an id of its own, every node carries the ids of
all leaves below it, and no attention mask is needed. The first child of a node goes on with the
parent's id, further children borrow one. After `keep` the winning leaf's id simply becomes the
sequence's own and the others are emptied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from localspec.errors import BackendError
from localspec.tree.mask import check_path
from localspec.types import NodeIndices, Positions, TokenIds

from .companion import SavedCompanion, reopened
from .memory import Cache, Decode, Memory, Pass, Piece, State, T


@dataclass(slots=True)
class _Plan:
    """What one step will do to a state, decided before anything happens.

    ids: of each new token, or the one id of them all.  lines: per new node the id that runs through it.
    copies: (source, target, end) cells to share first.  borrowed: ids taken from the pool.
    """

    parents: list[int]
    depths: list[int]
    positions: Positions
    ids: list[list[int]] | int
    lines: list[int]
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    borrowed: list[int] = field(default_factory=list)


class LlamaState(State):
    """A state that forgets for free. Pending node i: parents[i], depths[i], and lines[i], an id through it."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache)
        self._id = cache.take()
        self._length = 0
        self._parents: list[int] = []
        self._depths: list[int] = []
        self._lines: list[int] = []
        self._borrowed: list[int] = []
        self._plan: _Plan | None = None
        self._tokens = np.zeros(0, np.int32)
        self._outputs = np.zeros(0, np.int8)

    @property
    def length(self) -> int:
        """Number of committed tokens."""
        return self._length

    @property
    def num_pending(self) -> int:
        """Number of pending nodes."""
        return len(self._parents)

    @property
    def num_replayed(self) -> int:
        """Rewinding is free here."""
        return 0

    # ------------------------------------------------------------ growing

    def plan(self, tokens: TokenIds, parents: NodeIndices, outputs: NDArray[np.int8]) -> None:
        """Decide how new nodes [T] will lie in the cache. Raises ValueError for a bad parent, BackendError."""
        self._plan = self._planned(parents)
        self._tokens, self._outputs = tokens, outputs

    def _planned(self, parents: NodeIndices) -> _Plan:
        first, count = len(self._parents), len(parents)
        wanted = parents.tolist()
        if wanted == list(range(first - 1, first - 1 + count)):  # a chain below the newest node: its id goes on
            line = self._lines[-1] if first else self._id
            depth = self._depths[-1] + 1 if first else 0
            depths = list(range(depth, depth + count))
            start = self._length + depth
            return _Plan(wanted, depths, np.arange(start, start + count, dtype=np.int32), line, [line] * count)
        return self._plan_tree(wanted)

    def _plan_tree(self, wanted: list[int]) -> _Plan:
        first = len(self._parents)
        parents, depths, lines = self._parents + wanted, list(self._depths), list(self._lines)
        has_child = set(self._parents)
        ids: list[list[int]] = []
        plan = _Plan(wanted, [], np.zeros(0, np.int32), ids, [])
        for number, parent in enumerate(wanted, first):
            if not -1 <= parent < number:
                self.cache.give_back(plan.borrowed)
                raise ValueError(f"node {number} cannot have parent {parent}")
            if parent in has_child:
                line = self._branch(plan, parents, depths, lines, parent)
            else:
                line = lines[parent] if parent >= 0 else self._id
                has_child.add(parent)
            lines.append(line)
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
            ids.append([line])
        plan.depths, plan.lines = depths[first:], lines[first:]
        plan.positions = np.array(plan.depths, np.int32) + np.int32(self._length)
        return plan

    def _branch(self, plan: _Plan, parents: list[int], depths: list[int], lines: list[int], parent: int) -> int:
        """Borrow an id for another child of `parent`: new ancestors will carry it, old cells get it by a copy."""
        try:
            line = self.cache.take_for_leaf()
        except BackendError:
            self.cache.give_back(plan.borrowed)
            raise
        assert isinstance(plan.ids, list)
        first, node = len(self._parents), parent
        while node >= first:
            plan.ids[node - first].append(line)
            node = parents[node]
        source, end = (lines[node], depths[node] + 1) if node >= 0 else (self._id, 0)
        plan.copies.append((source, line, self._length + end))
        plan.borrowed.append(line)
        return line

    def run(self, decode: Decode[T]) -> T:
        """One pass."""
        return decode(self.planned())

    def planned(self) -> Pass:
        """The pass that was planned, its old cells shared with the borrowed ids."""
        plan = self._plan
        assert plan is not None
        for source, target, end in plan.copies:
            self.cache.context.share(source, target, end)
        recording = self._heard()
        features = None if recording is None else recording.space(len(self._tokens))
        return Pass(self._tokens, plan.positions, plan.ids, self._outputs, features)

    def drop_padding(self) -> None:
        """Forget the cells behind the planned chain."""
        plan = self._plan
        assert plan is not None and isinstance(plan.ids, int)
        self.cache.context.remove(plan.ids, self._length + plan.depths[-1] + 1)

    def commit(self) -> None:
        """The tokens are in the cache: they are pending nodes now."""
        plan, self._plan = self._plan, None
        assert plan is not None
        self._parents += plan.parents
        self._depths += plan.depths
        self._lines += plan.lines
        self._borrowed += plan.borrowed
        if self.recording is not None:
            self.recording.add(self._tokens, self.recording.newest)

    def undo(self) -> None:
        """The pass failed: leave no cell behind."""
        plan, self._plan = self._plan, None
        if plan is None:
            return
        for line in dict.fromkeys(plan.lines):
            if line not in plan.borrowed:
                self.cache.context.remove(line, self._length + plan.depths[plan.lines.index(line)])
        self.cache.empty(plan.borrowed)

    # ------------------------------------------------------------ keeping and dropping

    def keep(self, path: Sequence[int]) -> None:
        """Commit one path of pending nodes, drop the others. Raises ValueError for a non-path."""
        self.check_open()
        nodes = list(path)
        self.cache.context.read_taps(needed=bool(nodes))  # may fail: nothing has changed yet
        is_first_chain = nodes == list(range(len(nodes))) and self._parents[: len(nodes)] == list(
            range(-1, len(nodes) - 1)
        )
        if not is_first_chain:  # else there is nothing to check, and no array to build
            check_path(np.array(self._parents, np.int32), nodes)
        if self._borrowed and not is_first_chain:
            self._move_together(nodes[-1], len(nodes))
        else:
            self._choose(self._lines[nodes[-1]] if nodes else self._id, len(nodes))
        self._length += len(path)
        self._parents, self._depths, self._lines, self._borrowed = [], [], [], []
        if self.recording is not None:
            self.recording.keep(nodes)

    def _choose(self, winner: int, count: int) -> None:
        """The winner's id becomes the sequence's own; nothing is copied."""
        if len(self._parents) > count:
            self.cache.context.remove(winner, self._length + count)
        if self._borrowed:
            self.cache.empty([one for one in (self._id, *self._borrowed) if one != winner])
        self._id = winner

    def _move_together(self, leaf: int, count: int) -> None:
        """Copy the path's cells out, drop everything pending, and put them behind the committed ones."""
        pieces = self.cache.copied(self._lines[leaf], self._length + count, self._length)
        self.cache.context.remove(self._id, self._length)
        self.cache.empty(self._borrowed)
        self.cache.insert(self._id, pieces)

    def truncate(self, length: int) -> None:
        """Drop everything pending and all committed tokens from `length` on. Raises ValueError."""
        self.check_open()
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate {self._length} tokens to {length}")
        self.keep(())
        if length < self._length:
            self.cache.context.remove(self._id, length)
            self._length = length
            if self.recording is not None:
                self.recording.truncate(length)

    def save(self) -> LlamaSaved:
        """A copy of the committed tokens outside of llama.cpp. Raises ValueError while nodes are pending."""
        self.check_open()
        if self._parents:
            raise ValueError("cannot copy while nodes are pending")
        pieces = self.cache.copied(self._id, self._length) if self._length else []
        return LlamaSaved(self.cache.memory, self._length, tuple(pieces), self._saved_companions())

    def fill(self, saved: LlamaSaved) -> None:
        """Become what was saved; for an empty state only."""
        self.cache.insert(self._id, saved.pieces)
        self._length = saved.length
        self.recording = reopened(self.cache.memory.taps, saved.companions)


@dataclass(frozen=True, slots=True)
class LlamaSaved:
    """Committed cells of a sequence. `protocols.SavedState`."""

    memory: Memory
    length: int
    pieces: tuple[Piece, ...]
    companions: tuple[SavedCompanion, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Of the cells, and of what goes along with them."""
        return sum(piece.cells.num_bytes for piece in self.pieces) + sum(one.num_bytes for one in self.companions)

    def open(self) -> State:
        """A new sequence that holds them. Raises as `Memory.open`."""
        state = self.memory.open()
        assert isinstance(state, LlamaState)
        try:
            state.fill(self)
        except BaseException:
            state.close()
            raise
        return state
