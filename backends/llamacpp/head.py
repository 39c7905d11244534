"""What all heads of this backend share: they are opened beside states of their target, and closed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from localspec.protocols import HeadInfo, HeadState, SequenceState

from .companion import Companion, Recording
from .head_context import HeadContext
from .memory import Memory, State
from .state import LlamaState
from .taps import Taps


class LlamaHead(ABC):
    """`DraftHead`. taps: what it reads of `target`, the target's memory.  memory: contexts for its companions.
    on_close: gives the rest back."""

    def __init__(
        self, info: HeadInfo, taps: Taps, target: Memory, memory: Memory, on_close: Callable[[], None]
    ) -> None:
        self.info, self.taps = info, taps
        self._target, self._memory, self._on_close = target, memory, on_close
        self.is_closed = False
        target.want(taps)

    def open(self, state: SequenceState) -> HeadState:
        """See `DraftHead`. Raises ValueError also while nodes are pending."""
        if self.is_closed:
            raise ValueError("this head is closed")
        if not isinstance(state, State) or state.cache.memory is not self._target:
            raise ValueError("this state belongs to another model")
        state.check_open()
        found = None if state.recording is None else state.recording.of(self)
        companion = self._join(state) if found is None else found
        return self._beside(companion, lambda: _leave(state, companion))

    def _join(self, state: State) -> Companion:
        if state.num_pending:
            raise ValueError("a head cannot be opened while nodes are pending")
        cells = self._memory.open()
        assert isinstance(cells, LlamaState)
        companion = self._begin(cells, state.length)
        if state.recording is None:
            assert self._target.taps is not None
            state.recording = Recording(self._target.taps)
        state.recording.join(companion)
        return companion

    @abstractmethod
    def _begin(self, cells: LlamaState, num_missing: int) -> Companion:
        """A companion for a sequence that is so long already."""

    @abstractmethod
    def _beside(self, companion: Companion, leave: Callable[[], None]) -> HeadState:
        """The state for one of these companions."""

    def close(self) -> None:
        """Give contexts and weights back; its companions hear nothing any more. Twice does nothing."""
        if not self.is_closed:
            self.is_closed = True
            self._memory.close()
            self._target.want_no_more(self.taps)
            self._on_close()


def _leave(state: State, companion: Companion) -> None:
    """The state goes on without this companion."""
    if companion.is_closed:
        return
    companion.close()
    if state.recording is not None:
        state.recording.is_heard()


class CellCompanion(Companion):
    """A companion whose memory is a sequence in a context of its own: an ordinary state of this backend."""

    head: LlamaHead
    cells: LlamaState

    @property
    def is_closed(self) -> bool:
        """See `Companion`."""
        return self.head.is_closed or self.cells.closed

    @property
    def context(self) -> HeadContext:
        """Where its cells are."""
        context = self.cells.cache.context
        assert isinstance(context, HeadContext)
        return context

    def close(self) -> None:
        """See `Companion`."""
        self.cells.close()
