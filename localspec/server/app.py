"""The application: paths, what stands before them, and the page."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from localspec import __version__
from localspec.server.dialects import DIALECTS
from localspec.server.guards import Guard, head_check, host_check, key_check, refuse
from localspec.server.refusals import Refusal
from localspec.server.routes import Service, guarded
from localspec.server.schema.reading import describe

_PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def make_app(service: Service) -> Starlette:
    """The whole application over one service."""
    meters, settings = service.meters, service.settings
    routes = [
        *(Route(path, guarded(service.write, meters), methods=["POST"]) for path in DIALECTS),
        Route("/v1/messages/count_tokens", guarded(service.count, meters), methods=["POST"]),
        Route("/v1/models", guarded(service.models, meters)),
        Route("/v1/models/{name:path}", guarded(service.model, meters)),
        Route("/health", guarded(service.health, meters)),
        Route("/v1/health", guarded(service.health, meters)),
        Route("/metrics", guarded(service.metrics, meters)),
        Route("/status", guarded(service.status, meters)),
        Route("/openapi.json", guarded(_openapi, meters)),
        Route("/", guarded(_page, meters)),
        Mount("/page", _Files(directory=_PAGE)),
    ]
    middleware = [
        Middleware(Guard, check=head_check(settings.max_header_bytes)),
        Middleware(Guard, check=host_check(settings.hosts)),
    ]
    if settings.cors:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["X-Request-Id", "X-Localspec-Ignored", "Retry-After"],
            )
        )
    middleware.append(Middleware(Guard, check=key_check(settings.api_keys)))
    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _not_here})


async def _not_here(request: Request, error: Exception) -> Response:
    """No such path, or no such method on it."""
    assert isinstance(error, HTTPException)
    words = {404: "there is nothing at this path", 405: f"{request.method[:20]} is not for this path"}
    refusal = Refusal(error.status_code, words.get(error.status_code, error.detail), "not_found")
    response = refuse(refusal, request.url.path)
    response.headers.update(error.headers or {})
    return response


async def _page(_: Request) -> Response:
    return FileResponse(_PAGE / "index.html", headers=_PAGE_HEADERS)


async def _openapi(_: Request) -> Response:
    """What may be sent where, for tools that read OpenAPI."""
    paths = {}
    schemas: dict[str, object] = {}
    for path, schema in describe().items():
        name = schema["title"]
        schemas |= {f"{name}_{part}": value for part, value in schema.pop("$defs", {}).items()}
        schemas[name] = schema
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        responses = {code: {"description": words} for code, words in _RESPONSES.items()}
        paths[path] = {"post": {"requestBody": {"required": True, "content": content}, "responses": responses}}
    info = {"title": "localspec", "version": __version__}
    return JSONResponse({"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}})


_RESPONSES = {
    "200": "the answer; with `stream` as server-sent events",
    "400": "the body, or what it asks for, is wrong",
    "404": "no such model",
    "413": "the body is too long",
    "429": "too many requests wait",
}


class _Files(StaticFiles):
    """The page's own files, with the same headers as the page."""

    def file_response(self, *arguments: object, **named: object) -> Response:
        response = super().file_response(*arguments, **named)  # type: ignore[arg-type] # passed on as it came
        response.headers.update(_PAGE_HEADERS)
        return response
