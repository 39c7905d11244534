"""Rewinding a state that depends on the path by which it was reached.

A recurrent layer cannot forget its last tokens. What can be done is to go back to a snapshot from before
them and run the tokens that stay once more. `History` remembers a sequence's tokens and a few snapshots;
what a snapshot is, how it is put back and how tokens are run is the backend's business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from localspec.types import TokenIds

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Mark(Generic[S]):
    """A snapshot of the state when it held exactly `length` tokens."""

    length: int
    snapshot: S


class History(Generic[S]):
    """Committed tokens, and snapshots at some of their lengths.

    The newest snapshot is always kept, for the next round may need it; of the older ones at most `most`,
    spread so that their distances from the end grow: going back d tokens replays O(d), bounded memory.
    The empty state needs no snapshot.
    """

    def __init__(self, most: int = 6) -> None:
        self._most = most
        self._tokens: list[int] = []
        self._marks: list[Mark[S]] = []

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def marked_lengths(self) -> list[int]:
        """Lengths at which there is a snapshot, ascending."""
        return [mark.length for mark in self._marks]

    @property
    def snapshots(self) -> list[S]:
        """The snapshots that are kept, oldest first."""
        return [mark.snapshot for mark in self._marks]

    def extend(self, tokens: Iterable[int]) -> None:
        """Tokens were committed."""
        self._tokens.extend(int(token) for token in tokens)

    def mark(self, snapshot: S) -> None:
        """The state holds exactly these tokens now and looks like `snapshot`."""
        while self._marks and self._marks[-1].length >= len(self._tokens):
            self._marks.pop()
        self._marks.append(Mark(len(self._tokens), snapshot))
        if len(self._marks) > self._most + 1:
            del self._marks[self._least_useful()]

    def _least_useful(self) -> int:
        """Index of the snapshot without which the gap, relative to its distance from the end, is smallest."""
        end = len(self._tokens) + 1
        ends = [0, *(mark.length for mark in self._marks)]
        gaps = [(ends[i + 2] - ends[i]) / (end - ends[i + 1]) for i in range(len(self._marks) - 1)]
        return int(np.argmin(gaps))

    def rewind(self, length: int) -> Mark[S] | None:
        """Forget the tokens from `length` on; the nearest snapshot at or before it (None: the empty state)."""
        if not 0 <= length <= len(self._tokens):
            raise ValueError(f"cannot rewind {len(self._tokens)} tokens to {length}")
        del self._tokens[length:]
        while self._marks and self._marks[-1].length > length:
            self._marks.pop()
        return self._marks[-1] if self._marks else None

    def since(self, mark: Mark[S] | None) -> TokenIds:
        """[T] the tokens behind a snapshot: what must be run again."""
        return np.array(self._tokens[mark.length if mark is not None else 0 :], np.int32)

    def copy(self) -> History[S]:
        """An independent history that shares the snapshots."""
        other: History[S] = History(self._most)
        other._tokens, other._marks = list(self._tokens), list(self._marks)
        return other
