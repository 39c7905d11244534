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
from localspec.drafters.shape import MOST_CHILDREN
from localspec.engine.round import Lane, Room, run_round
from localspec.host_scores import HostScores
from localspec.protocols import (
    Capabilities,
    DraftRequest,
    HostTokens,
    ModelInfo,
    Outcome,
    Proposal,
    Rewind,
    SavedDraft,
    Scores,
    SequenceState,
    Step,
    WidthClass,
)
from localspec.sampling import Sampler, SamplingParams
from localspec.testing.reference import ByteTokenizer
from localspec.tree.grow import Grower
from localspec.tree.mask import depths
from localspec.types import Logits, NodeIndices
from localspec.verify import make_acceptance

_LEVELS = 8  # of the trees
_USUAL = 3  # nodes accepted in a usual round: an accepted length of 4 (docs/trees.md)

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


class TableScores(HostScores):
    """Rows of a table without copying them: that would be most of what is measured."""

    def __init__(self, table: Logits, places: NodeIndices) -> None:
        super().__init__(table, num_rows=len(places))
        self._places = places

    def rows(self, indices: Sequence[int]) -> Logits:
        """[len(indices), V]; a view where one row is asked."""
        return super().rows([int(self._places[index]) for index in indices])


class TableModel:
    """A `LanguageModel` whose pass takes next to no time: the row of a node is that of its depth in a table."""

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
        """The rows of the table, by depth."""
        scores: list[Scores] = []
        for step in steps:
            assert isinstance(step.state, TableState)
            step.state.num_pending += step.num_tokens
            places = depths(step.parents)
            scores.append(TableScores(self._rows, places if step.rows is None else places[list(step.rows)]))
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

    def wait(self) -> None:
        """Passes take no time."""

    def fork(self) -> TableState:
        """A copy."""
        return self.save().open()

    def save(self) -> TableSaved:
        """A copy."""
        return TableSaved(self.length)

    def close(self) -> None:
        """Nothing to give back."""


@dataclass(frozen=True, slots=True)
class TableSaved:
    """A number of tokens."""

    length: int
    num_bytes: int = 0

    def open(self) -> TableState:
        """A state that has counted so far."""
        state = TableState()
        state.length = self.length
        return state


class Foresight:
    """A drafter whose first `right` guesses are right; with all of them right every node is visited."""

    name = "foresight"
    needs_trees = False

    def __init__(self, rows: Logits, num: int, right: int) -> None:
        self._rows, self._num, self._right = rows, num, right

    def attach(self, state: SequenceState) -> None:
        """The target's states are not read."""

    def begin(self, context: Context) -> None:
        """Nothing to prepare."""

    def propose(self, request: DraftRequest) -> Proposal:
        """What the sampler will choose. This drafter's time is not the core's and is not counted."""
        context, mark, tokens = request.context, len(request.context), []
        for row in self._rows[: self._num]:
            tokens.append(request.sampler.choose(row, context))
            context.append(tokens[-1])
        context.truncate(mark)
        vocabulary = self._rows.shape[1]
        tokens[self._right :] = [(token + 1) % vocabulary for token in tokens[self._right :]]
        return Proposal(
            self.name, (HostTokens(np.array(tokens, np.int32)),), np.arange(-1, self._num - 1, dtype=np.int32)
        )

    def observe(self, outcome: Outcome) -> None:
        """Nothing to learn."""

    def save(self) -> tuple[SavedDraft, ...]:
        """No model has read anything."""
        return ()

    def restore(self, saved: Sequence[SavedDraft]) -> None:
        """Nothing of it is needed."""

    def close(self) -> None:
        """Nothing to give back."""


