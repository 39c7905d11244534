"""A whole server over an opened pair."""

from __future__ import annotations

import socket
from types import TracebackType

import uvicorn

from localspec.pair import Pair
from localspec.server.app import make_app
from localspec.server.batch import Batch, BatchSettings
from localspec.server.desk import Desk
from localspec.server.listener import make_server
from localspec.server.routes import Service
from localspec.server.settings import ServerSettings


class Program:
    """The batch, the application and uvicorn. Close it, or use it with `with`; the pair stays the caller's.

    The pair must have been opened with `BatchSettings.num_sequences` sequences.
    """

    def __init__(
        self, pair: Pair, batch: BatchSettings, settings: ServerSettings, *, log_requests: bool = False
    ) -> None:
        self.batch = Batch(pair, batch)
        self.service = Service(Desk(self.batch, settings), settings)
        self._server: uvicorn.Server = make_server(make_app(self.service), settings, log_requests=log_requests)

    def run(self, listening: socket.socket) -> None:
        """Serve until `stop`, or in the main thread until SIGINT or SIGTERM, which it passes on when it has ended."""
        self._server.run(sockets=[listening])

    def stop(self) -> None:
        """Make `run` return, after the running answers or the time they get. From any thread."""
        self._server.should_exit = True

    def close(self) -> None:
        """Give all sequences back."""
        self.service.close()
        self.batch.close()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
