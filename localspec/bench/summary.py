"""From runs to figures: per workload, temperature and contender."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from localspec.bench.contenders import PLAIN, Kind
from localspec.bench.intervals import Interval, Timed, ratio, speed
from localspec.bench.runs import SCHEMA, Run, RunLog

Times = dict[str, list[Timed]]
"""Prompt -> its repeats."""


@dataclass(frozen=True, slots=True)
class Row:
    """One contender on one workload at one temperature.

    speedup: over the faster of the plain contenders, which is named in `against`; None where it did not run yet.
    accepted_length: tokens per round, the bonus counted.  acceptance_by_depth: share of the rounds that guessed so
    deep in which that guess was taken.  split_ms: milliseconds per token spent in draft, verify and host.
    num_same_text: of the answers that plain decoding in the width class gave as well (`num_compared`), those with
    the same tokens.  of_best: speed as a share of the grid's best static configuration.  of_picked: the same, with the
    best of each repeat picked on the other repeats, so that chance does not help to pick it; None with one repeat.
    num_rechecked: choices that guarded decoding looked at again.
    """

    workload: str
    temperature: float
    contender: str
    kind: Kind
    num_prompts: int
    num_runs: int
    num_tokens: int
    tokens_per_second: Interval
    against: str
    speedup: Interval | None
    accepted_length: float | None
    share_accepted: float | None
    acceptance_by_depth: tuple[float, ...]
    split_ms: dict[str, float]
    num_same_text: int
    num_compared: int
    of_best: Interval | None = None
    of_picked: Interval | None = None
    num_rechecked: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"kind": self.kind.value}


@dataclass(frozen=True, slots=True)
class Oracle:
    """The fastest static configuration of a grid, plain decoding included. ties: others of which the interval of the
    ratio to it reaches 1, so that another draw of prompts might have put them first."""

    workload: str
    temperature: float
    contender: str
    ties: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything that is printed and drawn. complete: did all runs that were planned come about?"""

    conditions: dict[str, Any]
    complete: bool
    rows: list[Row] = field(default_factory=list)
    oracles: list[Oracle] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON, without the single runs."""
        return {
            "schema": SCHEMA,
            "conditions": self.conditions,
            "complete": self.complete,
            "rows": [row.as_dict() for row in self.rows],
            "oracles": [asdict(oracle) for oracle in self.oracles],
        }

    def find(self, workload: str, temperature: float) -> list[Row]:
        """The rows of one workload at one temperature, in the order of the contenders."""
        return [row for row in self.rows if (row.workload, row.temperature) == (workload, temperature)]

    @property
    def workloads(self) -> list[str]:
        """Names, in order."""
        return list(dict.fromkeys(row.workload for row in self.rows))

    @property
    def temperatures(self) -> list[float]:
        """In order."""
        return list(dict.fromkeys(row.temperature for row in self.rows))


def summarize(log: RunLog, *, complete: bool) -> Summary:
    """Figures of all runs so far."""
    summary = Summary(log.conditions, complete)
    kinds = {one["name"]: Kind(one["kind"]) for one in log.conditions["contenders"]}
    for work in log.conditions["workloads"]:
        for temperature in log.conditions["temperatures"]:
            mine = [run for run in log.runs if (run.workload, run.temperature) == (work["name"], temperature)]
            groups = {name: [run for run in mine if run.contender == name] for name in kinds}
            groups = {name: runs for name, runs in groups.items() if any(run.answer.num_timed for run in runs)}
            rows, oracle = _rows(groups, kinds, frozenset(log.conditions["grid"]))
            summary.rows.extend(rows)
            if oracle is not None:
                summary.oracles.append(oracle)
    return summary


def _rows(
    groups: dict[str, list[Run]], kinds: dict[str, Kind], grid: frozenset[str]
) -> tuple[list[Row], Oracle | None]:
    """The rows of one workload at one temperature. grid: names of static configurations."""
    times = {name: _times(runs) for name, runs in groups.items()}
    speeds = {name: speed(prompts) for name, prompts in times.items()}
    plains = [name for name in groups if kinds[name] is Kind.PLAIN]
    against = max(plains, key=lambda name: speeds[name].value, default="")
    static = [name for name in groups if name in grid or kinds[name] is Kind.PLAIN] if grid else []
    best = max(static, key=lambda name: speeds[name].value, default=None)
    picked = _picked_elsewhere({name: groups[name] for name in static})
    texts = {run.prompt: run.answer.digest for run in groups.get(PLAIN, [])}
    rows = []
    for name, runs in groups.items():
        compared = [run.answer.digest == texts[run.prompt] for run in runs if run.prompt in texts]
        rows.append(
            Row(
                workload=runs[0].workload,
                temperature=runs[0].temperature,
                contender=name,
                kind=kinds[name],
                num_prompts=len(times[name]),
                num_runs=len(runs),
                num_tokens=sum(run.answer.num_tokens for run in runs),
                tokens_per_second=speeds[name],
                against=against,
                speedup=ratio(times[name], times[against]) if against else None,
                accepted_length=_accepted_length(runs),
                share_accepted=_share_accepted(runs),
                acceptance_by_depth=_by_depth(runs),
                split_ms=_split(runs),
                num_same_text=sum(compared),
                num_compared=len(compared),
                of_best=ratio(times[name], times[best]) if best is not None else None,
                of_picked=ratio(times[name], picked),
                num_rechecked=sum(run.answer.num_rechecked or 0 for run in runs),
            )
        )
    if best is None:
        return rows, None
    ties = [
        row.contender
        for row in rows
        if row.contender in static
        and row.contender != best
        and row.of_best is not None
        and (row.of_best.high or row.of_best.value) >= 1.0
    ]
    return rows, Oracle(rows[0].workload, rows[0].temperature, best, tuple(ties))


def _picked_elsewhere(static: dict[str, list[Run]]) -> Times:
    """The times of each repeat's best configuration, by what all took in the other repeats; none with one repeat."""
    picked: Times = {}
    for repeat in sorted({run.repeat for runs in static.values() for run in runs}):
        elsewhere = {name: _times([run for run in runs if run.repeat != repeat]) for name, runs in static.items()}
        speeds = {name: speed(times).value for name, times in elsewhere.items() if times}
        if speeds:
            best = max(speeds, key=lambda name: speeds[name])
            for prompt, times in _times([run for run in static[best] if run.repeat == repeat]).items():
                picked.setdefault(prompt, []).extend(times)
    return picked


