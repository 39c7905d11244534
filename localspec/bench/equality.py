"""Is text under speculation the text of plain decoding? Compared token for token, differences with margin."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from localspec.audit.difference import Difference, explain
from localspec.audit.rows import RowReport, measure_rows
from localspec.bench.prompts import Prompt
from localspec.drafters import Nothing
from localspec.engine.answer import Generation
from localspec.errors import SettingError
from localspec.exactness import AUTO as AUTO_EXACT
from localspec.pair import Pair
from localspec.sampling import SamplingParams


@dataclass(slots=True)
class Row:
    """Counts of one drafter at one temperature."""

    drafter: str
    temperature: float
    domain: str
    num_prompts: int = 0
    num_equal: int = 0
    num_tokens: int = 0
    num_rounds: int = 0
    num_rechecked: int = 0
    num_changed: int = 0

    def add(self, result: Generation, want: Sequence[int]) -> None:
        """Count one run; want: what plain decoding said."""
        self.num_prompts += 1
        self.num_equal += result.tokens == want
        self.num_tokens += result.stats.num_tokens
        self.num_rounds += result.stats.num_rounds
        self.num_rechecked += result.stats.num_rechecked
        self.num_changed += result.stats.num_changed


@dataclass(slots=True)
class Report:
    """All rows and every difference. evidence: how the width class was found.  runs: what was asked for.
    num_done: prompts that are in it."""

    target: str
    width_class: str
    evidence: str = ""
    runs: str = ""
    num_done: int = 0
    rows: list[Row] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def num_different(self) -> int:
        """Runs whose text was not that of plain decoding."""
        return len(self.differences)

    @property
    def all_equal(self) -> bool:
        """Something was compared, and nothing differed."""
        return bool(self.rows) and not self.differences

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "target": self.target,
            "width_class": self.width_class,
            "evidence": self.evidence,
            "runs": self.runs,
            "num_done": self.num_done,
            "rows": [asdict(row) for row in self.rows],
            "differences": [difference.as_dict() for difference in self.differences],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """What `as_dict` made."""
        differences = [Difference.from_dict(item) for item in data["differences"]]
        return cls(**{**data, "rows": [Row(**row) for row in data["rows"]], "differences": differences})


def compare(
    pair: Pair,
    prompts: Sequence[Prompt],
    drafters: Sequence[str],
    temperatures: Sequence[float],
    max_tokens: int,
    on_prompt: Callable[[Report], None] = lambda report: None,
    begun: Report | None = None,
    *,
    num_seeds: int = 1,
    acceptance: str = "walk",
    exact: str = AUTO_EXACT,
    known: RowReport | None = None,
) -> Report:
    """Run every prompt plainly and with each drafter, same seed; the seed differs per prompt.

    One session serves all, so a prompt is prefilled once. on_prompt: called with the report so far after
    each prompt: a long run that is cut off has not been for nothing.  begun: such a report, to go on from.
    num_seeds: answers per prompt at temperatures above 0.  exact: what sessions promise, plain decoding's, too.
    known: how rows differ here; None measures it at the first difference.
    Raises SettingError where `begun` is of another run.
    """
    info = pair.target.info
    exactness = pair.exactness(exact, acceptance=acceptance)
    target = f"{info.name} {info.quantization} on {info.backend}, {info.device}"
    report = Report(target, str(exactness), exactness.widths.evidence)
    draft = "no draft model" if pair.draft is None else f"{pair.draft.info.name} {pair.draft.info.quantization}"
    named = hashlib.sha256(" ".join(prompt.id for prompt in prompts).encode()).hexdigest()[:8]
    report.runs = f"{draft}; {', '.join(drafters)}; T {list(temperatures)}; {max_tokens} tokens; prompts {named}"
    if begun is not None:
        if (begun.target, begun.width_class, begun.runs) != (report.target, report.width_class, report.runs):
            got, expected = f"{begun.target}; {begun.runs}", f"{report.target}; {report.runs}"
            raise SettingError("the run to go on with was another one", got=got, expected=expected)
        report = begun
    makers = {name: pair.drafter(name, exact=exact, acceptance=acceptance) for name in drafters}
    with ExitStack() as stack:
        for drafter in makers.values():
            stack.callback(drafter.close)
        session = stack.enter_context(pair.session("nothing", acceptance=acceptance, exact=exact))
        plain = session.drafter
        for number, prompt in list(enumerate(prompts))[report.num_done :]:
            tokens = prompt.encode(pair.target.tokenizer)
            for temperature, turn in [(t, turn) for t in temperatures for turn in range(num_seeds if t else 1)]:
                seed = 1000 + number + turn * len(prompts)
                params = SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens)
                session.use(plain)
                plainly = session.generate(tokens.tolist(), params)
                want = plainly.tokens
                if exactness.bound is not None:
                    _row(report, plain.name, temperature, prompt.domain).add(plainly, want)
                for name, drafter in makers.items():
                    session.use(drafter)
                    result = session.generate(tokens.tolist(), params)
                    _row(report, name, temperature, prompt.domain).add(result, want)
                    if result.tokens != want:
                        known = known or measure_rows(pair.target, [tokens])
                        places = (prompt.id, tokens), plain, (name, drafter)
                        report.differences.append(explain(session, *places, params, want, result.tokens, known))
            report.num_done = number + 1
            on_prompt(report)
    report.rows.sort(key=lambda row: (row.drafter, row.temperature))
    return report


def _row(report: Report, drafter: str, temperature: float, domain: str) -> Row:
    """The row of these three, made at its first use."""
    for row in report.rows:
        if (row.drafter, row.temperature, row.domain) == (drafter, temperature, domain):
            return row
    report.rows.append(Row(drafter, temperature, domain))
    return report.rows[-1]


def table(report: Report) -> str:
    """Markdown."""
    guarded = " re-checks per 100 tokens (changed) |" if any(row.num_rechecked for row in report.rows) else ""
    lines = [
        f"target: {report.target}; width class: {report.width_class}",
        *([f"evidence for the width class: {report.evidence}"] if report.evidence else []),
        "",
        "| drafter | T | domain | prompts | text equals plain | tokens per round (bonus counted) |" + guarded,
        "|---|---|---|---|---|---|" + ("---|" if guarded else ""),
    ]
    for row in report.rows:
        length = row.num_tokens / row.num_rounds if row.num_rounds else 0.0
        equal = f"{row.num_equal} of {row.num_prompts}"
        cells = [row.drafter, f"{row.temperature:g}", row.domain, str(row.num_prompts), equal, f"{length:.2f}"]
        if guarded:
            rate = 100.0 * row.num_rechecked / max(row.num_tokens, 1)
            cells.append(f"{rate:.1f} ({row.num_changed} of {row.num_rechecked})")
        lines.append(f"| {' | '.join(cells)} |")
    compared = [row for row in report.rows if row.drafter != Nothing.name]
    total, equal_runs = sum(r.num_prompts for r in compared), sum(r.num_equal for r in compared)
    lines += ["", f"{equal_runs} of {total} runs equal plain decoding token for token."]
    lines += [difference.line() for difference in report.differences]
    return "\n".join(lines)
