"""The caches of a model, one per open sequence, and what every sequence state has in common.

`LlamaModel.forward` drives a state in four calls: `plan` decides what will happen and changes nothing
in llama.cpp, `run` does it, then `commit` if every step of the pass succeeded, else `undo`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import TypeVar

from numpy import int8, int64
from numpy.typing import NDArray

from localspec.errors import BackendError
from localspec.protocols import SavedState
from localspec.types import Logits, NodeIndices, Positions, TokenIds

from .companion import Recording, SavedCompanion
from .native import Context, Saved
from .taps import Features, Taps


@dataclass(slots=True)
class Pass:
    """Tokens as llama.cpp wants them. ids: the sequence ids of each token, or the one that all have.
    outputs: 1 for scored tokens.  features: where their hidden states are written to, if anybody wants them."""

    tokens: TokenIds
    positions: Positions
    ids: list[list[int]] | int
    outputs: NDArray[int8]
    features: Features | None = None

    def part(self, places: slice | NDArray[int64]) -> Pass:
        """Some of its tokens; `outputs` may then be written to without changing the whole, and what is written to
        `features` is in the whole if they are a slice."""
        ids = self.ids
        if not isinstance(ids, int):
            ids = ids[places] if isinstance(places, slice) else [ids[place] for place in places.tolist()]
        features = None if self.features is None else self.features[places]
        return Pass(self.tokens[places], self.positions[places], ids, self.outputs[places].copy(), features)


MAX_IDS = 256
"""Sequence ids that llama.cpp has (LLAMA_MAX_SEQ)."""


@dataclass(frozen=True, slots=True)
class Rows:
    """[count, V] scored rows of a pass, which may still run: `fetch` waits for it."""

    count: int
    fetch: Callable[[], Logits]


T = TypeVar("T")
Decode = Callable[[Pass], T]
"""Runs a pass in the state's own context, and answers whatever the caller wants of it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Cells at positions start to end, as llama.cpp wrote them."""

    start: int
    end: int
    cells: Saved


