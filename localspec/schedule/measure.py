"""What passes cost on this machine, measured through the contract alone, in bounded time and against noise.

Target and draft model are timed in the same sweeps: every width once, in an order that is shuffled and then reversed,
so that neither drift nor what ran before favours a width (wide passes in every third sweep only). A point is the median
of its repeats, the first (warm-up) left out. Points that scatter, or where a wider pass was cheaper, are measured again
with the time left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from time import perf_counter

import numpy as np

from localspec.protocols import LanguageModel, Rewind
from localspec.schedule.cost import Costs, Curve
from localspec.schedule.passes import Clock, Passes

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
CONTEXTS = (64, 512, 2048)
DRAFT_WIDTH = 16
"""Widest pass of a draft model that is measured."""

QUICK_WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32)
QUICK_CONTEXTS = (64, 512)
QUICK_SECONDS = 4.0

_MOST_REPEATS = 25
_ENOUGH = 4  # repeats that come before another context does
_WIDE, _SELDOM = 16, 3  # wider passes take most of the time and scatter less: they are in every third sweep only
_GROWING = 0.4  # of the time left may go into reading up to a further context
_SWEEPING = 0.75  # of a context's time goes into sweeps, what is left into doubtful points
_SCATTER = 0.2  # interquartile range over median, above which a point is doubtful
_FALL = 1.1  # so much dearer than the next wider pass: doubtful, too (it may well be true)

Progress = Callable[[float, str], None]
"""Called with the share that is done, 0 to 1, and with what is being done."""

Overhead = Callable[[LanguageModel], float]
"""The host's own milliseconds per round of a target (`engine.overhead`, which this layer does not know)."""


