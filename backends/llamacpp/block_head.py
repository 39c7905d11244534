"""Heads that guess a block in one pass: DSpark, DFlash, JetSpec, DFlash 2 (llama.cpp's `dflash` architecture).

The companion keeps keys and values of committed tokens, made of the target's features, in a context of its own. A
block is [anchor, mask, mask, ...] behind them; its cells are dropped as soon as its rows are there.

Positions are counted from where the companion began. Rotation knows distances only, so that is the same to the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localspec.host_scores import HostScores
from localspec.protocols import HeadInfo, Scores, Tokens
from localspec.types import Logits, Probabilities, TokenIds

from .block_rows import Confidence, Place, Rows
from .companion import Companion, SavedCompanion, Waiting
from .head import CellCompanion, LlamaHead
from .head_context import zeros
from .memory import Memory, Pass
from .state import LlamaSaved, LlamaState
from .taps import Features, Taps

ROOM = 1 << 16
"""Guesses cost no cells, so there is no end to them."""


@dataclass(frozen=True, slots=True)
class Block:
    """size: slots of a pass.  first: the slot that guesses the token behind the anchor.  mask: the token of the
    others.  make_rows: from anchor, logits and hidden rows.  confidence: where the head has it."""

    size: int
    first: int
    mask: int
    needs_hidden: bool
    make_rows: Callable[[int, Logits, Features | None], Rows]
    confidence: Confidence | None

    @property
    def levels(self) -> int:
        """Slots that guess."""
        return self.size - self.first


class BlockCompanion(CellCompanion):
    """Features wait until a pass is full of them, or a block wants to be guessed."""

    head: BlockHead

    def __init__(self, head: BlockHead, cells: LlamaState, num_missing: int) -> None:
        self.head, self.cells, self.num_missing = head, cells, num_missing
        self._waiting = Waiting(head.taps.width)

    @property
    def end(self) -> int:
        """See `Companion`."""
        return self.num_missing + self.cells.length + len(self._waiting)

    def feed(self, tokens: TokenIds, features: Features) -> None:
        """See `Companion`."""
        self._waiting.add(features)
        most = self.context.max_batch
        while len(self._waiting) >= most:
            self._read(most)

    def flush(self) -> None:
        """Nothing waits any more."""
        if len(self._waiting):
            self._read(len(self._waiting))

    def _read(self, count: int) -> None:
        chunk = self._waiting.first(count)
        _pass(self.cells, zeros(count), np.zeros(count, np.int8), lambda part: self.context.read_states(part, chunk))
        self.cells.keep(range(count))
        self._waiting.drop(count)

    def guess(self, anchor: int) -> Rows:
        """The rows of the block behind `anchor`."""
        self.flush()
        block, context = self.head.block, self.context
        tokens = np.full(block.size, block.mask, np.int32)
        tokens[0] = anchor
        found: list[tuple[Logits, Features | None]] = []

        def run(part: Pass) -> None:
            found.append(context.run_tokens(part, hidden=block.needs_hidden))

        _pass(self.cells, tokens, np.ones(block.size, np.int8), run)
        self.cells.keep(())
        [(logits, hidden)] = found
        return block.make_rows(anchor, logits[block.first :], None if hidden is None else hidden[block.first :])

    def truncate(self, length: int) -> None:
        """See `Companion`."""
        kept = max(0, length - self.num_missing)
        self._waiting.cut(kept - self.cells.length)
        self.num_missing = min(self.num_missing, length)
        self.cells.truncate(min(kept, self.cells.length))

    def save(self) -> SavedCompanion:
        """See `Companion`."""
        self.flush()
        return _SavedBlock(self.head, self.cells.save(), self.num_missing)


@dataclass(frozen=True, slots=True)
class _SavedBlock:
    head: BlockHead
    cells: LlamaSaved
    offset: int

    @property
    def num_bytes(self) -> int:
        return self.cells.num_bytes

    def open(self) -> Companion | None:
        if self.head.is_closed:
            return None
        cells = self.cells.open()
        assert isinstance(cells, LlamaState)
        return BlockCompanion(self.head, cells, self.offset)


def _pass(cells: LlamaState, tokens: TokenIds, outputs: NDArray[np.int8], run: Callable[[Pass], None]) -> None:
    """Run a chain of pending nodes; if that fails there are none."""

    def decode(part: Pass) -> Logits:
        run(part)
        return np.zeros((0, 0), np.float32)

    cells.plan(tokens, np.arange(-1, len(tokens) - 1, dtype=np.int32), outputs)
    try:
        cells.run(decode)
    except BaseException:
        cells.undo()
        raise
    cells.commit()


class BlockState:
    """`HeadState`: guesses are places in the block, so feeding them costs next to nothing."""

    def __init__(self, companion: BlockCompanion, leave: Callable[[], None]) -> None:
        self._block, self._companion, self._leave = companion.head.block, companion, leave
        self._rows: Rows | None = None
        self._born = -1
        self._depths: list[int] = []
        self._scored: list[Place] = []  # of the rows scored last
        self._closed = False

    @property
    def num_missing(self) -> int:
        """See `HeadState`."""
        return self._companion.num_missing

    @property
    def room(self) -> int:
        """How many more guesses can be fed."""
        return ROOM

    def start(self, anchor: int) -> Scores:
        """See `HeadState`."""
        if self._closed or self._companion.is_closed:
            raise ValueError("this head state is closed")
        self._rows = self._companion.guess(anchor)
        self._born = self._companion.context.generation[0]
        self._depths, self._scored = [], [(0, anchor)]
        return HostScores(self._rows.at(self._scored), self._companion.context.generation)

    def extend(self, tokens: Tokens, parents: Sequence[int]) -> Scores:
        """See `HeadState`."""
        rows, generation = self._rows, self._companion.context.generation
        if rows is None or generation[0] != self._born:
            raise ValueError("nothing was started since the sequence went on")
        depths = list(self._depths)
        scored = []
        for token, parent in zip(tokens.numpy().tolist(), parents, strict=True):
            if not -1 <= parent < len(depths):
                raise ValueError(f"guess {len(depths)} cannot have parent {parent}")
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
            scored.append((depths[-1] + 1, token))
            if depths[-1] + 1 >= self._block.levels:
                raise ValueError(f"the head guesses {self._block.levels} levels, none behind level {depths[-1] + 1}")
        self._depths, self._scored = depths, scored
        return HostScores(rows.at(scored), generation)

    def confidence(self) -> Probabilities | None:
        """See `HeadState`."""
        if self._block.confidence is None or self._rows is None:
            return None
        return self._block.confidence.of(self._rows.hidden(self._scored), self._scored)

    def close(self) -> None:
        """See `HeadState`."""
        if not self._closed:
            self._closed, self._rows = True, None
            self._leave()


class BlockHead(LlamaHead):
    """block: what its file says about blocks."""

    def __init__(
        self, info: HeadInfo, block: Block, taps: Taps, target: Memory, memory: Memory, on_close: Callable[[], None]
    ) -> None:
        super().__init__(info, taps, target, memory, on_close)
        self.block = block

    def _begin(self, cells: LlamaState, num_missing: int) -> Companion:
        return BlockCompanion(self, cells, num_missing)

    def _beside(self, companion: Companion, leave: Callable[[], None]) -> BlockState:
        assert isinstance(companion, BlockCompanion)
        return BlockState(companion, leave)
