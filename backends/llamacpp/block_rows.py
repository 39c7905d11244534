"""From the one pass of a block head to the rows behind any path of guesses.

The pass leaves a row of logits and a hidden row per slot. What a slot says then depends on the guess before it:

    plain      not at all (DFlash, JetSpec)
    markov     w2 · w1[guess] is added (DSpark). llama.cpp has done that already, for the likeliest guesses in a
               row; for another one its product is taken out and the right one put in, which is exact but for rounding
    selector   of the slot's k best tokens, each with a score that depends on the guess before (DFlash 2)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localspec.types import Logits, Probabilities

from .head_tables import Matrix, Table
from .taps import Features


class Rows(ABC):
    """Rows of one block. logits [S, V] and hidden [S, E] (if `needs_hidden`) of its S slots that guess, views."""

    def __init__(self, anchor: int, logits: Logits, hidden: Features | None) -> None:
        self._logits = logits
        self._hidden = None if hidden is None else hidden.copy()
        self._likeliest = [anchor]  # the guess before each slot, as far as it was needed

    @abstractmethod
    def row(self, slot: int, previous: int) -> Logits:
        """[V] what slot `slot` says behind the guess `previous` (slot 0: the anchor)."""

    def first(self) -> Logits:
        """[1, V] what may follow the anchor."""
        return self.row(0, self._likeliest[0])[None]

    def _slot(self, slot: int) -> Logits:
        row: Logits = self._logits[slot]
        return row

    def hidden(self, slots: list[int]) -> Features:
        """[N, E] hidden rows of some slots."""
        assert self._hidden is not None
        return self._hidden[slots]

    def _greedy(self, slot: int) -> int:
        while len(self._likeliest) <= slot:
            self._likeliest.append(int(self._logits[len(self._likeliest) - 1].argmax()))
        return self._likeliest[slot]


class PlainRows(Rows):
    """Slots that do not know each other."""

    def row(self, slot: int, previous: int) -> Logits:
        """See `Rows`."""
        return self._slot(slot)


@dataclass(frozen=True, slots=True)
class Markov:
    """w1 [V, r], w2 [Vd, r].  ids [Vd]: tokens of w2's rows, None: all, in order."""

    w1: Table
    w2: Table
    ids: NDArray[np.int64] | None

    def difference(self, was: int, now: int) -> Logits:
        """[Vd] what another guess before adds to a row."""
        old, new = self.w1.rows([was, now])
        change: Logits = self.w2.whole @ (new - old)
        return change


class MarkovRows(Rows):
    """Rows with the bias of llama.cpp's own greedy chain in them."""

    def __init__(self, anchor: int, logits: Logits, hidden: Features | None, markov: Markov) -> None:
        super().__init__(anchor, logits, hidden)
        self._markov = markov

    def row(self, slot: int, previous: int) -> Logits:
        """See `Rows`."""
        was = self._greedy(slot)
        if previous == was:
            return self._slot(slot)
        row: Logits = self._logits[slot].copy()
        change = self._markov.difference(was, previous)
        if self._markov.ids is None:
            row += change
        else:
            row[self._markov.ids] += change
        return row


@dataclass(frozen=True, slots=True)
class Selector:
    """before [V, r], behind [V, r]: codebooks of the guess before and of the candidate.  gate [r, E].  top: k."""

    before: Table
    behind: Table
    gate: Table
    top: int


class SelectorRows(Rows):
    """Rows of a few candidates; every other token has -inf."""

    def __init__(self, anchor: int, logits: Logits, hidden: Features, selector: Selector) -> None:
        super().__init__(anchor, logits, hidden)
        self._selector = selector
        self._candidates: dict[int, tuple[NDArray[np.int64], Logits, Matrix, Matrix]] = {}

    def row(self, slot: int, previous: int) -> Logits:
        """See `Rows`."""
        ids, scores, codes, gate = self._of_slot(slot)
        row = np.full(self._logits.shape[1], -np.inf, np.float32)
        row[ids] = scores + codes @ (self._selector.before.rows([previous])[0] * gate)
        return row

    def _of_slot(self, slot: int) -> tuple[NDArray[np.int64], Logits, Matrix, Matrix]:
        if slot not in self._candidates:
            assert self._hidden is not None
            logits = self._logits[slot]
            ids = np.argpartition(-logits, self._selector.top - 1)[: self._selector.top]
            codes = self._selector.behind.rows(ids.tolist())
            self._candidates[slot] = (ids, logits[ids], codes, self._selector.gate.whole @ self._hidden[slot])
        return self._candidates[slot]


@dataclass(frozen=True, slots=True)
class Confidence:
    """How sure a DSpark head is of a slot: sigmoid(weight · [hidden; w1[guess before]] + bias)."""

    weight: Matrix
    bias: float
    w1: Table

    def of(self, hidden: Features, previous: list[int]) -> Probabilities:
        """[N] of N hidden rows [N, E] and the guesses before them."""
        size = hidden.shape[1]
        score = hidden @ self.weight[:size] + self.w1.rows(previous) @ self.weight[size:] + self.bias
        chance: Probabilities = 1.0 / (1.0 + np.exp(-score.astype(np.float64)))
        return chance
