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
from localspec.exactness import Mode
from localspec.pair import Pair
from localspec.sampling import SamplingParams
from localspec.server.batch import Batch, BatchSettings, Request
from localspec.server.speculation import Speculation
from localspec.server.ticket import Event, Failed, Finished, Pieces, Ticket
from localspec.types import TokenIds

_CANCELLED = 0.1
_STARTS = 4  # beginnings that requests share
_TEMPERATURES = (0.0, 0.0, 0.7, 1.0)
_SAMPLES = 10
_WAYS = ("auto", "auto", "auto", "ngram", "off")

Text = tuple[tuple[int, ...], str]
"""Tokens and text of an answer."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The trial at a moment: requests ended so far, memory of the process, bytes of copies in the prefix cache."""

    seconds: float
    num_ended: int
    memory_mib: float
    kept_bytes: int


@dataclass(slots=True)
class Report:
    """num_requests: different ones.  samples: at every tenth of the trial and at its end.  differing: requests whose
    text was not that of the same request alone (a cancelled one's: not its beginning).  failed: what requests failed
    with.  interrupted: it was ended before its time; the figures are those of what was done."""

    num_requests: int
    at_once: int
    num_finished: int = 0
    num_cancelled: int = 0
    num_cached: int = 0
    seconds: float = 0.0
    differing: list[int] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    left_open: int = 0
    interrupted: bool = False

    @property
    def num_compared(self) -> int:
        """Texts, and beginnings of texts, that were compared."""
        return self.num_finished + self.num_cancelled

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
    seconds: float = 0.0,
    cache_bytes: int = 64 << 20,
    on_progress: Callable[[Report, int], None] = lambda report, alone: None,
) -> Report:
    """Answer each request alone, plainly; then all of them `at_once` at a time, one in ten cancelled in the middle, and
    that again until so many seconds are over. The pair must have been opened for `at_once` sequences.

    on_progress: told, at every tenth of either part, what is known and how many were answered alone. Ctrl-C ends the
    trial with what there is.
    """
    report = Report(len(requests), at_once)
    before = _num_open(pair)
    started = monotonic()
    try:
        texts = _alone(pair, requests, lambda count: on_progress(report, count))
        started = monotonic()
        with Batch(pair, BatchSettings(parallel=at_once, queue=2 * at_once, cache_bytes=cache_bytes)) as batch:
            _together(batch, list(zip(requests, texts, strict=True)), report, seconds, on_progress)
    except KeyboardInterrupt:
        report.interrupted = True
    report.left_open = _num_open(pair) - before
    report.seconds = monotonic() - started
    return report


def _alone(pair: Pair, requests: Sequence[Request], on_tenth: Callable[[int], None]) -> list[Text]:
    texts: list[Text] = []
    with pair.session("nothing", exact=Mode.CLASS.value) as session:
        for number, request in enumerate(requests):
            session.reset()
            answer = session.generate(request.tokens, request.params)
            texts.append((answer.tokens, answer.text))
            if (number + 1) % max(1, len(requests) // _SAMPLES) == 0:
                on_tenth(number + 1)
    return texts


def _together(
    batch: Batch,
    asked: Sequence[tuple[Request, Text]],
    report: Report,
    seconds: float,
    on_progress: Callable[[Report, int], None],
) -> None:
    started = monotonic()
    most = report.at_once + report.at_once // 2  # some always wait
    gate, cuts = threading.Semaphore(most), random.Random(1)

    def sample() -> None:
        status = batch.status()
        ended = report.num_compared + len(report.failed)
        report.num_cached, report.seconds = status.num_cached_tokens, monotonic() - started
        report.samples.append(Sample(round(report.seconds, 1), ended, _memory_mib(), status.kept_bytes))
        on_progress(report, len(asked))

    number, passed = 0, 0.0
    while number < len(asked) or passed < seconds:
        gate.acquire()
        cut = cuts.randrange(1, 12) if cuts.random() < _CANCELLED else None
        request, text = asked[number % len(asked)]
        _Watch(number % len(asked), text, cut, report, gate).submit(batch, request)
        number, passed = number + 1, monotonic() - started
        if min(number / len(asked), passed / seconds if seconds else 1.0) * _SAMPLES >= len(report.samples) + 1:
            sample()
    for _ in range(most):
        gate.acquire()
    sample()


class _Watch:
    """Follows one request, cancels it after `cut` tokens, and compares what came with the text that it should have."""

    def __init__(self, number: int, text: Text, cut: int | None, report: Report, gate: threading.Semaphore) -> None:
        self._number, self._text, self._cut = number, text, cut
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
            self._compare(event.generation)
            self._gate.release()
        elif isinstance(event, Failed):
            self._report.failed.append(f"{self._number}: {event.error}")
            self._gate.release()

    def _compare(self, found: Generation) -> None:
        is_cut = found.finish_reason == "cancelled"
        self._report.num_cancelled += is_cut
        self._report.num_finished += not is_cut
        tokens, text = self._text
        want = tokens[: len(found.tokens)] if is_cut else tokens
        if found.tokens != want or not (is_cut or found.text == text):
            self._report.differing.append(self._number)


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


def progress_line(report: Report, alone: int) -> str:
    """Where the trial is."""
    if not report.samples:
        return f"alone: {alone} of {report.num_requests}"
    last = report.samples[-1]
    wrong = f"differing {len(report.differing)}, failed {len(report.failed)}"
    return f"together: {last.num_ended} in {last.seconds:.0f} s, {last.memory_mib:.0f} MiB; {wrong}"


def table(report: Report) -> str:
    """For people."""
    memory = ", ".join(f"{sample.memory_mib:.0f}" for sample in report.samples)
    copies = ", ".join(f"{sample.kept_bytes / 2**20:.0f}" for sample in report.samples)
    early = "; interrupted" if report.interrupted else ""
    ended = f"{report.num_finished} finished, {report.num_cancelled} cancelled, {len(report.failed)} failed"
    compared = f"{report.num_compared}, differing {len(report.differing)}"
    lines = [
        f"{report.num_requests} requests, {report.at_once} at once, in {report.seconds:.0f} s: {ended}{early}",
        f"compared with the same request alone, decoded plainly: {compared}",
        f"prompt tokens found in the cache: {report.num_cached}; sequences left open: {report.left_open}",
        f"memory of the process along the way, MiB: {memory}; of it copies: {copies}",
    ]
    lines += [f"failed: {line}" for line in report.failed[:5]]
    if report.differing:
        lines.append(f"differing requests: {report.differing[:20]}")
    return "\n".join(lines)


def as_dict(report: Report) -> dict[str, Any]:
    """Ready for JSON."""
    return asdict(report)
