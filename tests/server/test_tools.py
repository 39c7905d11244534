"""Tools: what the model is told of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from localspec.errors import PromptError, SettingError, UnknownNameError
from localspec.server.calls import HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, ToolFormat
from localspec.server.tools import Tool, ToolPlan, known_format
from tests.server.templated import (
    HERMES_TEMPLATE,
    LLAMA3_TEMPLATE,
    MISTRAL_TEMPLATE,
    NAMED_TEMPLATE,
    STOP,
    WEATHER,
    tiny,
    tokenizer,
)

PRINTING_TEMPLATE = (
    "{{ tools | tojson if tools }}{% for m in messages %}{% for call in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments }}}</tool_call>'
    "{{ '|' + call.function.arguments + '|' }}{% endfor %}{% endfor %}"
)


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
