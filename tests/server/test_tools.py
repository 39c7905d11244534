"""Tools: what the model is told, what it may write, and what is read out of its answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localspec.bench.grammar import is_valid
from localspec.constraint import constrain
from localspec.engine.template import thought_end
from localspec.errors import PromptError, SettingError, UnknownNameError
from localspec.loading import get_backend, open_pair
from localspec.protocols import LanguageModel, LoadSettings, Tokenizer
from localspec.sampling import SamplingParams
from localspec.server.calls import (
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_NAMED,
    CallArguments,
    CallBegin,
    CallEnd,
    CallReader,
    Delta,
    JsonEnd,
    TextDelta,
    ToolFormat,
)
from localspec.server.tools import Tool, ToolPlan, known_format

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
PRINTING_TEMPLATE = (
    "{{ tools | tojson if tools }}{% for m in messages %}{% for call in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments }}}</tool_call>'
    "{{ '|' + call.function.arguments + '|' }}{% endfor %}{% endfor %}"
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


# ---------------------------------------------------------------- reading


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


# ---------------------------------------------------------------- what the model is told


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (HERMES_TEMPLATE, HERMES),
        (HERMES_TEMPLATE.replace("<tool_call>\n", "<tool_call>").replace("\n</tool_call>", "</tool_call>"), "no gap"),
        (LLAMA3_TEMPLATE, LLAMA3),
        (MISTRAL_TEMPLATE, replace(MISTRAL, gap=" ")),
        (NAMED_TEMPLATE, MISTRAL_NAMED),
        (NAMED_TEMPLATE.replace("[ARGS]", "[CALL_ID]{{ call.id }}[ARGS]"), MISTRAL_NAMED),
        (NAMED_TEMPLATE.replace("[ARGS]", "[ARGUMENTS]"), None),
        (HERMES_TEMPLATE.replace('{"name": "{{ call.function.name }}"', "<function={{ call.function.name }}>"), None),
        (HERMES_TEMPLATE.replace("{{ tool | tojson }}", ""), None),  # a call is shown, and no tools
        ("{% for m in messages %}{{ m.content }}<tool_call>{% endfor %}{{ tools }}", None),
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_the_format_is_the_one_that_the_template_shows(template: str | None, expected: ToolFormat | str | None) -> None:
    assert known_format(tokenizer(template)) == (replace(HERMES, gap="") if expected == "no gap" else expected)


CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "Paris?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Paris", "unit": "C"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "21 degrees"},
]


@pytest.mark.parametrize("template", [HERMES_TEMPLATE, LLAMA3_TEMPLATE, MISTRAL_TEMPLATE, NAMED_TEMPLATE])
def test_a_call_and_its_result_are_rendered_by_the_template(template: str) -> None:
    text = ToolPlan.of(tokenizer(template), [WEATHER]).render(CALLED)
    assert '{"city": "Paris", "unit": "C"}' in text, "arguments must not be a string within JSON"
    assert "21 degrees" in text
    assert "The weather of a city" in text


def test_ids_of_others_are_cut_to_the_size_that_the_template_wants_and_stay_pairs() -> None:
    text = ToolPlan.of(tokenizer(MISTRAL_TEMPLATE), [WEATHER]).render(CALLED)
    given_id = text.split('"id": "')[1][:9]
    assert f"21 degrees {given_id}[/TOOL_RESULTS]" in text


def test_arguments_read_as_json_in_templates_that_print_them() -> None:
    text = ToolPlan.of(tokenizer(PRINTING_TEMPLATE), [WEATHER]).render(CALLED)
    assert text.endswith('"arguments": {"city": "Paris", "unit": "C"}}</tool_call>|{"city": "Paris", "unit": "C"}|')


def test_a_template_without_tools_is_told_in_the_system_message() -> None:
    plan = ToolPlan.of(tiny(), [WEATHER, STOP])
    text = plan.render([{"role": "system", "content": "Be brief."}, *CALLED])
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou can call functions.")
    assert text.count("<|im_start|>system") == 1
    assert '"name": "get_weather"' in text and '"name": "stop"' in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "unit": "C"}}\n</tool_call>' in text
    assert "<|im_start|>user\n<tool_response>\n21 degrees\n</tool_response><|im_end|>" in text


def test_a_template_that_knows_no_system_message_is_told_in_the_first_message() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    text = ToolPlan.of(tokenizer(template), [STOP]).render(CALLED[:1])
    assert text.startswith("<user>You can call functions.") and text.endswith("\n\nParis?")


def test_a_history_of_calls_can_be_rendered_without_tools() -> None:
    plan = ToolPlan.of(tiny(), [])
    text = plan.render(CALLED)
    assert "You can call" not in text and "21 degrees" in text
    assert plan.reader() is None and plan.grammar() is None and plan.shown_tokens == frozenset()


def test_with_choice_none_the_model_is_not_told() -> None:
    plan = ToolPlan.of(tokenizer(HERMES_TEMPLATE), [WEATHER], "none")
    assert "get_weather" not in plan.render(CALLED[:1])
    assert plan.reader() is None and plan.grammar() is None


def test_what_the_template_refuses_is_quoted() -> None:
    twice = {**CALLED[1], "tool_calls": [*CALLED[1]["tool_calls"], *CALLED[1]["tool_calls"]]}
    with pytest.raises(PromptError, match="one call at a time"):
        ToolPlan.of(tokenizer(LLAMA3_TEMPLATE), [WEATHER]).render([CALLED[0], twice])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Tool("no spaces"), SettingError, "not a name"),
        (lambda: Tool(""), SettingError, "not a name"),
        (lambda: Tool("f", parameters={"type": "string"}), SettingError, "no object"),
        (lambda: ToolPlan.of(tiny(), [STOP, STOP]), SettingError, "same name"),
        (lambda: ToolPlan.of(tiny(), [STOP], "stap"), UnknownNameError, "stop"),
        (lambda: ToolPlan.of(tiny(), [], "required"), SettingError, "no tool"),
        (lambda: ToolPlan.of(tiny(), [Tool(f"t{i}") for i in range(200)]), SettingError, "too many"),
    ],
)
def test_tools_that_cannot_be_are_refused(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


# ---------------------------------------------------------------- what it may write


class Vocabulary:
    """As much of a model as a grammar needs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.num_tokens


