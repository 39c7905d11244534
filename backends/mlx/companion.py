"""What heads make of a sequence's committed tokens, and the features that wait to be committed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Self

import mlx.core as mx

from .taps import Record

_MOST_WAITING = 64  # committed tokens whose features wait until somebody asks


class Owner(Protocol):
    """The head that a companion belongs to."""

    @property
    def is_closed(self) -> bool:
        """Are its weights gone?"""
        ...


class Companion(ABC):
    """One head's memory of one sequence: part of the target's state, and treated like it.

    head: whose it is.  taps: what `feed` is given, in this order.  num_missing: tokens that were committed before it
    was there; kept up by whoever holds it.
    """

    def __init__(self, head: Owner | None, taps: Sequence[int]) -> None:
        self.head = head
        self.taps = tuple(taps)
        self.num_missing = 0

    @abstractmethod
    def feed(self, tokens: mx.array, features: mx.array, start: int) -> None:
        """T tokens were committed at positions start, start + 1, ...: ids [T] and the taps side by side
        [T, len(taps) * hidden], both perhaps not computed yet. `start` is behind whatever was fed and not truncated;
        tokens in between were committed without features. Must not wait."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Forget everything at positions >= length; with 0, give the memory back."""

    @abstractmethod
    def copy(self) -> Self:
        """An independent companion that holds the same. Sharing memory is fine: arrays are values in MLX."""

    @abstractmethod
    def arrays(self) -> list[mx.array]:
        """What must be computed for it to exist; started with the target's passes, so that nothing piles up."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(array.nbytes for array in self.arrays())


@dataclass(frozen=True, slots=True)
class _Segment:
    """Features of pending nodes of one pass. first: number of the first node."""

    first: int
    tokens: mx.array  # [T]
    features: Record


@dataclass(frozen=True, slots=True)
class _Committed:
    """Features of tokens that were committed from `start` on, before anyone was fed with them."""

    start: int
    tokens: mx.array  # [T]
    features: Record


class Companions:
    """A sequence's companions, and the features that they were not fed with yet: of pending nodes, and of the last
    committed tokens. These wait until a head is asked (`settle`), since feeding takes the host's time in every pass,
    and where nobody asks, many passes are fed at once."""

    def __init__(self) -> None:
        self._members: list[Companion] = []
        self._segments: list[_Segment] = []
        self._waiting: list[_Committed] = []

    def __bool__(self) -> bool:
        return bool(self._members)

    def of(self, head: Owner | None) -> Companion | None:
        """A head's companion here."""
        return next((member for member in self._members if member.head is head), None)

    def add(self, companion: Companion) -> None:
        """Feed it from here on. Of nodes that are pending already it gets those whose taps were recorded."""
        self.settle()
        wanted = set(companion.taps)
        self._segments = [segment for segment in self._segments if wanted <= segment.features.keys()]
        self._members.append(companion)

    def remove(self, companion: Companion) -> None:
        """Feed it no more, and forget what it holds. Does nothing where it is not fed."""
        if companion in self._members:
            self._members.remove(companion)
            companion.truncate(0)
        if not self._members:
            self._waiting = []

    def record(self, first: int, tokens: mx.array, features: Record) -> None:
        """Tokens [T] became the pending nodes from `first` on."""
        self._segments.append(_Segment(first, tokens, features))

    def forget(self, num_pending: int) -> None:
        """Only the first nodes are still pending; passes are forgotten whole."""
        self._segments = [segment for segment in self._segments if segment.first < num_pending]

    def keep(self, path: Sequence[int], length: int) -> None:
        """Nodes were committed behind `length` tokens, and the others dropped."""
        segments, self._segments = self._segments, []
        if not (segments and self._members):
            return
        unseen = sum(node < segments[0].first for node in path)  # pending before anyone was attached
        nodes = [node - segments[0].first for node in path[unseen:]]
        if not nodes:
            return
        tokens = _picked([segment.tokens for segment in segments], nodes)
        wanted = {tap for member in self._members for tap in member.taps}
        rows = {tap: _picked([segment.features[tap] for segment in segments], nodes) for tap in wanted}
        self._waiting.append(_Committed(length + unseen, tokens, rows))
        if sum(one.tokens.shape[0] for one in self._waiting) > _MOST_WAITING:
            self.settle()

    def settle(self) -> None:
        """Feed what waits. Does not wait for the device."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        for run in _runs(waiting):
            tokens = _joined([one.tokens for one in run])
            taps = run[0].features
            rows = {tap: _joined([one.features[tap] for one in run]) for tap in taps}
            for member in self._members:
                parts = [rows[tap] for tap in member.taps] or [mx.zeros((tokens.shape[0], 0))]
                member.feed(tokens, mx.concatenate(parts, axis=-1), run[0].start)
        mx.async_eval(*(array for member in self._members for array in member.arrays()))

    def truncate(self, length: int) -> None:
        """Drop what is pending, and what was committed from `length` on."""
        self._segments = []
        self._waiting = [one for one in map(partial(_cut, length=length), self._waiting) if one is not None]
        for member in self._members:
            member.num_missing = min(member.num_missing, length)
            member.truncate(length)

    def copy(self) -> Companions:
        """For a copy of the sequence; nothing is pending. A saved sequence may outlive a head."""
        self.settle()
        other = Companions()
        for member in self._members:
            if member.head is not None and member.head.is_closed:
                continue
            copied = member.copy()
            copied.num_missing = member.num_missing
            other._members.append(copied)
        return other

    def arrays(self) -> list[mx.array]:
        """What must be computed for all of it to exist."""
        pending = [array for segment in self._segments for array in segment.features.values()]
        return pending + [array for member in self._members for array in member.arrays()]


def _runs(waiting: Sequence[_Committed]) -> list[list[_Committed]]:
    """Of tokens that stand behind each other, with the same taps."""
    runs: list[list[_Committed]] = []
    end = -1
    for one in waiting:
        if one.start != end or one.features.keys() != runs[-1][0].features.keys():
            runs.append([])
        runs[-1].append(one)
        end = one.start + one.tokens.shape[0]
    return runs


def _cut(one: _Committed, length: int) -> _Committed | None:
    """What is left of it in a sequence of so many tokens."""
    left = length - one.start
    if left <= 0:
        return None
    if left >= one.tokens.shape[0]:
        return one
    return _Committed(one.start, one.tokens[:left], {tap: rows[:left] for tap, rows in one.features.items()})


def _joined(parts: Sequence[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts))


def _picked(parts: Sequence[mx.array], nodes: Sequence[int]) -> mx.array:
    """Rows of consecutive parts, by number."""
    joined = _joined(parts)
    if list(nodes) == list(range(len(nodes))):
        return joined if len(nodes) == joined.shape[0] else joined[: len(nodes)]
    return mx.take(joined, mx.array(list(nodes), mx.int32), axis=0)
