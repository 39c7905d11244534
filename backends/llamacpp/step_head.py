"""Heads that guess token by token: EAGLE-3, and the MTP layer inside a target's own file.

Each entry of their memory is a pair: the target's state at a position and the token behind it, from which they tell
the token after that. So the state of the newest committed token waits for its partner, the anchor. A guess is paired
with the head's own state of its parent. Trees are grown by sequence ids, as in the target's cache (`state.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localspec.host_scores import HostScores
from localspec.protocols import HeadInfo, Scores, Tokens
from localspec.types import Logits, NodeIndices, Probabilities, TokenIds

from .companion import Companion, SavedCompanion, Waiting
from .head import CellCompanion, LlamaHead
from .head_context import HeadContext
from .memory import Memory, Pass
from .state import LlamaSaved, LlamaState
from .taps import Features, Taps

_NUM_RECENT = 512
"""States that are kept for a sequence that is cut: the last one left wants another partner then. Cut further back, its
pair stays as it was, with the token that stood there."""

Encode = Callable[[HeadContext, Features], Features]
"""[T, E] states that the head pairs with tokens, of the target's features [T, W]; at most a pass of them."""


class StepCompanion(CellCompanion):
    """Committed tokens and features wait until a pass is full of them, or guesses are wanted. recent: the last states
    that were read, [E] each; the very last one waits for its token."""

    head: StepHead

    def __init__(self, head: StepHead, cells: LlamaState, num_missing: int, recent: Sequence[Features]) -> None:
        self.head, self.cells, self.num_missing = head, cells, num_missing
        self._recent = deque(recent, _NUM_RECENT)
        self._tokens: TokenIds = np.zeros(0, np.int32)
        self._waiting = Waiting(head.taps.width)
        self._states: list[Features] = []  # [E] of the pending pairs, the head's own

    @property
    def end(self) -> int:
        """See `Companion`."""
        return self.num_missing + self._num_read + len(self._waiting)

    @property
    def _num_read(self) -> int:
        return self.cells.length + bool(self._recent)

    def feed(self, tokens: TokenIds, features: Features) -> None:
        """See `Companion`."""
        self.drop_guesses()
        self._tokens = np.concatenate([self._tokens, tokens])
        self._waiting.add(features)
        most = self.context.max_batch
        while len(self._waiting) >= most:
            self._read(most)

    def drop_guesses(self) -> None:
        """Forget all pending pairs."""
        self.cells.keep(())
        self._states = []

    def _read(self, count: int) -> None:
        states = self.head.encode(self.context, self._waiting.first(count))
        tokens = self._tokens[:count]
        if self._recent:
            pairs, partners = tokens, np.concatenate([self._recent[-1][None], states[:-1]])
        else:  # the very first token has no state before it
            pairs, partners = tokens[1:], states[:-1]
        if len(pairs):
            self._run(pairs, np.arange(-1, len(pairs) - 1, dtype=np.int32), partners, scored=False)
            self.cells.keep(range(len(pairs)))
        self._recent.extend(states[-_NUM_RECENT:].copy())
        self._tokens = self._tokens[count:]
        self._waiting.drop(count)

    def start(self, anchor: int) -> Logits:
        """[1, V] the row behind the anchor. Before anything was read it is paired with zeros."""
        self.drop_guesses()
        if len(self._waiting):
            self._read(len(self._waiting))
        partner = self._recent[-1] if self._recent else np.zeros(self.context.width, np.float32)
        return self._run(np.array([anchor], np.int32), np.array([-1], np.int32), partner[None], scored=True)

    def extend(self, tokens: TokenIds, parents: Sequence[int]) -> Logits:
        """[N, V] rows behind guesses; a parent is a number among the pending pairs."""
        states = np.stack([self._states[parent] for parent in parents])
        return self._run(tokens, np.array(parents, np.int32), states, scored=True)

    def _run(self, tokens: TokenIds, parents: NodeIndices, states: Features, *, scored: bool) -> Logits:
        """Scored or not, all alike: the architectures make no difference between their rows."""
        own: list[Features] = []

        def decode(part: Pass) -> Logits:
            rows, next_states = self.context.run_pairs(part, states)
            own.extend(next_states.copy())
            return rows

        outputs: NDArray[np.int8] = np.full(len(tokens), int(scored), np.int8)
        self.cells.plan(tokens, parents, outputs)
        try:
            rows = self.cells.run(decode)
        except BaseException:
            self.cells.undo()
            raise
        self.cells.commit()
        self._states += own
        return rows

    @property
    def room(self) -> int:
        """How many more guesses can be fed; each could be a leaf, and be fed at once."""
        leaves = self.context.max_ids - 1 - max(0, self.cells.num_pending - 1)
        return max(0, min(leaves - 1, self.context.max_outputs))

    def truncate(self, length: int) -> None:
        """See `Companion`."""
        self.drop_guesses()
        kept = max(0, length - self.num_missing)
        waiting = max(0, kept - self._num_read)
        self._tokens = self._tokens[:waiting]
        self._waiting.cut(waiting)
        self.num_missing = min(self.num_missing, length)
        dropped = self._num_read - kept
        if dropped > 0:
            is_known = dropped < len(self._recent)
            recent = list(self._recent)[:-dropped] if is_known else []
            self._recent = deque(recent, _NUM_RECENT)
            self.cells.truncate(kept - 1 if is_known else kept)

    def save(self) -> SavedCompanion:
        """See `Companion`."""
        self.drop_guesses()
        if len(self._waiting):
            self._read(len(self._waiting))
        return _SavedSteps(self.head, self.cells.save(), self.num_missing, tuple(self._recent))


