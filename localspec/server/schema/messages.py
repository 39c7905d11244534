"""`/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from localspec.server.schema.parts import Body, Name, Nothing, NumTokens, Part, Stops, Text, joined


class InputToolBody(Part):
    """A tool of the messages interface."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None


class BlockBody(Part):
    """A part of a message of the messages interface: text, a call, or what a call gave."""

    type: Literal["text", "tool_use", "tool_result"]
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: Annotated[str | None, BeforeValidator(joined)] = None
    is_error: bool | None = None
    cache_control: dict[str, Any] | None = None
    citations: Nothing = None
    caller: dict[str, Any] | None = None


def _blocks(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class TurnBody(Part):
    """A message of the messages interface."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[BlockBody], BeforeValidator(_blocks)]


class JsonFormatBody(Part):
    """The answer's JSON schema in the messages interface."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfigBody(Part):
    """How the answer of the messages interface is written."""

    format: JsonFormatBody | None = None
    effort: str | None = None


class ChoiceBody(Part):
    """Which tools the answer of the messages interface uses."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _Conversation(Body):
    messages: list[TurnBody] = Field(min_length=1)
    system: Text | None = None
    tools: list[InputToolBody] | None = Field(default=None, max_length=256)
    tool_choice: ChoiceBody | None = None
    output_config: OutputConfigBody | None = None
    thinking: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None


class CountBody(_Conversation):
    """`/v1/messages/count_tokens`."""

    reported = frozenset({"thinking", "cache_control"})


class MessagesBody(_Conversation):
    """`/v1/messages`."""

    reported = frozenset({"thinking", "cache_control", "metadata", "service_tier", "inference_geo", "speed"})

    max_tokens: NumTokens
    stop_sequences: Stops | None = None
    presence_penalty: float | None = Field(default=None, ge=-100.0, le=100.0)
    frequency_penalty: float | None = Field(default=None, ge=-100.0, le=100.0)
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    inference_geo: str | None = None
    speed: str | None = None
