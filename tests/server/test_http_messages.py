"""`/v1/messages`, driven by Anthropic's own client against a running server."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import jsonschema
import openai
import pytest

pytestmark = pytest.mark.real

QUESTION: list[Any] = [{"role": "user", "content": "How do I reverse a list in Python?"}]
TOOL: Any = {
    "name": "weather",
    "description": "What the weather is like.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def say(client: anthropic.Anthropic, **more: Any) -> Any:
    """A message of a few tokens, seeded."""
    asked: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 24, "extra_body": {"seed": 7}}
    return client.messages.create(**{**asked, **more})


def test_a_message_says_what_chat_says(ant: anthropic.Anthropic, oai: openai.OpenAI) -> None:
    message = say(ant, system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}])
    chat = oai.chat.completions.create(
        model="tiny", messages=[{"role": "system", "content": "Be brief."}, *QUESTION], max_tokens=24, seed=7
    )
    assert message.content[0].text == chat.choices[0].message.content
    assert chat.usage is not None
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == chat.usage.prompt_tokens
    assert usage.output_tokens == chat.usage.completion_tokens


def test_a_stream_says_the_same(ant: anthropic.Anthropic) -> None:
    whole = say(ant)
    with ant.messages.stream(model="tiny", max_tokens=24, messages=QUESTION, extra_body={"seed": 7}) as events:
        kinds = [event.type for event in events]
        final = events.get_final_message()
    assert [block.model_dump()["text"] for block in final.content] == [block.text for block in whole.content]
    assert (final.stop_reason, final.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 1


def test_it_says_why_it_stopped(ant: anthropic.Anthropic) -> None:
    assert say(ant, max_tokens=3).stop_reason == "max_tokens"
    greedy = {"temperature": 0}
    text = say(ant, extra_body=greedy).content[0].text
    stopped = say(ant, stop_sequences=[text[8:12]], extra_body=greedy)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", text[8:12])
    assert stopped.content[0].text == text[: text.index(text[8:12])]
    assert say(ant, messages=[{"role": "user", "content": "Hello"}], extra_body=greedy).stop_reason == "end_turn"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_tool_is_used_and_its_result_is_read(ant: anthropic.Anthropic, choice: Any) -> None:
    choice |= {"disable_parallel_tool_use": True}
    message = say(ant, tools=[TOOL], tool_choice=choice, max_tokens=120)
    assert message.stop_reason == "tool_use"
    [use] = [block for block in message.content if block.type == "tool_use"]
    jsonschema.validate(use.input, TOOL["input_schema"])
    with ant.messages.stream(
        model="tiny", max_tokens=120, messages=QUESTION, tools=[TOOL], tool_choice=choice, extra_body={"seed": 7}
    ) as events:
        final = events.get_final_message()
    assert [block.input for block in final.content if block.type == "tool_use"] == [use.input]
    told = [
        *QUESTION,
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in message.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "It rains."}]},
    ]
    final_text = say(ant, messages=told, tools=[TOOL], tool_choice={"type": "none"})
    assert final_text.content[0].type == "text"


def test_a_schema_is_obeyed(ant: anthropic.Anthropic) -> None:
    schema = TOOL["input_schema"]
    message = say(ant, output_config={"format": {"type": "json_schema", "schema": schema}}, max_tokens=80)
    jsonschema.validate(json.loads(message.content[0].text), schema)


def test_tokens_are_counted_without_an_answer(ant: anthropic.Anthropic) -> None:
    counted = ant.messages.count_tokens(model="tiny", messages=QUESTION, system="Be brief.")
    usage = say(ant, system="Be brief.", max_tokens=1).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_errors_have_the_shape_that_the_client_reads(ant: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 2047 maximum"):
        say(ant, messages=[{"role": "user", "content": "no room " * 2000}])
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        say(ant, model="claude")
    with pytest.raises(anthropic.BadRequestError, match="unknown field 'foo'"):
        say(ant, extra_body={"foo": 1})
    with pytest.raises(anthropic.BadRequestError, match="is missing"):
        say(ant, messages=[{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}])


def test_models_are_listed_for_this_client_too(ant: anthropic.Anthropic) -> None:
    assert [model.id for model in ant.models.list()] == ["tiny", "another-name"]
