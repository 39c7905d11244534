"""The interfaces that clients know, one file each, behind one small protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from localspec.server.ask import Ask
from localspec.server.desk import Job
from localspec.server.dialects.chat import Chat
from localspec.server.dialects.completions import Completion
from localspec.server.dialects.messages import Messages
from localspec.server.dialects.responses import Response
from localspec.server.refusals import Refusal
from localspec.server.reply import Reply, Written
from localspec.server.ticket import PrefillProgress

__all__ = ["DIALECTS", "Dialect", "Writer"]


class Writer(Protocol):
    """An answer as server-sent events. Each method gives those that are to be sent next."""

    idle: bytes
    """Sent where nothing else was for a while."""

    def begin(self) -> Iterator[bytes]:
        """Before anything is written."""
        ...

    def progress(self, index: int, event: PrefillProgress) -> Iterator[bytes]:
        """The prompt of answer `index` is being read; called if the request wants to know."""
        ...

    def write(self, index: int, written: Written) -> Iterator[bytes]:
        """A round of answer `index`."""
        ...

    def finish(self, index: int, reply: Reply) -> Iterator[bytes]:
        """Reply `index` is finished."""
        ...

    def end(self, replies: Sequence[Reply]) -> Iterator[bytes]:
        """All are."""
        ...

    def fail(self, refusal: Refusal) -> Iterator[bytes]:
        """Something went wrong; nothing follows."""
        ...


class Dialect(Protocol):
    """One request in the words of one interface."""

    ask: Ask

    def whole(self, job: Job, replies: Sequence[Reply]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        ...

    def writer(self, job: Job) -> Writer:
        """For one that is."""
        ...


DIALECTS: Mapping[str, Callable[[bytes], Dialect]] = {
    "/v1/chat/completions": Chat,
    "/v1/completions": Completion,
    "/v1/responses": Response,
    "/v1/messages": Messages,
}
"""Path -> what reads a body. Raises SettingError for one that breaks the schema."""
