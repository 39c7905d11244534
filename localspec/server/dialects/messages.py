"""`/v1/messages`, as Anthropic's clients know it, and `/v1/messages/count_tokens`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from localspec.constraint import Grammar
from localspec.engine.template import Message
from localspec.errors import SettingError
from localspec.server import report
from localspec.server.ask import AUTO, Ask, common, sampling
from localspec.server.calls import CallArguments, CallBegin, CallEnd, Delta, TextDelta
from localspec.server.desk import Job
from localspec.server.dialects.shared import extras, known_tool, make_tool
from localspec.server.refusals import Refusal
from localspec.server.reply import TOOL_CALLS, Reply, Written
from localspec.server.schema.messages import BlockBody, ChoiceBody, CountBody, InputToolBody, MessagesBody, TurnBody
from localspec.server.schema.reading import read_body
from localspec.server.stream import event
from localspec.server.ticket import PrefillProgress
from localspec.server.tools import Tool

_STOP = {
    "stop": "end_turn",
    "length": "max_tokens",
    "context": "model_context_window_exceeded",
    TOOL_CALLS: "tool_use",
}
_CHOICES = {"auto": AUTO, "any": "required", "none": "none"}


class Messages:
    """One such request."""

    def __init__(self, raw: bytes) -> None:
        body = read_body(MessagesBody, raw)
        settings = sampling(
            body,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            stop=None if body.stop_sequences is None else tuple(body.stop_sequences),
            max_tokens=body.max_tokens,
        )
        self.ask = _ask(body, settings)

    def whole(self, job: Job, replies: Sequence[Reply]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        [reply] = replies
        blocks = _Blocks()
        for delta in reply.deltas:
            for _ in blocks.take(delta):
                pass
        more = {"rounds": reply.rounds} if reply.show_rounds else {}
        return {**_head(job), "content": blocks.whole(), **_ending(reply), "usage": _usage(reply), **more}

    def writer(self, job: Job) -> _Writer:
        """For one that is."""
        return _Writer(job)


class Count:
    """A conversation whose tokens are to be counted."""

    def __init__(self, raw: bytes) -> None:
        self.ask = _ask(read_body(CountBody, raw), {})


class _Blocks:
    """The content of an answer as it grows, block by block, and the events that tell of it."""

    def __init__(self) -> None:
        self._blocks: list[dict[str, Any]] = []
        self._is_open = False

    def take(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """Take in a delta."""
        if isinstance(delta, TextDelta):
            if not self._is_open or self._blocks[-1]["type"] != "text":
                yield from self._begin({"type": "text", "text": ""})
            self._blocks[-1]["text"] += delta.text
            yield self._delta({"type": "text_delta", "text": delta.text})
        elif isinstance(delta, CallBegin):
            yield from self._begin({"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}})
            self._blocks[-1]["arguments"] = ""
        elif isinstance(delta, CallArguments):
            self._blocks[-1]["arguments"] += delta.text
            yield self._delta({"type": "input_json_delta", "partial_json": delta.text})
        elif isinstance(delta, CallEnd):
            yield from self.close()

    def close(self) -> Iterator[dict[str, Any]]:
        """End the block that is open."""
        if self._is_open:
            yield {"type": "content_block_stop", "index": len(self._blocks) - 1}
        self._is_open = False

    def whole(self) -> list[dict[str, Any]]:
        """All blocks; of a call that was cut off the input is empty."""
        return [
            {**{name: value for name, value in block.items() if name != "arguments"}, "input": _object(block)}
            if block["type"] == "tool_use"
            else block
            for block in self._blocks
        ]

    def _begin(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.close()
        self._blocks.append(block)
        self._is_open = True
        yield {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}


class _Writer:
    idle = event({"type": "ping"}, "ping")

    def __init__(self, job: Job) -> None:
        self._job = job
        self._blocks = _Blocks()

    def begin(self) -> Iterator[bytes]:
        usage = {
            "input_tokens": len(self._job.requests[0].tokens),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        }
        started = {**_head(self._job), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield _event({"type": "message_start", "message": started})

    def progress(self, index: int, progress: PrefillProgress) -> Iterator[bytes]:
        yield _event({"type": "ping", "prompt_progress": {"processed": progress.done, "total": progress.total}})

    def write(self, index: int, written: Written) -> Iterator[bytes]:
        for delta in written.deltas:
            yield from map(_event, self._blocks.take(delta))
        if written.round is not None:
            yield _event({"type": "ping", "round": written.round})

    def finish(self, index: int, reply: Reply) -> Iterator[bytes]:
        yield from map(_event, self._blocks.close())
        ending = _ending(reply)
        delta = {name: ending.pop(name) for name in ("stop_reason", "stop_sequence")}
        yield _event({"type": "message_delta", "delta": delta, "usage": _usage(reply), **ending})
        yield _event({"type": "message_stop"})

    def end(self, replies: Sequence[Reply]) -> Iterator[bytes]:
        yield from ()

    def fail(self, refusal: Refusal) -> Iterator[bytes]:
        yield event(refusal.anthropic(), "error")


def _event(data: dict[str, Any]) -> bytes:
    return event(data, data["type"])


def _head(job: Job) -> dict[str, Any]:
    return {"id": f"msg_{job.id}", "type": "message", "role": "assistant", "model": job.model}


def _ending(reply: Reply) -> dict[str, Any]:
    generation = reply.generation
    stopped = generation.stop_string is not None and reply.finish_reason == "stop"
    return {
        "stop_reason": "stop_sequence" if stopped else _STOP[reply.finish_reason],
        "stop_sequence": generation.stop_string if stopped else None,
        "timings": report.timings(reply),
        "metrics": report.metrics([reply]),
        **extras(reply),
    }


def _usage(reply: Reply) -> dict[str, Any]:
    cached = report.num_cached_tokens([reply], 1)
    return {
        "input_tokens": report.num_prompt_tokens([reply], 1) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": report.num_answer_tokens([reply]),
    }


def _object(block: Mapping[str, Any]) -> dict[str, Any]:
    try:
        value = json.loads(block["arguments"] or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _ask(body: MessagesBody | CountBody, settings: Mapping[str, Any]) -> Ask:
    tools = tuple(_tool(tool) for tool in body.tools or ())
    choice = body.tool_choice
    output = body.output_config
    schema = None if output is None or output.format is None else output.format.schema_
    return Ask(
        **common(body),
        messages=tuple(_conversation(body)),
        settings=settings,
        grammar=None if schema is None else Grammar.json_schema(schema),
        tools=tools,
        tool_choice=_choice(choice, tools),
        parallel_tools=choice is None or not choice.disable_parallel_tool_use,
        variables={} if output is None or output.effort is None else {"reasoning_effort": output.effort},
    )


def _tool(body: InputToolBody) -> Tool:
    return make_tool(body.name, body.description, body.input_schema, body.strict)


def _choice(body: ChoiceBody | None, tools: Sequence[Tool]) -> str:
    if body is None:
        return AUTO
    if body.type == "tool":
        return known_tool(body.name or "", tools)
    if body.type == "any" and not tools:
        raise SettingError("tool_choice is 'any', and there are no tools")
    return _CHOICES[body.type]


def _conversation(body: MessagesBody | CountBody) -> Iterator[Message]:
    """As templates read it: what calls gave are messages of their own."""
    if body.system is not None:
        yield {"role": "system", "content": body.system}
    for index, turn in enumerate(body.messages):
        yield from _turn(turn, f"messages.{index}")


def _turn(turn: TurnBody, where: str) -> Iterator[Message]:
    texts: list[str] = []
    calls = []
    for index, block in enumerate(turn.content):
        if block.type == "text":
            texts.append(_needed(block, "text", f"{where}.content.{index}"))
        elif block.type == "tool_result":
            call = _needed(block, "tool_use_id", f"{where}.content.{index}")
            content = block.content or ""
            yield {"role": "tool", "tool_call_id": call, "content": f"error: {content}" if block.is_error else content}
        else:
            calls.append(_call(block, f"{where}.content.{index}"))
    if texts or calls or not turn.content:
        message: dict[str, Any] = {"role": turn.role, "content": "".join(texts)}
        yield {**message, "tool_calls": calls} if calls else message


def _call(block: BlockBody, where: str) -> dict[str, Any]:
    function = {"name": _needed(block, "name", where), "arguments": json.dumps(block.input or {}, ensure_ascii=False)}
    return {"id": _needed(block, "id", where), "type": "function", "function": function}


def _needed(block: BlockBody, name: str, where: str) -> str:
    value = getattr(block, name)
    if value is None:
        raise SettingError(f"'{where}.{name}' is missing", expected=f"with a block of type {block.type}")
    return str(value)
