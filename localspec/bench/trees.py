"""Accepted length of chains and trees at equal node budgets, for each way of guessing and accepting."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from localspec.bench.prompts import Prompt
from localspec.drafters import DraftModel, HeadDrafter, find_head
from localspec.engine.round import RoundResult
from localspec.errors import UsageError
from localspec.pair import Pair
from localspec.protocols import Drafter
from localspec.sampling import SamplingParams
from localspec.verify import make_acceptance


@dataclass(frozen=True, slots=True)
class Method:
    """A form of guesses, a way to choose them, and a rule to accept them."""

    shape: str
    guess: str
    acceptance: str

    @property
    def label(self) -> str:
        """For the table."""
        return f"{self.shape}, {'rejection' if self.acceptance == 'rejection' else self.guess}"


METHODS = (
    Method("chain", "greedy", "walk"),
    Method("chain", "coupled", "rejection"),
    Method("chain", "coupled", "walk"),
    Method("tree", "greedy", "walk"),
    Method("tree", "coupled", "rejection"),
    Method("tree", "coupled", "walk"),
)
NUM_BINS = 5
_ALL = "all"
GREEDY_METHODS = (METHODS[0], METHODS[3])
"""At temperature 0 there is nothing to draw and no noise: the others are the same as these."""


@dataclass(slots=True)
class Row:
    """One method at one temperature in one domain, per budget: tokens emitted and rounds."""

    method: str
    temperature: float
    domain: str
    num_prompts: int = 0
    num_tokens: dict[int, int] = field(default_factory=dict)
    num_rounds: dict[int, int] = field(default_factory=dict)
    expected: list[float] = field(default_factory=lambda: [0.0] * NUM_BINS)
    observed: list[int] = field(default_factory=lambda: [0] * NUM_BINS)
    judged: list[int] = field(default_factory=lambda: [0] * NUM_BINS)

    def judge(self, result: RoundResult) -> None:
        """Compare the estimated chance of every node whose parent was accepted with what happened."""
        verdict = result.verdict
        tree, reached = verdict.tree, {-1, *verdict.path}
        for node in range(len(tree) if tree.log_q is not None else 0):
            if int(tree.parent[node]) in reached:
                assert tree.log_q is not None
                chance = math.exp(float(tree.log_q[node]))
                place = min(int(chance * NUM_BINS), NUM_BINS - 1)
                self.expected[place] += chance
                self.observed[place] += int(tree.token[node]) == verdict.tokens[int(tree.depth[node])]
                self.judged[place] += 1

    def length(self, budget: int) -> float:
        """Accepted length, the bonus counted."""
        return self.num_tokens.get(budget, 0) / max(self.num_rounds.get(budget, 0), 1)


@dataclass(slots=True)
class Report:
    """All rows."""

    target: str
    draft: str
    max_tokens: int
    budgets: tuple[int, ...]
    rows: list[Row] = field(default_factory=list)

    def row(self, method: str, temperature: float, domain: str) -> Row:
        """The row of these three, made at its first use."""
        for row in self.rows:
            if (row.method, row.temperature, row.domain) == (method, temperature, domain):
                return row
        self.rows.append(Row(method, temperature, domain))
        return self.rows[-1]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def measure(
    pair: Pair,
    prompts: Sequence[Prompt],
    temperatures: Sequence[float],
    budgets: Sequence[int],
    max_tokens: int,
    on_prompt: Callable[[Report], None] = lambda report: None,
    *,
    name: str = DraftModel.name,
) -> Report:
    """Decode every prompt with every method and budget, always with the prompt's own seed.

    name: who guesses, the draft model or the kind of a head. A head's chain is as long as it has levels at most.
    Raises UsageError where that is not loaded.  on_prompt: called with the report so far after each prompt.
    """
    about, make = _guesser(pair, name)
    info = pair.target.info
    report = Report(
        f"{info.name} {info.quantization} on {info.backend}, {info.device}",
        about,
        max_tokens,
        tuple(budgets),
    )
    with pair.session("nothing") as session:
        for prompt in prompts:
            seed = zlib.crc32(prompt.id.encode())  # the same in whatever company a prompt is run
            tokens = prompt.encode(pair.target.tokenizer).tolist()
            for temperature in temperatures:
                params = SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens)
                for method in METHODS if temperature else GREEDY_METHODS:
                    row = report.row(method.label, temperature, prompt.domain)
                    row.num_prompts += 1
                    for budget in budgets:
                        drafter = make(method, budget)
                        try:
                            session.use(drafter, make_acceptance(method.acceptance))
                            judge = row.judge if method.acceptance == "walk" else None
                            stats = session.stream(tokens, params, on_round=judge).result.stats
                        finally:
                            drafter.close()
                        row.num_tokens[budget] = row.num_tokens.get(budget, 0) + stats.num_tokens
                        row.num_rounds[budget] = row.num_rounds.get(budget, 0) + stats.num_rounds
            on_prompt(report)
    return report


def _guesser(pair: Pair, name: str) -> tuple[str, Callable[[Method, int], Drafter]]:
    """(what guesses, what makes a drafter of it). Raises UsageError."""
    if name != DraftModel.name:
        head = find_head(name, pair.heads)
        levels = head.info.levels

        def of_head(method: Method, budget: int) -> Drafter:
            num = budget if levels is None or method.shape != "chain" else min(budget, levels)
            return HeadDrafter(head, num=num, shape=method.shape, guess=method.guess)

        return f"{head.info.name} ({head.info.kind})", of_head
    draft = pair.draft
    if draft is None:
        raise UsageError("trees are grown by a draft model", fix="Name one with --draft.")
    if pair.drafting is not None and not pair.drafting.relation.same:
        raise UsageError(
            "ways of guessing are compared with a draft model of the target's tokenizer",
            got=str(pair.drafting.relation),
            fix="Name another one; `localspec bench cross` is for this one.",
        )

    def of_model(method: Method, budget: int) -> Drafter:
        return DraftModel(draft, num=budget, shape=method.shape, guess=method.guess)

    return f"{draft.info.name} {draft.info.quantization}", of_model


def table(report: Report) -> str:
    """Markdown: domains and all of them together, budgets side by side."""
    lines = [
        f"target: {report.target}; draft: {report.draft}; {report.max_tokens} tokens at most per prompt",
        "tokens emitted per round, the bonus counted, by most nodes a round",
        "",
        "| T | domain | prompts | method | " + " | ".join(f"{budget} nodes" for budget in report.budgets) + " |",
        "|---" * (4 + len(report.budgets)) + "|",
    ]
    rows = [*report.rows, *_totals(report)]
    domains = list(dict.fromkeys(row.domain for row in rows))
    methods = [method.label for method in METHODS]
    rows.sort(key=lambda row: (row.temperature, domains.index(row.domain), methods.index(row.method)))
    for row in rows:
        lengths = " | ".join(f"{row.length(budget):.2f}" for budget in report.budgets)
        lines.append(f"| {row.temperature:g} | {row.domain} | {row.num_prompts} | {row.method} | {lengths} |")
    return "\n".join([*lines, "", *_calibration(rows)])


def _calibration(rows: Sequence[Row]) -> list[str]:
    """How far the drafter's estimates can be trusted: by estimated chance, the mean of it and what came true."""
    lines = [
        "nodes whose parent was accepted, by the drafter's estimate: mean estimate -> share accepted (number)",
        "",
        "| T | method | "
        + " | ".join(f"{i / NUM_BINS:.1f} to {(i + 1) / NUM_BINS:.1f}" for i in range(NUM_BINS))
        + " |",
        "|---" * (2 + NUM_BINS) + "|",
    ]
    for row in rows:
        if row.domain == _ALL and any(row.judged):
            cells = [
                f"{expected / judged:.2f} -> {observed / judged:.2f} ({judged})" if judged else "-"
                for expected, observed, judged in zip(row.expected, row.observed, row.judged, strict=True)
            ]
            lines.append(f"| {row.temperature:g} | {row.method} | " + " | ".join(cells) + " |")
    return lines


def _totals(report: Report) -> list[Row]:
    totals: dict[tuple[str, float], Row] = {}
    for row in report.rows:
        total = totals.setdefault((row.method, row.temperature), Row(row.method, row.temperature, _ALL))
        total.num_prompts += row.num_prompts
        for place in range(NUM_BINS):
            total.expected[place] += row.expected[place]
            total.observed[place] += row.observed[place]
            total.judged[place] += row.judged[place]
        for budget in report.budgets:
            total.num_tokens[budget] = total.num_tokens.get(budget, 0) + row.num_tokens.get(budget, 0)
            total.num_rounds[budget] = total.num_rounds.get(budget, 0) + row.num_rounds.get(budget, 0)
    return list(totals.values())
