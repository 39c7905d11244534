"""Tools: what the model may write, and the round trip on the bundled pair."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from localspec.bench.grammar import is_valid
from localspec.constraint import constrain
from localspec.engine.template import thought_end
from localspec.errors import SettingError
from localspec.loading import open_pair
from localspec.protocols import LanguageModel, LoadSettings, Tokenizer
from localspec.sampling import SamplingParams
from localspec.server.tools import Tool, ToolPlan
from tests.server.templated import (
    HERMES_TEMPLATE,
    LLAMA3_TEMPLATE,
    MISTRAL_TEMPLATE,
    NAMED_TEMPLATE,
    STOP,
    WEATHER,
    joined,
    tiny,
    tokenizer,
)

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
