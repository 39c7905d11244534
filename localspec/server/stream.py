"""Answers that end when nobody reads them any more: as server-sent events, and whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class DisconnectedError(Exception):
    """The client has gone away; there is nobody to tell."""


def event(data: Mapping[str, Any] | str, name: str | None = None) -> bytes:
    """One server-sent event. JSON is written in ASCII, so that no proxy can break a character."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"), allow_nan=False)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


COMMENT = b": still here\n\n"
"""Read by nobody: it keeps a quiet connection open, and finds out whether it still is."""


class EventStream(Response):
    """Sends events as they come, and stops when the client goes away. at_end: called in any case."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str], at_end: Callable[[], None]
    ) -> None:
        self._events = events
        self._at_end = at_end
        self.status_code = 200
        self.background = None
        self.init_headers({**headers, "Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve it."""
        try:
            await while_connected(receive, self._send_all(send))
        except DisconnectedError:
            pass
        finally:
            self._at_end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """What `work` gives. If the client goes away first, it is cancelled, and DisconnectedError raised. The request's
    body must have been read."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise DisconnectedError
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
