"""`/v1/responses`, in the parts that clients use: text, function calls, JSON. Nothing is stored."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from localspec.constraint import Grammar
from localspec.engine.template import Message
from localspec.errors import SettingError
from localspec.server import report
from localspec.server.ask import Ask, common, sampling
from localspec.server.calls import CallArguments, CallBegin, CallEnd, Delta, TextDelta
from localspec.server.desk import Job
from localspec.server.dialects.shared import chosen_tool, extras, finish_word, tool_of
from localspec.server.refusals import Refusal
from localspec.server.reply import Reply, Written
from localspec.server.schema.reading import read_body
from localspec.server.schema.responses import ItemBody, ResponseBody, TextFormatBody
from localspec.server.stream import COMMENT, event
from localspec.server.ticket import PrefillProgress

_INCOMPLETE = {"length": "max_output_tokens"}


class Response:
    """One such request."""

    def __init__(self, raw: bytes) -> None:
        self.body = body = read_body(ResponseBody, raw)
        tools = tuple(tool_of(tool) for tool in body.tools or ())
        wants_logprobs = bool(body.include) or body.top_logprobs is not None
        self.ask = Ask(
            **{**common(body), "ignored": tuple(sorted({*body.ignored, *_unused_reasoning(body)}))},
            messages=tuple(_conversation(body)),
            settings=sampling(
                body,
                stop=None if body.stop is None else tuple(body.stop),
                max_tokens=body.max_output_tokens,
                logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
            ),
            grammar=_grammar(None if body.text is None else body.text.format),
            tools=tools,
            tool_choice=chosen_tool(body.tool_choice, tools),
            parallel_tools=body.parallel_tool_calls is not False,
            variables={} if body.reasoning is None else _reasoning(body.reasoning),
        )

    def whole(self, job: Job, replies: Sequence[Reply]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        [reply] = replies
        items = _Items(job.id)
        for delta in reply.deltas:
            for _ in items.take(delta):
                pass
        if reply.generation.logprobs is not None:
            items.note(report.chat_logprobs(reply.logprobs, job.tokenizer))
        for _ in items.close(complete=finish_word(reply) != "length"):
            pass
        return self.object_of(job, items.items, reply)

    def writer(self, job: Job) -> _Writer:
        """For one that is."""
        return _Writer(self, job)

    def object_of(self, job: Job, items: Sequence[dict[str, Any]], reply: Reply | None) -> dict[str, Any]:
        """The response as it stands; reply None: it is in progress."""
        body, params = self.body, job.requests[0].params
        said: dict[str, Any] = {
            "id": f"resp_{job.id}",
            "object": "response",
            "created_at": job.created,
            "status": "in_progress",
            "model": job.model,
            "output": list(items),
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": self.ask.parallel_tools,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "text": {"format": {"type": "text"}} if body.text is None else body.text.model_dump(by_alias=True),
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "truncation": "disabled",
            "usage": None,
        }
        if reply is None:
            return said
        reason = _INCOMPLETE.get(finish_word(reply))
        said["status"] = "completed" if reason is None else "incomplete"
        said["incomplete_details"] = None if reason is None else {"reason": reason}
        said["completed_at"] = int(time.time())
        said["usage"] = _usage(reply)
        said |= {"timings": report.timings(reply), "metrics": report.metrics([reply]), **extras(reply)}
        if reply.show_rounds:
            said["rounds"] = reply.rounds
        return said


class _Items:
    """The output of a response as it grows, item by item, and the events that tell of it."""

    def __init__(self, job_id: str) -> None:
        self.items: list[dict[str, Any]] = []
        self._id = job_id
        self._open: dict[str, Any] | None = None
        self._logprobs: list[dict[str, Any]] = []  # of the text since the last event

    def note(self, logprobs: Sequence[dict[str, Any]]) -> None:
        """Log-probabilities of the text that comes next."""
        self._logprobs += logprobs

    def take(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """Take in a delta."""
        if isinstance(delta, TextDelta):
            if self._open is None or self._open["type"] != "message":
                yield from self._begin_message()
            yield from self._say(delta.text)
        elif isinstance(delta, CallBegin):
            yield from self._begin_call(delta)
        elif isinstance(delta, CallArguments) and self._open is not None:
            self._open["arguments"] += delta.text
            yield {"type": "response.function_call_arguments.delta", **self._place(), "delta": delta.text}
        elif isinstance(delta, CallEnd):
            yield from self.close(complete=delta.complete)

    def close(self, *, complete: bool = True) -> Iterator[dict[str, Any]]:
        """End the item that is open."""
        item = self._open
        if item is None:
            return
        item["status"] = "completed" if complete else "incomplete"
        place = self._place()
        if item["type"] == "message":
            [part] = item["content"]
            part["logprobs"] += self._logprobs
            self._logprobs = []
            done = {**place, "content_index": 0}
            yield {"type": "response.output_text.done", **done, "text": part["text"], "logprobs": part["logprobs"]}
            yield {"type": "response.content_part.done", **done, "part": part}
        else:
            yield {"type": "response.function_call_arguments.done", **place, "arguments": item["arguments"]}
        yield {"type": "response.output_item.done", "output_index": place["output_index"], "item": item}
        self._open = None

    def _say(self, text: str) -> Iterator[dict[str, Any]]:
        assert self._open is not None
        logprobs, self._logprobs = self._logprobs, []
        [part] = self._open["content"]
        part["text"] += text
        part["logprobs"] += logprobs
        yield {
            "type": "response.output_text.delta",
            **self._place(),
            "content_index": 0,
            "delta": text,
            "logprobs": logprobs,
        }

    def _begin_message(self) -> Iterator[dict[str, Any]]:
        yield from self.close()
        name = f"msg_{self._id}_{len(self.items)}"
        item: dict[str, Any] = {"id": name, "type": "message", "role": "assistant", "content": []}
        yield from self._begin(item)
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield {"type": "response.content_part.added", **self._place(), "content_index": 0, "part": dict(part)}
        item["content"] = [part]

    def _begin_call(self, delta: CallBegin) -> Iterator[dict[str, Any]]:
        yield from self.close()
        names = {"call_id": delta.id, "name": delta.name, "arguments": ""}
        yield from self._begin({"id": f"fc_{self._id}_{len(self.items)}", "type": "function_call", **names})

    def _begin(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        item["status"] = "in_progress"
        self.items.append(item)
        self._open = item
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": dict(item)}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}


class _Writer:
    idle = COMMENT

    def __init__(self, request: Response, job: Job) -> None:
        self._request = request
        self._job = job
        self._items = _Items(job.id)
        self._number = 0

    def begin(self) -> Iterator[bytes]:
        started = self._request.object_of(self._job, (), None)
        yield self._event({"type": "response.created", "response": started})
        yield self._event({"type": "response.in_progress", "response": started})

    def progress(self, index: int, progress: PrefillProgress) -> Iterator[bytes]:
        done = {"processed": progress.done, "total": progress.total}
        yield self._event({"type": "response.localspec.prompt_progress", "index": index, **done})

    def write(self, index: int, written: Written) -> Iterator[bytes]:
        if written.logprobs is not None:
            self._items.note(report.chat_logprobs(written.logprobs, self._job.tokenizer))
        for delta in written.deltas:
            yield from map(self._event, self._items.take(delta))
        if written.round is not None:
            yield self._event({"type": "response.localspec.round", "round": written.round})

    def finish(self, index: int, reply: Reply) -> Iterator[bytes]:
        complete = finish_word(reply) != "length"
        yield from map(self._event, self._items.close(complete=complete))
        done = self._request.object_of(self._job, self._items.items, reply)
        yield self._event({"type": f"response.{done['status']}", "response": done})

    def end(self, replies: Sequence[Reply]) -> Iterator[bytes]:
        yield from ()

    def fail(self, refusal: Refusal) -> Iterator[bytes]:
        failed = self._request.object_of(self._job, self._items.items, None)
        error = {"code": "server_error", "message": refusal.message}
        yield self._event({"type": "response.failed", "response": {**failed, "status": "failed", "error": error}})

    def _event(self, data: dict[str, Any]) -> bytes:
        numbered = event({**data, "sequence_number": self._number}, data["type"])
        self._number += 1
        return numbered


def _conversation(body: ResponseBody) -> Iterator[Message]:
    """As templates read it: calls in a row belong to one message of the assistant."""
    if body.instructions is not None:
        yield {"role": "system", "content": body.instructions}
    speaking: dict[str, Any] | None = None  # the assistant, who may yet call something
    for index, item in enumerate(body.input):
        if item.type == "function_call":
            if speaking is None:
                speaking = {"role": "assistant", "content": ""}
            speaking.setdefault("tool_calls", []).append(_call(item, index))
            continue
        if speaking is not None:
            yield speaking
        speaking = None
        message = _message(item, index)
        if message["role"] == "assistant":
            speaking = message
        else:
            yield message
    if speaking is not None:
        yield speaking


def _call(item: ItemBody, index: int) -> dict[str, Any]:
    if item.call_id is None or item.name is None or item.arguments is None:
        raise SettingError(f"'input.{index}' needs call_id, name and arguments")
    return {
        "id": item.call_id,
        "type": "function",
        "function": {"name": item.name, "arguments": item.arguments},
    }


def _message(item: ItemBody, index: int) -> dict[str, Any]:
    if item.type == "function_call_output":
        if item.call_id is None or item.output is None:
            raise SettingError(f"'input.{index}' needs call_id and output")
        return {"role": "tool", "tool_call_id": item.call_id, "content": item.output}
    if item.role is None or item.content is None:
        raise SettingError(f"'input.{index}' needs role and content")
    return {"role": "system" if item.role == "developer" else item.role, "content": item.content}


def _grammar(body: TextFormatBody | None) -> Grammar | None:
    if body is None or body.type == "text":
        return None
    if body.type == "json_object":
        return Grammar.json_object()
    if body.schema_ is None:
        raise SettingError("'text.format.schema' is missing")
    return Grammar.json_schema(body.schema_)


def _reasoning(body: dict[str, Any]) -> dict[str, object]:
    return {} if body.get("effort") is None else {"reasoning_effort": body["effort"]}


def _unused_reasoning(body: ResponseBody) -> list[str]:
    return [f"reasoning.{name}" for name in body.reasoning or {} if name != "effort"]


def _usage(reply: Reply) -> dict[str, Any]:
    prompt, written = report.num_prompt_tokens([reply], 1), report.num_answer_tokens([reply])
    cached = report.num_cached_tokens([reply], 1)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": prompt - cached},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + written,
    }