class Cache:
    """The cells of one context and the sequence ids in it that are free."""

    def __init__(self, memory: Memory, context: Context) -> None:
        self.memory, self.context = memory, context
        self._all = tuple(range(context.max_ids - 1, -1, -1))
        self._free = list(self._all)

    def take(self) -> int:
        """A free id."""
        return self._free.pop()

    def take_for_leaf(self) -> int:
        """A free id, leaving one for `keep`. Raises BackendError when no other is left."""
        most = self.context.max_ids - 1
        if len(self._free) < 2:
            raise BackendError(
                "llama.cpp has no sequence id left for another branch",
                got=f"a pending tree with more than {most} leaves",
                expected=f"at most {most}",
                fix="Use trees with fewer leaves."
                if most >= MAX_IDS - 1
                else f"Load the model with trees=True for {MAX_IDS - 1} leaves, or use trees with fewer leaves.",
            )
        return self._free.pop()

    def empty(self, ids: Sequence[int]) -> None:
        """Forget the cells of these ids and take the ids back."""
        for one in ids:
            self.context.remove(one)
        self._free.extend(ids)

    def reset(self) -> None:
        """Forget all cells; every id is free again."""
        taken = set(self._all) - set(self._free)
        for one in taken:
            self.context.remove(one)
        self._free = list(self._all)

    def copied(self, source: int, end: int, start: int = 0) -> list[Piece]:
        """The cells of an id at positions `start` to `end`, outside of llama.cpp.

        In pieces no longer than a sliding window: of longer ones llama.cpp would leave out what the last
        token does not see, and a rewind would miss it.
        """
        step = self.context.window or max(1, end - start)
        bounds = [start, *range((start // step + 1) * step, end, step), end]
        pieces = []
        for first, last in pairwise(bounds):
            carrier = self.take()
            self.context.share(source, carrier, last, first)
            pieces.append(Piece(first, last, self.context.save(carrier)))
            self.empty([carrier])
        return pieces

    def insert(self, target: int, pieces: Sequence[Piece]) -> None:
        """Put copied cells behind those that `target` has, side by side and in order."""
        for piece in pieces:
            carrier = self.take()
            self.context.restore(carrier, piece.cells)
            self.context.share(carrier, target, piece.end, piece.start)
            self.empty([carrier])

    def give_back(self, ids: Sequence[int]) -> None:
        """Take back ids that own no cells."""
        self._free.extend(ids)


class State(ABC):
    """What both kinds of `SequenceState` share: a cache of their own, and the calls of a forward.

    recording: what a trained head wants to know of it, once one was opened for it.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.closed = False
        self.recording: Recording | None = None

    @property
    @abstractmethod
    def length(self) -> int:
        """Number of committed tokens."""

    @property
    @abstractmethod
    def num_pending(self) -> int:
        """Number of pending nodes."""

    @property
    @abstractmethod
    def num_replayed(self) -> int:
        """Tokens that were run again because others were dropped."""

    def check_open(self) -> None:
        """Raise ValueError once the state or its model is closed."""
        if self.closed or self.cache.context.is_closed:
            raise ValueError("this state is closed")

    @abstractmethod
    def plan(self, tokens: TokenIds, parents: NodeIndices, outputs: NDArray[int8]) -> None:
        """Decide how new nodes [T] will lie in the cache. Raises ValueError, BackendError."""

    @abstractmethod
    def run(self, decode: Decode[T]) -> T:
        """Run what was planned; what `decode` answers for the pass with the scored rows."""

    @abstractmethod
    def commit(self) -> None:
        """The planned nodes are pending now."""

    @abstractmethod
    def undo(self) -> None:
        """The forward failed: nothing that was planned has happened. Without a plan, nothing to do."""

    @abstractmethod
    def keep(self, path: Sequence[int]) -> None:
        """Commit one path of pending nodes, drop the others. Raises ValueError for a non-path."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Drop everything pending and all committed tokens from `length` on. Raises ValueError."""

    def wait(self) -> None:
        """Return once all passes have run. Raises ValueError."""
        self.check_open()
        self.cache.context.wait()

    @abstractmethod
    def save(self) -> SavedState:
        """A copy of the committed tokens outside of llama.cpp. Raises ValueError while nodes are pending."""

    def _heard(self) -> Recording | None:
        """The recording, if any head is still there to listen."""
        if self.recording is not None and not self.recording.is_heard():
            self.recording = None
        return self.recording

    def _saved_companions(self) -> tuple[SavedCompanion, ...]:
        return () if self.recording is None else self.recording.save()

    def fork(self) -> State:
        """An independent copy of the committed tokens. Raises ValueError while nodes are pending."""
        copy = self.save().open()
        assert isinstance(copy, State)
        return copy

    def close(self) -> None:
        """Empty the cache and give it back. Twice does nothing."""
        if self.closed:
            return
        self.closed = True
        if self.recording is not None:
            self.recording.close()
        if not self.cache.context.is_closed:
            self.cache.reset()
            self.cache.memory.release(self.cache)


class Memory:
    """All caches of a model, one per open sequence, made when first needed and kept for the next one.

    Sequences do not share a cache: attention sums over cells in the order in which they lie, so the
    same tokens in other cells give other last bits.
    """

    def __init__(
        self, make_context: Callable[[], Context], num_sequences: int, make_state: Callable[[Cache], State]
    ) -> None:
        self._make_context, self._make_state = make_context, make_state
        self._num_sequences = num_sequences
        self._num_open = 0
        self._wanted: list[Taps] = []
        self._always_listens = False
        self.taps: Taps | None = None
        self._caches = [Cache(self, make_context())]  # the first at once: memory may be too small
        self._idle = list(self._caches)

    def open(self) -> State:
        """A new, empty sequence. Raises BackendError when all are in use, OutOfMemoryError."""
        if self._num_open >= self._num_sequences:
            raise self.all_in_use()
        if not self._idle:
            context = self._make_context()
            context.tap(self.taps)
            context.always_listens = self._always_listens
            self._caches.append(Cache(self, context))
            self._idle.append(self._caches[-1])
        self._num_open += 1
        return self._make_state(self._idle.pop())

    @property
    def num_open(self) -> int:
        """Sequences that are open."""
        return self._num_open

    def want(self, taps: Taps) -> None:
        """Have these hidden states kept, too, in every context where somebody listens; for a memory without open
        sequences."""
        self._wanted.append(taps)
        self._tap(reduce(Taps.joined, self._wanted))

    def want_no_more(self, taps: Taps) -> None:
        """One of those who wanted them is gone. Once all are nothing is kept any more; before that the others' places
        in a row stay as they are."""
        self._wanted.remove(taps)
        if not self._wanted:
            self._tap(None)

    def always_listen(self, always: bool = True) -> None:
        """Have hidden states kept in every pass, whoever wants them, as long as a head is there."""
        self._always_listens = always
        for cache in self._caches:
            cache.context.always_listens = always

    def _tap(self, taps: Taps | None) -> None:
        self.taps, self._always_listens = taps, False
        for cache in self._caches:
            if not cache.context.is_closed:
                cache.context.tap(taps)

    @property
    def context(self) -> Context:
        """One of its contexts; there is one from the start."""
        return self._caches[0].context

    def all_in_use(self) -> BackendError:
        """The error for one sequence too many."""
        return BackendError(
            "too many open sequences",
            got=self._num_sequences + 1,
            expected=f"at most {self._num_sequences}",
            fix="Close one, or load the model with a larger num_sequences.",
        )

    def release(self, cache: Cache) -> None:
        """A sequence was closed; its cache serves the next one."""
        self._num_open -= 1
        self._idle.append(cache)

    def close(self) -> None:
        """Free all contexts."""
        for cache in self._caches:
            cache.context.close()
