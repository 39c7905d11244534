"""What one HTTP request asks for, whatever interface it came through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from localspec.constraint import Grammar
from localspec.engine.template import Message
from localspec.server.schema.parts import Body
from localspec.server.speculation import Speculation
from localspec.server.tools import Tool

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request, checked as far as its form goes.

    prompts: texts or tokens to continue as they stand; with `messages`, a conversation to answer, there are none.
    settings: what the request says of `SamplingParams`; for the rest, and for a `speculation` of None, the server's own
    defaults stand.  variables: for the chat template.  tool_choice: "auto", "none", "required" or a tool's name.
    ignored: fields that were sent and mean nothing here.
    """

    model: str | None = None
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[Message, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_choices: int = 1
    grammar: Grammar | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: str = AUTO
    parallel_tools: bool = True
    variables: Mapping[str, object] = field(default_factory=dict)
    speculation: Speculation | None = None
    stream: bool = False
    include_usage: bool = False
    show_rounds: bool = False
    return_progress: bool = False
    ignored: tuple[str, ...] = ()


def common(body: Body) -> dict[str, Any]:
    """The fields of an `Ask` that every interface names alike."""
    chosen = body.speculation
    speculation = None if chosen is None else Speculation.parse(chosen.drafter, chosen.width)
    return {
        "model": body.model,
        "speculation": speculation,
        "stream": bool(body.stream),
        "show_rounds": body.show_rounds,
        "return_progress": body.return_progress,
        "ignored": body.ignored,
    }


def sampling(body: Body, **more: Any) -> dict[str, Any]:
    """What a body says of the sampling, under our names. more: what its interface names otherwise; None is unsaid."""
    said = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": 0 if body.top_k == -1 else body.top_k,  # llama.cpp and vLLM write -1 for all
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "seed": None if body.seed == -1 else body.seed,
        "ignore_eos": body.ignore_eos,
        "stop_tokens": None if body.stop_token_ids is None else frozenset(body.stop_token_ids),
        **more,
    }
    return {name: value for name, value in said.items() if value is not None}
