"""`/v1/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from localspec.server.schema.parts import MAX_CHOICES, MAX_TOP_LOGPROBS, NUM_LIMIT, NumTokens, Penalised

_TokenId = Annotated[int, Field(ge=0, lt=NUM_LIMIT)]


def _prompts(value: object) -> object:
    """A prompt as a list of one."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return [value]
    return value


class CompletionBody(Penalised):
    """`/v1/completions`. best_of and suffix are taken where they change nothing."""

    reported = frozenset({"user"})

    prompt: Annotated[
        list[str] | list[Annotated[list[_TokenId], Field(min_length=1)]],
        BeforeValidator(_prompts),
        Field(min_length=1, max_length=MAX_CHOICES),
    ]
    max_tokens: NumTokens | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = None
    suffix: Literal[""] | None = None
    regex: str | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
