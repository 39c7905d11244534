"""From the batch's thread to asyncio: the answers of one HTTP request while they are written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial

from localspec.server.batch import Batch, Request
from localspec.server.refusals import Refusal
from localspec.server.ticket import Event, Failed, Finished, Pieces, PrefillProgress, Ticket

Happened = tuple[int, PrefillProgress | Pieces | Finished]
"""Which request, and what came of it."""


class Run:
    """Answers being written. Iterating gives what happened, in that order, and None after every `idle_s` in which
    nothing did; it ends with the last answer, and raises what made one fail.

    limit_s: longest time for all of it.  Whoever submits it cancels it in the end, whatever happened.
    """

    def __init__(
        self,
        batch: Batch,
        requests: Sequence[Request],
        loop: asyncio.AbstractEventLoop,
        *,
        idle_s: float,
        limit_s: float | None,
    ) -> None:
        self._batch = batch
        self._requests = requests
        self._loop = loop
        self._idle_s = idle_s
        self._limit_s = limit_s
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._unfinished = set(range(len(requests)))

    def submit(self) -> None:
        """Queue all requests, or none. From any thread; raises as `Batch.submit`."""
        try:
            for index, request in enumerate(self._requests):
                self._tickets.append(self._batch.submit(request, partial(self._hand_over, index)))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End within a round what is not finished. From any thread."""
        for ticket in self._tickets:
            ticket.cancel()

    async def __aiter__(self) -> AsyncIterator[Happened | None]:
        started = self._loop.time()
        while self._unfinished:
            left = None if self._limit_s is None else started + self._limit_s - self._loop.time()
            if left is not None and left <= 0.0:
                raise Refusal(504, f"the answer was not finished within {self._limit_s:g} seconds", "timeout")
            try:
                async with asyncio.timeout(self._idle_s if left is None else min(left, self._idle_s)):
                    index, event = await self._events.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(event, Failed):
                self._unfinished.discard(index)
                raise event.error
            if isinstance(event, Finished):
                self._unfinished.discard(index)
            yield index, event

    def _hand_over(self, index: int, event: Event) -> None:
        """Called by the batch's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
        except RuntimeError:  # the loop has ended, and with it whoever would read this
            self.cancel()
