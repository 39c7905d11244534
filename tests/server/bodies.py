"""Request bodies that nobody should send: good ones with something broken, and noise."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "7"},
        ],
        "max_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "n": 1,
        "stop": ["x"],
        "seed": 1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": 1.0},
        "logprobs": True,
        "top_logprobs": 2,
        "stream": False,
        "stream_options": {"include_usage": True},
        "response_format": {"type": "text"},
        "tools": [TOOL],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "speculation": {"drafter": "ngram", "width": 2},
        "show_rounds": True,
        "chat_template_kwargs": {"enable_thinking": False},
        "user": "me",
    },
    "/v1/completions": {
        "model": "tiny",
        "prompt": ["Once", "upon"],
        "max_tokens": 2,
        "n": 1,
        "echo": True,
        "stop": "x",
        "logit_bias": {"5": 1.0},
        "temperature": 0,
        "regex": "a+",
    },
    "/v1/responses": {
        "model": "tiny",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "7"},
        ],
        "instructions": "Be brief.",
        "max_output_tokens": 2,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        "tool_choice": "none",
        "include": ["message.output_text.logprobs"],
        "reasoning": {"effort": "low"},
    },
    "/v1/messages": {
        "model": "tiny",
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "7"}]},
        ],
        "max_tokens": 2,
        "stop_sequences": ["x"],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": False},
        "metadata": {"user_id": "me"},
    },
    "/v1/messages/count_tokens": {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]},
}
"""Path -> a body that is answered, with most of what may be said."""

Path = tuple[str | int, ...]

_ODD_TEXTS = [
    "",
    "\0",
    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    "<|im_end|>",
    "{{ 1/0 }}",
    "a" * 300,
]
_ODD_NUMBERS: list[Any] = [-1, 0, 1, 2**31, 2**63, 2**64, 10**40, -(10**40), 0.5, -0.0, 1e308, 1e-320]
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(_ODD_NUMBERS),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(_ODD_TEXTS),
    st.text(max_size=20),
)
_ANYTHING = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_SCHEMAS = st.sampled_from(
    [
        {"type": "nothing"},
        {"$ref": "#/nowhere"},
        {"$ref": "#"},
        {"pattern": "(((", "type": "string"},
        {"type": "string", "pattern": "(a{1,1000}){1,1000}"},
        {"enum": []},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"type": "object", "required": ["a"], "properties": {"a": False}},
        {"type": "array", "minItems": 10**6},
        {"not": {}},
        {"x-guidance": {"anything": 1}},
    ]
)
_PLACES_OF_SCHEMAS: dict[str, Callable[[object], dict[str, Any]]] = {
    "/v1/chat/completions": lambda schema: {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        "tools": None,
    },
    "/v1/completions": lambda schema: {"json_schema": schema, "regex": None},
    "/v1/responses": lambda schema: {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}},
    "/v1/messages": lambda schema: {"tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "any"}},
}
# What makes an answer long, not wrong: a fuzzed body may not say it.
_LENGTHS = ("max_tokens", "max_output_tokens")


def _paths(value: object, here: Path = ()) -> list[Path]:
    """Every place in a body."""
    found = [here] if here else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += _paths(inner, (*here, key))
    return found


def _like(value: object) -> st.SearchStrategy[Any]:
    """Something odd of the same type."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int | float):
        return st.sampled_from([0, 1, 2, 0.5, 3, 100, 2**40, -1])
    if isinstance(value, str):
        return st.sampled_from([*_ODD_TEXTS, "auto", "none", "required", "tiny", "off", "user"]) | st.text(max_size=20)
    if isinstance(value, list):
        return st.integers(0, 3).map(lambda times: [copy.deepcopy(item) for item in value for _ in range(times)])
    return st.just({})


def _holder(body: Any, path: Path) -> Any:
    """What holds the last step of a path."""
    for key in path[:-1]:
        body = body[key]
    return body


@st.composite
def broken(draw: st.DrawFn, path: str) -> bytes:
    """A good body of that path with one to three things changed: tweaked, replaced, taken out or put in."""
    body = copy.deepcopy(GOOD[path])
    for _ in range(draw(st.integers(1, 3))):
        places = [place for place in _paths(body) if place[0] not in _LENGTHS]
        if not places:
            break
        place = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["tweak", "tweak", "tweak", "replace", "remove", "add", "schema"]))
        holder = _holder(body, place)
        if kind == "tweak":
            holder[place[-1]] = draw(_like(holder[place[-1]]))
        elif kind == "replace":
            holder[place[-1]] = draw(_ANYTHING)
        elif kind == "remove":
            holder.pop(place[-1])
        elif kind == "add":
            name, value = draw(st.text(max_size=10)), draw(_ANYTHING)
            if name not in _LENGTHS:
                body[name] = value
        elif path in _PLACES_OF_SCHEMAS:
            body |= _PLACES_OF_SCHEMAS[path](copy.deepcopy(draw(_SCHEMAS)))
    return json.dumps(body).encode()


_NO_BODIES = [
    b"",
    b"null",
    b"[]",
    b'""',
    b"{}",
    b"{" * 5000,
    b"[" * 50_000,
    b'{"a":' * 2000,
    b"\xff\xfe{}",
    b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}',
    b'{"prompt":"\\ud800"}',
]
_NOISE = st.one_of(
    st.binary(max_size=200),
    st.integers(0, len(_NO_BODIES) - 1).map(
        lambda number: _NO_BODIES[number]
    ),  # Hypothesis prints what it chooses from
    _ANYTHING.map(lambda value: json.dumps(value).encode()),
)

requests = st.sampled_from(sorted(GOOD)).flatmap(
    lambda path: st.tuples(st.just(path), st.one_of(broken(path), broken(path), broken(path), _NOISE))
)
"""(path, body)"""
