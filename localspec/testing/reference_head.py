"""Heads for the reference model: slow numpy that shows what the contract of heads means.

A real head is trained; these know their target instead. `ReferenceHead` reads the conversation with weights that
nearly are the target's, one small pass per level, and adds something of all features it was fed; `ReferenceBlockHead`
does so for the anchor only, and guesses on from what usually follows each token. So both are right often enough to be
accepted, and a feature that is missing, fed twice or left behind changes every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from localspec.host_scores import HostScores
from localspec.protocols import HeadInfo, Scores, SequenceState, Tokens
from localspec.testing.reference import HIDDEN, Array, Cell, Companion, ReferenceModel, ReferenceState, normed
from localspec.tree.mask import depths
from localspec.types import Logits, Probabilities

_FADING = 0.8  # of what is remembered of older features
_ROOM = 256


class ReferenceHead:
    """A `DraftHead` of one pass per level.

    amount: how far its weights are from the target's.  levels: most that it guesses ahead.  host_scores: pretended.
    """

    def __init__(
        self, target: ReferenceModel, *, amount: float = 0.2, levels: int | None = None, host_scores: bool = True
    ) -> None:
        self.target = target
        self.inner = target.perturbed(amount)
        rng = np.random.default_rng(7)
        self.mix = rng.normal(size=(HIDDEN, 2 * HIDDEN)) / np.sqrt(2 * HIDDEN)
        self.read = amount * rng.normal(size=(_ROOM, target.vocab_size, HIDDEN)) / np.sqrt(HIDDEN)
        self.generation = [0]
        self.info = self._info(levels, host_scores)

    def _info(self, levels: int | None, host_scores: bool) -> HeadInfo:
        return HeadInfo(
            name="reference head",
            path=Path("reference-head"),
            kind="eagle3",
            num_parameters=self.mix.size + self.read.size,
            taps=(0, 1),
            levels=levels,
            host_scores=host_scores,
        )

    def open(self, state: SequenceState) -> ReferenceHeadState:
        """The head's part of a sequence."""
        if not isinstance(state, ReferenceState) or state.model is not self.target:
            raise ValueError("this head belongs to another target")
        state.check_open()
        for companion in state.companions:
            if isinstance(companion, ReferenceHeadState) and companion.head is self:
                return companion
        made = ReferenceHeadState(self, state, state.length)
        state.companions.append(made)
        return made

    def close(self) -> None:
        """Nothing to give back."""

    def row(self, beside: ReferenceHeadState, token: int, hidden: Array, depth: int) -> Array:
        """[V] what may follow the guess `token` at a depth (-1: the anchor)."""
        return np.asarray(self.inner.head @ normed(hidden) + self.read[0] @ beside.remembered)


class ReferenceBlockHead(ReferenceHead):
    """A `DraftHead` whose start does all the work, and that says how sure it is."""

    def __init__(
        self, target: ReferenceModel, *, amount: float = 0.2, levels: int = 5, host_scores: bool = True
    ) -> None:
        super().__init__(target, amount=amount, levels=levels, host_scores=host_scores)

    def _info(self, levels: int | None, host_scores: bool) -> HeadInfo:
        return HeadInfo(
            name="reference block head",
            path=Path("reference-block-head"),
            kind="dspark",
            num_parameters=self.mix.size + self.read.size,
            taps=(-1, 1),
            levels=levels,
            one_pass=True,
            confident=True,
            host_scores=host_scores,
        )

    @cached_property
    def usual(self) -> Array:
        """[V, V] what follows each token where nothing else is known."""
        rows = []
        for token in range(self.target.vocab_size):
            hidden, _ = self.target.compute(token, 0, [])
            rows.append(self.target.head @ normed(hidden))
        return np.array(rows)

    def row(self, beside: ReferenceHeadState, token: int, hidden: Array, depth: int) -> Array:
        """[V] with its own reading of the features at each depth."""
        if depth < 0:
            return super().row(beside, token, hidden, depth)
        return np.asarray(self.usual[token] + self.read[1 + depth] @ beside.remembered)


