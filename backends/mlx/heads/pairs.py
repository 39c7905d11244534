"""Heads that guess token by token from pairs: the hidden state at a position, and the token behind it.

A pair (h at p, token at p + 1) goes through a few layers with keys and values of their own and says what stands at
p + 2. Committed pairs hold the target's hidden states; a guess has none, so what came out for its parent takes that
place, and its entry is dropped when guessing starts anew: the target's own features are written there instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self, cast

import mlx.core as mx
import numpy as np

from localspec.protocols import HeadInfo, HeadState, Scores, Tokens
from localspec.types import NodeIndices

from ..cache import Pass
from ..companion import Companion, Owner
from ..layout import Layout, chain
from ..memory import copied, rows_in
from ..model import MlxModel
from ..scores import DeviceScores
from ..state import MlxState
from .base import MlxHead, MlxHeadState
from .features import FeatureLog
from .parameters import device_ids

_MOST_WAITING = 32  # committed pairs that wait for the next guess's pass, which then takes them along
_CHUNK = 512  # pairs per pass; a longer run is cut, which bounds the memory of its activations
_MOST_GUESSES = 512


class PairNetwork(Protocol):
    """Layers over pairs. E is the width of the hidden states it takes, W that of all taps side by side."""

    @property
    def current(self) -> Pass:
        """What its caches and positions read of the pass in progress."""
        ...

    @property
    def width(self) -> int:
        """E."""
        ...

    def caches(self) -> list[Any]:
        """Empty caches for one sequence."""
        ...

    def features(self, taps: mx.array) -> mx.array:
        """[K, E] the hidden states of the pairs, from the target's [K, W]."""
        ...

    def run(self, hidden: mx.array, tokens: mx.array, caches: list[Any]) -> mx.array:
        """[K, E] outputs of pairs [K, E] and [K] ids."""
        ...

    def fed_back(self, outputs: mx.array) -> mx.array:
        """[N, E] what stands in for the hidden states of the children of N pairs."""
        ...

    def logits(self, outputs: mx.array) -> mx.array:
        """[N, V] what follows, in the target's ids; -inf for a token that cannot be guessed."""
        ...


