"""The prefix cache: places in which sequences are computed, and what of earlier ones is still worth having.

A slot whose request has ended keeps its tokens until another request needs the place. What that one does not go
on with is copied out first, and copies stay within a budget of bytes, least recently used out first. So a new prompt
starts from the longest beginning that any slot or copy shares with it: a system prompt, or the conversation so far.
The slot's drafter stays in it with a memory of its own, and compares for itself. What draft models have read is copied
out and put back beside what the target has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from localspec.context import common_prefix
from localspec.errors import OutOfMemoryError
from localspec.protocols import Drafter, LanguageModel, Rewind, SavedDraft, SavedState, SequenceState
from localspec.types import TokenIds

WORTH_COPYING = 32
"""Tokens: fewer are read again rather than copied."""


def _nothing() -> TokenIds:
    return np.zeros(0, np.int32)


@dataclass(slots=True, eq=False)
class Slot:
    """One sequence of the target and the drafter that goes with it.

    held: the tokens that `state` has committed, while no request is in the slot.  drafter_key: which drafter it is.
    drafts: what draft models had read of a copy that was put back, until a drafter takes it.  place: among the slots.
    """

    state: SequenceState
    place: int = 0
    held: TokenIds = field(default_factory=_nothing)
    drafter: Drafter | None = None
    drafter_key: str = ""
    drafts: tuple[SavedDraft, ...] = ()
    used_at: int = 0

    def draft_with(self, key: str, make: Callable[[], Drafter]) -> None:
        """Use the drafter of that key for the next turn, a new one unless it is here already, with what was put back
        for it."""
        if self.drafter is None or self.drafter_key != key:
            self.use(None)  # first: there may be no sequence for a second one
            self.use(make(), key)
        else:
            self.drafter.attach(self.state)
        assert self.drafter is not None
        drafts, self.drafts = self.drafts, ()
        self.drafter.restore(drafts)

    def use(self, drafter: Drafter | None, key: str = "") -> None:
        """Draft with another one; the former is closed. One that reads the target's hidden states may empty the
        sequence, to see it read."""
        if self.drafter is not None:
            self.drafter.close()
        self.drafter, self.drafter_key = drafter, key if drafter is not None else ""
        if drafter is not None:
            drafter.attach(self.state)

    def hold(self, state: SequenceState) -> None:
        """Another sequence, in the place of a closed one."""
        self.state = state
        if self.drafter is not None:
            self.drafter.attach(state)

    def close(self) -> None:
        """Give the memory back."""
        self.use(None)
        self.state.close()

    def save_drafts(self) -> tuple[SavedDraft, ...]:
        """What draft models have read here, as far as there is memory for copies."""
        try:
            return () if self.drafter is None else self.drafter.save()
        except OutOfMemoryError:
            return ()  # what cannot be kept is read again


@dataclass(slots=True, eq=False)
class Kept:
    """A copy of a sequence with its tokens, and of what draft models had read of them."""

    tokens: TokenIds
    saved: SavedState
    drafts: tuple[SavedDraft, ...] = ()

    @property
    def num_bytes(self) -> int:
        """What all of it takes."""
        return self.saved.num_bytes + self.draft_bytes

    @property
    def draft_bytes(self) -> int:
        """What the draft models' part takes."""
        return sum(draft.num_bytes for draft in self.drafts)


