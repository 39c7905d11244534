"""`/v1/responses`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from localspec.server.schema.parts import (
    MAX_TOP_LOGPROBS,
    Body,
    FunctionBody,
    Name,
    NumTokens,
    Part,
    Stops,
    StreamOptionsBody,
    joined,
)


class FunctionToolBody(FunctionBody):
    """A tool of the responses interface."""

    type: Literal["function"]


class TextFormatBody(Part):
    """The same in the responses interface."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(alias="schema", default=None)
    strict: bool | None = None


class TextBody(Part):
    """How the answer of the responses interface is written."""

    format: TextFormatBody | None = None
    verbosity: str | None = None


class ItemBody(Part):
    """An item of a conversation in the responses interface: a message, a call, or what a call gave."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Annotated[str | None, BeforeValidator(joined)] = None
    id: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Annotated[str | None, BeforeValidator(joined)] = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: str | None = None


def _items(value: object) -> object:
    return [{"type": "message", "role": "user", "content": value}] if isinstance(value, str) else value


class ResponseBody(Body):
    """`/v1/responses`. Nothing is stored, so earlier turns are sent in `input`."""

    reported = frozenset(
        {
            "metadata",
            "store",
            "user",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "prompt_cache_options",
            "max_tool_calls",
        }
    )

    input: Annotated[list[ItemBody], BeforeValidator(_items), Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: NumTokens | None = None
    stop: Stops | None = None
    text: TextBody | None = None
    tools: list[FunctionToolBody] | None = Field(default=None, max_length=256)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    include: list[Literal["message.output_text.logprobs"]] | None = None
    stream_options: StreamOptionsBody | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    reasoning: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    max_tool_calls: int | None = None
