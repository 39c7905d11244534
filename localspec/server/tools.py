"""Tools in a conversation: what the model is told of them, what it may write, how that is read.

A model calls tools in the format that its chat template shows. Templates without tools, or with a format that is not
known here, are helped: tools are described in the system message and called as Hermes models do it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from localspec.constraint import WHITE_SPACE, Grammar, special_token
from localspec.engine.template import Message, render, thought_end
from localspec.errors import PromptError, SettingError, UnknownNameError, UnsupportedModelError
from localspec.protocols import Tokenizer
from localspec.server.calls import (
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_NAMED,
    PYTHON_TAG,
    CallArguments,
    CallReader,
    ToolFormat,
)

AUTO, NONE, REQUIRED = "auto", "none", "required"

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MOST_TOOLS = 128


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. parameters: JSON schema of its arguments, an object's; None: any object.
    strict: refuse a schema that cannot be enforced as a whole. Raises SettingError for a name that is none."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise SettingError(
                "not a name of a tool", got=repr(self.name[:80]), expected="1 to 64 letters, digits, `_`, `-` or `.`"
            )
        kind = (self.parameters or {}).get("type", "object")
        if kind != "object":
            raise SettingError(f"the parameters of tool {self.name} are no object", got=kind, expected="object")

    def as_dict(self) -> dict[str, Any]:
        """As templates want it, and OpenAI's clients write it."""
        parameters = self.parameters if self.parameters is not None else {"type": "object", "properties": {}}
        function = {"name": self.name, "description": self.description, "parameters": dict(parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How tools are used in one request. native: the template itself has a place for tools in `tool_format`; otherwise
    they are written into the system message.  choice: "auto", "none", "required" or the name of the one to call.
    parallel: may one answer hold several calls?"""

    tokenizer: Tokenizer
    tool_format: ToolFormat
    native: bool
    tools: tuple[Tool, ...]
    choice: str
    parallel: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer, tools: Sequence[Tool], choice: str = AUTO, parallel: bool = True) -> ToolPlan:
        """Raises SettingError for tools that cannot be told apart, and UnknownNameError for a choice that is none."""
        names = [tool.name for tool in tools]
        doubles = sorted({name for name in names if names.count(name) > 1})
        if doubles:
            raise SettingError("several tools have the same name", got=", ".join(doubles))
        if len(tools) > _MOST_TOOLS:
            raise SettingError("too many tools", got=len(tools), expected=f"at most {_MOST_TOOLS}")
        if choice not in (AUTO, NONE, REQUIRED, *names):
            raise UnknownNameError.among("tool", choice, [AUTO, NONE, REQUIRED, *names])
        if choice == REQUIRED and not tools:
            raise SettingError("a call is required, and there is no tool to call", fix="Give tools.")
        shown = known_format(tokenizer)
        offered = () if choice == NONE else tuple(tools)
        return cls(tokenizer, shown or HERMES, shown is not None, offered, choice, parallel)

    # ------------------------------------------------------------ what the model reads

    def render(self, messages: Sequence[Message], **variables: object) -> str:
        """The conversation, in OpenAI's form (assistant `tool_calls`, role "tool"), as the model reads it. Raises as
        `engine.template.render`."""
        told = _history(messages, self.tool_format)
        if not self.native:
            return self._render_described(told, variables)
        tools = [tool.as_dict() for tool in self.tools] or None
        return render(self.tokenizer, told, tools=tools, **variables)

    def _render_described(self, told: list[dict[str, Any]], variables: Mapping[str, object]) -> str:
        told = [_without_calls(message, self.tool_format) for message in told]
        if not self.tools:
            return render(self.tokenizer, told, **variables)
        text = _description(self.tools, self.tool_format)
        if told and told[0].get("role") == "system":
            return render(self.tokenizer, [_before(text, told[0], behind=True), *told[1:]], **variables)
        try:
            return render(self.tokenizer, [{"role": "system", "content": text}, *told], **variables)
        except PromptError:  # some templates know no system message
            if not told:
                raise
            return render(self.tokenizer, [_before(text, told[0]), *told[1:]], **variables)

    # ------------------------------------------------------------ what it may write

    def grammar(self, prompt: str = "") -> Grammar | None:
        """What the answer to a rendered prompt may look like. None: anything, because calls are neither required nor to
        be checked. With "auto", calls are held to their schemas if a tool is `strict` or if only one call is allowed,
        where the format marks calls."""
        if not self.tools:
            return None
        if self.choice == AUTO and not (self.tool_format.opening and self._checks_calls):
            return None
        return Grammar.lark(_lark(self)).behind(thought_end(prompt))

    @property
    def _checks_calls(self) -> bool:
        return not self.parallel or any(tool.strict for tool in self.tools)

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """Those that may be called in this answer."""
        if self.choice in (AUTO, REQUIRED):
            return self.tools
        return tuple(tool for tool in self.tools if tool.name == self.choice)

    # ------------------------------------------------------------ how that is read

    @property
    def shown_tokens(self) -> frozenset[int]:
        """Special tokens that belong to calls and must be part of the text (`SamplingParams.shown_tokens`)."""
        if not self.tools:
            return frozenset()
        shape = self.tool_format
        marks = (shape.opening, shape.closing, shape.separator) if shape.opening else (PYTHON_TAG,)
        tokens = (special_token(self.tokenizer, mark) for mark in marks)
        return frozenset(token for token in tokens if token is not None)

    def reader(self) -> CallReader | None:
        """What reads the answer; None where no call can come."""
        return CallReader(self.tool_format, [tool.name for tool in self.tools]) if self.tools else None


_PROBE = Tool("probe_tool", "Sounds the depth.", {"type": "object", "properties": {"depth": {"type": "integer"}}})
_PROBED: list[Message] = [
    {"role": "user", "content": "How deep?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "abcdefghi", "function": {"name": _PROBE.name, "arguments": '{"depth": 7}'}}],
    },
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "7"},
]


def known_format(tokenizer: Tokenizer) -> ToolFormat | None:
    """The format in which the chat template writes calls; None where it has no place for tools or writes calls in no
    format that is known here. Found by showing it a call and reading what it makes of that."""
    try:
        text = render(tokenizer, _history(_PROBED, MISTRAL), tools=[_PROBE.as_dict()])
    except (PromptError, UnsupportedModelError):
        return None
    if _PROBE.description not in text:
        return None
    for shape in (MISTRAL, MISTRAL_NAMED, HERMES):
        reader = CallReader(shape, [_PROBE.name])
        if CallArguments(0, '{"depth": 7}') in [*reader.push(text), *reader.finish()]:
            gap = re.search(rf'{re.escape(shape.opening)}(\s*)(?:\[?\{{"name": ")?{_PROBE.name}', text)
            return replace(shape, gap=gap[1] if gap is not None else shape.gap)
    return LLAMA3 if f'{{"name": "{_PROBE.name}", "parameters": {{"depth": 7}}' in text else None


# ---------------------------------------------------------------- messages


class _Arguments(dict[str, Any]):
    """Arguments as templates want them: an object for those that take it apart or call `tojson`, the text as it was
    written for those that print it."""

    def __init__(self, value: Mapping[str, Any], text: str) -> None:
        super().__init__(value)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __radd__(self, other: str) -> str:
        return other + str(self)

    def __add__(self, other: str) -> str:
        return str(self) + other


def _history(messages: Sequence[Message], tool_format: ToolFormat) -> list[dict[str, Any]]:
    """Calls with their arguments as objects, ids that the template accepts, results with the name of their call."""
    told: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for message in messages:
        copy = dict(message)
        calls = copy.get("tool_calls")
        if calls:
            copy["tool_calls"] = [_call(call, tool_format) for call in calls]
            names.update({str(call.get("id")): call["function"]["name"] for call in calls})
        elif "tool_calls" in copy:
            del copy["tool_calls"]
        if copy.get("role") == "tool":
            asked = str(copy.get("tool_call_id"))
            copy["tool_call_id"] = _fitting_id(asked, tool_format)
            if asked in names:
                copy.setdefault("name", names[asked])
        told.append(copy)
    return told


def _call(call: Mapping[str, Any], tool_format: ToolFormat) -> dict[str, Any]:
    function = dict(call["function"])
    arguments = function.get("arguments") or "{}"
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    try:
        value = json.loads(text)
    except ValueError:
        value = text  # a broken call of the model's own, shown to it as it wrote it
    function["arguments"] = _Arguments(value, text) if isinstance(value, dict) else value
    return {**call, "id": _fitting_id(str(call.get("id")), tool_format), "type": "function", "function": function}


def _fitting_id(text: str, tool_format: ToolFormat) -> str:
    """An id that somebody else gave, in the size that the template insists on; the same one for the same text."""
    size = tool_format.id_size
    if not size or (len(text) == size and text.isascii() and text.isalnum()):
        return text
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:size]


def _description(tools: Sequence[Tool], tool_format: ToolFormat) -> str:
    """What a model that was trained on no format is told."""
    signatures = "\n".join(json.dumps(tool.as_dict()["function"], ensure_ascii=False) for tool in tools)
    example = json.dumps({"name": "NAME", tool_format.arguments: {"PARAMETER": "VALUE"}})
    return (
        "You can call functions. Their signatures are JSON:\n"
        f"<tools>\n{signatures}\n</tools>\n"
        "To call one, write its name and its arguments as JSON, in this form:\n"
        f"{tool_format.opening}\n{example}\n{tool_format.closing}"
    )


def _before(text: str, message: dict[str, Any], *, behind: bool = False) -> dict[str, Any]:
    """The message with a text before its content, or behind it."""
    content = message.get("content") or ""
    parts = (content, text) if behind else (text, content)
    return {**message, "content": "\n\n".join(filter(None, parts))}


def _without_calls(message: dict[str, Any], tool_format: ToolFormat) -> dict[str, Any]:
    """Calls as the text that they were, a result as a message of the user's."""
    content = message.get("content") or ""
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    written = [
        f"{tool_format.opening}\n"
        f"{_head(call['function']['name'], tool_format)}{call['function']['arguments']}}}\n"
        f"{tool_format.closing}"
        for call in message.get("tool_calls", ())
    ]
    plain = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**plain, "content": "\n".join(filter(None, [content, *written]))} if written else plain


# ---------------------------------------------------------------- grammar


def _head(name: str, tool_format: ToolFormat) -> str:
    """A call up to its arguments."""
    return f'{{"name": {json.dumps(name)}, "{tool_format.arguments}": '


def _lark(plan: ToolPlan) -> str:
    """The answers that the plan allows, in llguidance's Lark."""
    shape, tools = plan.tool_format, plan.callable_tools
    separator = _mark(plan.tokenizer, shape.separator)
    rules = [
        f"call_{place}: {json.dumps(tool.name)} {separator} arguments_{place}"
        if separator
        else f'call_{place}: {json.dumps(_head(tool.name, shape))} arguments_{place} "}}"'
        for place, tool in enumerate(tools)
    ]
    rules += [f"arguments_{place}: %json {_schema(tool)}" for place, tool in enumerate(tools)]
    rules.append("call: " + " | ".join(f"call_{place}" for place in range(len(tools))))
    opening, closing = _mark(plan.tokenizer, shape.opening), _mark(plan.tokenizer, shape.closing)
    several = plan.parallel and plan.choice in (AUTO, REQUIRED)
    if shape.listed:
        more = '(", " call)*' if several else ""
        calls = rf'/ ?\[/ call {more} "]"'
    elif closing:
        gap = json.dumps(shape.gap) if shape.gap else ""
        calls = f"{gap} call {gap} {closing}"
    else:
        calls = "call"
    rules.append(f"calls: {calls}")
    if plan.choice == AUTO:
        rules += _text_and_calls(opening, several)
    elif shape.listed or not opening:
        rules.append(f"start: {opening} calls")
    else:
        between = json.dumps(shape.gap) if shape.gap else ""
        more = f"({between} {opening} calls)*" if several else ""
        rules.append(f"start: {opening} calls {more}")
    return "\n".join(reversed(rules))


def _text_and_calls(opening: str, several: bool) -> list[str]:
    """Any text, in which each opening begins calls; if only one may come, it ends the answer."""
    rules = [r"TEXT: /(?s:.*)/", "start: part* TEXT" if several else "start: part | TEXT"]
    if opening.startswith("<["):  # a token of its own, which no text can hold
        return [*rules, f"part: TEXT {opening} calls"]
    return [*rules, f"opened[lazy]: TEXT {opening}", "part: opened calls"]


def _mark(tokenizer: Tokenizer, text: str) -> str:
    """A marker: a token by its number, or text."""
    token = special_token(tokenizer, text)
    if token is not None:
        return f"<[{token}]>"
    return json.dumps(text) if text else ""


def _schema(tool: Tool) -> str:
    """The arguments' schema with llguidance's own settings."""
    own = {"whitespace_pattern": WHITE_SPACE, "lenient": not tool.strict}
    return Grammar.json_schema({"type": "object", **(tool.parameters or {}), "x-guidance": own}).source
