"""The core's own time per round: sampling, acceptance and bookkeeping, without the model (which here answers
from a table at once), the drafter, detokenising and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from localspec.context import Context
from localspec.engine.round import Lane, Room, run_round
from localspec.protocols import (
    Capabilities,
    DraftRequest,
    HostTokens,
    ModelInfo,
    Outcome,
    Proposal,
    Rewind,
    Scores,
    Step,
    WidthClass,
)
from localspec.sampling import HostScores, Sampler, SamplingParams
from localspec.testing.reference import ByteTokenizer
from localspec.types import Logits
from localspec.verify import make_acceptance

SETTINGS = {
    "greedy": SamplingParams(),
    "temperature 0.8": SamplingParams(temperature=0.8),
    "temperature 0.8, top-k 40, top-p 0.95, min-p 0.05": SamplingParams(
        temperature=0.8, top_k=40, top_p=0.95, min_p=0.05
    ),
    "the same with penalties": SamplingParams(
        temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, repetition_penalty=1.1, frequency_penalty=0.2
    ),
}


class TableModel:
    """A `LanguageModel` whose pass takes no time: rows come from a table, in turn."""

    def __init__(self, rows: Logits) -> None:
        self._rows = rows
        self.vocab_size = rows.shape[1]
        self.tokenizer = ByteTokenizer(257)
        self.info = ModelInfo("table", Path("table"), "table", "F32", 0, 1 << 20, 1 << 20, "numpy", "table")
        self.capabilities = Capabilities(Rewind.FREE, True, 4096, 64, WidthClass(2), True)

    def open(self) -> TableState:
        """A state that only counts."""
        return TableState()

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        """The first rows of the table."""
        scores: list[Scores] = []
        for step in steps:
            assert isinstance(step.state, TableState)
            step.state.num_pending += step.num_tokens
            count = step.num_tokens if step.rows is None else len(step.rows)
            scores.append(HostScores(self._rows[:count]))
        return scores

    def close(self) -> None:
        """Nothing to give back."""


class TableState:
    """Counts tokens."""

    def __init__(self) -> None:
        self.length = 0
        self.num_pending = 0
        self.num_replayed = 0

    def keep(self, path: Sequence[int]) -> None:
        """Count the kept nodes."""
        self.length += len(path)
        self.num_pending = 0

    def truncate(self, length: int) -> None:
        """Count down."""
        self.length, self.num_pending = length, 0

    def fork(self) -> TableState:
        """A copy."""
        return TableState()

    def close(self) -> None:
        """Nothing to give back."""


class Foresight:
    """A drafter that always guesses right, so that every node is visited: the dearest case."""

    name = "foresight"
    needs_trees = False

    def __init__(self, rows: Logits, num: int) -> None:
        self._rows, self._num = rows, num

    def begin(self, context: Context) -> None:
        """Nothing to prepare."""

    def propose(self, request: DraftRequest) -> Proposal:
        """What the sampler will choose. This drafter's time is not the core's and is not counted."""
        context, mark, tokens = request.context, len(request.context), []
        for row in self._rows[: self._num]:
            tokens.append(request.sampler.choose(row, context))
            context.append(tokens[-1])
        context.truncate(mark)
        return Proposal(
            self.name, (HostTokens(np.array(tokens, np.int32)),), np.arange(-1, self._num - 1, dtype=np.int32)
        )

    def observe(self, outcome: Outcome) -> None:
        """Nothing to learn."""

    def close(self) -> None:
        """Nothing to give back."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and 90th percentile of the core's milliseconds per round."""

    settings: str
    median_ms: float
    p90_ms: float
    vocabulary: int
    nodes: int


def measure(vocabulary: int, nodes: int, rounds: int) -> list[Timing]:
    """Time rounds of `nodes` nodes, all accepted, with rows shaped like a language model's."""
    rng = np.random.default_rng(0)
    rows = (3.0 * rng.standard_normal((nodes + 1, vocabulary))).astype(np.float32)
    timings = []
    for name, params in SETTINGS.items():
        model = TableModel(rows)
        context = Context(rng.integers(0, vocabulary, 1000).tolist())
        context.start_output()
        lane = Lane(
            model.open(), context, Foresight(rows, nodes), Sampler(params, 1), make_acceptance("walk"), frozenset()
        )
        times = []
        for _ in range(rounds + 5):
            started = perf_counter()
            [result] = run_round(model, [lane], [Room(nodes, nodes)])
            times.append((perf_counter() - started) * 1e3 - result.record.draft_ms)
            assert result.record.num_accepted == nodes
            context.truncate(1000)
        times = sorted(times[5:])
        timings.append(Timing(name, median(times), times[int(0.9 * len(times))], vocabulary, nodes))
    return timings


def table(timings: Sequence[Timing]) -> str:
    """Markdown."""
    first = timings[0]
    lines = [
        f"core time per round outside model calls; vocabulary {first.vocabulary}, {first.nodes} nodes, all accepted",
        "not counted: detokenising, stop strings and the drafters' own work",
        "",
        "| sampling | median ms | 90th percentile ms |",
        "|---|---|---|",
    ]
    return "\n".join(lines + [f"| {t.settings} | {t.median_ms:.2f} | {t.p90_ms:.2f} |" for t in timings])
