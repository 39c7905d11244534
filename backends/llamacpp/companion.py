"""What goes along with a sequence: a trained head's own memory of it, made of the target's hidden states.

A state that has a companion records the features of its pending nodes and hands over those that are kept. The
companion follows `truncate`, is copied by `fork` and `save`, and ends with the state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from localspec.types import TokenIds

from .taps import Features


class SavedCompanion(Protocol):
    """A companion outside of all open sequences."""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        ...

    def open(self) -> Companion:
        """Another one like it."""
        ...


class Companion(ABC):
    """A head's part of one sequence. `owner` tells heads apart."""

    owner: object
    width: int

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


class Recording:
    """Tokens and features of a state's pending nodes, for its companion. A node that no pass has run has none."""

    def __init__(self, companion: Companion) -> None:
        self.companion = companion
        self._tokens: list[int] = []
        self._rows: list[Features | None] = []
        self._newest = np.zeros((0, companion.width), np.float32)

    def space(self, count: int) -> Features:
        """[count, W] for a pass to write to."""
        self._newest = np.empty((count, self.companion.width), np.float32)
        return self._newest

    def fill(self, features: Features) -> None:
        """What a pass shared with others wrote for this state."""
        self._newest = features

    @property
    def newest(self) -> Features:
        """[T, W] of the last pass."""
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
        if ready:
            self.companion.feed(np.array([tokens[node] for node in nodes[: len(ready)]], np.int32), np.stack(ready))

    def catch_up(self, tokens: TokenIds, features: Features, end: int) -> None:
        """Committed tokens [T] up to `end` were run, perhaps again: hand over those that are new."""
        missing = end - self.companion.end
        if missing > 0:
            self.companion.feed(tokens[-missing:], features[len(tokens) - missing : len(tokens)])
