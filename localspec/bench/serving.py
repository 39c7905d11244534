"""Many requests at once: time to the first token and throughput, speculative against plain batching.

A closed loop: so many requests are kept in flight, each answered one makes room for the next, until all are answered.
Both ways run in the same batch and take turns, so that neither has the quieter machine. The prompts of a turn begin
with a token of their own each, so that nothing is found in the cache.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from localspec.bench.prompts import Prompt
from localspec.pair import Pair
from localspec.sampling import SamplingParams
from localspec.server.batch import Batch, BatchSettings, Request
from localspec.server.speculation import OFF, Speculation
from localspec.server.ticket import Event, Failed, Finished

PLAIN, SPECULATIVE = OFF, "auto"
_WAITS = "first token ms, p50 / p95 (plain)"


@dataclass(slots=True)
class Run:
    """One closed loop. tokens_per_second: of all answers, from the first submission to the last end.
    first_token_ms: of each request.  accepted_length: tokens per round and request."""

    at_once: int
    how: str
    num_tokens: int
    seconds: float
    first_token_ms: list[float]
    accepted_length: float

    @property
    def tokens_per_second(self) -> float:
        """Throughput."""
        return self.num_tokens / self.seconds


@dataclass(slots=True)
class Report:
    """All runs, in the order in which they ran."""

    target: str
    draft: str
    max_tokens: int
    temperature: float
    one_pass: bool
    runs: list[Run] = field(default_factory=list)

    def ratio(self, at_once: int) -> float:
        """Throughput against plain batching: the median over the turns, each against the plain run beside it."""
        plain = [run for run in self.runs if (run.at_once, run.how) == (at_once, PLAIN)]
        fast = [run for run in self.runs if (run.at_once, run.how) == (at_once, SPECULATIVE)]
        return median(a.tokens_per_second / b.tokens_per_second for a, b in zip(fast, plain, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        at_once = dict.fromkeys(run.at_once for run in self.runs)
        return {**asdict(self), "against_plain": {str(many): round(self.ratio(many), 4) for many in at_once}}


def measure(
    pair: Pair,
    prompts: Sequence[Prompt],
    at_once: Sequence[int],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    turns: int = 3,
    per_run: int = 12,
    on_run: Callable[[Run], None] = lambda run: None,
) -> Report:
    """Run every load `turns` times both ways, after a turn that is not counted. per_run: requests of a run, at least
    two for each place. The pair must have been opened for `max(at_once)` sequences."""
    info = pair.target.info
    report = Report(
        f"{info.name} {info.quantization} on {info.backend}, {info.device}",
        "none" if pair.draft is None else pair.draft.info.name,
        max_tokens,
        temperature,
        pair.target.capabilities.batches,
    )
    encoded = [prompt.encode(pair.target.tokenizer) for prompt in prompts]
    number = 0
    with Batch(pair, BatchSettings(parallel=max(at_once), cache_bytes=0)) as batch:
        for many in at_once:
            for turn in range(turns + 1):
                for how in (PLAIN, SPECULATIVE) if turn % 2 else (SPECULATIVE, PLAIN):
                    requests = []
                    for index in range(max(2 * many, per_run)):
                        number += 1
                        own = number % pair.target.tokenizer.num_tokens
                        tokens = [own, *encoded[index % len(encoded)].tolist()]
                        params = SamplingParams(temperature=temperature, seed=index, max_tokens=max_tokens)
                        requests.append(Request(tokens=tokens, params=params, speculation=Speculation.parse(how)))
                    run = _run(batch, requests, many, how)
                    if turn:
                        report.runs.append(run)
                        on_run(run)
    report.runs.sort(key=lambda run: at_once.index(run.at_once))
    return report


def _run(batch: Batch, requests: Sequence[Request], many: int, how: str) -> Run:
    """Keep `many` in flight until all are answered. Raises what a request failed with."""
    ended: queue.SimpleQueue[Finished | Failed] = queue.SimpleQueue()

    def on_event(event: Event) -> None:
        if isinstance(event, Finished | Failed):
            ended.put(event)

    started = perf_counter()
    waiting = list(reversed(requests))
    for _ in range(min(many, len(waiting))):
        batch.submit(waiting.pop(), on_event)
    first, num_tokens, num_rounds = [], 0, 0
    for _ in requests:
        event = ended.get()
        if isinstance(event, Failed):
            raise event.error
        if waiting:
            batch.submit(waiting.pop(), on_event)
        if event.timings.first_token_ms is not None:
            first.append(event.timings.first_token_ms)
        num_tokens += len(event.generation.tokens)
        num_rounds += event.generation.stats.num_rounds
    return Run(many, how, num_tokens, perf_counter() - started, first, num_tokens / max(num_rounds, 1))


def table(report: Report) -> str:
    """For people."""
    how = "in one pass" if report.one_pass else "one after another"
    lines = [
        f"target {report.target}; draft model {report.draft}; requests of a round run {how}",
        f"answers of up to {report.max_tokens} tokens, temperature {report.temperature:g}; medians over the runs",
        "",
        f"{'at once':>7}  {'plain tok/s':>11}  {'speculative':>11}  {'ratio':>6}  {_WAITS:>34}  per round",
    ]
    for many in dict.fromkeys(run.at_once for run in report.runs):
        plain = [run for run in report.runs if (run.at_once, run.how) == (many, PLAIN)]
        fast = [run for run in report.runs if (run.at_once, run.how) == (many, SPECULATIVE)]
        lines.append(
            f"{many:7d}  {median(run.tokens_per_second for run in plain):11.1f}  "
            f"{median(run.tokens_per_second for run in fast):11.1f}  {report.ratio(many):5.2f}x  "
            f"{f'{_waits(fast)} ({_waits(plain)})':>34}  {median(run.accepted_length for run in fast):9.2f}"
        )
    return "\n".join(lines)


def _waits(runs: Sequence[Run]) -> str:
    first = [ms for run in runs for ms in run.first_token_ms]
    return f"{np.percentile(first, 50):.0f} / {np.percentile(first, 95):.0f}" if first else "-"