def _times(runs: Sequence[Run]) -> Times:
    times: Times = {}
    for run in runs:
        if run.answer.num_timed:  # a single token that came with the prompt has no speed
            times.setdefault(run.prompt, []).append(Timed(run.answer.num_timed, run.answer.decode_ms))
    return times


def _accepted_length(runs: Sequence[Run]) -> float | None:
    rounds = sum(run.answer.num_rounds or 0 for run in runs)
    return sum(run.answer.num_tokens for run in runs) / rounds if rounds else None


def _share_accepted(runs: Sequence[Run]) -> float | None:
    drafted = sum(run.answer.num_drafted or 0 for run in runs)
    accepted = [run.answer.num_accepted for run in runs]
    if not drafted or None in accepted:
        return None
    return sum(number or 0 for number in accepted) / drafted


def _by_depth(runs: Sequence[Run]) -> tuple[float, ...]:
    drafted = _sums([run.answer.drafted_by_depth or () for run in runs])
    accepted = _sums([run.answer.accepted_by_depth or () for run in runs])
    accepted += [0] * (len(drafted) - len(accepted))
    return tuple(taken / guessed for taken, guessed in zip(accepted, drafted, strict=True))


def _sums(lists: Sequence[Sequence[int]]) -> list[int]:
    sums = [0] * max(map(len, lists), default=0)
    for numbers in lists:
        for place, number in enumerate(numbers):
            sums[place] += number
    return sums


def _split(runs: Sequence[Run]) -> dict[str, float]:
    """Milliseconds per token by part; empty where a library does not say."""
    timed = sum(run.answer.num_timed for run in runs)
    split = {}
    for part in ("draft", "verify", "host"):
        values = [getattr(run.answer, f"{part}_ms") for run in runs]
        if None in values or not timed:
            return {}
        split[part] = sum(values) / timed
    return split