class ReferenceHeadState:
    """A `HeadState`: what was read of the conversation, and a memory of the features after each of its tokens."""

    def __init__(self, head: ReferenceHead, state: ReferenceState, first: int) -> None:
        self.head = head
        self._state = state
        self._first = first  # committed tokens that were not seen
        self._inner = ReferenceState(head.inner)
        self._memory: list[Array] = []  # [HIDDEN] after each token seen
        self._tokens: list[int] = []  # the anchor and the guesses fed
        self._certainty: Probabilities | None = None
        self._closed = False

    # ------------------------------------------------------------ the companion

    def feed(self, cells: Sequence[Cell]) -> None:
        """Read on."""
        self._forget()
        for cell in cells:
            self._run(cell.token, -1)
            self._inner.keep((0,))
            seen = self.head.mix @ np.concatenate([cell.features[tap + 1] for tap in self.head.info.taps])
            self._memory.append(normed(_FADING * self.remembered + seen))

    def truncate(self, length: int) -> None:
        """Forget what was read from there on."""
        self._forget()
        self._first = min(self._first, length)
        self._inner.truncate(length - self._first)
        del self._memory[length - self._first :]

    def copied(self, state: ReferenceState) -> Companion:
        """For a copy of the sequence."""
        other = ReferenceHeadState(self.head, state, self._first)
        other._inner.committed = list(self._inner.committed)
        other._memory = list(self._memory)
        return other

    # ------------------------------------------------------------ the guesses

    @property
    def num_missing(self) -> int:
        """Committed tokens that were not seen."""
        return self._first

    @property
    def room(self) -> int:
        """How many more guesses can be fed."""
        return _ROOM - len(self._tokens)

    @property
    def remembered(self) -> Array:
        """[HIDDEN] of all features seen."""
        return self._memory[-1] if self._memory else np.zeros(HIDDEN)

    def start(self, anchor: int) -> Scores:
        """[1, V] behind the anchor."""
        self._check_open()
        self._forget()
        return self._scores([anchor], [-1])

    def extend(self, tokens: Tokens, parents: Sequence[int]) -> Scores:
        """[N, V] behind guesses."""
        self._check_open()
        if not self._tokens:
            raise ValueError("guesses are fed before the anchor")
        ids = tokens.numpy().tolist()
        if not all(-1 <= parent < len(self._tokens) - 1 for parent in parents) or len(ids) != len(parents):
            raise ValueError(f"{len(ids)} guesses below {list(parents)}, where {len(self._tokens) - 1} were fed")
        if len(ids) > self.room:
            raise ValueError(f"{len(ids)} guesses are too many: {self.room} can be fed")
        levels = self.head.info.levels
        deepest = max(self._depth(parent + 1) for parent in parents) + 1
        if levels is not None and deepest > levels - 2:
            raise ValueError(f"a guess at depth {deepest}: this head guesses {levels} levels")
        return self._scores(ids, [parent + 1 for parent in parents])

    def confidence(self) -> Probabilities | None:
        """[N] of the rows scored last."""
        return self._certainty if self.head.info.confident else None

    def close(self) -> None:
        """Leave the sequence."""
        self._closed = True
        if self in self._state.companions:
            self._state.companions.remove(self)

    # ------------------------------------------------------------ inside

    def _check_open(self) -> None:
        self._state.check_open()
        if self._closed:
            raise ValueError("this head's part of the sequence is closed")

    def _forget(self) -> None:
        self._inner.keep(())
        self._tokens = []

    def _depth(self, node: int) -> int:
        """Of a pending node; the anchor's is -1."""
        return int(depths(np.array(self._inner.parents, np.int32))[node]) - 1

    def _scores(self, ids: Sequence[int], parents: Sequence[int]) -> Scores:
        self.head.generation[0] += 1
        rows = []
        for token, parent in zip(ids, parents, strict=True):
            hidden = self._run(token, parent)
            self._tokens.append(token)
            rows.append(self.head.row(self, token, hidden, self._depth(len(self._tokens) - 1)))
        logits = np.array(rows, np.float32)
        self._certainty = _certainty(logits)
        return HostScores(logits, self.head.generation)

    def _run(self, token: int, parent: int) -> Array:
        """[HIDDEN] of a token that is then pending; without a place among the sequences of its model."""
        state, inner = self._inner, self.head.inner
        state.parents.append(parent)
        hidden, cell = inner.compute(token, inner.position(state), inner.visible(state))
        state.pending.append(cell)
        return hidden


def _certainty(logits: Logits) -> Probabilities:
    """[N] a chance that grows with the distance between best and second."""
    best = np.sort(logits.astype(np.float64), axis=1)[:, -2:]
    return np.asarray(1.0 / (1.0 + np.exp(-(best[:, 1] - best[:, 0]))))
