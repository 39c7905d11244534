"""A long trial of a batch: many requests of all kinds, some cancelled, each text compared with the same request alone.

What is watched besides: sequences that stay open, copies beyond their budget, and the memory of the process.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from localspec.engine.answer import Generation
from localspec.errors import BackendError
from localspec.loading import Pair
from localspec.sampling import SamplingParams
from localspec.server.batch import Batch, BatchSettings, Request
from localspec.server.speculation import Speculation
from localspec.server.ticket import Event, Failed, Finished, Pieces, Ticket
from localspec.types import TokenIds

_CANCELLED = 0.1
_STARTS = 4  # beginnings that requests share
_TEMPERATURES = (0.0, 0.0, 0.7, 1.0)
_WAYS = ("auto", "auto", "auto", "ngram", "off")


@dataclass(slots=True)
class Report:
    """memory_mib: of the process, after each tenth of the trial.  differing: requests whose text was not that of the
    same request alone (a cancelled one's: not its beginning).  failed: what requests failed with."""

    num_requests: int
    at_once: int
    num_finished: int = 0
    num_cancelled: int = 0
    num_compared: int = 0
    num_cached: int = 0
    seconds: float = 0.0
    differing: list[int] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    kept_bytes: list[int] = field(default_factory=list)
    left_open: int = 0

    @property
    def is_clean(self) -> bool:
        """Every text right, every request answered, every sequence given back."""
        return not (self.differing or self.failed or self.left_open)


def random_requests(pair: Pair, count: int, longest: int, seed: int = 0) -> list[Request]:
    """Mixed lengths, seeds, settings and kinds of speculation; one in two goes on from a beginning that others have."""
    rng = np.random.default_rng(seed)
    size = pair.target.tokenizer.num_tokens
    most = max(8, min(longest, pair.target.info.context_length // 2))
    starts: list[TokenIds] = [rng.integers(0, size, most // 2, dtype=np.int32) for _ in range(_STARTS)]
    requests = []
    for number in range(count):
        own = rng.integers(0, size, int(rng.integers(1, most // 2)), dtype=np.int32)
        shared = starts[int(rng.integers(0, _STARTS))][: int(rng.integers(2, most // 2))]
        tokens = np.concatenate([shared, own]) if rng.random() < 0.5 else own
        temperature = float(rng.choice(_TEMPERATURES))
        params = SamplingParams(
            temperature=temperature,
            seed=number,
            max_tokens=int(rng.integers(1, most // 2)),
            top_p=0.9 if rng.random() < 0.2 else 1.0,
            repetition_penalty=1.1 if rng.random() < 0.1 else 1.0,
            ignore_eos=bool(rng.random() < 0.5),
        )
        way = Speculation.parse(str(rng.choice(_WAYS)))
        requests.append(Request(tokens=tokens.tolist(), params=params, speculation=way))
    return requests


def run(
    pair: Pair,
    requests: Sequence[Request],
    *,
    at_once: int = 16,
    cache_bytes: int = 64 << 20,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Answer all, `at_once` at a time and one in ten cancelled in the middle; then each again alone, plainly. The pair
    must have been opened for `at_once` sequences."""
    report = Report(len(requests), at_once)
    started = monotonic()
    before = _num_open(pair)
    ended: dict[int, Generation] = {}
    gate = threading.Semaphore(at_once + at_once // 2)  # some always wait
    cuts = random.Random(1)
    with Batch(pair, BatchSettings(parallel=at_once, queue=len(requests), cache_bytes=cache_bytes)) as batch:
        for number, request in enumerate(requests):
            gate.acquire()
            cut = cuts.randrange(1, 12) if cuts.random() < _CANCELLED else None
            _Watch(number, cut, ended, report, gate).submit(batch, request)
            if number % max(1, len(requests) // 10) == 0:
                report.memory_mib.append(_memory_mib())
                report.kept_bytes.append(batch.status().kept_bytes)
            on_progress(number, 2 * len(requests))
        for _ in range(at_once + at_once // 2):
            gate.acquire()
        report.num_cached = batch.status().num_cached_tokens
        report.memory_mib.append(_memory_mib())
    report.left_open = _num_open(pair) - before
    report.seconds = monotonic() - started
    with pair.session("nothing") as alone:
        for number, generation in sorted(ended.items()):
            alone.reset()
            whole = alone.generate(requests[number].tokens, requests[number].params)
            report.num_compared += 1
            is_cut = generation.finish_reason == "cancelled"
            report.num_cancelled += is_cut
            report.num_finished += not is_cut
            want = whole.tokens[: len(generation.tokens)] if is_cut else whole.tokens
            if generation.tokens != want or not (is_cut or generation.text == whole.text):
                report.differing.append(number)
            on_progress(len(requests) + number, 2 * len(requests))
    return report


class _Watch:
    """Follows one request, and cancels it after `cut` tokens."""

    def __init__(
        self, number: int, cut: int | None, ended: dict[int, Generation], report: Report, gate: threading.Semaphore
    ) -> None:
        self._number, self._cut, self._ended = number, cut, ended
        self._report, self._gate = report, gate
        self._seen = 0
        self._ticket: Ticket | None = None

    def submit(self, batch: Batch, request: Request) -> None:
        """Let it in."""
        self._ticket = batch.submit(request, self._on_event)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Pieces):
            self._seen += len(event.tokens)
            if self._cut is not None and self._seen >= self._cut and self._ticket is not None:
                self._ticket.cancel()
        elif isinstance(event, Finished):
            self._ended[self._number] = event.generation
            self._gate.release()
        elif isinstance(event, Failed):
            self._report.failed.append(f"{self._number}: {event.error}")
            self._gate.release()


def _num_open(pair: Pair) -> int:
    """Sequences of the target that cannot be opened now."""
    most = pair.target.capabilities.num_sequences
    with ExitStack() as stack:
        for number in range(most):
            try:
                state = pair.target.open()
            except BackendError:
                return most - number
            stack.callback(state.close)
    return 0


def _memory_mib() -> float:
    """Of this process, as it is now; 0.0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, ValueError, IndexError):
        return 0.0


def table(report: Report) -> str:
    """For people."""
    memory = ", ".join(f"{value:.0f}" for value in report.memory_mib)
    ended = f"{report.num_finished} finished, {report.num_cancelled} cancelled, {len(report.failed)} failed"
    compared = f"{report.num_compared}, differing {len(report.differing)}"
    lines = [
        f"{report.num_requests} requests, {report.at_once} at once, in {report.seconds:.0f} s: {ended}",
        f"compared with the same request alone, decoded plainly: {compared}",
        f"prompt tokens found in the cache: {report.num_cached}; sequences left open: {report.left_open}",
        f"memory of the process along the way, MiB: {memory}",
    ]
    lines += [f"failed: {line}" for line in report.failed[:5]]
    if report.differing:
        lines.append(f"differing requests: {report.differing[:20]}")
    return "\n".join(lines)


def as_dict(report: Report) -> dict[str, Any]:
    """Ready for JSON."""
    return asdict(report)
