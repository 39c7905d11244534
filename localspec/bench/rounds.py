"""Where a configuration's time goes, round by round: which rounds win against plain decoding, and which cost.

A benchmark says that a configuration is slower than plain decoding, not why. Its rounds do: those that guessed, the
plain ones behind them, those that asked a drafter and verified nothing, and all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from localspec.bench.contenders import PLAIN
from localspec.bench.runs import Run

KINDS = {
    "guessed": "guesses were verified",
    "first": "plain, among the first three of an answer",
    "behind": "plain, the two behind guesses",
    "asked": "plain, though drafting took a fifth of a plain round or more",
    "others": "plain",
}
_FIRST, _BEHIND = 3, 2
_MUCH = 0.2  # of a plain round


@dataclass(frozen=True, slots=True)
class Part:
    """Rounds of one kind. ms: the median, longest: the most that one took.  cost: what they took beyond plain decoding
    of as many tokens, as a share of all the configuration's time; below 0 it was won."""

    workload: str
    temperature: float
    contender: str
    kind: str
    num_rounds: int
    num_tokens: int
    ms: float
    longest: float
    cost: float


def parts(runs: Sequence[Run]) -> list[Part]:
    """Of all that wrote their rounds down, in the order of the runs; plain decoding's own included."""
    places = dict.fromkeys((run.workload, run.temperature) for run in runs)
    found: list[Part] = []
    for workload, temperature in places:
        here = [run for run in runs if (run.workload, run.temperature) == (workload, temperature) and run.answer.rounds]
        for name in dict.fromkeys(run.contender for run in here):
            own = [run for run in here if run.contender == name]
            prompts = {run.prompt for run in own}
            plain = [run for run in here if run.contender == PLAIN and run.prompt in prompts]
            if plain:
                found += _parts(own, plain)
    return found


def table(found: Sequence[Part]) -> str:
    """Markdown, with what the kinds are."""
    columns = "T", "workload", "configuration", "rounds", "number", "tokens a round", "ms, median", "longest", "cost"
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for part in found:
        cells = [f"{part.temperature:g}", part.workload, part.contender, part.kind, str(part.num_rounds)]
        cells += [f"{part.num_tokens / part.num_rounds:.2f}", f"{part.ms:.1f}", f"{part.longest:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{part.cost:+.1%}"]) + " |")
    legend = ["cost: time beyond plain decoding of as many tokens, of all the configuration's time."]
    legend += [f"{kind}: {about}." for kind, about in KINDS.items() if any(part.kind == kind for part in found)]
    return "\n".join(lines) + "\n\n" + "  \n".join(legend)


def _parts(own: Sequence[Run], plain: Sequence[Run]) -> list[Part]:
    """Of one configuration's answers, beside plain decoding's to the same prompts."""
    plain_rounds = [one for run in plain for one in run.answer.rounds or ()]
    token_ms = sum(map(_ms, plain_rounds)) / sum(map(_tokens, plain_rounds))
    much = _MUCH * median(map(_ms, plain_rounds))
    by_kind: dict[str, list[Sequence[float]]] = {kind: [] for kind in KINDS}
    for run in own:
        for kind, one in _kinds(run.answer.rounds or (), much):
            by_kind[kind].append(one)
    whole = sum(_ms(one) for rounds in by_kind.values() for one in rounds)
    first = own[0]
    made = []
    for kind, rounds in by_kind.items():
        if rounds:
            times, tokens = [_ms(one) for one in rounds], sum(map(_tokens, rounds))
            cost = (sum(times) - tokens * token_ms) / whole
            place = first.workload, first.temperature, first.contender
            made.append(Part(*place, kind, len(rounds), tokens, median(times), max(times), cost))
    return made


def _kinds(rounds: Sequence[Sequence[float]], much: float) -> Iterator[tuple[str, Sequence[float]]]:
    quiet = _BEHIND  # rounds since a guess
    for place, one in enumerate(rounds):
        nodes, _, _, draft_ms, _, _ = one
        if nodes:
            kind = "guessed"
        elif draft_ms >= much:
            kind = "asked"
        elif quiet < _BEHIND:
            kind = "behind"
        else:
            kind = "first" if place < _FIRST else "others"
        quiet = 0 if nodes else quiet + 1
        yield kind, one


def _ms(one: Sequence[float]) -> float:
    return sum(one[3:])


def _tokens(one: Sequence[float]) -> int:
    return 1 + int(one[1])
