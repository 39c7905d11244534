"""Which widths give bit-identical rows here: looked at, not assumed.

The same random tokens behind the same context are decoded in passes of every width, each pass committed, so a row is
computed at every place of a pass and on keys and values that passes of the same width wrote. Two widths are of one
group while no bit of any row differed. Also counted: how often another group's best token is another one, and how far
logits differ. (What guarded decoding looks at again is measured in `schedule.bound`.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localspec.protocols import LanguageModel, Rewind, Scores, WidthClass
from localspec.schedule.passes import Clock, Passes
from localspec.types import Logits, TokenIds

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64)
CONTEXTS = (20, 300, 701, 133)
"""Tokens before the compared ones, trial by trial. Kernels change with the context, too: llama.cpp on a CPU splits a
lone token's attention among threads from 512 cells on, and allots cells by 256."""

_MOST_TRIALS = 12
_LEAST_WIDTHS = 4  # 1, 2, 4, 8
_NARROW = (8, 32)  # tokens that passes narrower than this are run over: at least, at most
DEEP = 600
"""Tokens of context behind which width 1 must have been compared before it may join a class."""
_MANY = 32  # rows over which it must have been equal


@dataclass(frozen=True, slots=True)
class Difference:
    """Two widths compared over `num_rows` rows: how many differ in any bit, in how many the best token differs, and the
    largest difference of a logit."""

    num_rows: int = 0
    num_unequal: int = 0
    num_other_best: int = 0
    largest: float = 0.0

    @property
    def other_best(self) -> float:
        """Share of rows whose best token is another one."""
        return self.num_other_best / max(self.num_rows, 1)

    def plus(self, other: Difference) -> Difference:
        """Both counts together."""
        return Difference(
            self.num_rows + other.num_rows,
            self.num_unequal + other.num_unequal,
            self.num_other_best + other.num_other_best,
            max(self.largest, other.largest),
        )


@dataclass(frozen=True)
class Classes:
    """A partition of the tested widths, with evidence. groups: by their narrowest width, each ascending.
    contexts: tokens before the compared ones, trial by trial.  differences: of any two tested widths."""

    widths: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    contexts: tuple[int, ...]
    differences: dict[tuple[int, int], Difference] = field(default_factory=dict)

    def between(self, one: int, other: int) -> Difference:
        """What was found for two tested widths."""
        return self.differences.get((min(one, other), max(one, other)), Difference())

    def against(self, serving: WidthClass) -> dict[int, Difference]:
        """Per tested width outside a class, what was found against the class's narrowest tested width."""
        inside = [width for width in self.widths if is_inside(width, serving)]
        outside = [width for width in self.widths if not is_inside(width, serving)]
        return {width: self.between(width, inside[0]) for width in outside} if inside else {}

    def plus(self, other: Classes) -> Classes:
        """The evidence of both: widths are of one group if they are in each that tested them. One that only the first
        tested goes with the widest of those that it is equal to."""
        widths = tuple(sorted({*self.widths, *other.widths}))
        marks = {width: tuple(_group_of(width, one.groups) for one in (self, other)) for width in widths}
        groups: list[list[int]] = []
        for width in widths:
            for group in reversed(groups):
                if all(None in pair or pair[0] == pair[1] for pair in zip(marks[width], marks[group[0]], strict=True)):
                    group.append(width)
                    break
            else:
                groups.append([width])
        differences = dict(self.differences)
        for pair, found in other.differences.items():
            differences[pair] = differences.get(pair, Difference()).plus(found)
        return Classes(widths, tuple(map(tuple, groups)), (*self.contexts, *other.contexts), differences)

    @property
    def largest(self) -> float:
        """The largest difference of a logit between any two widths."""
        return max((found.largest for found in self.differences.values()), default=0.0)

    @property
    def num_rows(self) -> int:
        """Rows that the widest-compared pair of widths has in common."""
        return max((found.num_rows for found in self.differences.values()), default=0)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "widths": list(self.widths),
            "groups": [list(group) for group in self.groups],
            "contexts": list(self.contexts),
            "differences": [[*pair, *astuple(found)] for pair, found in self.differences.items()],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Classes:
        """The inverse. Raises ValueError, KeyError or TypeError for anything else."""
        return cls(
            tuple(map(int, data["widths"])),
            tuple(tuple(map(int, group)) for group in data["groups"]),
            tuple(map(int, data["contexts"])),
            {
                (int(one), int(other)): Difference(int(rows), int(unequal), int(best), float(largest))
                for one, other, rows, unequal, best, largest in data["differences"]
            },
        )

    def __str__(self) -> str:
        return " | ".join(_range(group) for group in self.groups)


def _group_of(width: int, groups: Sequence[Sequence[int]]) -> int | None:
    """Number of the group that a width is in; None if it was not tested."""
    return next((number for number, group in enumerate(groups) if width in group), None)


def is_inside(width: int, known: WidthClass) -> bool:
    """Is this width one of the class?"""
    return known.min_width <= width and (known.max_width is None or width <= known.max_width)


