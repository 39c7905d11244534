"""Chat templates: the model's own jinja source, run in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from localspec.errors import PromptError, UnsupportedModelError
from localspec.protocols import Tokenizer

_THOUGHTS = {"<think>": "</think>", "[THINK]": "[/THINK]", "<thinking>": "</thinking>", "<thought>": "</thought>"}

Message = Mapping[str, Any]
"""{"role": "user", "content": "..."} and whatever else a template reads."""


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it as an instance variable

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: not escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment.from_string(source)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def render(tokenizer: Tokenizer, messages: Sequence[Message], **variables: object) -> str:
    """The conversation as the model was trained to read it, ready for the assistant's answer.

    Raises UnsupportedModelError where the model brings no template, PromptError where the template
    refuses the messages (its own words are quoted).
    """
    source = tokenizer.chat_template
    if source is None:
        raise UnsupportedModelError(
            "this model brings no chat template", fix="Use `generate` with a plain prompt, or a chat-tuned model."
        )
    # None, not missing: templates ask `tools is not none`
    names = {**tokenizer.template_tokens, "tools": None, "documents": None, **variables}
    try:
        return _compile(source).render(messages=list(messages), add_generation_prompt=True, **names)
    except Exception as error:  # the template is somebody else's program and may raise anything
        raise PromptError(f"the chat template refuses this conversation: {error}") from error


def thought_end(prompt: str) -> str:
    """What ends the thought that a rendered prompt has begun, and so comes before the answer; "" if it begins none."""
    end = prompt.rstrip()
    return next((closing for opening, closing in _THOUGHTS.items() if end.endswith(opening)), "")
