"""What goes along with a sequence: a trained head's own memory of it, made of the target's hidden states.

A state that has a companion records the features of its pending nodes and hands over those that are kept. The
companion follows `truncate`, is copied by `fork` and `save`, and ends with the state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from localspec.types import TokenIds

from .taps import Features, Taps


class ListeningHead(Protocol):
    """taps: what it reads of its target."""

    taps: Taps


class SavedCompanion(Protocol):
    """A companion outside of all open sequences."""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        ...

    def open(self) -> Companion | None:
        """Another one like it; None once its head is closed."""
        ...


class Companion(ABC):
    """A head's part of one sequence. head: whose.  num_missing: committed tokens at the beginning that it has not
    seen."""

    head: ListeningHead
    num_missing: int

    @property
    @abstractmethod
    def is_closed(self) -> bool:
        """Was its head closed, or itself?"""

    @property
    @abstractmethod
    def end(self) -> int:
        """Committed tokens of the sequence up to which it has got."""

    @abstractmethod
    def feed(self, tokens: TokenIds, features: Features) -> None:
        """The sequence's next committed tokens [T] and their hidden states [T, W]."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """The sequence has only its first `length` tokens left."""

    @abstractmethod
    def save(self) -> SavedCompanion:
        """A copy for another sequence."""

    @abstractmethod
    def close(self) -> None:
        """Give its memory back. Twice does nothing."""


class Waiting:
    """Rows [N, W] that come a few at a time and leave many at a time. Joining all of them each time would copy
    megabytes a round where a head is seldom asked."""

    def __init__(self, width: int) -> None:
        self._rows: Features = np.empty((0, width), np.float32)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, rows: Features) -> None:
        """Some more."""
        end = self._count + len(rows)
        if end > len(self._rows):
            larger = np.empty((max(end, 2 * len(self._rows)), self._rows.shape[1]), np.float32)
            larger[: self._count] = self._rows[: self._count]
            self._rows = larger
        self._rows[self._count : end] = rows
        self._count = end

    def first(self, count: int) -> Features:
        """[count, W] until others are added or dropped."""
        return self._rows[:count]

    def drop(self, count: int) -> None:
        """The first ones wait no more."""
        rest = self._rows[count : self._count].copy()
        self._rows[: len(rest)] = rest
        self._count = len(rest)

    def cut(self, count: int) -> None:
        """Keep the first ones, at most so many."""
        self._count = min(self._count, max(count, 0))


class Recording:
    """Tokens and features of a state's pending nodes, for its companions. A node that no pass has run has none.

    taps: what the target gives away, of which each companion gets its part.
    """

    def __init__(self, taps: Taps, companions: Sequence[Companion] = ()) -> None:
        self._taps = taps
        self._companions: list[Companion] = []
        self._columns: list[NDArray[np.int64] | None] = []
        self._tokens: list[int] = []
        self._rows: list[Features | None] = []
        self._newest = np.zeros((0, taps.width), np.float32)
        for companion in companions:
            self.join(companion)

    def join(self, companion: Companion) -> None:
        """Another one listens from here on."""
        self._companions.append(companion)
        self._columns.append(self._taps.columns(companion.head.taps))

    def leave(self, companion: Companion) -> None:
        """It listens no more."""
        place = self._companions.index(companion)
        del self._companions[place], self._columns[place]

    def of(self, head: object) -> Companion | None:
        """The companion that is this head's."""
        return next((one for one in self._companions if one.head is head), None)

    def is_heard(self) -> bool:
        """Does anybody listen? Companions of heads that were closed do not."""
        for companion in [one for one in self._companions if one.is_closed]:
            self.leave(companion)
        return bool(self._companions)

    def space(self, count: int) -> Features:
        """[count, W] for a pass to write to, before `keep` at the latest."""
        self._newest = np.empty((count, self._taps.width), np.float32)
        return self._newest

    def fill(self, features: Features) -> None:
        """What a pass wrote, or writes later, for this state: its part of a larger one."""
        self._newest = features

    @property
    def newest(self) -> Features:
        """[T, W] of the last pass, written before `keep` at the latest."""
        return self._newest

    def add(self, tokens: TokenIds, features: Features) -> None:
        """New nodes; those beyond the features were not run."""
        self._tokens += tokens.tolist()
        self._rows += [*features, *[None] * (len(tokens) - len(features))]

    def put(self, node: int, row: Features) -> None:
        """An earlier node was run."""
        self._rows[node] = row

    def keep(self, nodes: Sequence[int]) -> None:
        """These nodes are committed now, the others forgotten. Those that were not run are handed over later."""
        tokens, rows = self._tokens, self._rows
        self._tokens, self._rows = [], []
        ready: list[Features] = []
        for node in nodes:
            row = rows[node]
            if row is None:
                break
            ready.append(row)
        if ready and self.is_heard():
            kept = np.array([tokens[node] for node in nodes[: len(ready)]], np.int32)
            for companion, columns in zip(self._companions, self._columns, strict=True):
                companion.feed(kept, _part(np.stack(ready), columns))

    def catch_up(self, tokens: TokenIds, features: Features, end: int) -> None:
        """Committed tokens [T] up to `end` were run, perhaps again: hand over those that are new."""
        for companion, columns in zip(self._companions, self._columns, strict=True):
            missing = end - companion.end
            if missing > 0:
                new = features[len(tokens) - missing : len(tokens)]
                companion.feed(tokens[-missing:], _part(new, columns))

    def truncate(self, length: int) -> None:
        """The sequence has only its first `length` tokens left."""
        if self.is_heard():
            for companion in self._companions:
                companion.truncate(length)

    def save(self) -> tuple[SavedCompanion, ...]:
        """Copies of all companions."""
        return tuple(companion.save() for companion in self._companions) if self.is_heard() else ()

    def close(self) -> None:
        """The sequence has ended."""
        if self.is_heard():
            for companion in self._companions:
                companion.close()


def _part(features: Features, columns: NDArray[np.int64] | None) -> Features:
    return features if columns is None else features[:, columns]


def reopened(taps: Taps | None, saved: Sequence[SavedCompanion]) -> Recording | None:
    """Companions as they were saved, for a new sequence of the same target."""
    companions = [one for one in (copy.open() for copy in saved) if one is not None]
    return Recording(taps, companions) if taps is not None and companions else None
