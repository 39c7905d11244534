"""Where a configuration's time goes, round by round: which rounds win against plain decoding, and which cost.

A benchmark says that a configuration is slower than plain decoding, not why. Its rounds do: those that guessed, the
plain ones behind them, those that asked a drafter and verified nothing, and all others.

And where a machine is quick in one minute and slow in the next, an answer is better compared with its own plain rounds
than with plain decoding's, which took place in another minute.
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
_ENOUGH = 3  # plain rounds, by which an answer's pace is judged
_UNSEEN = 0.1  # of much drafting, in a round without a look


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


@dataclass(frozen=True, slots=True)
class Pace:
    """A configuration's speed against plain decoding of the same prompts.

    times_plain: by the clock.  times_own: both in units of each answer's own plain rounds, None where there are none.
    num_judged: answers with enough of them, of all `num_answers`.
    """

    workload: str
    temperature: float
    contender: str
    num_answers: int
    num_judged: int
    times_plain: float
    times_own: float | None


def parts(runs: Sequence[Run]) -> list[Part]:
    """Of all that wrote their rounds down, in the order of the runs; plain decoding's own included."""
    return [part for own, plain in _beside_plain(runs) for part in _parts(own, plain)]


def paces(runs: Sequence[Run]) -> list[Pace]:
    """Of all that wrote their rounds down but plain decoding, in the order of the runs."""
    return [_pace(own, plain) for own, plain in _beside_plain(runs) if own[0].contender != PLAIN]


def pace_table(found: Sequence[Pace]) -> str:
    """Markdown, with what the columns are."""
    columns = "T", "workload", "configuration", "times plain", "by its own plain rounds", "answers judged"
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for pace in found:
        own = "" if pace.times_own is None else f"{pace.times_own:.2f}"
        cells = [f"{pace.temperature:g}", pace.workload, pace.contender, f"{pace.times_plain:.2f}", own]
        lines.append("| " + " | ".join([*cells, f"{pace.num_judged} of {pace.num_answers}"]) + " |")
    return "\n".join(lines) + (
        "\n\nby its own plain rounds: the same, with the median of each answer's own plain rounds as the unit of time, "
        "which a machine's changes of pace do not touch. Only answers that have some are judged."
    )


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


def _beside_plain(runs: Sequence[Run]) -> Iterator[tuple[list[Run], list[Run]]]:
    """(a configuration's runs of a workload at a temperature, plain decoding's of the same prompts)."""
    places = dict.fromkeys((run.workload, run.temperature) for run in runs)
    for workload, temperature in places:
        here = [run for run in runs if (run.workload, run.temperature) == (workload, temperature) and run.answer.rounds]
        for name in dict.fromkeys(run.contender for run in here):
            own = [run for run in here if run.contender == name]
            prompts = {run.prompt for run in own}
            plain = [run for run in here if run.contender == PLAIN and run.prompt in prompts]
            if plain:
                yield own, plain


def _parts(own: Sequence[Run], plain: Sequence[Run]) -> list[Part]:
    """Of one configuration's answers, beside plain decoding's to the same prompts."""
    token_ms, much = _token_ms(plain), _much(plain)
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


def _pace(own: Sequence[Run], plain: Sequence[Run]) -> Pace:
    much = _much(plain)
    judged, ours = _in_own_rounds(own, much)
    prompts = {run.prompt for run in judged}
    _, theirs = _in_own_rounds([run for run in plain if run.prompt in prompts], much)
    first = own[0]
    place = first.workload, first.temperature, first.contender
    times_own = theirs / ours if ours and theirs else None
    return Pace(*place, len(own), len(judged), _token_ms(plain) / _token_ms(own), times_own)


def _in_own_rounds(runs: Sequence[Run], much: float) -> tuple[list[Run], float]:
    """(answers with enough plain rounds, what a token took in units of these; 0 where there are none). Only rounds in
    which nobody looked for guesses are the unit, or what looking takes would cancel out."""
    judged, units, tokens = list[Run](), 0.0, 0
    for run in runs:
        rounds = run.answer.rounds or ()
        others = (one for kind, one in _kinds(rounds, much) if kind == "others")
        quiet = [_ms(one) for one in others if one[3] < _UNSEEN * much]
        if len(quiet) >= _ENOUGH:
            judged.append(run)
            units += sum(map(_ms, rounds)) / median(quiet)
            tokens += sum(map(_tokens, rounds))
    return judged, units / max(tokens, 1)


def _token_ms(runs: Sequence[Run]) -> float:
    rounds = [one for run in runs for one in run.answer.rounds or ()]
    return sum(map(_ms, rounds)) / sum(map(_tokens, rounds))


def _much(plain: Sequence[Run]) -> float:
    """Milliseconds of drafting that are much beside a plain round."""
    return _MUCH * median(_ms(one) for run in plain for one in run.answer.rounds or ())


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