def find(
    model: LanguageModel,
    widths: Sequence[int] = WIDTHS,
    *,
    contexts: Sequence[int] = CONTEXTS,
    seconds: float = 10.0,
    rows: int | None = None,
    on_progress: Callable[[float, str], None] | None = None,
    clock: Clock = perf_counter,
) -> Classes:
    """Compare the rows of these widths, trial by trial until the time is over (one trial at least, of the most telling
    widths if there is no time for all). One sequence of the model must be free. A model that cannot take tokens back
    has width 1 only. rows: that narrow widths are compared over in a trial [default: as many as there is time for]."""
    known = model.capabilities
    room = model.info.context_length
    tested = sorted({width for width in widths if 1 <= width <= min(known.max_width, room // 2)}) or [1]
    if known.rewind is Rewind.NEVER:
        tested = [1]
    longest = max(tested[-1], rows or 0)
    fitting = [context for context in contexts if context + longest <= room] or [max(0, room - longest)]
    end = clock() + seconds
    labels: dict[int, list[int]] = {}
    differences: dict[tuple[int, int], Difference] = {}
    used: list[int] = []
    with Passes(model, seed=1, clock=clock) as passes:
        # all narrow widths together run about three passes per token; two trials should fit into the time
        affordable = int(seconds * 1e3 / 6.0 / max(passes.time(1), 1e-3))
        narrow = min(max(affordable, _NARROW[0]), _NARROW[1], tested[-1]) if rows is None else rows
        while len(used) < _MOST_TRIALS and len(tested) > 1:
            context = fitting[len(used) % len(fitting)]
            if used and clock() >= end:
                break
            if on_progress is not None:
                on_progress(len(used) / _MOST_TRIALS, f"comparing rows behind {context} tokens")
            if context < passes.length:
                passes.truncate(0)
            if not passes.grow(context, end if used else float("inf")):
                break
            trial = _Trial(passes, passes.random(max(tested[-1], narrow)), tested, narrow)
            trial.run(end, clock, least=0 if used else _LEAST_WIDTHS)
            if used and len(trial.label) < len(tested):
                break
            tested = sorted(trial.label)  # the first trial goes as far as there is time
            used.append(context)
            for width in tested:
                labels.setdefault(width, []).append(trial.label[width])
            for pair, found in trial.differences().items():
                differences[pair] = differences.get(pair, Difference()).plus(found)
    groups: dict[tuple[int, ...], list[int]] = {}
    for width in tested:
        groups.setdefault(tuple(labels.get(width, ())), []).append(width)
    return Classes(tuple(tested), tuple(map(tuple, groups.values())), tuple(used), differences)


def worth_a_deeper_look(claimed: WidthClass, found: Classes) -> tuple[tuple[int, ...], int]:
    """(the widths to compare behind `DEEP` tokens, over how many rows), where that is all that is missing for width 1
    to join a measured class; else no widths."""
    narrowest = claimed.min_width
    if not claimed.measured or narrowest == 1 or not found.contexts or _reaches(found, narrowest):
        return (), 0
    if not {1, narrowest} <= set(found.widths) or found.between(1, narrowest).num_unequal:
        return (), 0
    widths = tuple(width for width in found.widths if width <= max(narrowest, 4))
    below = [width for width in found.widths if width < narrowest]
    missing = _MANY - min(found.between(width, narrowest).num_rows for width in below)
    return widths, max(missing, _NARROW[0]) + widths[-1] - 1  # a pass that is not full is left out


def class_to_use(
    claimed: WidthClass, found: Classes, value: Callable[[WidthClass], float] | None = None
) -> tuple[WidthClass, str]:
    """(the class to stay in, what contradicts the backend's word, empty if nothing does).

    The claimed class stands while its tested widths are of one group; a class that nobody had measured becomes a
    measured one as far as was tested. Otherwise it is cut to the best run of neighbouring tested widths of one group.
    Narrower widths than a measured claim has join it where they were found equal, deep into the context as well. Where
    they were not, and passes of the class are so dear that width 1 alone is worth more, it is the class.
    value: of a class, the larger the better [default: the number of tested widths up to 16].
    """
    serving, contradiction = _inside_claim(claimed, found, value)
    if not found.contexts or not claimed.measured or serving.min_width == 1:
        return serving, contradiction
    if _reaches(found, serving.min_width):
        run = [width for width in found.widths if is_inside(width, replace(serving, min_width=1))]
        return replace(serving, min_width=1, evidence=_evidence(run, found)), contradiction
    said = "by `localspec tune`: wider passes cost more here than guesses are expected to bring"
    alone = WidthClass(1, 1, said, plain_only=True)
    if value is not None and 1 in found.widths and value(alone) > value(serving):
        return alone, contradiction
    return serving, contradiction


def _reaches(found: Classes, width: int) -> bool:
    """Were rows of width 1, and of all between, those of `width`, in enough trials to say so?"""
    below = [narrower for narrower in found.widths if narrower < width]
    return (
        1 in below
        and max(found.contexts) >= DEEP
        and all(found.between(one, width).num_rows >= _MANY for one in below)
        and not any(found.between(one, width).num_unequal for one in below)
    )


def _inside_claim(
    claimed: WidthClass, found: Classes, value: Callable[[WidthClass], float] | None
) -> tuple[WidthClass, str]:
    inside = [width for width in found.widths if is_inside(width, claimed)]
    if len(inside) < 2 or not found.contexts:
        return claimed, ""
    runs = _runs(inside, found)
    last = inside[-1]
    open_end = claimed.max_width if claimed.measured else last
    candidates = [
        replace(
            claimed,
            min_width=claimed.min_width if run[0] == inside[0] else run[0],
            max_width=open_end if run[-1] == last else run[-1],
            evidence=_evidence(run, found),
            measured=True,
        )
        for run in runs
    ]
    if len(runs) == 1:
        return (claimed if claimed.measured else candidates[0]), ""
    if not claimed.measured:  # a width that is equal to itself alone is no class to promise anything by
        candidates = [one for one, run in zip(candidates, runs, strict=True) if len(run) > 1]
        if not candidates:
            return claimed, ""
    worth = value or (lambda one: float(sum(is_inside(width, one) for width in inside if width <= 16)))
    best = max(candidates, key=worth)
    contradiction = (
        f"widths {claimed} were said to give equal rows, but do not here: {found}; the class is {best} now"
        if claimed.measured
        else ""
    )
    return best, contradiction


def _runs(widths: Sequence[int], found: Classes) -> list[list[int]]:
    """Neighbouring tested widths of one group."""
    group = {width: number for number, members in enumerate(found.groups) for width in members}
    runs = [[widths[0]]]
    for width in widths[1:]:
        if group[width] == group[runs[-1][-1]]:
            runs[-1].append(width)
        else:
            runs.append([width])
    return runs


def _evidence(run: Sequence[int], found: Classes) -> str:
    rows = min((found.between(run[0], other).num_rows for other in run[1:]), default=0)
    return (
        f"by `localspec tune`: widths {', '.join(map(str, run))} gave identical rows ({rows} rows or more of random "
        f"tokens behind contexts of {min(found.contexts)} to {max(found.contexts)})"
    )


def _range(group: Sequence[int]) -> str:
    return str(group[0]) if len(group) == 1 else ", ".join(map(str, group))


class _Trial:
    """The same tokens in passes of every width, of the narrow ones the first `narrow` tokens. label: of each width that
    was run, the first one of equal rows."""

    def __init__(self, passes: Passes, ids: TokenIds, widths: Sequence[int], narrow: int) -> None:
        self.label: dict[int, int] = {}
        self._passes, self._ids, self._narrow = passes, ids, narrow
        self._widths = sorted(widths, key=lambda width: (width > 2, width & (width - 1) != 0, width))  # as measured
        self._counts: dict[int, int] = {}
        self._rows: dict[int, Logits] = {}

    def run(self, end: float, clock: Clock, least: int) -> None:
        """Run the widths until `end`, `least` of them whatever that takes."""
        for number, width in enumerate(self._widths):
            if number >= least and clock() >= end:
                return
            rows = _rows(self._passes, self._ids[: max(self._narrow, width)], width)
            self._counts[width] = len(rows)
            equal = [label for label, other in self._rows.items() if not _unequal(rows, other).any()]
            self.label[width] = equal[0] if equal else width
            if not equal:
                self._rows[width] = rows

    def differences(self) -> dict[tuple[int, int], Difference]:
        """Of any two widths."""
        found = {}
        widths = sorted(self.label)
        for index, one in enumerate(widths):
            for other in widths[index + 1 :]:
                found[one, other] = self._difference(one, other)
        return found

    def _difference(self, one: int, other: int) -> Difference:
        common = min(self._counts[one], self._counts[other])
        first, second = self.label[one], self.label[other]
        if first == second:
            return Difference(common)
        a, b = self._rows[first], self._rows[second]
        common = min(common, len(a), len(b))
        return Difference(
            common,
            int(_unequal(a[:common], b[:common]).sum()),
            int((a[:common].argmax(axis=1) != b[:common].argmax(axis=1)).sum()),
            float(np.abs(a[:common] - b[:common]).max()),
        )


def _unequal(one: Logits, other: Logits) -> NDArray[np.bool_]:
    """[T] which of the rows that both have differ in any bit."""
    common = min(len(one), len(other))
    return np.asarray(np.any(one[:common].view(np.uint32) != other[:common].view(np.uint32), axis=1))


def _rows(passes: Passes, ids: TokenIds, width: int) -> Logits:
    """[T', V] rows of the tokens, decoded in passes of one width; T' as far as whole passes go."""
    parts: list[Logits] = []

    def look(_: int, scores: Scores) -> None:
        parts.append(scores.rows(range(scores.num_rows)).copy())

    passes.walk(ids, width, look)
    return np.concatenate(parts)
