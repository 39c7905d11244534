"""Accepted length of chains and trees at equal node budgets, for each way of guessing and accepting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from localspec.bench.prompts import Prompt
from localspec.drafters import DraftModel
from localspec.errors import UsageError
from localspec.loading import Pair
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
) -> Report:
    """Decode every prompt with every method and budget; same seed for all. Raises UsageError without a draft model.

    on_prompt: called with the report so far after each prompt.
    """
    if pair.draft is None:
        raise UsageError("trees are grown by a draft model", fix="Name one with --draft.")
    info = pair.target.info
    report = Report(
        f"{info.name} {info.quantization} on {info.backend}, {info.device}",
        f"{pair.draft.info.name} {pair.draft.info.quantization}",
        max_tokens,
        tuple(budgets),
    )
    with pair.session("nothing") as session:
        for number, prompt in enumerate(prompts):
            tokens = prompt.encode(pair.target.tokenizer).tolist()
            for temperature in temperatures:
                params = SamplingParams(temperature=temperature, seed=1000 + number, max_tokens=max_tokens)
                for method in METHODS if temperature else GREEDY_METHODS:
                    row = report.row(method.label, temperature, prompt.domain)
                    row.num_prompts += 1
                    for budget in budgets:
                        drafter = DraftModel(pair.draft, num=budget, shape=method.shape, guess=method.guess)
                        try:
                            session.use(drafter, make_acceptance(method.acceptance))
                            stats = session.generate(tokens, params).stats
                        finally:
                            drafter.close()
                        row.num_tokens[budget] = row.num_tokens.get(budget, 0) + stats.num_tokens
                        row.num_rounds[budget] = row.num_rounds.get(budget, 0) + stats.num_rounds
            on_prompt(report)
    return report


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
    return "\n".join(lines)


def _totals(report: Report) -> list[Row]:
    totals: dict[tuple[str, float], Row] = {}
    for row in report.rows:
        total = totals.setdefault((row.method, row.temperature), Row(row.method, row.temperature, "all"))
        total.num_prompts += row.num_prompts
        for budget in report.budgets:
            total.num_tokens[budget] = total.num_tokens.get(budget, 0) + row.num_tokens.get(budget, 0)
            total.num_rounds[budget] = total.num_rounds.get(budget, 0) + row.num_rounds.get(budget, 0)
    return list(totals.values())
