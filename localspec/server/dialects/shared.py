"""What the interfaces of OpenAI have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from localspec.errors import SettingError
from localspec.server import report
from localspec.server.ask import AUTO
from localspec.server.reply import TOOL_CALLS, Reply
from localspec.server.schema.parts import FunctionBody
from localspec.server.tools import Tool

FINGERPRINT = "localspec"
DONE = "[DONE]"

_FINISH = {"stop": "stop", "length": "length", "context": "length", TOOL_CALLS: TOOL_CALLS}
_CHOICES = (AUTO, "none", "required")


def finish_word(reply: Reply) -> str:
    """OpenAI's word for how an answer ended."""
    return _FINISH[reply.finish_reason]


def extras(reply: Reply) -> dict[str, Any]:
    """What we say of an answer beyond the interface."""
    generation = reply.generation
    said: dict[str, Any] = {"seed": generation.seed, "speculation": report.speculation(generation)}
    if generation.note:
        said["note"] = generation.note
    return said


def tool_of(body: FunctionBody) -> Tool:
    """A function as the template and the grammar want it. Raises SettingError for a name that means something else."""
    return make_tool(body.name, body.description, body.parameters, body.strict)


def make_tool(name: str, description: str | None, parameters: Mapping[str, Any] | None, strict: bool | None) -> Tool:
    """As `tool_of`."""
    if name in _CHOICES:
        raise SettingError(f"a tool may not be named {name!r}", fix="As a tool choice it means something else.")
    return Tool(name, description or "", None if parameters is None else dict(parameters), bool(strict))


def chosen_tool(choice: str | Mapping[str, Any] | None, tools: Sequence[Tool]) -> str:
    """What `tool_choice` means: "auto", "none", "required", or a tool's name. Raises SettingError."""
    if choice is None:
        return AUTO
    if isinstance(choice, str):
        if choice == "required" and not tools:
            raise SettingError("tool_choice is 'required', and there are no tools")
        return choice
    named = choice.get("function", choice)
    name = named.get("name") if isinstance(named, Mapping) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise SettingError(
            "this tool_choice is not known",
            got=str(dict(choice))[:60],
            expected="auto, none, required, or a function's name",
        )
    return known_tool(name, tools)


def known_tool(name: str, tools: Sequence[Tool]) -> str:
    """The name, if a tool has it. Raises SettingError."""
    if name not in [tool.name for tool in tools]:
        raise SettingError(
            "tool_choice names no tool", got=name, expected=", ".join(tool.name for tool in tools) or "some tools"
        )
    return name
