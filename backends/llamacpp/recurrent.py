"""One sequence of a model with recurrent layers, whose state cannot forget its last tokens.

Sequence id WORK runs ahead; other ids hold snapshots of it at some committed lengths, which costs llama.cpp
a copy of the recurrent state (attention cells are shared). Dropping tokens makes WORK a copy of the newest
snapshot again, and the committed tokens behind that *wait*: they go along with the next pass, in front of its
own tokens. So a rejected guess costs a wider pass, not another one.

Rows must not depend on how often that happened. They do not, because recurrences run token by token whatever
the width, and because no token is ever run in a pass of one where a caller pads his (one width class, one
kernel). Padding that a caller hangs below his tokens is only run where the pass would else be too narrow, that
is where nothing waits: in plain decoding every second pass. It is then taken back, and its token waits for the
next pass, which needs no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localspec.replay import History, Mark
from localspec.tree.mask import check_path
from localspec.types import NodeIndices, TokenIds

from .companion import SavedCompanion, reopened
from .memory import Cache, Decode, Memory, Pass, Piece, State, T

NUM_SNAPSHOTS = 3
"""Older snapshots that are kept beside the newest, for going back further."""

NUM_IDS = NUM_SNAPSHOTS + 3
"""WORK, the newest snapshot, and one in the making."""

_MOST_WAITING = 4
"""More tokens than this are run by themselves and then remembered: else each later pass would run them again."""


@dataclass(slots=True)
class _Plan:
    """What one step will do. goes_back: WORK returns to the newest snapshot first.
    between: pending nodes to run before the new ones.  num_run: of the new ones, the rest is not run yet."""

    tokens: TokenIds
    parents: list[int]
    outputs: NDArray[np.int8]
    goes_back: bool
    between: list[int]
    num_run: int


class RecurrentState(State):
    """`SequenceState` whose rewinding costs a replay.

    Committed tokens are in the history; those behind its newest snapshot are waiting. tip is None: WORK equals
    the newest snapshot.  Otherwise WORK holds all committed tokens and the path to the pending node tip.
    """

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache)
        self._work = cache.take()
        self._history: History[int] = History(NUM_SNAPSHOTS)
        self._ids: set[int] = set()  # of snapshots
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._was_run: list[bool] = []
        self._num_fresh = 0  # committed tokens at the end that no pass has run yet
        self._tip: int | None = None
        self._num_replayed = 0
        self._plan: _Plan | None = None

    @property
    def length(self) -> int:
        """Number of committed tokens."""
        return len(self._history)

    @property
    def num_pending(self) -> int:
        """Number of pending nodes."""
        return len(self._parents)

    @property
    def num_replayed(self) -> int:
        """Tokens that were run again because others were dropped."""
        return self._num_replayed

    # ------------------------------------------------------------ growing

    def plan(self, tokens: TokenIds, parents: NodeIndices, outputs: NDArray[np.int8]) -> None:
        """Decide what to run for a chain below any pending node. Raises ValueError for anything else."""
        first, wanted = len(self._parents), parents.tolist()
        if wanted and not -1 <= wanted[0] < first:
            raise ValueError(f"node {first} cannot have parent {wanted[0]}")
        if wanted[1:] != list(range(first, first + len(wanted) - 1)):
            raise ValueError(f"a model with recurrent layers runs chains only, not parents {wanted}")
        above = self._path(wanted[0]) if wanted else []
        goes_back = self._tip is not None and self._tip not in above
        between = above if goes_back or self._tip is None else above[above.index(self._tip) + 1 :]
        scored = np.flatnonzero(outputs)
        num_run = int(scored[-1]) + 1 if len(scored) else len(wanted)
        if num_run == 1 and not between and not 0 < len(self._waiting(goes_back)) <= _MOST_WAITING:
            num_run = min(2, len(wanted))  # nothing would go along
        self._plan = _Plan(tokens, wanted, outputs, goes_back, between, num_run)

    def _path(self, node: int) -> list[int]:
        """Pending nodes from the root side down to `node`."""
        path: list[int] = []
        while node >= 0:
            path.append(node)
            node = self._parents[node]
        return path[::-1]

    def run(self, decode: Decode[T]) -> T:
        """What waits, what lies between, what is new; the answer is of the pass with the last."""
        plan = self._plan
        assert plan is not None
        if plan.goes_back:
            self._go_back()
        waiting = self._waiting(False)
        start = self.length - len(waiting)
        num_again = len(waiting) - self._num_fresh if len(waiting) else 0
        num_again += sum(self._was_run[node] for node in plan.between)
        if len(waiting) > _MOST_WAITING:
            alone = self._pass(waiting, start, np.zeros(len(waiting), np.int8))
            decode(alone)
            self._hear(waiting, alone)
            self._num_fresh = 0
            self._remember()
            start, waiting = self.length, waiting[:0]
        elif self._tip is not None:
            start += len(self._path(self._tip))
        before = [*waiting.tolist(), *(self._tokens[node] for node in plan.between)]
        tokens = np.array([*before, *plan.tokens[: plan.num_run].tolist()], np.int32)
        outputs = np.concatenate([np.zeros(len(before), np.int8), plan.outputs[: plan.num_run]])
        self._num_replayed += num_again
        whole = self._pass(tokens, start, outputs)
        rows = decode(whole)
        self._hear(waiting, whole)
        return rows

    def _pass(self, tokens: TokenIds, start: int, outputs: NDArray[np.int8]) -> Pass:
        recording = self._heard()
        features = None if recording is None else recording.space(len(tokens))
        positions = np.arange(start, start + len(tokens), dtype=np.int32)
        return Pass(tokens, positions, self._work, outputs, features)

    def _hear(self, waiting: TokenIds, done: Pass) -> None:
        """A pass that began with committed tokens has run: hand over what is new of them, leave the nodes' features
        for `commit`."""
        if self.recording is not None and done.features is not None:
            if len(waiting):
                self.cache.context.read_taps()
            self.recording.catch_up(waiting, done.features, self.length)
            self.recording.fill(done.features[len(waiting) :])

    def commit(self) -> None:
        """The planned nodes are pending now, and WORK has got to the last one that was run."""
        plan, self._plan = self._plan, None
        assert plan is not None
        first = len(self._parents)
        for node in plan.between:
            self._was_run[node] = True
        if self.recording is not None:
            heard = self.recording.newest
            for node, row in zip(plan.between, heard, strict=False):
                self.recording.put(node, row)
            self.recording.add(plan.tokens, heard[len(plan.between) :])
        self._tokens += plan.tokens.tolist()
        self._parents += plan.parents
        self._was_run += [index < plan.num_run for index in range(len(plan.parents))]
        if plan.num_run:
            self._tip, self._num_fresh = first + plan.num_run - 1, 0

    def undo(self) -> None:
        """The pass failed: WORK may be anywhere, so it goes back."""
        if self._plan is not None:
            self._plan = None
            self._go_back()

    # ------------------------------------------------------------ keeping and dropping

    def keep(self, path: Sequence[int]) -> None:
        """Commit one path of pending nodes, drop the others. Raises ValueError for a non-path."""
        self.check_open()
        nodes = list(path)
        self.cache.context.read_taps(needed=bool(nodes))  # may fail: nothing has changed yet
        check_path(np.array(self._parents, np.int32), nodes)
        tokens = [self._tokens[node] for node in nodes]
        held = self._path(self._tip) if self._tip is not None else []
        was_run = [self._was_run[node] for node in nodes]
        self._num_fresh = was_run.count(False) + (0 if any(was_run) else self._num_fresh)
        if held and held == nodes[: len(held)]:
            self._history.extend(tokens[: len(held)])
            self._remember()
            self._history.extend(tokens[len(held) :])
        else:
            if held:
                self._go_back()
            self._history.extend(tokens)
        self._tokens, self._parents, self._was_run, self._tip = [], [], [], None
        if self.recording is not None:
            self.recording.keep(nodes)

    def truncate(self, length: int) -> None:
        """Drop everything pending and all committed tokens from `length` on. Raises ValueError."""
        self.check_open()
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} tokens to {length}")
        self.keep(())
        dropped = self.length - length
        if dropped:
            self._history.rewind(length)
            self._num_fresh = max(0, self._num_fresh - dropped)
            self._go_back()
            self._forget_unused()
            if self.recording is not None:
                self.recording.truncate(length)

    def _newest(self) -> Mark[int] | None:
        return self._history.rewind(self.length)

    def _waiting(self, goes_back: bool) -> TokenIds:
        """[T] committed tokens that WORK does not hold, now or once it went back."""
        is_behind = goes_back or self._tip is None
        return self._history.since(self._newest()) if is_behind else np.zeros(0, np.int32)

    def _go_back(self) -> None:
        """Make WORK the newest snapshot again, or empty."""
        self.cache.context.remove(self._work)
        mark = self._newest()
        if mark is not None:
            self.cache.context.copy(mark.snapshot, self._work)
        self._tip = None

    def _remember(self) -> None:
        """WORK holds exactly the committed tokens: keep a snapshot."""
        snapshot = self.cache.take()
        self.cache.context.copy(self._work, snapshot)
        self._ids.add(snapshot)
        self._history.mark(snapshot)
        self._forget_unused()

    def _forget_unused(self) -> None:
        unused = self._ids.difference(self._history.snapshots)
        self.cache.empty(sorted(unused))
        self._ids -= unused

    def save(self) -> RecurrentSaved:
        """A copy of the committed tokens outside of llama.cpp; of the snapshots it gets the newest. Raises
        ValueError while nodes are pending."""
        self.check_open()
        if self._parents:
            raise ValueError("cannot copy while nodes are pending")
        mark = self._newest()
        pieces = self.cache.copied(self._work, mark.length) if mark is not None else []
        tokens = tuple(self._history.since(None).tolist())
        length = 0 if mark is None else mark.length
        return RecurrentSaved(
            self.cache.memory, tokens, length, tuple(pieces), self._num_fresh, self._saved_companions()
        )

    def fill(self, saved: RecurrentSaved) -> None:
        """Become what was saved; for an empty state only."""
        if saved.mark:
            self.cache.insert(self._work, saved.pieces)
            self._history.extend(saved.tokens[: saved.mark])
            self._remember()
        self._history.extend(saved.tokens[saved.mark :])
        self._num_fresh = saved.num_fresh
        self.recording = reopened(self.cache.memory.taps, saved.companions)


@dataclass(frozen=True, slots=True)
class RecurrentSaved:
    """Committed tokens, and the state at the first `mark` of them. `protocols.SavedState`."""

    memory: Memory
    tokens: tuple[int, ...]
    mark: int
    pieces: tuple[Piece, ...]
    num_fresh: int
    companions: tuple[SavedCompanion, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Of the state, and of what goes along with it."""
        return sum(piece.cells.num_bytes for piece in self.pieces) + sum(one.num_bytes for one in self.companions)

    def open(self) -> State:
        """A new sequence that holds them. Raises as `Memory.open`."""
        state = self.memory.open()
        assert isinstance(state, RecurrentState)
        try:
            state.fill(self)
        except BaseException:
            state.close()
            raise
        return state
