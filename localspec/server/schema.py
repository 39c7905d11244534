"""What clients may send, field by field. The only file that knows pydantic.

Three kinds of fields: those that are honoured, those that mean nothing here and are *reported* back in the header
`X-Localspec-Ignored` (`Body.ignored`), and all others, which are refused. Nothing else happens to a field. Names follow
the interfaces of OpenAI and Anthropic; what llama.cpp, vLLM and mlx-lm add is taken under their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, from_json

from localspec.errors import SettingError

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
_MAX_TOKENS = 2**31
_MAX_SEED = 2**64 - 1

B = TypeVar("B", bound="Body")


# ---------------------------------------------------------------- pieces of bodies


class _Part(BaseModel):
    """Strict: a number is no text, an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def _joined(content: object) -> object:
    """Text given in parts, as one text; other parts than text are refused."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            shown = kind if isinstance(kind, str) else type(part).__name__
            raise ValueError(f"part {index} is {shown[:40]!r}: this server reads text only")
        texts.append(text)
    return "".join(texts)


def _listed(value: object) -> object:
    """One text as a list of one."""
    return [value] if isinstance(value, str) else value


def _without_none(value: object) -> object:
    """An empty list for null."""
    return [] if value is None else value


Text = Annotated[str, BeforeValidator(_joined)]
"""A text, or a list of text parts, which are joined."""

Stops = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_listed), Field(max_length=MAX_STOPS)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
NumTokens = Annotated[int, Field(ge=1, lt=_MAX_TOKENS)]


class FunctionBody(_Part):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(_Part):
    """A tool of the chat interface."""

    type: Literal["function"]
    function: FunctionBody


class FunctionToolBody(FunctionBody):
    """A tool of the responses interface."""

    type: Literal["function"]


class InputToolBody(_Part):
    """A tool of the messages interface."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None


class CalledBody(_Part):
    """A function as it was called; arguments: JSON, as the model wrote it."""

    name: str
    arguments: str


class CallBody(_Part):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledBody
    index: int | None = None


class MessageBody(_Part):
    """One message of the chat interface; answers of this server may be given back as they came."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_joined)] = None
    name: str | None = None
    tool_calls: Annotated[list[CallBody], BeforeValidator(_without_none)] = []
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0), BeforeValidator(_without_none)] = []


class SchemaBody(_Part):
    """A JSON schema with a name. Under `strict` or not, the answer obeys it."""

    name: Name
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class FormatBody(_Part):
    """What the answer may look like, in the chat interface; `regex` and `grammar` (lark) are ours."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: SchemaBody | None = None
    regex: str | None = None
    grammar: str | None = None


class TextFormatBody(_Part):
    """The same in the responses interface."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(alias="schema", default=None)
    strict: bool | None = None


class StreamOptionsBody(_Part):
    """include_usage: a last chunk with the counts. include_obfuscation: padding against eavesdroppers; only off."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class SpeculationBody(_Part):
    """Who guesses for this request, and at most how many tokens a round."""

    drafter: str = "auto"
    width: Annotated[int, Field(ge=1, le=4096)] | None = None


def _spelled_out(value: object) -> object:
    """A drafter's name alone, or true and false for `auto` and `off`."""
    if isinstance(value, bool):
        return {"drafter": "auto" if value else "off"}
    return {"drafter": value} if isinstance(value, str) else value


# ---------------------------------------------------------------- bodies


class Body(_Part):
    """What every request that writes text may say.

    speculation: "off", "auto", a drafter as on the command line, or {"drafter": ..., "width": ...}.  show_rounds: with
    every chunk the round behind it: who guessed what, and what was taken.  return_progress: chunks while the prompt
    is read.
    """

    reported: ClassVar[frozenset[str]] = frozenset()

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=100.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1, lt=_MAX_TOKENS)
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(
        default=None, gt=0.0, le=100.0, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")
    )
    seed: int | None = Field(default=None, ge=-1, le=_MAX_SEED)
    ignore_eos: bool | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=_MAX_TOKENS)]] | None = Field(default=None, max_length=1000)
    speculation: Annotated[SpeculationBody | None, BeforeValidator(_spelled_out)] = None
    show_rounds: bool = False
    return_progress: bool = False

    @property
    def ignored(self) -> tuple[str, ...]:
        """Fields that were sent and mean nothing here."""
        return tuple(name for name in sorted(self.model_fields_set & self.reported) if getattr(self, name) is not None)


class _Penalised(Body):
    presence_penalty: float | None = Field(default=None, ge=-100.0, le=100.0)
    frequency_penalty: float | None = Field(default=None, ge=-100.0, le=100.0)
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], float] | None = Field(
        default=None, max_length=4096
    )
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: Stops | None = None
    stream_options: StreamOptionsBody | None = None
    user: str | None = None


class ChatBody(_Penalised):
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


def _prompts(value: object) -> object:
    """A prompt as a list of one."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return [value]
    return value


TokenId = Annotated[int, Field(ge=0, lt=_MAX_TOKENS)]


class CompletionBody(_Penalised):
    """`/v1/completions`. best_of and suffix are taken where they change nothing."""

    reported = frozenset({"user"})

    prompt: Annotated[
        list[str] | list[Annotated[list[TokenId], Field(min_length=1)]],
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


class TextBody(_Part):
    """How the answer of the responses interface is written."""

    format: TextFormatBody | None = None
    verbosity: str | None = None


class ItemBody(_Part):
    """An item of a conversation in the responses interface: a message, a call, or what a call gave."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Annotated[str | None, BeforeValidator(_joined)] = None
    id: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Annotated[str | None, BeforeValidator(_joined)] = None
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


class BlockBody(_Part):
    """A part of a message of the messages interface: text, a call, or what a call gave."""

    type: Literal["text", "tool_use", "tool_result"]
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: Annotated[str | None, BeforeValidator(_joined)] = None
    is_error: bool | None = None
    cache_control: dict[str, Any] | None = None
    citations: Annotated[list[Any], Field(max_length=0), BeforeValidator(_without_none)] = []
    caller: dict[str, Any] | None = None


def _blocks(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class TurnBody(_Part):
    """A message of the messages interface."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[BlockBody], BeforeValidator(_blocks)]


class JsonFormatBody(_Part):
    """The answer's JSON schema in the messages interface."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfigBody(_Part):
    """How the answer of the messages interface is written."""

    format: JsonFormatBody | None = None
    effort: str | None = None


class ChoiceBody(_Part):
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


# ---------------------------------------------------------------- reading


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
