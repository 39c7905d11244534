"""Tools, and the bundled vocabulary with the templates that models bring."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from localspec.loading import get_backend
from localspec.protocols import Tokenizer
from localspec.server.calls import CallArguments, CallBegin, CallReader, Delta, TextDelta, ToolFormat
from localspec.server.tools import Tool

ROOT = Path(__file__).resolve().parent.parent.parent
WEATHER = Tool(
    "get_weather",
    "The weather of a city",
    {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 16}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    strict=True,
)
STOP = Tool("stop")

# Templates of our own, in the forms that models bring.
HERMES_TEMPLATE = (
    "{%- if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n"
    'Write <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n{% endif %}'
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
LLAMA3_TEMPLATE = (
    "{%- if tools is not none %}Functions: {% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}\n"
    'Respond as {"name": function name, "parameters": dictionary}.\n{% endif %}'
    "{%- for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    '{{ raise_exception("one call at a time") }}{% endif %}'
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% elif m.role == 'tool' %}<ipython>{{ m.content }}{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
)
MISTRAL_TEMPLATE = (
    "{%- if tools is not none %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{%- for m in messages %}{% if m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids of nine') }}{% endif %}"
    '{{ (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}{% endfor %}]'
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids of nine') }}{% endif %}"
    "[TOOL_RESULTS]{{ m.content }} {{ m.tool_call_id }}[/TOOL_RESULTS]"
    "{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"
)
NAMED_TEMPLATE = (
    "{%- if tools is not none %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{%- for m in messages %}{% for call in m.tool_calls or [] %}"
    "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}"
    "{% if m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)


@cache
def tiny() -> Tokenizer:
    return get_backend("mlx").open_tokenizer(ROOT / "models" / "tiny" / "target.gguf")


class Templated:
    """The bundled vocabulary with another template, and other special tokens."""

    def __init__(self, template: str | None, special: dict[str, int] | None = None) -> None:
        self.chat_template = template
        self._special = special or {}

    def __getattr__(self, name: str) -> Any:
        return getattr(tiny(), name)

    def encode(self, text: str, *, special: bool) -> Any:
        if special and text in self._special:
            return np.array([self._special[text]], np.int32)
        return tiny().encode(text, special=special)


def tokenizer(template: str | None, **special: int) -> Tokenizer:
    return cast(Tokenizer, Templated(template, special))


def read(tool_format: ToolFormat, text: str, cuts: Sequence[int] = ()) -> list[Delta]:
    reader = CallReader(tool_format, ["f", "g"])
    deltas: list[Delta] = []
    for start, end in pairwise([0, *sorted(cuts), len(text)]):
        deltas += reader.push(text[start:end])
    return deltas + reader.finish()


def joined(deltas: Sequence[Delta]) -> list[Any]:
    """Text as strings, calls as (name, arguments, complete), however they were cut."""
    parts: list[Any] = []
    for delta in deltas:
        if isinstance(delta, TextDelta):
            if parts and isinstance(parts[-1], str):
                parts[-1] += delta.text
            else:
                parts.append(delta.text)
        elif isinstance(delta, CallBegin):
            parts.append((delta.name, "", None))
        elif isinstance(delta, CallArguments):
            parts[-1] = (parts[-1][0], parts[-1][1] + delta.text, None)
        else:
            parts[-1] = (*parts[-1][:2], delta.complete)
    return parts