def accepts(plan: ToolPlan, text: str, prompt: str = "") -> bool:
    constraint = constrain(cast(LanguageModel, Vocabulary(plan.tokenizer)), plan.grammar(prompt))
    assert constraint is not None
    return constraint.accepts(text)


PARIS = '{"city": "Paris", "unit": "C"}'
CALLS = {
    HERMES_TEMPLATE: '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>',
    LLAMA3_TEMPLATE: '{{"name": "{}", "parameters": {}}}',
    MISTRAL_TEMPLATE: '[TOOL_CALLS] [{{"name": "{}", "arguments": {}}}]',
    NAMED_TEMPLATE: "[TOOL_CALLS]{}[ARGS]{}",
}


@pytest.mark.parametrize("template", CALLS)
def test_a_required_call_is_held_to_its_schema(template: str) -> None:
    plan = ToolPlan.of(tokenizer(template), [WEATHER, STOP], "required")
    call = CALLS[template].format
    assert accepts(plan, call("get_weather", PARIS))
    assert accepts(plan, call("stop", '{"anything": 1}'))
    for wrong in (
        call("get_weather", '{"city": "Paris"}'),
        call("get_weather", '{"city": "Paris", "unit": "K"}'),
        call("go", "{}"),
        call("stop", "3"),
        "Sure.",
        "",
        "Sure. " + call("stop", "{}"),
    ):
        assert not accepts(plan, wrong), wrong


@pytest.mark.parametrize("template", CALLS)
def test_a_named_call_is_that_one_and_only_one(template: str) -> None:
    plan = ToolPlan.of(tokenizer(template), [WEATHER, STOP], "stop")
    call = CALLS[template].format
    assert accepts(plan, call("stop", "{}"))
    assert not accepts(plan, call("get_weather", PARIS))
    assert not accepts(plan, call("stop", "{}") + "\n" + call("stop", "{}"))
    assert not accepts(plan, call("stop", "{}") + call("stop", "{}"))


def test_several_calls_where_they_may_be_several() -> None:
    call = CALLS[HERMES_TEMPLATE].format
    two = call("stop", "{}") + "\n" + call("get_weather", PARIS)
    assert accepts(ToolPlan.of(tokenizer(HERMES_TEMPLATE), [WEATHER, STOP], "required"), two)
    assert not accepts(ToolPlan.of(tokenizer(HERMES_TEMPLATE), [WEATHER, STOP], "required", parallel=False), two)
    twice = 2 * CALLS[NAMED_TEMPLATE].format("stop", "{}")
    assert accepts(ToolPlan.of(tokenizer(NAMED_TEMPLATE), [STOP], "required"), twice)
    assert not accepts(ToolPlan.of(tokenizer(NAMED_TEMPLATE), [STOP], "required", parallel=False), twice)
    listed = '[TOOL_CALLS] [{"name": "stop", "arguments": {}}, {"name": "stop", "arguments": {}}]'
    assert accepts(ToolPlan.of(tokenizer(MISTRAL_TEMPLATE), [STOP], "required"), listed)
    assert not accepts(ToolPlan.of(tokenizer(MISTRAL_TEMPLATE), [STOP], "required", parallel=False), listed)


