"""A whole server in a thread of the tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2

from localspec.pair import Pair
from localspec.server.batch import BatchSettings
from localspec.server.listener import address_of, bind
from localspec.server.program import Program
from localspec.server.settings import ServerSettings

LONG_S = 20.0


@dataclass(frozen=True, slots=True)
class Served:
    """A running server."""

    address: str
    program: Program

    @property
    def num_busy(self) -> int:
        """Requests that are being answered or wait for it."""
        status = self.program.batch.status()
        return status.num_active + status.num_waiting


@contextmanager
def serving(pair: Pair, batch: BatchSettings, settings: ServerSettings) -> Iterator[Served]:
    """A server on a free port, stopped at the end."""
    with bind("127.0.0.1", 0) as listening, Program(pair, batch, settings) as program:
        thread = threading.Thread(target=program.run, args=(listening,), name="test-server")
        thread.start()
        try:
            address = address_of(listening)
            wait_until(lambda: _answers(address))
            yield Served(address, program)
        finally:
            program.stop()
            thread.join(LONG_S)
            assert not thread.is_alive(), "the server does not stop"


def wait_until(holds: Callable[[], bool], seconds: float = LONG_S) -> None:
    """Wait for what happens soon; fail if it does not."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def _answers(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/health").is_success
    except httpx2.TransportError:
        return False
