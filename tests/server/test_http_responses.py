"""`/v1/responses`, driven by OpenAI's own client against a running server."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

pytestmark = pytest.mark.real

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "word": {"enum": ["red", "green"]}},
    "required": ["ok", "word"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "name": "add",
    "description": "Adds two numbers.",
    "parameters": {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "minimum": 0, "maximum": 99},
            "b": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "strict": True,
}


def respond(client: openai.OpenAI, **more: Any) -> Any:
    """A response of a few tokens, seeded."""
    asked: dict[str, Any] = {"model": "tiny", "input": "Hello!", "max_output_tokens": 24, "extra_body": {"seed": 7}}
    return client.responses.create(**{**asked, **more})


def test_a_response_says_what_chat_says(oai: openai.OpenAI) -> None:
    response = respond(oai, instructions="Be brief.")
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    chat = oai.chat.completions.create(model="tiny", messages=messages, max_tokens=24, seed=7)
    assert response.output_text == chat.choices[0].message.content
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert (response.status, response.object) == ("completed", "response")


def test_a_stream_ends_with_the_whole_response(oai: openai.OpenAI) -> None:
    whole = respond(oai)
    with oai.responses.stream(model="tiny", input="Hello!", max_output_tokens=24, extra_body={"seed": 7}) as events:
        seen = list(events)
        final = events.get_final_response()
    assert final.output_text == whole.output_text
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    kinds = [event.type for event in seen]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_an_answer_that_is_cut_off_is_incomplete(oai: openai.OpenAI) -> None:
    response = respond(oai, input="Tell me a story.", max_output_tokens=4)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"


def test_a_schema_is_obeyed(oai: openai.OpenAI) -> None:
    form = {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}}
    response = respond(oai, text=form, max_output_tokens=80)
    jsonschema.validate(json.loads(response.output_text), SCHEMA)


def test_a_call_is_made_and_its_result_is_read(oai: openai.OpenAI) -> None:
    more: dict[str, Any] = {"tools": [TOOL], "max_output_tokens": 120, "parallel_tool_calls": False}
    asked: list[Any] = [{"role": "user", "content": "What is 3 + 4?"}]
    response = respond(oai, input=asked, tool_choice="required", **more)
    [call] = [item for item in response.output if item.type == "function_call"]
    jsonschema.validate(json.loads(call.arguments), TOOL["parameters"])
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
    again = [*asked, call.model_dump(exclude_none=True), result]
    final = respond(oai, input=again, tool_choice="none", **more)
    assert final.output_text
    with oai.responses.stream(
        model="tiny", input=asked, tool_choice="required", extra_body={"seed": 7}, **more
    ) as events:
        kinds = [event.type for event in events]
        streamed = events.get_final_response()
    [same] = [item for item in streamed.output if item.type == "function_call"]
    assert same.arguments == call.arguments
    assert "response.function_call_arguments.done" in kinds


def test_logprobs_come_if_included(oai: openai.OpenAI) -> None:
    response = respond(oai, include=["message.output_text.logprobs"], top_logprobs=2)
    entries = response.output[0].content[0].logprobs
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    spoken = bytes(byte for entry in entries for byte in entry.bytes).decode().removesuffix("<|im_end|>")
    assert spoken == response.output_text


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": [{"type": "function_call", "name": "add"}]}, "needs call_id"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
    ],
)
def test_what_is_not_done_is_refused(oai: openai.OpenAI, more: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        respond(oai, **more)
