"""What a client of a batch holds: the events of one request, and the means to end it."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from localspec.engine.answer import Generation, Piece
from localspec.engine.round import RoundResult, TokenLogprob


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """done of total prompt tokens are read; those found in the cache are in neither."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Pieces:
    """One round. pieces: text that can be shown now, often none.  tokens, logprobs: those of the answer, cut where it
    ended.  round: all of it, what was emitted behind a stop included."""

    pieces: tuple[Piece, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    round: RoundResult


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds. queued: until a place was free.  prefill: until the prompt was read, other requests' rounds in
    between included.  first_token: from submission, None where there was none.  total: from submission."""

    queued_ms: float
    prefill_ms: float
    first_token_ms: float | None
    total_ms: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer ended, or was cancelled. pieces: text that was held back to the end."""

    pieces: tuple[Piece, ...]
    generation: Generation
    timings: Timings


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended with an error; the others go on. generation: as far as it got, None if it never began."""

    error: BaseException
    generation: Generation | None
    timings: Timings


Event = PrefillProgress | Pieces | Finished | Failed
OnEvent = Callable[[Event], None]


class Ticket:
    """One submitted request. Its last event is always one `Finished` or `Failed`.

    on_event: called with each event on the batch's own thread, which it must not hold up; without it they wait here
    for `events`.
    """

    def __init__(self, on_event: OnEvent | None, on_cancel: Callable[[Ticket], None]) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._on_event: OnEvent = on_event or self._events.put
        self._on_cancel = on_cancel
        self.cancelled = False

    def cancel(self) -> None:
        """End the request after the round in progress; from any thread. Does nothing once it has ended."""
        self.cancelled = True
        self._on_cancel(self)

    def events(self) -> Iterator[Event]:
        """Each event once, waiting for the next; ends with the last one. Of no use beside an `on_event`."""
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, Finished | Failed):
                return

    def result(self) -> Generation:
        """The finished answer; reads the events that are left. Raises what made it fail."""
        for event in self.events():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                return event.generation
        raise AssertionError("a ticket without an end")

    def put(self, event: Event) -> None:
        """For the batch: hand an event on."""
        self._on_event(event)
