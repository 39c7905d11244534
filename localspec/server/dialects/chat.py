"""`/v1/chat/completions`, as OpenAI's clients know it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from localspec.constraint import Grammar
from localspec.engine.template import Message
from localspec.errors import SettingError
from localspec.server import report
from localspec.server.ask import Ask, common, sampling
from localspec.server.calls import CallArguments, CallBegin, Delta, TextDelta
from localspec.server.desk import Job
from localspec.server.dialects.shared import DONE, FINGERPRINT, chosen_tool, extras, finish_word, tool_of
from localspec.server.refusals import Refusal
from localspec.server.reply import Call, Reply, Written
from localspec.server.schema.chat import ChatBody, FormatBody, MessageBody
from localspec.server.schema.reading import read_body
from localspec.server.stream import COMMENT, event
from localspec.server.ticket import PrefillProgress


class Chat:
    """One such request."""

    def __init__(self, raw: bytes) -> None:
        body = read_body(ChatBody, raw)
        tools = tuple(tool_of(tool.function) for tool in body.tools or ())
        variables = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            variables["reasoning_effort"] = body.reasoning_effort
        self.ask = Ask(
            **common(body),
            messages=tuple(_message(message) for message in body.messages),
            settings=sampling(
                body,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                logit_bias=bias_of(body.logit_bias),
                stop=None if body.stop is None else tuple(body.stop),
                max_tokens=_max_tokens(body),
                logprobs=_num_logprobs(body),
            ),
            num_choices=body.n or 1,
            grammar=_grammar(body.response_format),
            tools=tools,
            tool_choice=chosen_tool(body.tool_choice, tools),
            parallel_tools=body.parallel_tool_calls is not False,
            variables=variables,
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
        )

    def whole(self, job: Job, replies: Sequence[Reply]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        return {
            **_head(job, "chat.completion"),
            "choices": [_choice(job, index, reply) for index, reply in enumerate(replies)],
            "usage": report.usage(replies, self.ask.num_choices),
            "timings": report.timings(replies[0]),
            "metrics": report.metrics(replies),
        }

    def writer(self, job: Job) -> _Writer:
        """For one that is."""
        return _Writer(job)


class _Writer:
    idle = COMMENT

    def __init__(self, job: Job) -> None:
        self._job = job
        self._head = _head(job, "chat.completion.chunk")

    def begin(self) -> Iterator[bytes]:
        for index in range(self._job.ask.num_choices):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def progress(self, index: int, progress: PrefillProgress) -> Iterator[bytes]:
        done = {"processed": progress.done, "total": progress.total}
        yield event({**self._head, "choices": [], "prompt_progress": {"index": index, **done}})

    def write(self, index: int, written: Written) -> Iterator[bytes]:
        more: dict[str, Any] = {}
        if written.logprobs is not None and written.tokens:
            more["logprobs"] = {"content": report.chat_logprobs(written.logprobs, self._job.tokenizer)}
        if written.round is not None:
            more["round"] = written.round
        for delta in written.deltas:
            said = _delta(delta)
            if said is not None:
                yield self._chunk(index, said, **more)
                more = {}
        if more:
            yield self._chunk(index, {}, **more)

    def finish(self, index: int, reply: Reply) -> Iterator[bytes]:
        choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": finish_word(reply), **extras(reply)}
        yield event({**self._head, "choices": [choice], "timings": report.timings(reply)})

    def end(self, replies: Sequence[Reply]) -> Iterator[bytes]:
        if self._job.ask.include_usage:
            usage = report.usage(replies, self._job.ask.num_choices)
            yield event({**self._head, "choices": [], "usage": usage, "metrics": report.metrics(replies)})
        yield event(DONE)

    def fail(self, refusal: Refusal) -> Iterator[bytes]:
        yield event(refusal.openai())

    def _chunk(self, index: int, delta: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return event({**self._head, "choices": [choice]})


def _head(job: Job, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{job.id}",
        "object": kind,
        "created": job.created,
        "model": job.model,
        "system_fingerprint": FINGERPRINT,
    }


def _choice(job: Job, index: int, reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
    if reply.calls:
        message["content"] = reply.text or None
        message["tool_calls"] = [_call(call) for call in reply.calls]
    choice = {"index": index, "message": message, "finish_reason": finish_word(reply), "logprobs": None}
    if reply.generation.logprobs is not None:
        choice["logprobs"] = {"content": report.chat_logprobs(reply.logprobs, job.tokenizer)}
    if reply.show_rounds:
        choice["rounds"] = reply.rounds
    return {**choice, **extras(reply)}


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _delta(delta: Delta) -> dict[str, Any] | None:
    """A delta as a chunk says it; None for what chunks do not say."""
    if isinstance(delta, TextDelta):
        return {"content": delta.text}
    if isinstance(delta, CallBegin):
        function = {"name": delta.name, "arguments": ""}
        return {"tool_calls": [{"index": delta.index, "id": delta.id, "type": "function", "function": function}]}
    if isinstance(delta, CallArguments):
        return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}
    return None


def _message(body: MessageBody) -> Message:
    """As templates read it."""
    message: dict[str, Any] = {
        "role": "system" if body.role == "developer" else body.role,
        "content": body.content or "",
    }
    if body.tool_calls:
        message["tool_calls"] = [call.model_dump(include={"id", "type", "function"}) for call in body.tool_calls]
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(body, name)
        if value is not None:
            message[name] = value
    return message


def _grammar(body: FormatBody | None) -> Grammar | None:
    if body is None or body.type == "text":
        return None
    if body.type == "json_object":
        return Grammar.json_object()
    if body.type == "json_schema" and body.json_schema is not None:
        return Grammar.json_schema(body.json_schema.schema_)
    if body.type == "regex" and body.regex is not None:
        return Grammar.regex(body.regex)
    if body.type == "grammar" and body.grammar is not None:
        return Grammar.lark(body.grammar)
    raise SettingError(f"'response_format.{body.type}' is missing", expected=f"what type {body.type!r} means")


def _max_tokens(body: ChatBody) -> int | None:
    both = (body.max_tokens, body.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise SettingError("'max_tokens' and 'max_completion_tokens' differ", got=f"{both[0]} and {both[1]}")
    return both[1] if both[0] is None else both[0]


def _num_logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise SettingError("'top_logprobs' needs 'logprobs'", fix="Set logprobs to true.")
    return None


def bias_of(body: dict[str, float] | None) -> dict[int, float] | None:
    """Token id -> what is added to its logit."""
    return None if body is None else {int(token): bias for token, bias in body.items()}
