"""Many sequences in one context, each in a stream of cells of its own, so that one pass can run them all.

In a stream token p lies in cell p whatever the neighbours do, so attention sums as it does for the sequence alone.
Rows were bit-identical to those of a sequence alone where every sequence of a pass had the same number of tokens, at
least two; where numbers differed llama.cpp cut the pass into parts one token wide, and they were not. So sequences are
padded to the widest. A stream has no second id, so there are no trees, and none of the copies that sliding windows
need.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from localspec.types import TokenIds

from .memory import Cache, Memory, Pass, Piece, State
from .native import Context
from .taps import Taps

if TYPE_CHECKING:
    from .state import LlamaState

SLACK = 128
"""Cells of a stream beyond its context, for padding."""


class StreamCache(Cache):
    """One stream of a shared context: a single id."""

    def __init__(self, memory: Memory, context: Context, stream: int) -> None:
        super().__init__(memory, context)
        self.stream = stream
        self._all = (stream,)
        self._free = [stream]

    def take_for_leaf(self) -> int:
        """There is none: ValueError."""
        raise ValueError("this model was loaded to run many sequences in one pass, so it takes chains only")

    def copied(self, source: int, end: int, start: int = 0) -> list[Piece]:
        """All cells, outside of llama.cpp."""
        assert start == 0 and not self.context.window
        return [Piece(0, end, self.context.save(source))]

    def insert(self, target: int, pieces: Sequence[Piece]) -> None:
        """Put copied cells into an empty stream."""
        for piece in pieces:
            self.context.restore(target, piece.cells)


class Streams(Memory):
    """All streams of one context. The lowest free one is opened: a pass over neighbouring streams is one, over
    others several."""

    def __init__(self, context: Context, num_sequences: int, make_state: Callable[[Cache], State]) -> None:
        self._caches = [StreamCache(self, context, stream) for stream in range(num_sequences)]
        self._idle_streams = list(range(num_sequences))
        self._make_state = make_state
        self._num_sequences = num_sequences
        self._wanted: list[Taps] = []
        self.taps: Taps | None = None

    @property
    def num_open(self) -> int:
        """Sequences that are open."""
        return self._num_sequences - len(self._idle_streams)

    def open(self) -> State:
        """A new, empty sequence. Raises BackendError when all are in use."""
        if not self._idle_streams:
            raise self.all_in_use()
        return self._make_state(self._caches[heapq.heappop(self._idle_streams)])

    def release(self, cache: Cache) -> None:
        """A sequence was closed; its stream serves the next one."""
        assert isinstance(cache, StreamCache)
        heapq.heappush(self._idle_streams, cache.stream)

    def close(self) -> None:
        """Free the context."""
        self.context.close()


def joined(states: Sequence[LlamaState], least: int) -> tuple[Pass, list[NDArray[np.int64]]]:
    """What was planned for these states as one pass of equally wide parts, at least `least`, in the order of their
    streams; and per state the places of its own tokens in it. `features` has room for all if one state wants them."""
    passes = [state.planned() for state in states]
    width = max(least, *(len(one.tokens) for one in passes))
    streams = [one.ids for one in passes if isinstance(one.ids, int)]
    order = sorted(range(len(states)), key=streams.__getitem__)
    tokens: TokenIds = np.zeros((len(states), width), np.int32)
    positions, outputs = np.zeros_like(tokens), np.zeros(tokens.shape, np.int8)
    ids: list[list[int]] = []
    places: list[NDArray[np.int64]] = [np.zeros(0, np.int64)] * len(states)
    for row, index in enumerate(order):
        one, count = passes[index], len(passes[index].tokens)
        tokens[row, :count], outputs[row, :count] = one.tokens, one.outputs
        positions[row] = one.positions[0] + np.arange(width)
        ids += [[streams[index]]] * width
        places[index] = row * width + np.arange(count)
    wide = next((one.features.shape[1] for one in passes if one.features is not None), None)
    features = None if wide is None else np.empty((tokens.size, wide), np.float32)
    return Pass(tokens.reshape(-1), positions.reshape(-1), ids, outputs.reshape(-1), features), places
