"""The tokens of one conversation, the counts that penalties need, and nothing else.

Simulating a path is appending its tokens and truncating again: so every node of a tree, and every
guess of a drafter, sees penalties computed from exactly the history it would have.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from localspec.types import TokenIds


class TokenCounts:
    """How often each token occurs, in arrays that are ready to index a row of logits."""

    def __init__(self) -> None:
        self._slot: dict[int, int] = {}
        self._ids = np.zeros(64, np.int32)
        self._counts = np.zeros(64, np.int32)

    def add(self, token: int, amount: int) -> None:
        """Count one more occurrence (amount 1) or one fewer (-1)."""
        slot = self._slot.get(token)
        if slot is None:
            slot = self._slot[token] = len(self._slot)
            if slot == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[slot], self._counts[slot] = token, 0
        self._counts[slot] += amount
        if not self._counts[slot]:
            self._remove(token)

    def _remove(self, token: int) -> None:
        """The last slot moves into the place of a token that occurs no more, so that none has to be passed over."""
        slot, last = self._slot.pop(token), len(self._slot)
        if slot != last:
            self._ids[slot], self._counts[slot] = self._ids[last], self._counts[last]
            self._slot[int(self._ids[slot])] = slot

    def seen(self) -> tuple[TokenIds, NDArray[np.int32]]:
        """(ids, counts) of tokens that occur at least once, in no order: views, valid until the next `add`."""
        used = len(self._slot)
        return self._ids[:used], self._counts[:used]


class Context:
    """An append-and-truncate list of token ids; the answer begins behind those it was made with."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        ids = np.fromiter(tokens, np.int32)
        self._ids = np.zeros(max(256, 2 * len(ids)), np.int32)
        self._ids[: len(ids)] = ids
        self._length = len(ids)
        self._output_start = len(ids)
        self._counts: TokenCounts | None = None
        self._output_counts: TokenCounts | None = None

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> TokenIds:
        """[T] a read-only view, valid until the next append."""
        view = self._ids[: self._length]
        view.flags.writeable = False
        return view

    @property
    def output(self) -> TokenIds:
        """[T] the current answer, under the same terms."""
        return self.tokens[self._output_start :]

    @property
    def anchor(self) -> int:
        """The last token: emitted, not yet in the target's cache."""
        return int(self._ids[self._length - 1])

    def start_output(self) -> None:
        """The current answer begins after what is here now."""
        self._output_start = self._length
        self._output_counts = None

    def append(self, token: int) -> None:
        """Add one token at the end."""
        if self._length == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
        self._ids[self._length] = token
        self._count(self._length, 1)
        self._length += 1

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens at the end."""
        for token in tokens:
            self.append(int(token))

    def truncate(self, length: int) -> None:
        """Drop the tokens from `length` on."""
        while self._length > length:
            self._length -= 1
            self._count(self._length, -1)
        self._output_start = min(self._output_start, self._length)

    @property
    def counts(self) -> TokenCounts:
        """Counts over everything. Built when first asked for, kept up to date from then on."""
        if self._counts is None:
            self._counts = self._counted(0)
        return self._counts

    @property
    def output_counts(self) -> TokenCounts:
        """Counts over the current answer."""
        if self._output_counts is None:
            self._output_counts = self._counted(self._output_start)
        return self._output_counts

    def _counted(self, start: int) -> TokenCounts:
        counts = TokenCounts()
        for token in self._ids[start : self._length]:
            counts.add(int(token), 1)
        return counts

    def _count(self, index: int, amount: int) -> None:
        token = int(self._ids[index])
        if self._counts is not None:
            self._counts.add(token, amount)
        if self._output_counts is not None and index >= self._output_start:
            self._output_counts.add(token, amount)


def common_prefix(left: TokenIds, right: TokenIds) -> int:
    """Number of leading tokens that are equal."""
    size = min(len(left), len(right))
    different = np.flatnonzero(left[:size] != right[:size])
    return int(different[0]) if len(different) else size