@dataclass(frozen=True, slots=True)
class _SavedSteps:
    head: StepHead
    cells: LlamaSaved
    offset: int
    recent: tuple[Features, ...]

    @property
    def num_bytes(self) -> int:
        return self.cells.num_bytes + sum(state.nbytes for state in self.recent)

    def open(self) -> Companion | None:
        if self.head.is_closed:
            return None
        cells = self.cells.open()
        assert isinstance(cells, LlamaState)
        return StepCompanion(self.head, cells, self.offset, self.recent)


class StepState:
    """`HeadState`: every `extend` is a pass."""

    def __init__(self, companion: StepCompanion, leave: Callable[[], None]) -> None:
        self._companion, self._leave = companion, leave
        self._born, self._closed = -1, False
        self._num_fed = 0

    @property
    def num_missing(self) -> int:
        """See `HeadState`."""
        return self._companion.num_missing

    @property
    def room(self) -> int:
        """How many more guesses can be fed."""
        return self._companion.room

    def start(self, anchor: int) -> Scores:
        """See `HeadState`."""
        if self._closed or self._companion.is_closed:
            raise ValueError("this head state is closed")
        self._num_fed = 0
        return self._scores(self._companion.start(anchor))

    def extend(self, tokens: Tokens, parents: Sequence[int]) -> Scores:
        """See `HeadState`."""
        if self._companion.context.generation[0] != self._born:
            raise ValueError("nothing was started since the sequence went on")
        first = self._num_fed
        wrong = next((parent for parent in parents if not -1 <= parent < first), None)
        if wrong is not None:
            raise ValueError(f"guesses of one call cannot have parent {wrong}, {first} were fed before")
        ids = tokens.numpy()
        if len(ids) > self.room:
            raise ValueError(f"{len(ids)} guesses, and there is room for {self.room}")
        self._num_fed += len(ids)
        return self._scores(self._companion.extend(ids, [parent + 1 for parent in parents]))

    def _scores(self, rows: Logits) -> Scores:
        generation = self._companion.context.generation
        self._born = generation[0]
        return HostScores(rows, generation)

    def confidence(self) -> Probabilities | None:
        """None: such heads do not say."""
        return None

    def close(self) -> None:
        """See `HeadState`."""
        if not self._closed:
            self._closed = True
            self._leave()


class StepHead(LlamaHead):
    """encode: what becomes of features before they are paired."""

    def __init__(
        self, info: HeadInfo, encode: Encode, taps: Taps, target: Memory, memory: Memory, on_close: Callable[[], None]
    ) -> None:
        super().__init__(info, taps, target, memory, on_close)
        self.encode = encode

    def _begin(self, cells: LlamaState, num_missing: int) -> Companion:
        return StepCompanion(self, cells, num_missing, ())

    def _beside(self, companion: Companion, leave: Callable[[], None]) -> StepState:
        assert isinstance(companion, StepCompanion)
        return StepState(companion, leave)
