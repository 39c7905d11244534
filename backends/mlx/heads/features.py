"""What a head made of the features of committed tokens, one row per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import mlx.core as mx

from ..companion import Companion, Owner


class FeatureLog:
    """Rows [K, E] of the tokens from `first` on, in the order in which they came.

    Only the newest is read; the others are kept for `truncate`, after which another one is the newest. Kept as they
    came, so nothing is copied in a round.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self._num_rows = 0
        self._parts: list[mx.array] = []

    def __len__(self) -> int:
        return self._num_rows

    @property
    def end(self) -> int:
        """Position behind the newest row."""
        return self.first + self._num_rows

    def append(self, rows: mx.array) -> None:
        """Add the rows of the next tokens."""
        if rows.shape[0]:
            self._parts.append(rows)
            self._num_rows += rows.shape[0]

    def last(self) -> mx.array | None:
        """[1, E] of the newest token, or None where there is none."""
        return self._parts[-1][-1:] if self._parts else None

    def truncate(self, length: int) -> None:
        """Forget the tokens from position `length` on; those that come next stand there."""
        over = self.first + self._num_rows - length
        self._num_rows = max(self._num_rows - max(over, 0), 0)
        while over > 0 and self._parts:
            part = self._parts.pop()
            if part.shape[0] > over:
                self._parts.append(mx.contiguous(part[: part.shape[0] - over]))
            over -= part.shape[0]
        self.first = min(self.first, length)

    def copy(self) -> FeatureLog:
        """The same rows."""
        other = FeatureLog(self.first)
        other._parts, other._num_rows = list(self._parts), self._num_rows
        return other

    def arrays(self) -> list[mx.array]:
        """Everything that is held."""
        return list(self._parts)


class LastHidden(Companion):
    """The last hidden states of committed tokens; only the newest one is ever read."""

    def __init__(self, head: Owner | None, taps: Sequence[int]) -> None:
        super().__init__(head, taps)
        self.log = FeatureLog(0)

    def feed(self, tokens: mx.array, features: mx.array, start: int) -> None:
        """Hidden states [T, hidden] of the tokens from position `start` on."""
        if start != self.log.end:
            self.log = FeatureLog(start)
        self.log.append(features)

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self.log.truncate(length)

    def copy(self) -> Self:
        """The same."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other.log = self.log.copy()
        return other

    def arrays(self) -> list[mx.array]:
        """What may still have to be computed."""
        return self.log.arrays()[-1:]

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(array.nbytes for array in self.log.arrays())
