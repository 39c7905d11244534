"""From bytes to a checked body, and the bodies described for others."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from localspec.errors import SettingError
from localspec.server.schema.chat import ChatBody
from localspec.server.schema.completions import CompletionBody
from localspec.server.schema.messages import CountBody, MessagesBody
from localspec.server.schema.parts import Body
from localspec.server.schema.responses import ResponseBody

B = TypeVar("B", bound=Body)


def read_body(kind: type[B], raw: bytes) -> B:
    """The body, checked. Raises SettingError, naming the field, what was got and what is expected."""
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise SettingError(f"the body is not JSON: {error}", expected="a JSON object") from None
    if not isinstance(data, dict):
        raise SettingError("the body is not a JSON object", got=_shown(data))
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _worded(kind, error.errors(include_url=False)) from None


def _worded(kind: type[Body], problems: Sequence[ErrorDetails]) -> SettingError:
    """The first problem, in one line; of the members of a union the one that got furthest."""
    problem = max(problems, key=lambda p: len(p["loc"])) if len({p["loc"][:1] for p in problems}) == 1 else problems[0]
    where = ".".join(str(step) for step in problem["loc"])[:120] or "the body"
    if problem["type"] == "extra_forbidden":
        near = get_close_matches(where, kind.model_fields, n=1, cutoff=0.7) if len(problem["loc"]) == 1 else []
        hint = f"Did you mean {near[0]!r}?" if near else "Leave it out: this server has nothing of that name."
        return SettingError(f"unknown field '{where}'", fix=hint)
    if problem["type"] == "missing":
        return SettingError(f"'{where}' is missing")
    message = problem["msg"].removeprefix("Value error, ")
    return SettingError(f"'{where}': {message[:1].lower()}{message[1:]}", got=_shown(problem["input"]))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def describe() -> dict[str, dict[str, Any]]:
    """JSON schemas of the bodies, by path, for `/openapi.json`."""
    bodies: dict[str, type[Body]] = {
        "/v1/chat/completions": ChatBody,
        "/v1/completions": CompletionBody,
        "/v1/responses": ResponseBody,
        "/v1/messages": MessagesBody,
        "/v1/messages/count_tokens": CountBody,
    }
    return {
        path: body.model_json_schema(ref_template=f"#/components/schemas/{body.__name__}_{{model}}")
        for path, body in bodies.items()
    }
