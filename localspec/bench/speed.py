"""Decoding speed against plain, side by side: same prompts, same seeds, alternating order, medians."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from localspec.bench.prompts import Prompt
from localspec.engine.session import Session
from localspec.engine.stats import Stats
from localspec.loading import Pair
from localspec.sampling import SamplingParams

PLAIN = "nothing"


@dataclass(frozen=True, slots=True)
class Run:
    """One answer, timed. decode_ms excludes prefill."""

    prompt: str
    domain: str
    drafter: str
    temperature: float
    repeat: int
    num_tokens: int
    num_rounds: int
    num_drafted: int
    num_accepted: int
    decode_ms: float
    draft_ms: float
    verify_ms: float
    host_ms: float


@dataclass(slots=True)
class Report:
    """All runs, and the conditions they were made under."""

    conditions: str
    max_tokens: int
    repeats: int
    runs: list[Run] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def measure(
    pair: Pair,
    prompts: Sequence[Prompt],
    drafters: Sequence[str],
    temperatures: Sequence[float],
    max_tokens: int,
    repeats: int,
) -> Report:
    """Time plain decoding and each drafter on every prompt, `repeats` times, in alternating order."""
    conditions = f"{_described(pair)}; {max_tokens} tokens at most, {repeats} repeats, alternating order"
    report = Report(conditions, max_tokens, repeats)
    names = [PLAIN, *drafters]
    sessions = {name: pair.session(name) for name in names}
    try:
        for session in sessions.values():  # warm-up: first passes allocate
            _run(session, prompts[0].encode(pair.target.tokenizer).tolist(), SamplingParams(seed=0, max_tokens=16))
        for repeat in range(repeats):
            for number, prompt in enumerate(prompts):
                tokens = prompt.encode(pair.target.tokenizer).tolist()
                for temperature in temperatures:
                    params = SamplingParams(temperature=temperature, seed=1000 + number, max_tokens=max_tokens)
                    order = names if (repeat + number) % 2 == 0 else names[::-1]
                    for name in order:
                        stats = _run(sessions[name], tokens, params)
                        report.runs.append(
                            Run(
                                prompt.id,
                                prompt.domain,
                                name,
                                temperature,
                                repeat,
                                stats.num_tokens,
                                stats.num_rounds,
                                stats.num_drafted,
                                stats.num_accepted,
                                stats.decode_ms,
                                stats.draft_ms,
                                stats.verify_ms,
                                stats.host_ms,
                            )
                        )
    finally:
        for session in sessions.values():
            session.close()
    return report


def _run(session: Session, tokens: list[int], params: SamplingParams) -> Stats:
    session.reset()
    return session.generate(tokens, params).stats


def _described(pair: Pair) -> str:
    target, draft = pair.target.info, pair.draft.info if pair.draft else None
    text = f"target {target.name} {target.quantization} on {target.backend}, {target.device}"
    return text + (f"; draft {draft.name} {draft.quantization}" if draft else "")


def _speed(runs: Sequence[Run], repeat: int) -> float:
    """Tokens per second of one repeat over all its prompts."""
    mine = [run for run in runs if run.repeat == repeat]
    return 1e3 * sum(run.num_tokens for run in mine) / sum(run.decode_ms for run in mine)


def table(report: Report) -> str:
    """Markdown: per temperature, domain and drafter the median over repeats, with the range of the ratio."""
    lines = [
        report.conditions,
        "",
        (
            "| T | domain | drafter | tokens/s | against plain (range) | tokens per round (bonus counted) "
            "| guesses accepted | draft / verify / host |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[float, str, str], list[Run]] = {}
    for run in report.runs:
        for domain in (run.domain, "all"):
            groups.setdefault((run.temperature, domain, run.drafter), []).append(run)
    for (temperature, domain, drafter), runs in sorted(
        groups.items(), key=lambda item: (item[0][0], item[0][1] == "all")
    ):
        plain = groups[temperature, domain, PLAIN]
        speeds = [_speed(runs, repeat) for repeat in range(report.repeats)]
        ratios = [speed / _speed(plain, repeat) for repeat, speed in enumerate(speeds)]
        rounds, drafted = sum(run.num_rounds for run in runs), sum(run.num_drafted for run in runs)
        total = sum(run.decode_ms for run in runs)
        split = " / ".join(
            f"{100 * sum(getattr(run, f'{part}_ms') for run in runs) / total:.0f}%"
            for part in ("draft", "verify", "host")
        )
        accepted = f"{100 * sum(run.num_accepted for run in runs) / drafted:.0f}%" if drafted else "-"
        against = "1" if drafter == PLAIN else f"{median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        label = "plain" if drafter == PLAIN else drafter
        lines.append(
            f"| {temperature:g} | {domain} | {label} | {median(speeds):.1f} | {against} "
            f"| {sum(run.num_tokens for run in runs) / rounds:.2f} | {accepted} | {split} |"
        )
    return "\n".join(lines)
