"""`/v1/completions`: text that goes on as it stands, without a template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from localspec.constraint import Grammar
from localspec.errors import SettingError
from localspec.server import report
from localspec.server.ask import Ask, common, sampling
from localspec.server.calls import TextDelta
from localspec.server.desk import Job
from localspec.server.dialects.chat import bias_of
from localspec.server.dialects.shared import DONE, FINGERPRINT, extras, finish_word
from localspec.server.refusals import Refusal
from localspec.server.reply import Reply, Written
from localspec.server.schema.completions import CompletionBody
from localspec.server.schema.reading import read_body
from localspec.server.stream import COMMENT, event
from localspec.server.ticket import PrefillProgress


class Completion:
    """One such request."""

    def __init__(self, raw: bytes) -> None:
        body = read_body(CompletionBody, raw)
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise SettingError("'best_of' must equal 'n'", got=body.best_of, fix="Every answer is returned.")
        if body.echo and body.logprobs is not None:
            raise SettingError("'echo' with 'logprobs' is not done: the prompt's own are not computed")
        self.echo = bool(body.echo)
        self.ask = Ask(
            **common(body),
            prompts=tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in body.prompt),
            settings=sampling(
                body,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                logit_bias=bias_of(body.logit_bias),
                stop=None if body.stop is None else tuple(body.stop),
                max_tokens=body.max_tokens,
                logprobs=body.logprobs,
            ),
            num_choices=body.n or 1,
            grammar=_grammar(body),
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
        )

    def whole(self, job: Job, replies: Sequence[Reply]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        return {
            **_head(job),
            "choices": [self._choice(job, index, reply) for index, reply in enumerate(replies)],
            "usage": report.usage(replies, self.ask.num_choices),
            "timings": report.timings(replies[0]),
            "metrics": report.metrics(replies),
        }

    def writer(self, job: Job) -> _Writer:
        """For one that is."""
        return _Writer(job, self.echo)

    def _choice(self, job: Job, index: int, reply: Reply) -> dict[str, Any]:
        prompt = job.prompt_text(index) if self.echo else ""
        choice = {
            "index": index,
            "text": prompt + reply.text,
            "finish_reason": finish_word(reply),
            "logprobs": None,
            **extras(reply),
        }
        if reply.generation.logprobs is not None:
            choice["logprobs"] = report.completion_logprobs(reply.logprobs, job.tokenizer, 0)
        if reply.show_rounds:
            choice["rounds"] = reply.rounds
        return choice


class _Writer:
    idle = COMMENT

    def __init__(self, job: Job, echo: bool) -> None:
        self._job = job
        self._echo = echo
        self._head = _head(job)
        self._num_chars = [0] * len(job.requests)

    def begin(self) -> Iterator[bytes]:
        if self._echo:
            for index in range(len(self._job.requests)):
                yield self._chunk(index, self._job.prompt_text(index))

    def progress(self, index: int, progress: PrefillProgress) -> Iterator[bytes]:
        done = {"processed": progress.done, "total": progress.total}
        yield event({**self._head, "choices": [], "prompt_progress": {"index": index, **done}})

    def write(self, index: int, written: Written) -> Iterator[bytes]:
        more: dict[str, Any] = {}
        if written.logprobs is not None and written.tokens:
            start = self._num_chars[index]
            more["logprobs"] = report.completion_logprobs(written.logprobs, self._job.tokenizer, start)
            self._num_chars[index] += sum(len(token) for token in more["logprobs"]["tokens"])
        if written.round is not None:
            more["round"] = written.round
        text = "".join(delta.text for delta in written.deltas if isinstance(delta, TextDelta))
        if text or more:
            yield self._chunk(index, text, **more)

    def finish(self, index: int, reply: Reply) -> Iterator[bytes]:
        chunk = self._choice(index, "", finish_reason=finish_word(reply), **extras(reply))
        yield event({**self._head, "choices": [chunk], "timings": report.timings(reply)})

    def end(self, replies: Sequence[Reply]) -> Iterator[bytes]:
        if self._job.ask.include_usage:
            usage = report.usage(replies, self._job.ask.num_choices)
            yield event({**self._head, "choices": [], "usage": usage, "metrics": report.metrics(replies)})
        yield event(DONE)

    def fail(self, refusal: Refusal) -> Iterator[bytes]:
        yield event(refusal.openai())

    def _choice(self, index: int, text: str, **more: Any) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None, **more}

    def _chunk(self, index: int, text: str, **more: Any) -> bytes:
        return event({**self._head, "choices": [self._choice(index, text, **more)]})


def _head(job: Job) -> dict[str, Any]:
    return {
        "id": f"cmpl-{job.id}",
        "object": "text_completion",
        "created": job.created,
        "model": job.model,
        "system_fingerprint": FINGERPRINT,
    }


def _grammar(body: CompletionBody) -> Grammar | None:
    given = [name for name in ("regex", "grammar", "json_schema") if getattr(body, name) is not None]
    if len(given) > 1:
        raise SettingError("one grammar at a time", got=", ".join(given))
    if body.regex is not None:
        return Grammar.regex(body.regex)
    if body.grammar is not None:
        return Grammar.lark(body.grammar)
    return None if body.json_schema is None else Grammar.json_schema(body.json_schema)
