"""What all heads share: which sequences they follow, and their end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar, cast

import mlx.core as mx

from localspec.protocols import HeadInfo, HeadState, SequenceState

from ..companion import Companion
from ..model import MlxModel
from ..state import MlxState

C = TypeVar("C", bound=Companion)


class MlxHead(ABC, Generic[C]):
    """`protocols.DraftHead`. While it is open, the target's layers in `info.taps` are read in passes of sequences that
    have a companion."""

    def __init__(self, info: HeadInfo, target: MlxModel) -> None:
        self.info = info
        self.target = target
        self.is_closed = False
        target.network.taps.add(info.taps)

    @abstractmethod
    def new_companion(self) -> C:
        """An empty one; `Companion.head` is this head."""

    @abstractmethod
    def new_state(self, state: MlxState, companion: C) -> HeadState:
        """Guesses beside a sequence."""

    def drop_weights(self) -> None:
        """Give the head's own memory back; nothing is asked of it any more."""

    def open(self, state: SequenceState) -> HeadState:
        """The head's part of a sequence. Raises ValueError for a sequence of another model, or once closed."""
        if self.is_closed:
            raise ValueError("this head is closed")
        if not isinstance(state, MlxState) or state.owner is not self.target:
            raise ValueError("a state of another model was given")
        state.check_open()
        found = state.companions.of(self)
        companion = self.new_companion() if found is None else cast("C", found)
        if found is None:
            companion.num_missing = state.length
            state.companions.add(companion)
        return self.new_state(state, companion)

    def close(self) -> None:
        """Stop following all sequences, and give the weights back."""
        if self.is_closed:
            return
        self.is_closed = True
        self.target.drop_companions(self)
        if not self.target.is_closed:
            self.target.network.taps.remove(self.info.taps)
        self.drop_weights()
        mx.clear_cache()


class MlxHeadState(ABC, Generic[C]):
    """The part of `protocols.HeadState` that all heads share. head: whose it is.  state: the target's sequence."""

    def __init__(self, head: Any, state: MlxState, companion: C) -> None:
        self.head = head
        self.state = state
        self._companion = companion
        self._closed = False

    def check_open(self) -> None:
        """Raise ValueError once this, the head or the sequence is closed."""
        if self._closed or self.head.is_closed:
            raise ValueError("this head is closed")
        self.state.check_open()

    @property
    def companion(self) -> C:
        """What it made of all committed tokens."""
        self.state.companions.settle()
        return self._companion

    @property
    def num_missing(self) -> int:
        """Of the committed tokens, how many at the beginning the head has not seen."""
        return self._companion.num_missing

    def close(self) -> None:
        """Forget the guesses, and feed no more."""
        if not self._closed:
            self._closed = True
            self.state.companions.remove(self._companion)
