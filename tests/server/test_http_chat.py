"""`/v1/chat/completions` and `/v1/completions`, driven by OpenAI's own client against a running server."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import jsonschema
import openai
import pytest

from localspec.engine.template import render
from localspec.pair import Pair
from localspec.sampling import SamplingParams

pytestmark = pytest.mark.real

MODEL = "tiny"
QUESTION: list[Any] = [{"role": "user", "content": "How do I reverse a list in Python?"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What the weather is like.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def ask(client: openai.OpenAI, **more: Any) -> Any:
    """A chat completion with a few tokens, seeded."""
    asked: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_tokens": 24, "seed": 7, **more}
    return client.chat.completions.create(**asked)


def stream(client: openai.OpenAI, **more: Any) -> list[Any]:
    """The chunks of the same."""
    with ask(client, stream=True, **more) as chunks:
        return list(chunks)


def said(chunks: list[Any], index: int = 0) -> str:
    """The text of one choice."""
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_text_is_that_of_a_session_with_the_same_seed(
    oai: openai.OpenAI, served_pair: Pair, temperature: float
) -> None:
    answer = ask(oai, temperature=temperature)
    prompt = render(served_pair.target.tokenizer, QUESTION)
    params = SamplingParams(temperature=temperature, seed=7, max_tokens=24)
    with served_pair.session("nothing") as session:
        expected = session.generate(prompt, params)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.usage.prompt_tokens == expected.num_prompt_tokens


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_stream_says_what_the_whole_answer_says(oai: openai.OpenAI, temperature: float) -> None:
    whole = ask(oai, temperature=temperature)
    chunks = stream(oai, temperature=temperature, stream_options={"include_usage": True})
    assert said(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_include_usage_no_chunk_has_one(oai: openai.OpenAI) -> None:
    assert all(chunk.usage is None and chunk.choices for chunk in stream(oai))


def test_n_answers_have_the_seeds_that_follow(oai: openai.OpenAI) -> None:
    three = ask(oai, n=3, temperature=0.8)
    alone = [ask(oai, seed=7 + choice, temperature=0.8).choices[0].message.content for choice in range(3)]
    assert [choice.message.content for choice in three.choices] == alone
    assert len(set(alone)) > 1
    chunks = stream(oai, n=3, temperature=0.8)
    assert [said(chunks, index) for index in range(3)] == alone


def test_an_answer_without_a_seed_reports_the_one_it_had(oai: openai.OpenAI) -> None:
    first = ask(oai, seed=openai.omit, temperature=0.9).choices[0]
    again = ask(oai, seed=first.model_extra["seed"], temperature=0.9).choices[0]
    assert again.message.content == first.message.content


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(oai: openai.OpenAI, streaming: bool) -> None:
    free = ask(oai, temperature=0.0).choices[0].message.content
    stop = free[8:12]
    if streaming:
        chunks = stream(oai, temperature=0.0, stop=[stop, "never said"])
        text, reason = said(chunks), chunks[-1].choices[0].finish_reason
    else:
        choice = ask(oai, temperature=0.0, stop=stop).choices[0]
        text, reason = choice.message.content, choice.finish_reason
    assert text == free[: free.index(stop)]
    assert reason == "stop"


def test_max_tokens_cuts_under_both_of_its_names(oai: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = ask(oai, **{"max_tokens": openai.omit, name: 5})
        assert answer.usage.completion_tokens == 5
        assert answer.choices[0].finish_reason == "length"


def test_a_biased_token_is_never_said(oai: openai.OpenAI, served_pair: Pair) -> None:
    free = ask(oai, temperature=0.0, logprobs=True).choices[0]
    token = int(served_pair.target.tokenizer.encode(free.message.content, special=False)[0])
    barred = ask(oai, temperature=0.0, logit_bias={str(token): -100}).choices[0]
    assert barred.message.content != free.message.content


def test_penalties_reach_the_sampler(oai: openai.OpenAI, served_pair: Pair) -> None:
    prompt = render(served_pair.target.tokenizer, QUESTION)
    for name, value in (("presence_penalty", 1.5), ("frequency_penalty", 1.5), ("repetition_penalty", 1.4)):
        more = {name: value} if name != "repetition_penalty" else {"extra_body": {name: value}}
        answer = ask(oai, temperature=0.7, top_p=0.9, **more)
        with served_pair.session("nothing") as session:
            settings: dict[str, Any] = {name: value}
            params = SamplingParams(temperature=0.7, top_p=0.9, seed=7, max_tokens=24, **settings)
            assert answer.choices[0].message.content == session.generate(prompt, params).text, name


@pytest.mark.parametrize("streaming", [False, True])
def test_logprobs_name_every_token_of_the_text(oai: openai.OpenAI, streaming: bool) -> None:
    if streaming:
        chunks = stream(oai, logprobs=True, top_logprobs=3)
        text = said(chunks)
        entries = [e for c in chunks for choice in c.choices if choice.logprobs for e in choice.logprobs.content]
    else:
        choice = ask(oai, logprobs=True, top_logprobs=3).choices[0]
        text, entries = choice.message.content, choice.logprobs.content
    spoken = bytes(byte for entry in entries for byte in entry.bytes).decode()
    assert spoken.removesuffix("<|im_end|>") == text
    assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0.0 for entry in entries)


def test_a_conversation_that_ends_with_the_assistant_is_continued(oai: openai.OpenAI) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "Use the `"}]
    continued = ask(oai, messages=begun, temperature=0.0).choices[0].message.content
    free = ask(oai, temperature=0.0).choices[0].message.content
    assert free.startswith("Use the `")
    assert free.startswith(("Use the `" + continued)[: len(free)])


# ---------------------------------------------------------------- counts


def test_a_second_turn_is_read_from_the_cache(oai: openai.OpenAI) -> None:
    opening: list[Any] = [{"role": "user", "content": "Tell me about the river that has never been crossed."}]
    first = ask(oai, messages=opening)
    turn = [*opening, first.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "More."}]
    second = ask(oai, messages=turn)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1
    assert second.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens
    assert second.model_extra["timings"]["cache_n"] == second.usage.prompt_tokens_details.cached_tokens


def test_timings_and_metrics_count_alike(oai: openai.OpenAI) -> None:
    answer = ask(oai, temperature=0.0, max_tokens=48, extra_body={"speculation": "draft_model:num=4"})
    timings, metrics = answer.model_extra["timings"], answer.model_extra["metrics"]["speculative_decoding"]
    assert timings["predicted_n"] == answer.usage.completion_tokens
    assert timings["cache_n"] + timings["prompt_n"] == answer.usage.prompt_tokens - 1  # the anchor is no part of it
    assert timings["draft_n"] == metrics["num_draft_tokens"] > 0
    assert timings["draft_n_accepted"] == metrics["num_accepted_draft_tokens"] > 0
    histogram = metrics["acceptance_histogram"]
    assert sum(histogram) == metrics["num_spec_steps"]
    assert sum(k * count for k, count in enumerate(histogram)) == metrics["num_accepted_draft_tokens"]
    length = 1 + metrics["num_accepted_draft_tokens"] / metrics["num_spec_steps"]
    assert metrics["mean_acceptance_length"] == pytest.approx(length, abs=1e-3)


def test_in_a_stream_metrics_ride_on_the_usage_chunk(oai: openai.OpenAI) -> None:
    chunks = stream(oai, stream_options={"include_usage": True})
    assert chunks[-1].model_extra["metrics"]["speculative_decoding"]["num_spec_steps"] >= 0
    assert chunks[-2].model_extra["timings"]["predicted_n"] == chunks[-1].usage.completion_tokens


# ---------------------------------------------------------------- speculation


@pytest.mark.parametrize("speculation", ["off", False])
def test_speculation_can_be_switched_off(oai: openai.OpenAI, speculation: object) -> None:
    plain = ask(oai, temperature=0.0, extra_body={"speculation": speculation})
    assert plain.model_extra["timings"]["draft_n"] == 0
    assert plain.choices[0].model_extra["speculation"]["drafter"] == "nothing"
    guessed = ask(oai, temperature=0.0, extra_body={"speculation": "draft_model"})
    assert guessed.model_extra["timings"]["draft_n"] > 0
    assert guessed.choices[0].message.content == plain.choices[0].message.content


def test_a_width_bounds_every_round(oai: openai.OpenAI) -> None:
    wanted = {"speculation": {"drafter": "draft_model:num=8", "width": 2}, "show_rounds": True}
    answer = ask(oai, temperature=0.0, extra_body=wanted)
    rounds = answer.choices[0].model_extra["rounds"]
    assert max(len(entry["nodes"]) for entry in rounds) == 2


def test_rounds_say_who_guessed_what(oai: openai.OpenAI) -> None:
    chunks = stream(oai, temperature=0.0, extra_body={"show_rounds": True, "speculation": "draft_model"})
    rounds = [choice.model_extra["round"] for c in chunks for choice in c.choices if "round" in choice.model_extra]
    pieces = [piece for entry in rounds for piece in entry["pieces"]]
    assert "".join(piece["text"] for piece in pieces) == said(chunks)
    assert {piece["source"] for piece in pieces} == {"draft_model", "target"}
    for entry in rounds:
        if "nodes" in entry:
            assert len(entry["emitted"]) == len(entry["path"]) + 1
            assert all(-1 <= node["parent"] < place for place, node in enumerate(entry["nodes"]))


def test_progress_is_told_if_asked_for(oai: openai.OpenAI) -> None:
    long: list[Any] = [{"role": "user", "content": "word " * 900}]
    chunks = stream(oai, messages=long, max_tokens=1, extra_body={"return_progress": True})
    told = [chunk.model_extra["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk.model_extra]
    assert len(told) >= 2
    assert told[-1]["processed"] == told[-1]["total"] > 500


# ---------------------------------------------------------------- formats and tools


@pytest.mark.parametrize("streaming", [False, True])
def test_a_schema_is_obeyed(oai: openai.OpenAI, streaming: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    more: dict[str, Any] = {"response_format": form, "temperature": 0.9, "max_tokens": 120}
    text = said(stream(oai, **more)) if streaming else ask(oai, **more).choices[0].message.content
    jsonschema.validate(json.loads(text), PERSON)


def test_a_json_object_comes_out_as_one(oai: openai.OpenAI) -> None:
    more = {"response_format": {"type": "json_object"}, "temperature": 0.0, "max_tokens": 300}
    choice = ask(oai, **more).choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    else:
        assert choice.message.content.lstrip().startswith("{")
        assert choice.model_extra["note"]


def test_a_regular_expression_is_obeyed(oai: openai.OpenAI) -> None:
    form = {"type": "regex", "regex": "[a-c]{3}-[0-9]{2}"}
    text = ask(oai, extra_body={"response_format": form}).choices[0].message.content
    assert len(text) == 6 and set(text[:3]) <= set("abc") and text[3] == "-" and text[4:].isdigit()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_is_made_and_its_result_is_read(oai: openai.OpenAI, choice: Any) -> None:
    more: dict[str, Any] = {"tools": [WEATHER], "max_tokens": 120, "parallel_tool_calls": False}
    answer = ask(oai, tool_choice=choice, **more).choices[0]
    assert answer.finish_reason == "tool_calls"
    [call] = answer.message.tool_calls
    assert call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    told = [
        *QUESTION,
        answer.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "It rains."},
    ]
    final = ask(oai, messages=told, tool_choice="none", **more).choices[0]
    assert final.message.content and not final.message.tool_calls


def test_a_streamed_call_is_put_together_by_the_client(oai: openai.OpenAI) -> None:
    more: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    whole = ask(oai, max_tokens=120, **more).choices[0].message.tool_calls[0].function
    asked: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_tokens": 120, "seed": 7, **more}
    with oai.chat.completions.stream(**asked) as events:
        final = events.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    [call] = final.message.tool_calls or []
    assert (call.function.name, call.function.arguments) == (whole.name, whole.arguments)


def test_tools_that_need_not_be_called_leave_text_alone(oai: openai.OpenAI) -> None:
    answer = ask(oai, tools=[WEATHER], tool_choice="none", temperature=0.0).choices[0]
    assert answer.message.content and answer.message.tool_calls is None


# ---------------------------------------------------------------- completions


def test_completions_continue_texts_and_tokens_alike(oai: openai.OpenAI, served_pair: Pair) -> None:
    tokens = served_pair.target.tokenizer.encode("Once upon a time", special=True).tolist()
    more: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "seed": 3}
    by_text = oai.completions.create(prompt="Once upon a time", **more)
    by_token = oai.completions.create(prompt=tokens, **more)
    both = oai.completions.create(prompt=["Once upon a time", "The king"], n=2, **more)
    assert by_text.choices[0].text == by_token.choices[0].text == both.choices[0].text
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.usage is not None and by_text.usage is not None
    assert both.usage.prompt_tokens == by_text.usage.prompt_tokens + 2


@pytest.mark.parametrize("streaming", [False, True])
def test_completions_echo_and_stream(oai: openai.OpenAI, streaming: bool) -> None:
    more: Any = {"model": MODEL, "prompt": "The king", "max_tokens": 12, "seed": 3}
    text = oai.completions.create(**more).choices[0].text
    if streaming:
        with oai.completions.create(echo=True, stream=True, **more) as chunks:
            echoed = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    else:
        echoed = oai.completions.create(echo=True, **more).choices[0].text
    assert echoed == "The king" + text


@pytest.mark.parametrize("streaming", [False, True])
def test_completions_place_their_logprobs(oai: openai.OpenAI, streaming: bool) -> None:
    more: Any = {"model": MODEL, "prompt": "The king", "max_tokens": 12, "seed": 3, "logprobs": 2}
    if streaming:
        with oai.completions.create(stream=True, **more) as chunks:
            choices = [choice for chunk in chunks for choice in chunk.choices]
    else:
        choices = oai.completions.create(**more).choices
    text = "".join(choice.text for choice in choices)
    for choice in choices:
        if choice.logprobs is not None:
            placed = zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)
            assert all(text[offset:].startswith(token) for token, offset in placed)
            assert all(len(entry) == 2 for entry in choice.logprobs.top_logprobs)


# ---------------------------------------------------------------- what is sent back


def test_fields_without_meaning_are_reported(http: httpx2.Client) -> None:
    body = {"messages": QUESTION, "max_tokens": 1, "user": "me", "metadata": {"a": "b"}, "store": None}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert response.headers["x-localspec-ignored"] == "metadata, user"


def test_any_name_of_the_model_will_do_and_no_other(oai: openai.OpenAI) -> None:
    assert [model.id for model in oai.models.list().data] == ["tiny", "another-name"]
    assert ask(oai, model="another-name").model == "another-name"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ask(oai, model="gpt-4o")
    with pytest.raises(openai.NotFoundError):
        oai.models.retrieve("gpt-4o")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"temprature": 1}, "Did you mean 'temperature'"),
        ({"temperature": "hot"}, "'temperature'"),
        ({"temperature": 101}, "'temperature'"),
        ({"top_logprobs": 2}, "needs 'logprobs'"),
        ({"max_completion_tokens": 3}, "differ"),
        ({"speculation": "guessing"}, "unknown drafter"),
        ({"speculation": "draft_model:colour=4"}, "unknown setting"),
        ({"response_format": {"type": "json_schema"}}, "is missing"),
        ({"response_format": {"type": "regex", "regex": "("}}, "regex"),
        ({"logit_bias": {"99999": 1.0}}, "logit_bias"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "names no tool"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "text only"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"chat_template_kwargs": {"messages": []}}, "not yours to set"),
    ],
)
def test_what_is_wrong_is_named(oai: openai.OpenAI, body: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(oai, extra_body=body)
    assert words in caught.value.message
    assert caught.value.type == "invalid_request_error"


def test_a_conversation_that_does_not_fit_is_refused_in_the_known_words(oai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 2047 tokens") as caught:
        ask(oai, messages=[{"role": "user", "content": "no room " * 2000}])
    assert caught.value.code == "context_length_exceeded"
