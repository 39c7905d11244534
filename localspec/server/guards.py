"""Who is let in: the Host header against DNS rebinding, API keys, and bodies that are too long or never come.

A page on the web may resolve its own name to 127.0.0.1 and then reach a local server as its own origin; but its Host
header still has that name. Addresses cannot be rebound, so they pass. Bodies must say that they are JSON: browsers do
not send that to another origin without asking first, and the answer (CORS) is no unless an origin was let in.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from localspec.server.refusals import Refusal, error_body

_OPEN_PATHS = frozenset({"/", "/health", "/v1/health"})
"""What may be seen without a key: the page (which asks for one), and whether the server lives."""
_OPEN_FOLDER = "/page/"

_CONTAINERS = ("host.docker.internal", "host.containers.internal")
"""What containers call the machine that they run on. Nobody can own a name under `internal`, so nobody rebinds it."""


def refuse(refusal: Refusal, path: str) -> JSONResponse:
    """The refusal as a response, in the shape that clients of that path read."""
    return JSONResponse(error_body(refusal, path), refusal.status, refusal.headers)


class Guard:
    """Middleware: refuses what `check` refuses, before anything is read."""

    def __init__(self, app: ASGIApp, check: Callable[[str, Headers], None]) -> None:
        self._app = app
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it through, or answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope["path"], Headers(scope=scope))
        except Refusal as refusal:
            await refuse(refusal, scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)


def host_check(names: Sequence[str]) -> Callable[[str, Headers], None]:
    """Refuses requests to a name that is not this server's."""
    own = socket.gethostname().lower()
    allowed = {"localhost", own, f"{own}.local", *_CONTAINERS, *(name.lower() for name in names)}

    def check(_: str, headers: Headers) -> None:
        given = headers.getlist("host")
        name = _name_of(given[0]) if len(given) == 1 else None
        if name is None or not (name in allowed or name.endswith(".localhost") or _is_address(name)):
            shown = ", ".join(given)[:100] or "none"
            raise Refusal(
                403, f"host {shown!r} is not this server's name; start it with --allow-host to let it in", "wrong_host"
            )

    return check


def head_check(limit: int) -> Callable[[str, Headers], None]:
    """Refuses requests whose headers have more bytes. One that does not end is cut off by the connection itself."""

    def check(_: str, headers: Headers) -> None:
        if sum(len(name) + len(value) + 4 for name, value in headers.raw) > limit:
            raise Refusal(431, f"the headers are longer than {limit} bytes", "header_too_long")

    return check


def key_check(keys: Sequence[str]) -> Callable[[str, Headers], None]:
    """Refuses requests without one of the keys; without keys nothing."""
    known = [key.encode() for key in keys]

    def check(path: str, headers: Headers) -> None:
        if not known or path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER):
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        sent = given.strip().encode(errors="replace")
        matches = [hmac.compare_digest(sent, key) for key in known]  # all of them: time must not tell which is close
        if not any(matches):
            raise Refusal(401, "no valid API key was sent: Authorization: Bearer KEY, or x-api-key", "invalid_api_key")

    return check


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The request's body. Raises a Refusal for one that is not JSON by its own account, too long, or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f"the body must be JSON: Content-Type: application/json, not {kind[:60]!r}", "not_json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "compressed bodies are not read; send it as it is", "encoded_body")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_long(limit)
    try:
        return await asyncio.wait_for(_read(request, limit), seconds)
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {seconds:g} seconds", "timeout") from None


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_long(limit)
    return bytes(body)


def _too_long(limit: int) -> Refusal:
    return Refusal(413, f"the body is longer than {limit} bytes; start the server with a larger --max-body", "too_long")


def _name_of(host: str) -> str | None:
    """A Host header without its port; None for what is none."""
    host = host.strip().lower()
    if host.startswith("["):
        address, bracket, port = host[1:].partition("]")
        return address if bracket and (not port or port[1:].isdigit()) else None
    name, colon, port = host.partition(":")
    return name.rstrip(".") if name and (not colon or port.isdigit()) else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
