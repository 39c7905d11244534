"""What `/metrics` says, in Prometheus's format: the batch's own counts, and what only the HTTP side sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from localspec.server.batch import Batch
from localspec.server.ticket import Timings

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

_GAUGES = {
    "num_active": ("requests_running", "Requests that are being answered."),
    "num_waiting": ("requests_waiting", "Requests in the queue."),
    "num_slots": ("slots", "Requests that can be answered at a time."),
    "num_kept": ("prefix_cache_entries", "Copies of prompts and answers kept for later requests."),
    "kept_bytes": ("prefix_cache_bytes", "Bytes of these."),
    "kept_draft_bytes": ("prefix_cache_draft_bytes", "Of these, bytes of what draft models have read."),
    "tokens_per_second": ("tokens_per_second", "Tokens written a second by all requests together, of late."),
}
_COUNTERS = {
    "num_prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "num_cached_tokens": ("cached_tokens", "Of these, tokens that were not computed again."),
    "num_generated": ("generation_tokens", "Tokens written."),
    "num_rounds": ("spec_decode_num_drafts", "Rounds: proposals verified."),
    "num_drafted": ("spec_decode_num_draft_tokens", "Tokens guessed."),
    "num_accepted": ("spec_decode_num_accepted_tokens", "Of these, tokens accepted."),
}


class Meters:
    """Counts of one server."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "localspec_http_requests", "Requests by path and status.", ["path", "status"], registry=self._registry
        )
        self._first = Histogram(
            "localspec_time_to_first_token_seconds",
            "From submission to the first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._total = Histogram(
            "localspec_request_seconds", "From submission to the end.", buckets=_SECONDS, registry=self._registry
        )
        self._registry.register(self)

    def responded(self, path: str, status: int) -> None:
        """A request was answered, or refused."""
        self._requests.labels(path, str(status)).inc()

    def finished(self, timings: Timings) -> None:
        """An answer ended."""
        self._total.observe(timings.total_ms / 1e3)
        if timings.first_token_ms is not None:
            self._first.observe(timings.first_token_ms / 1e3)

    def text(self) -> bytes:
        """Everything, ready to be scraped."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The batch's counts as they are now (prometheus_client's protocol)."""
        status = asdict(self._batch.status())
        for name, (label, words) in _GAUGES.items():
            yield GaugeMetricFamily(f"localspec_{label}", words, value=status[name])
        for name, (label, words) in _COUNTERS.items():
            yield CounterMetricFamily(f"localspec_{label}", words, value=status[name])
        ended = CounterMetricFamily("localspec_answers", "Answers by how they ended.", labels=["finish_reason"])
        for reason, count in status["ended"].items():
            ended.add_metric([reason], count)
        yield ended
        by_place = CounterMetricFamily(
            "localspec_spec_decode_num_accepted_tokens_per_pos",
            "Rounds in which the guess at this depth was accepted.",
            labels=["position"],
        )
        for position, count in enumerate(status["accepted_by_depth"]):
            by_place.add_metric([str(position)], count)
        yield by_place
