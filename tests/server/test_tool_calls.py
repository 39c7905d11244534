"""Tools: what is read out of an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localspec.server.calls import (
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_NAMED,
    CallArguments,
    CallBegin,
    CallEnd,
    CallReader,
    JsonEnd,
    TextDelta,
    ToolFormat,
)
from tests.server.templated import joined, read

ANSWERS: list[tuple[ToolFormat, str, list[Any]]] = [
    (HERMES, "no call <b>here</b> and <tool_ neither", ["no call <b>here</b> and <tool_ neither"]),
    (
        HERMES,
        (
            'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": "x}y\\"", "b": [1, {"c": 2}]}}\n</tool_call>\n'
            '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\n'
        ),
        ["Let me see.", ("f", '{"a": "x}y\\"", "b": [1, {"c": 2}]}', True), ("g", "{}", True)],
    ),
    (HERMES, '<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>\ndone', [("f", '{"a":1}', True), "\ndone"]),
    (HERMES, '<tool_call>\n{"arguments": {"a": 1}, "name": "f"}\n</tool_call>', [("f", '{"a": 1}', True)]),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": "{\\"a\\": 1}"}\n</tool_call>', [("f", '{"a": 1}', True)]),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>', [("f", '{"a": 1}', True)]),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": True}}</tool_call>', [("f", '{"a": True}', False)]),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "cut o', [("f", '{"a": 1, "b": "cut o', False)]),
    (HERMES, '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>', [("unknown", "{}", True)]),
    (HERMES, "<tool_call>not json</tool_call> ok", ["<tool_call>not json</tool_call> ok"]),
    (HERMES, '<tool_call>\n{"nam": "f"}\n</tool_call>', ['<tool_call>\n{"nam": "f"}\n</tool_call>']),
    (HERMES, '<tool_call>\n{"name": "f", "argum', ['<tool_call>\n{"name": "f", "argum']),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>\n{"name": "g", "argu',
        [("f", "{}", True)],
    ),
    (LLAMA3, '{"name": "f", "parameters": {"a": 1}}', [("f", '{"a": 1}', True)]),
    (
        LLAMA3,
        '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {"b": {}}}',
        [("f", '{"a": 1}', True), ("g", '{"b": {}}', True)],
    ),
    (LLAMA3, '{"name": "zz", "parameters": {"a": 1}}', ['{"name": "zz", "parameters": {"a": 1}}']),
    (LLAMA3, '{"answer": 3, "x": "and so on"} hello', ['{"answer": 3, "x": "and so on"} hello']),
    (LLAMA3, 'Hello {"name": "f", "parameters": {}}', ['Hello {"name": "f", "parameters": {}}']),
    (LLAMA3, "\n <|python", ["\n <|python"]),
    (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}, "id": "abcdefghi"}]',
        [("f", '{"a": 1}', True), ("g", "{}", True)],
    ),
    (MISTRAL, 'hi [TOOL_CALLS][{"name": "f", "arguments": {"a": [1,2]}}]', ["hi", ("f", '{"a": [1,2]}', True)]),
    (MISTRAL, "[TOOL_CALLS] []", ["[TOOL_CALLS] []"]),
    (
        MISTRAL_NAMED,
        'So:[TOOL_CALLS]f[ARGS]{"a": {"b": 1}}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}',
        ["So:", ("f", '{"a": {"b": 1}}', True), ("g", "{}", True)],
    ),
    (MISTRAL_NAMED, "[TOOL_CALLS]f[ARG] no", ["[TOOL_CALLS]f[ARG] no"]),
    (MISTRAL_NAMED, "[TOOL_CALLS]f[ARGS]3", ["[TOOL_CALLS]f[ARGS]3"]),
    (MISTRAL_NAMED, '[TOOL_CALLS]f[ARGS]{"a": "cut', [("f", '{"a": "cut', False)]),
    (MISTRAL, "[1] and [TOOLS]", ["[1] and [TOOLS]"]),
]


@pytest.mark.parametrize(("tool_format", "text", "expected"), ANSWERS)
def test_calls_and_text_are_told_apart(tool_format: ToolFormat, text: str, expected: list[Any]) -> None:
    assert joined(read(tool_format, text)) == expected


@given(st.sampled_from(ANSWERS), st.data())
def test_what_is_read_does_not_depend_on_how_it_comes(
    case: tuple[ToolFormat, str, list[Any]], data: st.DataObject
) -> None:
    tool_format, text, expected = case
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    assert joined(read(tool_format, text, cuts)) == expected
    assert joined(read(tool_format, text, range(len(text)))) == expected


@given(
    st.sampled_from([HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED]),
    st.lists(
        st.sampled_from([*'<>[]{}/"\\:, \nab', *(MISTRAL.opening, "[ARGS]", HERMES.opening, '{"name"')]), max_size=40
    ),
)
def test_text_that_holds_no_call_comes_out_as_it_is(tool_format: ToolFormat, pieces: list[str]) -> None:
    text = "".join(pieces)
    deltas = read(tool_format, text, range(len(text)))
    if all(isinstance(delta, TextDelta) for delta in deltas):
        assert "".join(delta.text for delta in deltas if isinstance(delta, TextDelta)) == text


def test_arguments_come_while_they_are_written() -> None:
    reader = CallReader(HERMES, ["f"])
    assert reader.push('<tool_call>\n{"name": "f", "arguments"') == []
    begun = reader.push(': {"city": "Par')
    assert [type(delta) for delta in begun] == [CallBegin, CallArguments]
    assert reader.push("is") == [CallArguments(0, "is")]
    assert reader.push('"}}\n</tool_call>') == [CallArguments(0, '"}'), CallEnd(0, True)]
    assert reader.finish() == []


def test_a_plain_json_answer_is_not_held_back() -> None:
    reader = CallReader(LLAMA3, ["f"])
    assert reader.push('{"ans') == [TextDelta('{"ans')]
    assert reader.push('wer": ') == [TextDelta('wer": ')]


def test_ids_are_fresh_and_fit_the_template() -> None:
    ids = set()
    for tool_format, text, _ in ANSWERS:
        for delta in read(tool_format, text):
            if isinstance(delta, CallBegin):
                ids.add(delta.id)
                assert len(delta.id) == (tool_format.id_size or 29) and delta.id.replace("_", "").isalnum()
    assert len(ids) == sum(isinstance(part, tuple) for *_, parts in ANSWERS for part in parts)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.dictionaries(st.text(), json_values, max_size=4), st.text(max_size=5), st.integers(0, 200))
def test_the_end_of_an_object_is_found(value: dict[str, Any], behind: str, cut: int) -> None:
    text = json.dumps(value, ensure_ascii=False)
    scanner = JsonEnd()
    cut = min(cut, len(text))
    taken = scanner.feed(text[:cut])
    if not scanner.ended:
        taken += scanner.feed(text[cut:] + behind)
    assert scanner.ended and taken == len(text)
