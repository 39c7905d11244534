"""From the one pass of a block head to the rows behind any path of guesses.

The pass leaves a row of logits and a hidden row per slot. What a slot says then depends on the guess before it:

    plain      not at all (DFlash, JetSpec)
    markov     w2 · w1[guess] is added (DSpark). llama.cpp has done that already, for the likeliest guesses in a
               row; for another one its product is taken out and the right one put in, which is exact but for rounding
    selector   of the slot's k best tokens, each with a score that depends on the guess before (DFlash 2)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from localspec.types import Logits, Probabilities

from .head_tables import Matrix, Table
from .taps import Features

Place = tuple[int, int]
"""(slot, the guess before it; for slot 0 the anchor)."""


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def one_thread() -> AbstractContextManager[object]:
    """Products inside are computed by the caller alone. OpenBLAS's threads stay awake for some 40 ms behind a product,
    and llama.cpp's have to share the processors with them: its passes then take three times as long."""
    limit: AbstractContextManager[object] = _libraries().limit(limits=1, user_api="blas")
    return limit


class Rows(ABC):
    """Rows of one block. logits [S, V] and hidden [S, E] (where it is needed) of its S slots that guess, views."""

    def __init__(self, logits: Logits, hidden: Features | None) -> None:
        self._logits = logits
        self._hidden = None if hidden is None else hidden.copy()

    @abstractmethod
    def at(self, places: Sequence[Place]) -> Logits:
        """[N, V] what is said at each place; a view of llama.cpp's own rows where that will do."""

    def hidden(self, places: Sequence[Place]) -> Features:
        """[N, E] hidden rows."""
        assert self._hidden is not None
        return self._hidden[[slot for slot, _ in places]]

    def _stored(self, places: Sequence[Place]) -> Logits:
        slots: slice | list[int] = [slot for slot, _ in places]
        if len(places) == 1:  # the usual chain: no copy
            slots = slice(places[0][0], places[0][0] + 1)
        rows: Logits = self._logits[slots]
        return rows


class PlainRows(Rows):
    """Slots that do not know each other."""

    def __init__(self, anchor: int, logits: Logits, hidden: Features | None) -> None:
        super().__init__(logits, hidden)

    def at(self, places: Sequence[Place]) -> Logits:
        """See `Rows`."""
        return self._stored(places)


@dataclass(frozen=True, slots=True)
class Markov:
    """w1 [V, r], w2 [Vd, r].  ids [Vd]: tokens of w2's rows, None: all, in order."""

    w1: Table
    w2: Table
    ids: NDArray[np.int64] | None

    def differences(self, was: Sequence[int], now: Sequence[int]) -> Logits:
        """[N, Vd] what other guesses before add to N rows."""
        both = self.w1.rows([*was, *now])
        codes = both[len(was) :] - both[: len(was)]
        with one_thread():
            changes = codes @ self.w2.whole.T
        return changes.astype(np.float32, copy=False)


class MarkovRows(Rows):
    """Rows with the bias of llama.cpp's own greedy chain in them."""

    def __init__(self, anchor: int, logits: Logits, hidden: Features | None, markov: Markov) -> None:
        super().__init__(logits, hidden)
        self._markov = markov
        self._likeliest = [anchor]  # the guess before each slot, as far as it was needed

    def at(self, places: Sequence[Place]) -> Logits:
        """See `Rows`."""
        other = [number for number, (slot, before) in enumerate(places) if before != self._greedy(slot)]
        rows = self._stored(places)
        if not other:
            return rows
        if len(places) == 1:
            rows = rows.copy()
        changes = self._markov.differences(
            [self._greedy(places[number][0]) for number in other], [places[number][1] for number in other]
        )
        ids = self._markov.ids
        if ids is None:
            rows[other] += changes
        else:
            rows[np.array(other)[:, None], ids] += changes
        return rows

    def _greedy(self, slot: int) -> int:
        while len(self._likeliest) <= slot:
            self._likeliest.append(int(self._logits[len(self._likeliest) - 1].argmax()))
        return self._likeliest[slot]


@dataclass(frozen=True, slots=True)
class Selector:
    """before [V, r], behind [V, r]: codebooks of the guess before and of the candidate.  gate [r, E].  top: k."""

    before: Table
    behind: Table
    gate: Table
    top: int


class SelectorRows(Rows):
    """Rows of a few candidates; every other token has -inf."""

    def __init__(self, logits: Logits, hidden: Features, selector: Selector) -> None:
        super().__init__(logits, hidden)
        self._selector = selector
        self._candidates: dict[int, tuple[NDArray[np.int64], Logits, Matrix, Matrix]] = {}

    def at(self, places: Sequence[Place]) -> Logits:
        """See `Rows`."""
        rows = np.full((len(places), self._logits.shape[1]), -np.inf, np.float32)
        codes_before = self._selector.before.rows([before for _, before in places])
        with one_thread():
            for row, code, (slot, _) in zip(rows, codes_before, places, strict=True):
                ids, scores, codes, gate = self._of_slot(slot)
                row[ids] = scores + codes @ (code * gate)
        return rows

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

    def of(self, hidden: Features, places: Sequence[Place]) -> Probabilities:
        """[N] of N places and their hidden rows [N, E]."""
        size = hidden.shape[1]
        codes = self.w1.rows([before for _, before in places])
        with one_thread():
            score = hidden @ self.weight[:size] + codes @ self.weight[size:] + self.bias
        chance: Probabilities = 1.0 / (1.0 + np.exp(-score.astype(np.float64)))
        return chance