class PairMemory(Companion):
    """The pairs of one sequence, and the guesses since `start`. Positions are counted from the first pair: rotary
    embeddings turn by differences only."""

    def __init__(self, head: Owner | None, taps: Sequence[int], network: PairNetwork) -> None:
        super().__init__(head, taps)
        self._network = network
        self._log = FeatureLog(0)
        self._caches = network.caches()
        self._rows = list(rows_in(self._caches))
        self._num_entries = 0  # committed pairs in the caches
        self._waiting: list[tuple[mx.array, mx.array]] = []  # committed pairs behind those
        self._parents: NodeIndices = np.zeros(0, np.int32)  # of the anchor's pair, then of the guesses
        self._outputs: mx.array | None = None  # [nodes, E] of all of them

    # ------------------------------------------------------------ committed tokens

    def feed(self, tokens: mx.array, features: mx.array, start: int) -> None:
        """Tokens [K] were committed from position `start` on, whose features are [K, W]. What was made of tokens
        before a gap is forgotten: a pair joins neighbours."""
        self._forget()
        if start != self._log.end:
            self.truncate(0)
            self._log = FeatureLog(start)
        before, new = self._log.last(), self._network.features(features)
        if before is None:
            hidden, ids = new[:-1], tokens[1:]
        else:
            hidden, ids = mx.concatenate([before, new[:-1]]), tokens
        self._log.append(new)
        if ids.shape[0]:
            self._waiting.append((hidden, ids))
        if sum(ids.shape[0] for _, ids in self._waiting) > _MOST_WAITING:
            self._settle()

    def truncate(self, length: int) -> None:
        """Forget what was made of the tokens from `length` on; with 0, give the memory back."""
        self._forget()
        self._settle()
        self._log.truncate(length)
        self._num_entries = max(len(self._log) - 1, 0)
        self._rewind(self._num_entries)
        if not length:
            for cache in self._rows:
                cache.drop()

    def copy(self) -> Self:
        """The same committed pairs; shares memory until either is written to."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other._caches = [copied(cache) for cache in self._caches]
        other._rows = list(rows_in(other._caches))
        other._log = self._log.copy()
        other._waiting = list(self._waiting)
        other._forget()
        return other

    def arrays(self) -> list[mx.array]:
        """What may still have to be computed for all committed pairs to exist."""
        return [*self._log.arrays()[-1:], *(array for pair in self._waiting for array in pair), *self._cells()]

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(array.nbytes for array in [*self._log.arrays(), *self._cells()])

    # ------------------------------------------------------------ guesses

    @property
    def room(self) -> int:
        """How many more guesses can be fed."""
        return _MOST_GUESSES - max(len(self._parents) - 1, 0)

    def start(self, anchor: int) -> mx.array:
        """Forget earlier guesses; [1, V] logits behind the anchor."""
        self._forget()
        last = self._log.last()
        if last is None:  # nothing was read since the head was opened
            last = mx.zeros((1, self._network.width))
        waiting = [*self._waiting, (last, mx.array([anchor], mx.int32))]
        outputs = self._append(waiting, chain(sum(ids.shape[0] for _, ids in waiting)), self._num_entries)
        self._num_entries += sum(ids.shape[0] for _, ids in self._waiting)
        self._waiting = []
        self._parents = np.full(1, -1, np.int32)
        return self._scored(outputs[-1:])

    def extend(self, tokens: mx.array, parents: Sequence[int]) -> mx.array:
        """Feed guesses [N]; parents as in `protocols.HeadState`. [N, V] logits behind each."""
        if self._outputs is None:
            raise ValueError("guesses are fed before the anchor")
        if len(parents) > self.room:
            raise ValueError(f"{len(parents)} guesses are too many: {self.room} can be fed")
        above = np.asarray(parents, np.int32) + 1
        if len(above) != tokens.shape[0] or np.any(above < 0) or np.any(above >= len(self._parents)):
            raise ValueError(f"parents {list(parents)} of {tokens.shape[0]} guesses behind {len(self._parents) - 1}")
        hidden = self._network.fed_back(mx.take(self._outputs, mx.array(above), axis=0))
        self._parents = np.concatenate([self._parents, above])
        return self._scored(self._append([(hidden, tokens)], self._parents, self._num_entries))

    # ------------------------------------------------------------ inside

    def _cells(self) -> list[mx.array]:
        return [array for cache in self._rows for array in cache.arrays()]

    def _scored(self, outputs: mx.array) -> mx.array:
        """Remember the outputs of the newest nodes and begin to compute their rows."""
        self._outputs = outputs if self._outputs is None else mx.concatenate([self._outputs, outputs])
        logits = self._network.logits(outputs)
        mx.async_eval(logits, self._outputs, *self._cells())
        return logits

    def _append(self, pairs: Sequence[tuple[mx.array, mx.array]], parents: NodeIndices, num_committed: int) -> mx.array:
        """[K, E] outputs of new pairs, the last ones of nodes that hang together as `parents` say."""
        hidden = mx.concatenate([part for part, _ in pairs]) if len(pairs) > 1 else pairs[0][0]
        ids = mx.concatenate([part for _, part in pairs]) if len(pairs) > 1 else pairs[0][1]
        current = self._network.current
        current.begin(Layout(num_committed, parents, ids.shape[0]), None)
        try:
            return self._network.run(hidden, ids, self._caches)
        finally:
            current.end()

    def _settle(self) -> None:
        """Write the waiting pairs. Outputs that nobody wants are not computed, being lazy."""
        waiting, self._waiting = self._waiting, []
        for hidden, ids in waiting:
            for begin in range(0, ids.shape[0], _CHUNK):
                part = (hidden[begin : begin + _CHUNK], ids[begin : begin + _CHUNK])
                self._append([part], chain(part[1].shape[0]), self._num_entries)
                self._num_entries += part[1].shape[0]

    def _forget(self) -> None:
        """Drop the guesses and the anchor's pair."""
        self._rewind(self._num_entries)
        self._parents, self._outputs = self._parents[:0], None

    def _rewind(self, num_rows: int) -> None:
        for cache in self._rows:
            cache.num_rows = num_rows


class PairHead(MlxHead[PairMemory]):
    """`protocols.DraftHead` over a network of pairs."""

    def __init__(self, info: HeadInfo, target: MlxModel, network: PairNetwork) -> None:
        super().__init__(info, target)
        self._network: PairNetwork | None = network

    def new_companion(self) -> PairMemory:
        """An empty one."""
        assert self._network is not None
        return PairMemory(self, self.info.taps, self._network)

    def new_state(self, state: MlxState, companion: PairMemory) -> HeadState:
        """Guesses beside a sequence."""
        return PairHeadState(self, state, companion)

    def drop_weights(self) -> None:
        """Give the head's own memory back."""
        self._network = None


class PairHeadState(MlxHeadState[PairMemory]):
    """`protocols.HeadState`. Rows stay on the device, and a chain is guessed without waiting."""

    @property
    def room(self) -> int:
        """How many more guesses can be fed."""
        return self.companion.room

    def start(self, anchor: int) -> Scores:
        """Forget earlier guesses; [1, V] what may follow the anchor."""
        self.check_open()
        return self._scores(self.companion.start(anchor))

    def extend(self, tokens: Tokens, parents: Sequence[int]) -> Scores:
        """Feed guesses; [N, V] what may follow each."""
        self.check_open()
        return self._scores(self.companion.extend(device_ids(tokens), parents))

    def confidence(self) -> None:
        """It does not say."""

    def _scores(self, logits: mx.array) -> Scores:
        return cast("Scores", DeviceScores(logits, self.head.target.ledger))
