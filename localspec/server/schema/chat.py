"""`/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from localspec.server.schema.parts import (
    MAX_TOP_LOGPROBS,
    FunctionBody,
    Name,
    Nothing,
    NumTokens,
    Part,
    Penalised,
    joined,
    without_none,
)


class ToolBody(Part):
    """A tool of the chat interface."""

    type: Literal["function"]
    function: FunctionBody


class CalledBody(Part):
    """A function as it was called; arguments: JSON, as the model wrote it."""

    name: str
    arguments: str


class CallBody(Part):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledBody
    index: int | None = None


class MessageBody(Part):
    """One message of the chat interface; answers of this server may be given back as they came."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(joined)] = None
    name: str | None = None
    tool_calls: Annotated[list[CallBody], BeforeValidator(without_none)] = Field(default_factory=list)
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Nothing = None


class SchemaBody(Part):
    """A JSON schema with a name. Under `strict` or not, the answer obeys it."""

    name: Name
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class FormatBody(Part):
    """What the answer may look like, in the chat interface; `regex` and `grammar` (lark) are ours."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: SchemaBody | None = None
    regex: str | None = None
    grammar: str | None = None


class ChatBody(Penalised):
    """`/v1/chat/completions`."""

    reported = frozenset(
        {
            "user",
            "metadata",
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "prompt_cache_options",
            "verbosity",
            "cache_prompt",
        }
    )

    messages: list[MessageBody] = Field(min_length=1)
    max_tokens: NumTokens | None = None
    max_completion_tokens: NumTokens | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: FormatBody | None = None
    tools: list[ToolBody] | None = Field(default=None, max_length=256)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    verbosity: str | None = None
    cache_prompt: bool | None = None