class Gardener(Foresight):
    """A drafter that grows a tree of `num` nodes best-first from scores made up beforehand, and has the
    right path in it for `right` levels."""

    name = "gardener"
    needs_trees = True

    def __init__(self, rows: Logits, num: int, right: int) -> None:
        super().__init__(rows, num, right)
        self.grow_ms: list[float] = []
        rng = np.random.default_rng(1)
        chances = np.sort(rng.dirichlet([0.3] * MOST_CHILDREN, 256), axis=1)[:, ::-1]
        self._scores = np.log(np.minimum(chances, 0.9)).tolist()
        self._others = rng.integers(0, rows.shape[1], (256, MOST_CHILDREN)).tolist()

    def propose(self, request: DraftRequest) -> Proposal:
        """What the sampler will choose, among siblings that it will not. Growing is timed apart."""
        path = super().propose(request).tree().token.tolist()[:_LEVELS]
        started = perf_counter()
        grower = Grower(self._num, (MOST_CHILDREN,) * _LEVELS)
        nodes, right, count = [-1], -1, 0
        while nodes:
            following = -2
            for node in nodes:
                tokens, scores = self._others[count % 256], self._scores[count % 256]
                count += 1
                if node == right:
                    tokens, scores = [path[len(grower.path(node))], *tokens[1:]], [-0.01, *scores[1:]]
                    following = len(grower)
                grower.offer(node, tokens, scores)
            right, nodes = following, grower.frontier()
        tree = grower.finish().tree
        self.grow_ms.append((perf_counter() - started) * 1e3)
        return Proposal(self.name, (HostTokens(tree.token),), tree.parent)


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and 90th percentile of the core's milliseconds per round in which `accepted` nodes were."""

    settings: str
    median_ms: float
    p90_ms: float
    vocabulary: int
    nodes: int
    accepted: int


def measure(vocabulary: int, nodes: int, rounds: int, *, trees: bool = False) -> list[Timing]:
    """Time rounds of `nodes` nodes with rows shaped like a language model's: chains, or trees of up to eight
    levels, the growing counted. Each setting twice: the usual few nodes accepted, and a whole path."""
    rng = np.random.default_rng(0)
    rows = (3.0 * rng.standard_normal((nodes + 1, vocabulary))).astype(np.float32)
    whole = min(nodes, _LEVELS) if trees else nodes
    return [
        _timed(rows, params, name, nodes, right, rounds, trees)
        for name, params in SETTINGS.items()
        for right in sorted({min(_USUAL, whole), whole})
    ]


def _timed(rows: Logits, params: SamplingParams, name: str, nodes: int, right: int, rounds: int, trees: bool) -> Timing:
    rng = np.random.default_rng(0)
    vocabulary = rows.shape[1]
    model = TableModel(rows)
    context = Context(rng.integers(0, vocabulary, 1000).tolist())
    context.start_output()
    drafter = (Gardener if trees else Foresight)(rows, nodes, right)
    lane = Lane(model.open(), context, drafter, Sampler(params, 1), make_acceptance("walk"), frozenset())
    times = []
    for _ in range(rounds + 5):
        started = perf_counter()
        [result] = run_round(model, [lane], [Room(nodes, nodes)])
        times.append((perf_counter() - started) * 1e3 - result.record.draft_ms)
        if isinstance(drafter, Gardener):
            times[-1] += drafter.grow_ms[-1]
        assert result.record.num_accepted == right
        context.truncate(1000)
    times = sorted(times[5:])
    return Timing(name, median(times), times[int(0.9 * len(times))], vocabulary, nodes, right)


def table(timings: Sequence[Timing]) -> str:
    """Markdown."""
    first = timings[0]
    lines = [
        f"core time per round outside model calls; vocabulary {first.vocabulary}, {first.nodes} nodes",
        "not counted: detokenising, stop strings and the drafters' own work",
        "",
        "| sampling | nodes accepted | median ms | 90th percentile ms |",
        "|---|---|---|---|",
    ]
    return "\n".join(lines + [f"| {t.settings} | {t.accepted} | {t.median_ms:.2f} | {t.p90_ms:.2f} |" for t in timings])