def costs(
    target: LanguageModel,
    draft: LanguageModel | None = None,
    *,
    seconds: float = 15.0,
    widths: Sequence[int] = WIDTHS,
    contexts: Sequence[int] = CONTEXTS,
    overhead: Overhead | None = None,
    on_progress: Progress | None = None,
    clock: Clock = perf_counter,
) -> Costs:
    """The costs of a pair, in about `seconds` (longer only where even one pass of the narrowest widths is).

    widths: tokens per pass, as far as the target's `max_width`, its width class and its context go; of the draft
    model those up to DRAFT_WIDTH.  contexts: committed tokens before the pass; deeper ones that do not fit into the
    context or the time are left out, which `notes` says. One sequence of each model must be free.
    Of a model that cannot take tokens back only width 1 at the first context is measured.
    """
    deadline = clock() + seconds
    models = [target] if draft is None else [target, draft]
    plain = any(model.capabilities.rewind is Rewind.NEVER for model in models)
    own_ms = Costs.overhead_ms if overhead is None or plain else overhead(target)  # before a sequence is in use
    longest = min(model.info.context_length for model in models)
    with ExitStack() as stack:
        tracks = [
            stack.enter_context(closing(_Track(model, _widths(model, widths, most), clock)))
            for model, most in zip(models, (longest // 2, min(longest // 2, DRAFT_WIDTH)), strict=False)
        ]
        room = longest - max(track.widths[-1] for track in tracks)
        depths = _fitting(contexts, room)[: 1 if plain else None]
        notes = _measure_at(tracks, depths, deadline, on_progress or (lambda share, what: None))
    if on_progress is not None:
        on_progress(1.0, "")
    curves = [track.curve() for track in tracks]
    notes.append(f"{_repeats(tracks)} repeats a point, scatter {_scatter_of(tracks):.0%}")
    return Costs(curves[0], curves[1] if draft is not None else None, own_ms, "by localspec tune", tuple(notes))


def quick(
    target: LanguageModel,
    draft: LanguageModel | None = None,
    *,
    seconds: float = QUICK_SECONDS,
    overhead: Overhead | None = None,
    on_progress: Progress | None = None,
    clock: Clock = perf_counter,
) -> Costs:
    """The short version: fewer widths, two contexts."""
    found = costs(
        target,
        draft,
        seconds=seconds,
        widths=QUICK_WIDTHS,
        contexts=QUICK_CONTEXTS,
        overhead=overhead,
        on_progress=on_progress,
        clock=clock,
    )
    return replace(found, measured="in short at first load")


def assumed(target: LanguageModel, draft: LanguageModel | None = None) -> Costs:
    """Costs where nothing was measured: by the number of parameters alone, on a processor of no particular kind. Only
    their proportions mean anything, and those not much; a plan corrects them by its rounds."""

    def curve(model: LanguageModel) -> Curve:
        one = max(model.info.num_parameters, 1_000_000) / 2e7  # ms: 20 million parameters read per millisecond
        widths = sorted({1, min(2, model.capabilities.max_width), min(64, model.capabilities.max_width)})
        return Curve(tuple(widths), (64,), (tuple(one * (1.0 + 0.1 * (width - 1)) for width in widths),))

    note = "costs were not measured but assumed: run `localspec tune`"
    return Costs(curve(target), None if draft is None else curve(draft), measured="", notes=(note,))


# ---------------------------------------------------------------- what is measured


def _widths(model: LanguageModel, widths: Sequence[int], most: int) -> list[int]:
    """Ascending, at most `most`; the narrowest of the width class is among them, whatever was asked for."""
    known = model.capabilities
    if known.rewind is Rewind.NEVER:
        return [1]
    most = max(min(most, known.max_width, known.width_class.max_width or most), known.width_class.min_width)
    steps = known.width_steps or widths
    return sorted({width for width in (*steps, known.width_class.min_width) if 1 <= width <= most})


def _fitting(contexts: Sequence[int], room: int) -> list[int]:
    """Contexts that fit, ascending; where one does not, the longest that does stands in if that is worth it."""
    fits = sorted(context for context in contexts if context <= room)
    last = fits[-1] if fits else 0
    if len(fits) < len(contexts) and room > 1.5 * last:
        fits.append(room)
    return fits or [max(room, 1)]


# ---------------------------------------------------------------- repeats


@dataclass(slots=True)
class _Track:
    """A model's sequence, and the milliseconds of its passes: by context, by width, in order."""

    model: LanguageModel
    widths: list[int]
    clock: Clock
    passes: Passes = field(init=False)
    ms: dict[int, dict[int, list[float]]] = field(default_factory=dict)
    context: int = 0

    def __post_init__(self) -> None:
        self.passes = Passes(self.model, clock=self.clock)

    def grow(self, context: int, until: float) -> bool:
        self.context = context
        return self.passes.grow(context, until)

    def back(self, context: int) -> None:
        """To an earlier context, as if the present one had not been begun."""
        if self.context != context:
            self.ms.pop(self.context, None)
        self.context = context
        self.passes.truncate(context)

    def repeat(self, width: int) -> None:
        self.ms.setdefault(self.context, {}).setdefault(width, []).append(self.passes.time(width))

    def here(self) -> dict[int, list[float]]:
        return self.ms.setdefault(self.context, {})

    def drop_missing(self) -> None:
        """Go on with the widths that there was time for."""
        self.widths = [width for width in self.widths if width in self.here()]

    def curve(self) -> Curve:
        contexts = sorted(self.ms)
        rows = tuple(tuple(float(np.median(_settled(self.ms[c][w]))) for w in self.widths) for c in contexts)
        return Curve(tuple(self.widths), tuple(contexts), rows)

    def close(self) -> None:
        self.passes.close()


def _measure_at(tracks: Sequence[_Track], depths: Sequence[int], deadline: float, tell: Progress) -> list[str]:
    """Measure at each context; what had to be left out, in words."""
    clock = tracks[0].clock
    for number, depth in enumerate(depths):
        tell(number / len(depths), f"{depth} tokens of context")
        by = clock() + _GROWING * (deadline - clock()) if number else float("inf")
        grown = all(track.grow(depth, by) for track in tracks)
        end = clock() + max(deadline - clock(), 0.0) / (len(depths) - number)
        if not (grown and _measured(tracks, end, deadline)):
            _go_on(tracks, depths[number - 1], deadline)
            return [f"contexts of {depth} tokens and more were not measured: no time"]
    return []


def _measured(tracks: Sequence[_Track], end: float, deadline: float) -> bool:
    """Measure all widths at the present context, until `end`, or `deadline` where repeats are few. False if there was
    no time for each width once; at the first context the widths are cut to those there was time for instead."""
    first, clock = all(len(track.ms) == 0 for track in tracks), tracks[0].clock
    jobs = _jobs(tracks)
    jobs.sort(key=lambda job: (job[1] > 2, job[1] & (job[1] - 1) != 0, job[1]))  # 1, 2, powers of two, the others
    for number, (track, width) in enumerate(jobs):
        if clock() >= (deadline if first else end) and not (first and number < 2 * len(tracks)):
            break
        track.repeat(width)
    if not all(width in track.here() for track, width in jobs):
        if not first:
            return False
        for track in tracks:
            track.drop_missing()
    _sweep(tracks, clock() + _SWEEPING * (end - clock()), deadline)
    _again(tracks, end)
    return True


def _go_on(tracks: Sequence[_Track], context: int, end: float) -> None:
    """Spend the time left on an earlier context."""
    for track in tracks:
        track.back(context)
    _sweep(tracks, end, end)


def _sweep(tracks: Sequence[_Track], end: float, deadline: float) -> None:
    """Repeat all widths until `end`; the first few times until `deadline`."""
    jobs, clock, rng = _jobs(tracks), tracks[0].clock, np.random.default_rng(0)
    order = list(range(len(jobs)))
    for number in range(_MOST_REPEATS - 1):
        order = order[::-1] if number % 2 else rng.permutation(len(jobs)).tolist()
        for place in order:
            if clock() >= (deadline if number < _ENOUGH else end):
                return
            track, width = jobs[place]
            if width <= _WIDE or number % _SELDOM == 0:
                track.repeat(width)


def _again(tracks: Sequence[_Track], end: float) -> None:
    """Repeat the doubtful points until they are not, or the time is over; half as often again at most, for what is
    measured later alone shows drift as a difference."""
    repeats = max(len(track.here()[width]) for track, width in _jobs(tracks))
    for _ in range(max(repeats // 2, 2)):
        doubtful = [(track, width) for track in tracks for width in _doubtful(track)]
        if not doubtful:
            return
        for track, width in doubtful:
            if track.clock() >= end:
                return
            track.repeat(width)


def _jobs(tracks: Sequence[_Track]) -> list[tuple[_Track, int]]:
    return [(track, width) for track in tracks for width in track.widths]


def _doubtful(track: _Track) -> list[int]:
    """Widths whose repeats scatter, or that cost more than the next wider one."""
    here = track.here()
    found = {width for width in track.widths if _scatter(_settled(here[width])) > _SCATTER}
    for width, wider in zip(track.widths, track.widths[1:], strict=False):
        if np.median(_settled(here[width])) > _FALL * np.median(_settled(here[wider])):
            found |= {width, wider}
    return sorted(found)


def _settled(values: list[float]) -> list[float]:
    """Without the warm-up, if there is anything else."""
    return values[1:] or values


def _scatter(values: list[float]) -> float:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float((high - low) / middle)


def _points(tracks: Sequence[_Track]) -> list[list[float]]:
    return [_settled(track.ms[c][w]) for track in tracks for c in track.ms for w in track.widths]


def _repeats(tracks: Sequence[_Track]) -> str:
    counts = [len(values) for values in _points(tracks)]
    return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(min(counts))


def _scatter_of(tracks: Sequence[_Track]) -> float:
    return float(np.median([_scatter(values) for values in _points(tracks)]))
