"""A speed benchmark for readers: Markdown with its conditions, and the folder of everything it leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localspec.bench.contenders import PLAIN, PLAIN_ONE, Kind
from localspec.bench.intervals import Interval
from localspec.bench.runs import Run
from localspec.bench.summary import Row, Summary

REPORT_JSON, REPORT_MARKDOWN, RUNS = "report.json", "report.md", "runs.jsonl"

_COLUMNS = (
    "workload",
    "configuration",
    "tokens/s",
    "against plain (95%)",
    "tokens per round, bonus counted",
    "guesses accepted",
    "same text as plain",
    "draft / verify / host, ms per token",
)


def markdown(summary: Summary, pictures: Sequence[str] = ()) -> str:
    """Conditions, a table per temperature, the grid's best, and what the numbers mean.

    pictures: file names to show.
    """
    parts = [] if summary.complete else ["**Interrupted: figures of the runs made so far.**"]
    parts += [conditions_text(summary.conditions)]
    for temperature in summary.temperatures:
        rows = [row for row in summary.rows if row.temperature == temperature]
        parts.append(f"Temperature {temperature:g}:\n\n" + _table(rows))
        oracles = [oracle for oracle in summary.oracles if oracle.temperature == temperature]
        if oracles:
            parts.append("Best static configuration of the grid:\n\n" + _grid_table(summary, temperature))
    parts += [f"![{Path(name).stem}]({name})" for name in pictures]
    return "\n\n".join([*parts, _legend(summary)])


def conditions_text(conditions: Mapping[str, Any]) -> str:
    """A paragraph: models, machine, versions, settings."""
    runtime = ", ".join(
        part if name in part else f"{name} {part}" for name, part in conditions["runtime"].items() if part
    )
    draft = f"; draft {_model_text(conditions['draft'])}" if conditions["draft"] else ""
    prompts = ", ".join(f"{work['name']} {len(work['prompts'])}" for work in conditions["workloads"])
    length = "exactly" if conditions["ignore_eos"] else "at most"
    repeats = f"{conditions['repeats']} repeat{'s' if conditions['repeats'] > 1 else ''}"
    started = conditions["started"]
    load = conditions["load_average"]
    rounds = conditions.get("experience", 0)
    learned = f"; drafter auto knew the pair from {rounds:,} rounds of earlier runs" if rounds else ""
    before = "" if load is None else f", load average {load} before"
    models = f"Target {_model_text(conditions['target'])}{draft}."
    where = (
        f"{conditions['target']['device']} on {conditions['processor']}; {runtime}; localspec "
        f"{conditions['localspec']}, Python {conditions['python']}; width class {conditions['width_class']}."
    )
    what = (
        f"Prompts: {prompts}; {length} {conditions['max_tokens']} tokens each, {repeats}, alternating order after a "
        f"warm-up; started {started}{before}{learned}."
    )
    return "\n".join([models, where, what, *(f"Note: {note}." for note in conditions["notes"])])


def write_report(folder: Path, summary: Summary, runs: Sequence[Run], pictures: Sequence[str]) -> None:
    """report.json (figures and all runs) and report.md."""
    data = summary.as_dict() | {"runs": [run.as_dict() for run in runs]}
    (folder / REPORT_JSON).write_text(json.dumps(data, indent=1), encoding="utf-8")
    (folder / REPORT_MARKDOWN).write_text(f"# Speed\n\n{markdown(summary, pictures)}\n", encoding="utf-8")


def _model_text(model: Mapping[str, Any]) -> str:
    return f"{model['name']} {model['quantization']} ({model['num_parameters'] / 1e6:,.0f}M parameters)"


def _table(rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    return "\n".join(lines + [_line(row) for row in rows]) + _rechecked(rows)


def _rechecked(rows: Sequence[Row]) -> str:
    """Guarded decoding's re-checks, where there were any."""
    shares = [
        f"{row.workload}, {row.contender} {100.0 * row.num_rechecked / row.num_tokens:.1f}"
        for row in rows
        if row.num_rechecked
    ]
    return f"\n\nRe-checked choices per 100 tokens: {'; '.join(shares)}." if shares else ""


def _line(row: Row) -> str:
    is_base = row.contender == row.against
    cells = [
        row.workload,
        row.contender,
        f"{row.tokens_per_second.value:.1f}",
        "1" if is_base else _times(row.speedup),
        "-" if row.accepted_length is None else f"{row.accepted_length:.2f}",
        "-" if row.share_accepted is None else f"{row.share_accepted:.0%}",
        f"{row.num_same_text} of {row.num_compared}" if row.num_compared and row.contender != PLAIN else "-",
        " / ".join(f"{row.split_ms[part]:.1f}" for part in ("draft", "verify", "host")) if row.split_ms else "-",
    ]
    return "| " + " | ".join(cells) + " |"


def _grid_table(summary: Summary, temperature: float) -> str:
    """The oracle per workload, and how near the configurations asked for by name come to it."""
    named = list(dict.fromkeys(row.contender for row in summary.rows if row.kind is Kind.CONFIG))
    head = ["workload", "best static", "against plain (95%)", "as good within the interval"]
    head += [f"{name}, share of the best (95%)" for name in named]
    repeated = _is_repeated(summary)
    head += [f"{name}, of the best picked on the other repeats" for name in named if repeated]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for oracle in summary.oracles:
        if oracle.temperature == temperature:
            rows = {row.contender: row for row in summary.find(oracle.workload, temperature)}
            best = rows[oracle.contender]
            cells = [oracle.workload, oracle.contender, _times(best.speedup), ", ".join(oracle.ties) or "-"]
            cells += [_share(rows[name].of_best if name in rows else None) for name in named]
            cells += [_share(rows[name].of_picked if name in rows else None) for name in named if repeated]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _is_repeated(summary: Summary) -> bool:
    """Is there another repeat to pick each repeat's best by?"""
    return any(row.of_picked is not None for row in summary.rows)


def _times(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    ends = "" if interval.low is None else f" ({interval.low:.2f} to {interval.high:.2f})"
    return f"{interval.value:.2f}x{ends}"


def _share(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    ends = "" if interval.low is None else f" ({interval.low:.0%} to {interval.high:.0%})"
    return f"{interval.value:.0%}{ends}"


def _legend(summary: Summary) -> str:
    names = {row.contender for row in summary.rows}
    lines = [
        "Tokens per second of decoding, reading the prompt left out. Per prompt the median over its repeats; the",
        "intervals are 95% percentile bootstraps over the prompts (2,000 resamples, paired).",
    ]
    if PLAIN_ONE in names:
        lines.append(
            f'"{PLAIN}" keeps the promise (padded into the width class, or guarded); "{PLAIN_ONE}" gives that up. '
            "Speed is against the faster of the two."
        )
    if summary.oracles:
        lines.append("The best of many is a little too good: chance helped to pick it.")
        if _is_repeated(summary):
            lines.append("It does not help where each repeat's best is the one that was best in the other repeats.")
    lines += [f"{work['name']}: {work['about']}." for work in summary.conditions["workloads"]]
    return "  \n".join(lines)
