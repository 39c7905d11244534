"""Chat templates: the model's own jinja source, run in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from localspec.errors import PromptError, UnsupportedModelError
from localspec.protocols import Tokenizer

Message = Mapping[str, Any]
"""{"role": "user", "content": "..."} and whatever else a template reads."""


@lru_cache(maxsize=16)
def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension])
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
    names = {**tokenizer.template_tokens, **variables}
    try:
        return _compile(source).render(messages=list(messages), add_generation_prompt=True, **names)
    except Exception as error:  # the template is somebody else's program and may raise anything
        raise PromptError(f"the chat template refuses this conversation: {error}") from error
