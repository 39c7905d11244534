"""The socket, and uvicorn on it, with patience that ends.

uvicorn waits for ever for the rest of a request's head and for a client to read. Here both have a limit, so that
connections which are slow on purpose (slow-loris) or half open do not pile up.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from localspec.errors import SettingError
from localspec.server.settings import ServerSettings

_KEEP_ALIVE_S = 30
_PROBE_AFTER_S = 30


def bind(host: str, port: int) -> socket.socket:
    """A socket with that address, not listening yet; port 0 takes a free one. Raises SettingError."""
    try:
        [family, kind, protocol, _, address] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise SettingError(f"cannot listen on {host}: {error}", fix="Check --host.") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _find_out_the_dead(bound)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        raise SettingError(f"cannot listen on {host}:{port}: {error}", fix="Choose another --port.") from None
    return bound


def _find_out_the_dead(bound: socket.socket) -> None:
    """Connections ask whether the other side still lives; on Linux accepted sockets inherit this."""
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", _PROBE_AFTER_S), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        option = getattr(socket, name, None)
        if option is not None:
            bound.setsockopt(socket.IPPROTO_TCP, option, value)


def address_of(bound: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


def make_server(app: ASGIApp, settings: ServerSettings, *, log_requests: bool = False) -> uvicorn.Server:
    """Ready to `run(sockets=[...])`. It ends at SIGINT or SIGTERM, after `settings.drain_s` at most."""
    config = uvicorn.Config(
        app,
        http=_patient(settings),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=log_requests,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        h11_max_incomplete_event_size=settings.max_header_bytes,
    )
    return uvicorn.Server(config)


class _Countdown:
    """Calls `then` unless it is stopped in time."""

    def __init__(self, seconds: float, then: Callable[[], None]) -> None:
        self._seconds = seconds
        self._then = then
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, unless it runs already."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._then)

    def stop(self) -> None:
        """It came in time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _patient(settings: ServerSettings) -> type[H11Protocol]:
    """uvicorn's connection with these limits."""

    class Patient(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._head = _Countdown(settings.header_s, self._drop)
            self._reader = _Countdown(settings.write_s, self._drop)
            self._head.start()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_head(begun=True)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch_head(begun=bool(self.conn.trailing_data[0]))

        def connection_lost(self, exc: Exception | None) -> None:
            self._head.stop()
            self._reader.stop()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reader.start()

        def resume_writing(self) -> None:
            self._reader.stop()
            super().resume_writing()

        def _watch_head(self, *, begun: bool) -> None:
            """A head that has begun, and is not whole, is waited for so long."""
            if begun and self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self._head.start()
            else:
                self._head.stop()

        def _drop(self) -> None:
            """Close at once: nothing that was not sent yet waits in the kernel for a reader."""
            connection = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()

    return Patient