def test_with_auto_text_is_free_and_calls_of_strict_tools_are_checked() -> None:
    plan = ToolPlan.of(tokenizer(HERMES_TEMPLATE), [WEATHER])
    call = CALLS[HERMES_TEMPLATE].format
    assert accepts(plan, "Nothing to call <b>here</b>.")
    assert accepts(plan, "Let me see.\n" + call("get_weather", PARIS) + "\n" + call("get_weather", PARIS) + " Done.")
    assert not accepts(plan, "Let me see.\n" + call("get_weather", '{"city": 3}'))
    assert ToolPlan.of(tokenizer(HERMES_TEMPLATE), [STOP]).grammar() is None
    single = ToolPlan.of(tokenizer(HERMES_TEMPLATE), [STOP], parallel=False)
    assert accepts(single, "So: " + call("stop", "{}"))
    assert not accepts(single, call("stop", "{}") + call("stop", "{}"))


def test_schemas_that_cannot_be_enforced_are_refused_for_strict_tools_only() -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    loose = ToolPlan.of(tokenizer(HERMES_TEMPLATE), [Tool("f", "", parameters)], "required")
    assert accepts(loose, CALLS[HERMES_TEMPLATE].format("f", '{"a": [1, 1]}'))
    strict = ToolPlan.of(tokenizer(HERMES_TEMPLATE), [Tool("f", "", parameters, strict=True)], "required")
    with pytest.raises(SettingError, match="uniqueItems"):
        accepts(strict, "")


def test_references_inside_a_schema_are_found() -> None:
    parameters = {
        "type": "object",
        "properties": {"who": {"$ref": "#/$defs/person"}},
        "required": ["who"],
        "$defs": {"person": {"enum": ["Ann", "Bob"]}},
    }
    plan = ToolPlan.of(tokenizer(HERMES_TEMPLATE), [Tool("f", "", parameters, strict=True)], "f")
    assert accepts(plan, CALLS[HERMES_TEMPLATE].format("f", '{"who": "Ann"}'))
    assert not accepts(plan, CALLS[HERMES_TEMPLATE].format("f", '{"who": "Eve"}'))


def test_markers_that_are_special_tokens_are_shown_and_written_as_tokens() -> None:
    marked = tokenizer(MISTRAL_TEMPLATE, **{"[TOOL_CALLS]": 5})
    plan = ToolPlan.of(marked, [STOP], "required")
    assert plan.shown_tokens == {5}
    constraint = constrain(cast(LanguageModel, Vocabulary(marked)), plan.grammar())
    assert constraint is not None
    assert constraint.mask(np.zeros(0, np.int32)).nonzero()[0].tolist() == [5]
    assert ToolPlan.of(tiny(), [STOP]).shown_tokens == frozenset()


def test_a_thought_that_the_template_began_comes_before_the_call() -> None:
    plan = ToolPlan.of(tokenizer(HERMES_TEMPLATE), [STOP], "required")
    assert thought_end("<|im_start|>assistant\n<think>\n") == "</think>"
    assert thought_end("<|im_start|>assistant\n<think>\n\n</think>\n") == ""
    call = CALLS[HERMES_TEMPLATE].format("stop", "{}")
    assert accepts(plan, "Hm.</think>\n\n" + call, "<think>\n")
    assert not accepts(plan, call, "<think>\n")


# ---------------------------------------------------------------- with the bundled pair


@pytest.mark.real
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_call_makes_the_round_trip_on_the_bundled_pair(temperature: float) -> None:
    """Asked for, written under speculation as plainly, read, answered, and the conversation goes on."""
    settings = LoadSettings(context=1024)
    with open_pair(backend="llamacpp", settings=settings, use_tuned=False) as pair:
        plan = ToolPlan.of(pair.target.tokenizer, [WEATHER, STOP], "get_weather")
        messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Paris?"}]
        prompt = plan.render(messages)
        params = SamplingParams(
            temperature=temperature, seed=1, max_tokens=80, grammar=plan.grammar(prompt), shown_tokens=plan.shown_tokens
        )
        with pair.session("nothing") as session:
            plain = session.generate(prompt, params)
        with pair.session("draft_model") as session:
            made = session.generate(prompt, params)
        assert made.tokens == plain.tokens
        assert made.complete and made.stats.accepted_length > 1.5
        reader = plan.reader()
        assert reader is not None
        [(name, arguments, complete)] = joined([*reader.push(made.text), *reader.finish()])
        assert name == "get_weather" and complete and WEATHER.parameters is not None
        assert is_valid(arguments, dict(WEATHER.parameters))
        call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "21 degrees"},
        ]
        again = plan.render(messages)
        assert again.startswith(prompt + made.text), "the model must find its own call as it wrote it"
        assert "21 degrees" in again
