"""One request from submission to its last event."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from localspec.engine.answer import Answer, Generation, Piece
from localspec.engine.round import Room, RoundResult
from localspec.engine.slots import Slot
from localspec.server.speculation import Speculation
from localspec.server.ticket import Event, Failed, Finished, Pieces, PrefillProgress, Ticket, Timings
from localspec.types import TokenIds

_log = logging.getLogger("localspec.server")


def _now_ms() -> float:
    return perf_counter() * 1e3


@dataclass(slots=True, eq=False)
class Seat:
    """A request with its ticket and its answer. slot: where it is computed, once it has one.  ready: is the prompt
    read? Times are clock readings in milliseconds, None for what has not happened."""

    ticket: Ticket
    answer: Answer
    prompt: TokenIds
    speculation: Speculation
    acceptance: str
    slot: Slot | None = None
    ready: bool = False
    submitted_ms: float = field(default_factory=_now_ms)
    seated_ms: float | None = None
    ready_ms: float | None = None
    first_ms: float | None = None

    @property
    def num_unread(self) -> int:
        """Prompt tokens that are still to be read."""
        done = self.slot.state.length if self.slot is not None else 0
        return len(self.prompt) - 1 - done

    def waited_ms(self) -> float:
        """Since submission."""
        return _now_ms() - self.submitted_ms

    # ------------------------------------------------------------ what happens to it

    def sit(self, slot: Slot) -> None:
        """It has a slot now, with what of its prompt was found there."""
        self.slot, self.seated_ms = slot, _now_ms()
        self.answer.stats.num_reused = slot.state.length

    def tell_progress(self) -> None:
        """Some of the prompt was read."""
        assert self.slot is not None
        stats = self.answer.stats
        stats.num_prefilled = self.slot.state.length - stats.num_reused
        self._put(PrefillProgress(stats.num_prefilled, len(self.prompt) - 1 - stats.num_reused))

    def get_ready(self) -> None:
        """The prompt is read, by all that read it."""
        self.ready, self.ready_ms = True, _now_ms()
        self.answer.stats.prefill_ms = self.ready_ms - (self.seated_ms or self.ready_ms)

    def room(self) -> Room | None:
        """How much may be proposed for it; None once the answer has ended."""
        room = self.answer.room()
        most = self.speculation.width
        return room if room is None or most is None else Room(min(room.nodes, most), room.depth)

    def take(self, result: RoundResult) -> None:
        """Its part of a round."""
        assert self.slot is not None
        if self.first_ms is None:
            self.first_ms = _now_ms()
        before = len(self.answer.tokens)
        pieces = tuple(self.answer.take(result, self.slot.state))
        logprobs = None if result.logprobs is None else tuple(self.answer.logprobs[before:])
        self._put(Pieces(pieces, tuple(self.answer.tokens[before:]), logprobs, result))

    def finish(self) -> Generation:
        """The last event: the answer ended, or was cancelled."""
        pieces: Sequence[Piece] = tuple(self.answer.finish())
        generation = self._generation()
        self._put(Finished(tuple(pieces), generation, self._timings()))
        return generation

    def fail(self, error: BaseException) -> None:
        """The last event: something broke."""
        generation: Generation | None = None
        try:
            generation = self._generation()
        except Exception:
            _log.exception("what a failed request got so far is lost")
        self._put(Failed(error, generation, self._timings()))

    # ------------------------------------------------------------ inside

    def _generation(self) -> Generation:
        drafter = self.slot.drafter if self.slot is not None else None
        name = drafter.name if drafter is not None else self.speculation.drafter.name
        return self.answer.generation(name, self.acceptance)

    def _timings(self) -> Timings:
        now, start = _now_ms(), self.submitted_ms
        seated = now if self.seated_ms is None else self.seated_ms
        ready = max(seated, now) if self.ready_ms is None else self.ready_ms
        first = None if self.first_ms is None else self.first_ms - start
        return Timings(seated - start, ready - seated, first, now - start)

    def _put(self, event: Event) -> None:
        """Hand an event on. A listener that breaks ends its own request only."""
        try:
            self.ticket.put(event)
        except Exception:
            _log.exception("a listener failed; its request is cancelled")
            self.ticket.cancelled = self.answer.cancelled = True
