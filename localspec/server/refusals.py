"""Errors as HTTP answers: a status, and a body in the shape that the clients of each interface read."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from localspec.errors import (
    ClosedError,
    ContextOverflowError,
    GrammarError,
    LocalspecError,
    OutOfMemoryError,
    QueueFullError,
    UsageError,
)

_log = logging.getLogger("localspec.server")

# status -> (OpenAI's word, Anthropic's word)
_KINDS = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("not_found_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("timeout_error", "timeout_error"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "invalid_request_error"),
    431: ("invalid_request_error", "invalid_request_error"),
    429: ("rate_limit_error", "rate_limit_error"),
    503: ("server_error", "overloaded_error"),
    504: ("timeout_error", "timeout_error"),
}
_OUR_FAULT = ("server_error", "api_error")


@dataclass(eq=False)  # not frozen: Python itself writes an exception's traceback
class Refusal(Exception):  # noqa: N818 - an answer as much as an error
    """Why a request gets no answer. code: a word for programs.  anthropic_message: the message as clients of that
    interface look for it, where it differs."""

    status: int
    message: str
    code: str | None = None
    retry_after_s: float | None = None
    anthropic_message: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Besides the usual ones. What may leave an unread body behind closes the connection."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status in (408, 413):
            headers["Connection"] = "close"
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def openai(self) -> dict[str, Any]:
        """The body that OpenAI's clients read."""
        kind = _KINDS.get(self.status, _OUR_FAULT)[0]
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """The body that Anthropic's clients read."""
        kind = _KINDS.get(self.status, _OUR_FAULT)[1]
        return {"type": "error", "error": {"type": kind, "message": self.anthropic_message or self.message}}


def refusal_of(error: BaseException) -> Refusal:
    """What a client is told of an error. An unexpected one is logged, and its words are kept from the client."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ContextOverflowError):
        return Refusal(
            400,
            f"This model's maximum context length is {error.limit} tokens. However, your messages resulted in "
            f"{error.num_tokens} tokens. Please reduce the length of the messages.",
            "context_length_exceeded",
            anthropic_message=f"prompt is too long: {error.num_tokens} tokens > {error.limit} maximum",
        )
    if isinstance(error, QueueFullError):
        return Refusal(429, str(error), "queue_full", error.retry_after_s)
    if isinstance(error, UsageError | GrammarError):
        return Refusal(400, str(error), "invalid_value")
    if isinstance(error, ClosedError):
        return Refusal(503, str(error), "shutting_down", 5.0)
    if isinstance(error, OutOfMemoryError | MemoryError):
        _log.warning("a request ran out of memory: %s", error)
        return Refusal(503, str(error) or "out of memory", "out_of_memory", 5.0)
    if isinstance(error, LocalspecError):
        _log.error("a request failed: %s", error)
        return Refusal(500, str(error), "server_error")
    _log.error("a request failed", exc_info=error)
    return Refusal(500, "internal error; the server's log has the details", "server_error")


def is_anthropic(path: str) -> bool:
    """Does this path belong to the interface whose clients read Anthropic's errors?"""
    return path.startswith("/v1/messages")


def error_body(refusal: Refusal, path: str) -> dict[str, Any]:
    """The body for whoever asked for that path."""
    return refusal.anthropic() if is_anthropic(path) else refusal.openai()