class Slots:
    """`num` slots of a model, and copies of at most `max_bytes`.

    Raises BackendError if the model has fewer sequences.
    """

    def __init__(self, model: LanguageModel, num: int, max_bytes: int) -> None:
        self._model, self._max_bytes = model, max_bytes
        self._idle: list[Slot] = []
        self._busy: list[Slot] = []
        self._kept: list[Kept] = []  # least recently used first
        self._clock = 0
        try:
            for place in range(num):
                self._idle.append(Slot(model.open(), place))
        except BaseException:
            self.close()
            raise

    @property
    def num_free(self) -> int:
        """Slots without a request."""
        return len(self._idle)

    @property
    def num_kept(self) -> int:
        """Copies."""
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """What the copies take."""
        return sum(kept.num_bytes for kept in self._kept)

    @property
    def draft_bytes(self) -> int:
        """Of these, what draft models have read."""
        return sum(kept.draft_bytes for kept in self._kept)

    # ------------------------------------------------------------ taking and giving back

    def take(self, prompt: TokenIds, running: Iterable[tuple[Slot, TokenIds]] = ()) -> Slot:
        """A free slot that already holds the longest known beginning of `prompt` (its last token left out).

        running: slots of other requests with their tokens so far, to copy a beginning from.
        Raises OutOfMemoryError or BackendError if a copy cannot be put back; the slot is then free and empty.
        """
        self._clock += 1
        slot = max(self._idle, key=lambda one: self._merit(one, prompt))
        here = self._shared(slot.held, prompt)
        kept = max(self._kept, key=lambda one: self._shared(one.tokens, prompt), default=None)
        there = 0 if kept is None else self._shared(kept.tokens, prompt)
        other, beside = self._best_running(running, prompt)
        if kept is not None and there >= max(here + WORTH_COPYING, beside):
            self._kept.remove(kept)
            self._kept.append(kept)
            slot = self._restored(kept)
        elif other is not None and beside >= max(here, there) + WORTH_COPYING:
            slot = self._restored(Kept(prompt[:beside], other.state.save(), other.save_drafts()))
        elif len(slot.held) - here >= WORTH_COPYING:
            self._keep(slot)
        shared = self._shared(slot.held, prompt)
        slot.state.truncate(shared)
        self._idle.remove(slot)
        self._busy.append(slot)
        slot.held, slot.used_at = _nothing(), self._clock
        return slot

    def give_back(self, slot: Slot, tokens: TokenIds) -> None:
        """A request has ended. tokens: what was read and written in the slot."""
        self._busy.remove(slot)
        self._idle.append(slot)
        slot.held = np.array(tokens[: slot.state.length], np.int32)

    def discard(self, slot: Slot) -> None:
        """A request has broken off, and with it perhaps its state: the slot starts anew."""
        self._busy.remove(slot)
        self._idle.append(slot)
        self._empty(slot)

    def close(self) -> None:
        """Give everything back."""
        for slot in (*self._idle, *self._busy):
            slot.close()
        self._idle, self._busy, self._kept = [], [], []

    # ------------------------------------------------------------ inside

    def _shared(self, tokens: TokenIds, prompt: TokenIds) -> int:
        """Tokens at the beginning of `prompt` that need not be read."""
        same = min(common_prefix(tokens, prompt), len(prompt) - 1)
        return 0 if same < len(tokens) and self._model.capabilities.rewind is Rewind.NEVER else same

    def _merit(self, slot: Slot, prompt: TokenIds) -> tuple[int, int, int, int]:
        """What makes a free slot the right one: a long beginning, then busy neighbours (a backend may run neighbouring
        sequences at less cost), then any beginning, then that it was not used for long."""
        shared = self._shared(slot.held, prompt)
        busy = sum(abs(one.place - slot.place) == 1 for one in self._busy)
        return shared if shared >= WORTH_COPYING else 0, busy, shared, -slot.used_at

    def _best_running(self, running: Iterable[tuple[Slot, TokenIds]], prompt: TokenIds) -> tuple[Slot | None, int]:
        best, length = None, 0
        for slot, tokens in running:
            same = self._shared(tokens[: slot.state.length], prompt)
            if same > length:
                best, length = slot, same
        return best, length

    def _restored(self, copy: Kept) -> Slot:
        """The least recently used free slot, holding a copy; what it held is kept if it is worth it."""
        slot = min(self._idle, key=lambda one: one.used_at)
        if len(slot.held) >= WORTH_COPYING:
            self._keep(slot, besides=copy)
        self._empty(slot, copy.saved)
        # none, where the slot's drafter has to see them read
        slot.held, slot.drafts = copy.tokens[: slot.state.length], copy.drafts
        return slot

    def _empty(self, slot: Slot, saved: SavedState | None = None) -> None:
        """The slot with a new state; an empty one if the copy finds no room."""
        slot.state.close()
        slot.held, slot.drafts = _nothing(), ()
        try:
            slot.hold(self._model.open() if saved is None else saved.open())
        except BaseException:
            slot.hold(self._model.open())
            raise

    def _keep(self, slot: Slot, besides: Kept | None = None) -> None:
        """Copy out what a slot holds; older copies go where there are too many bytes. besides: a copy in use."""
        if not self._max_bytes or any(self._covers(kept.tokens, slot.held) for kept in self._kept):
            return
        if any(self._covers(one.held, slot.held) for one in self._idle if one is not slot):
            return
        try:
            saved = slot.state.save()
        except OutOfMemoryError:
            return  # what cannot be kept is read again
        if saved.num_bytes > self._max_bytes:
            return
        new = Kept(slot.held, saved, slot.save_drafts())
        if new.num_bytes > self._max_bytes:
            new.drafts = ()
        self._kept = [one for one in self._kept if one is besides or not self._covers(new.tokens, one.tokens)]
        self._kept.append(new)
        while self.num_bytes > self._max_bytes:
            del self._kept[0]

    def _covers(self, tokens: TokenIds, others: TokenIds) -> bool:
        """Can `others` be had from `tokens`?"""
        if self._model.capabilities.rewind is not Rewind.FREE:
            return len(tokens) == len(others) and common_prefix(tokens, others) == len(others)
        return common_prefix(tokens, others) == len(others)
