"""What answers each path."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from localspec import __version__
from localspec.server.desk import Desk, Job
from localspec.server.dialects import DIALECTS, Dialect, Writer
from localspec.server.dialects.messages import Count
from localspec.server.guards import read_body, refuse
from localspec.server.meters import CONTENT_TYPE, Meters
from localspec.server.refusals import Refusal, refusal_of
from localspec.server.reply import Reply, Written
from localspec.server.run import Happened, Run
from localspec.server.settings import ServerSettings
from localspec.server.stream import DisconnectedError, EventStream, while_connected
from localspec.server.ticket import Finished, Pieces, PrefillProgress

T = TypeVar("T")

Endpoint = Callable[[Request], Awaitable[Response]]


class Service:
    """One model behind these paths. close it when the server has ended."""

    def __init__(self, desk: Desk, settings: ServerSettings) -> None:
        self.desk = desk
        self.settings = settings
        self.meters = Meters(desk.batch)
        self._started = int(time.time())
        # Templates, tokenizers and grammars take time and are used by one thread only.
        self._thread = ThreadPoolExecutor(1, "localspec-desk")

    def close(self) -> None:
        """Give the thread back; the batch is somebody else's."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    # ------------------------------------------------------------ paths

    async def write(self, request: Request) -> Response:
        """All paths that write text."""
        raw = await self._body(request)
        dialect, job, run = await self._on_thread(self._begin, request.url.path, raw, asyncio.get_running_loop())
        headers = {"X-Request-Id": f"req_{job.id}", "Request-Id": f"req_{job.id}"}
        if job.ask.ignored:
            headers["X-Localspec-Ignored"] = ", ".join(job.ask.ignored)
        if job.ask.stream:
            return EventStream(self._events(run, job, dialect.writer(job)), headers, run.cancel)
        try:
            replies = await while_connected(request.receive, self._whole(run, job))
        finally:
            run.cancel()
        return JSONResponse(dialect.whole(job, replies), headers=headers)

    async def count(self, request: Request) -> Response:
        """`/v1/messages/count_tokens`."""
        raw = await self._body(request)
        count = await self._on_thread(lambda: self.desk.count(Count(raw).ask))
        return JSONResponse({"input_tokens": count})

    async def models(self, request: Request) -> Response:
        """`/v1/models`, in the form of the client that asks."""
        entries = [self._model(name, request) for name in self.desk.names]
        ends = {"first_id": self.desk.names[0], "last_id": self.desk.names[-1], "has_more": False}
        return JSONResponse({"object": "list", "data": entries, **ends})

    async def model(self, request: Request) -> Response:
        """`/v1/models/NAME`."""
        name = request.path_params["name"]
        self.desk.check_model(name)
        return JSONResponse(self._model(name, request))

    async def health(self, _: Request) -> Response:
        """`/health`."""
        if not self.desk.batch.is_working:
            raise Refusal(503, "nobody answers requests here any more", "not_working")
        return JSONResponse({"status": "ok"})

    async def metrics(self, _: Request) -> Response:
        """`/metrics`."""
        return Response(self.meters.text(), headers={"Content-Type": CONTENT_TYPE})

    async def status(self, _: Request) -> Response:
        """`/status`: what is loaded, and what it is doing."""
        pair = self.desk.batch.pair
        info, experience = pair.target.info, self.desk.batch.experience
        described = {
            "localspec": __version__,
            "names": list(self.desk.names),
            "target": info.name,
            "draft": None if pair.draft is None else pair.draft.info.name,
            "heads": [head.info.kind for head in pair.heads],
            "backend": info.backend,
            "device": info.device,
            "context_length": info.context_length,
            "width_class": str(pair.target.capabilities.width_class),
            "notes": list(pair.notes),
            "plain_ms": round(experience.plain_ms(0), 4),
            "measured": experience.live.costs.measured,
            "batch": asdict(self.desk.batch.status()),
        }
        return JSONResponse(described)

    # ------------------------------------------------------------ inside

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self.settings.max_body_bytes, self.settings.body_s)

    async def _on_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _begin(self, path: str, raw: bytes, loop: asyncio.AbstractEventLoop) -> tuple[Dialect, Job, Run]:
        """Read the body, make the request ready and queue it."""
        dialect = DIALECTS[path](raw)
        job = self.desk.prepare(dialect.ask)
        run = Run(self.desk.batch, job.requests, loop, idle_s=self.settings.idle_s, limit_s=self.settings.answer_s)
        run.submit()
        return dialect, job, run

    async def _events(self, run: Run, job: Job, writer: Writer) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, an error that comes late included."""
        replies = job.replies()
        try:
            yield b"".join(writer.begin())
            async for happened in run:
                data = writer.idle if happened is None else self._told(happened, job, replies, writer)
                if data:
                    yield data
            yield b"".join(writer.end(replies))
        except Exception as error:
            yield b"".join(writer.fail(refusal_of(error)))

    def _told(self, happened: Happened, job: Job, replies: Sequence[Reply], writer: Writer) -> bytes:
        """The events that tell of one event of the batch."""
        index, event = happened
        if isinstance(event, PrefillProgress):
            return b"".join(writer.progress(index, event)) if job.ask.return_progress else b""
        if isinstance(event, Pieces):
            return b"".join(writer.write(index, replies[index].take(event)))
        last = self._finish(replies[index], event)
        return b"".join(writer.write(index, last)) + b"".join(writer.finish(index, replies[index]))

    async def _whole(self, run: Run, job: Job) -> Sequence[Reply]:
        replies = job.replies()
        async for happened in run:
            if happened is None:
                continue
            index, event = happened
            if isinstance(event, Pieces):
                replies[index].take(event)
            elif isinstance(event, Finished):
                self._finish(replies[index], event)
        return replies

    def _finish(self, reply: Reply, event: Finished) -> Written:
        self.meters.finished(event.timings)
        if event.generation.finish_reason == "cancelled":  # by nobody who still listens, but a server that stops
            raise Refusal(503, "the server is shutting down", "shutting_down", 5.0)
        return reply.finish(event)

    def _model(self, name: str, request: Request) -> dict[str, Any]:
        info = self.desk.batch.pair.target.info
        if "anthropic-version" in request.headers:
            created_at = datetime.fromtimestamp(self._started, UTC).isoformat()
            return {"type": "model", "id": name, "display_name": info.name, "created_at": created_at}
        meta = {"context_length": info.context_length, "quantization": info.quantization, "backend": info.backend}
        return {"id": name, "object": "model", "created": self._started, "owned_by": "localspec", "meta": meta}


def guarded(endpoint: Endpoint, meters: Meters) -> Endpoint:
    """The endpoint, with what it raises turned into an answer, and counted."""

    async def answer(request: Request) -> Response:
        route = request.scope["path"]
        try:
            response = await endpoint(request)
        except (DisconnectedError, ClientDisconnect):
            response = Response(status_code=499)  # nobody reads it
        except Exception as error:
            response = refuse(refusal_of(error), route)
        meters.responded(_family(route), response.status_code)
        return response

    return answer


def _family(path: str) -> str:
    """One label for all models: labels are kept for ever, and clients choose paths."""
    return "/v1/models/NAME" if path.startswith("/v1/models/") else path
