"""What passes cost on this machine, measured through the contract alone, in bounded time and against noise.

Target and draft model are timed in the same sweeps: every width once, in an order that is shuffled and then reversed,
so that neither drift nor what ran before favours a width (wide passes in every third sweep only). A point is the median
of its repeats, the first (warm-up) left out. Points that scatter, or where a wider pass was cheaper, are measured again
with the time left.

What depth costs tells a plan more than the last repeats at the first context do: once a few widths have been passed
over, time for a second context is set aside. Where it is short, that one is nearer, or has a few widths only, and the
others go by those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import pairwise
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
_ENOUGH = 3  # repeats that come before a context's share of the time is kept to
_WIDE, _SELDOM = 16, 3  # wider passes take most of the time and scatter less: they are in every third sweep only
_KEY_WIDTHS = (4, 8, 16)  # with the narrowest ones: measured first, and where time is short alone
_DEEPER = 1.3  # so much dearer than at the first context reading and passes are taken to be beforehand
_SECOND = 0.6  # of the time left may go into the least that is measured behind a second context
_NEAREST = 4  # times the first context: from nearer ones scatter would be taken for the price of depth
_NEARER = 64  # tokens by which a second context comes nearer where time is short
_GROWING = 0.4  # of the time left may be planned for reading up to a context beyond the second
_LONGEST = 0.6  # of what is left then may go into it
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
    context or the time are left out, and a second one may come nearer or have only a few widths measured, the others
    going by those; `notes` says so. One sequence of each model must be free.
    Of a model that cannot take tokens back only width 1 at the first context is measured. What must be built for each
    width (`Capabilities.width_steps`) is built before, and takes as long as it takes: half a minute was seen.
    """
    tell = on_progress or (lambda share, what: None)
    if any(model is not None and model.capabilities.width_steps for model in (target, draft)):
        tell(0.0, "building what passes of each width need")
        build(target, draft, clock=clock)
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
        notes = _measure_at(tracks, depths, deadline, tell)
    tell(1.0, "")
    curves = [track.curve() for track in tracks]
    notes.append(f"{_repeats(tracks)} repeats a point, scatter {_scatter_of(tracks):.0%}")
    return Costs(curves[0], curves[1] if draft is not None else None, own_ms, "by localspec tune", tuple(notes))


def build(target: LanguageModel, draft: LanguageModel | None = None, *, clock: Clock = perf_counter) -> float:
    """Have all built that passes of a pair need where each width needs something of its own
    (`Capabilities.width_steps`), by a first pass of each and by reading; the seconds that it took. What that takes is
    no pass's price. One sequence of each model must be free."""
    started = clock()
    for model in (target, draft):
        if model is not None and model.capabilities.width_steps:
            longest = model.info.context_length // 2
            with Passes(model, clock=clock) as passes:
                for width in _widths(model, (), longest if model is target else min(longest, DRAFT_WIDTH)):
                    passes.time(width)
                passes.grow(min(CONTEXTS[0], longest))
    return clock() - started


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
    """A model's sequence, and the milliseconds of its passes: by context, by width, in order. Behind a further context
    widths may be missing."""

    model: LanguageModel
    widths: list[int]
    clock: Clock
    passes: Passes = field(init=False)
    ms: dict[int, dict[int, list[float]]] = field(default_factory=dict)
    context: int = 0

    def __post_init__(self) -> None:
        self.passes = Passes(self.model, clock=self.clock)

    @property
    def key_widths(self) -> set[int]:
        """The few that the others can go by."""
        narrowest = self.widths[0], self.model.capabilities.width_class.min_width
        return {*narrowest, *_KEY_WIDTHS, min(self.widths[-1], _KEY_WIDTHS[-1])} & set(self.widths)

    def grow(self, context: int, until: float) -> bool:
        self.context = context
        self.passes.truncate(min(context, self.passes.length))
        return self.passes.grow(context, until)

    def back(self, context: int) -> None:
        """To an earlier context, as if the present one had not been begun."""
        if self.context != context:
            self.ms.pop(self.context, None)
        self.context = context
        self.passes.truncate(context)

    def repeat(self, width: int) -> None:
        self.here().setdefault(width, []).append(self.passes.time(width))

    def here(self) -> dict[int, list[float]]:
        return self.ms.setdefault(self.context, {})

    def drop_missing(self) -> None:
        """Go on with the widths that there was time for."""
        self.widths = [width for width in self.widths if width in self.here()]

    def first_seconds(self, width: int) -> float:
        """Of a pass at the first context."""
        return float(np.median(_settled(self.ms[min(self.ms)][width]))) / 1e3

    def reading_seconds(self, context: int) -> float:
        """About what reading up to there takes: a token what it takes in the best pass."""
        each = min(self.first_seconds(width) / width for width in self.ms[min(self.ms)])
        return _DEEPER * each * max(context - self.passes.length, 0)

    def curve(self) -> Curve:
        contexts = sorted(self.ms)
        known = [{width: float(np.median(_settled(ms))) for width, ms in self.ms[c].items()} for c in contexts]
        return Curve(tuple(self.widths), tuple(contexts), tuple(_filled(self.widths, known[0], row) for row in known))

    def close(self) -> None:
        self.passes.close()


def _filled(widths: Sequence[int], first: Mapping[int, float], known: Mapping[int, float]) -> tuple[float, ...]:
    """A row of the table from what is known of it and the first row, where nothing is missing. Attention takes about
    as long as width times context says: what depth adds lies on the line between known widths, beyond the last one in
    proportion to the width. It is never less than nothing."""
    places = sorted(known)
    added = [known[width] - first[width] for width in places]

    def by_others(width: int) -> float:
        beyond = max(width / places[-1], 1.0)
        return first[width] + max(beyond * float(np.interp(width, places, added)), 0.0)

    return tuple(known[width] if width in known else by_others(width) for width in widths)


# ---------------------------------------------------------------- contexts


def _measure_at(tracks: Sequence[_Track], depths: Sequence[int], deadline: float, tell: Progress) -> list[str]:
    """Measure at each context that there is time for; what had to be left out, in words."""
    clock = tracks[0].clock
    tell(0.0, f"{depths[0]} tokens of context")
    for track in tracks:
        track.grow(depths[0], float("inf"))
    _look_first(tracks, depths, deadline)
    wanted = _within_reach(tracks, depths, deadline - clock())
    for number, depth in enumerate(wanted):
        tell(number / len(wanted), f"{depth} tokens of context")
        before, ahead = tracks[0].context, wanted[number + 1 :]
        if number and not _go_to(tracks, wanted, number, deadline):
            _go_back(tracks, before, deadline)
            break
        latest = deadline - (_least_seconds(tracks, ahead[0]) if ahead else 0.0)
        passing = deadline - clock() - (_reading_seconds(tracks, ahead[-1]) if ahead else 0.0)
        end = min(clock() + max(passing, 0.0) / (1 + len(ahead)), latest)
        _look_deeper(tracks, end)
        _sweep(tracks, clock() + _SWEEPING * (end - clock()), latest)
        _again(tracks, end)
    return _left_out(tracks, depths)


def _left_out(tracks: Sequence[_Track], depths: Sequence[int]) -> list[str]:
    target = tracks[0]
    missing = [depth for depth in depths if depth > max(target.ms)]
    notes = [f"contexts of {depth} tokens and more were not measured: no time" for depth in missing[:1]]
    for context, found in target.ms.items():
        if len(found) < len(target.widths):
            widths = ", ".join(map(str, sorted(found)))
            notes.append(f"behind {context} tokens widths {widths} were measured, the others go by these")
    return notes


def _within_reach(tracks: Sequence[_Track], depths: Sequence[int], left: float) -> list[int]:
    """The first context and those that there seems to be time for; the second may be nearer than it was asked for,
    and then is the last."""
    first, *further = depths
    for second in range(further[0], _nearest(depths) - 1, -_NEARER) if further else ():
        if _least_seconds(tracks, second) <= _SECOND * left:
            deeper = further[1:] if second == further[0] else []
            return [first, second, *(d for d in deeper if _reading_seconds(tracks, d) <= _GROWING * left)]
    return [first]


def _nearest(depths: Sequence[int]) -> int:
    """The nearest place for a second context."""
    return min(_NEAREST * depths[0], depths[1])


def _least_seconds(tracks: Sequence[_Track], context: int) -> float:
    """About what the least at a further context takes: reading up to it, and passes of the few widths."""
    few = sum(track.first_seconds(width) for track in tracks for width in track.key_widths)
    return _reading_seconds(tracks, context) + _ENOUGH * _DEEPER * few


def _reading_seconds(tracks: Sequence[_Track], context: int) -> float:
    return sum(track.reading_seconds(context) for track in tracks)


def _go_to(tracks: Sequence[_Track], depths: Sequence[int], number: int, deadline: float) -> bool:
    """Read up to a further context and pass over it in the few widths, once. False if there was no time. For the
    second one all time may go, and where reading takes longer than expected its nearest place will do."""
    clock = tracks[0].clock
    second = number == 1
    passing = _least_seconds(tracks, 0)
    by = deadline - passing if second else clock() + _LONGEST * (deadline - clock())
    for depth in (depths[number], _nearest(depths))[: 1 + second]:
        if clock() < by and all(track.grow(depth, by) for track in tracks):
            return _pass_once([job for job in _by_use(tracks) if job[1] in job[0].key_widths], deadline)
    return False


def _go_back(tracks: Sequence[_Track], context: int, end: float) -> None:
    """Spend the time left on an earlier context."""
    for track in tracks:
        track.back(context)
    _look_deeper(tracks, end)
    _sweep(tracks, end, end)


# ---------------------------------------------------------------- passes


def _look_first(tracks: Sequence[_Track], depths: Sequence[int], deadline: float) -> None:
    """Measure each width once at the first context, as far as there is time beside that for a second one. Widths that
    there was none for are dropped."""
    began, jobs = tracks[0].clock(), _by_use(tracks)
    few = [job for job in jobs if job[1] in job[0].key_widths]
    _pass_once(few[: 2 * len(tracks)], float("inf"))
    if _pass_once(few, deadline):
        kept = _least_seconds(tracks, _nearest(depths)) / _SECOND if len(depths) > 1 else 0.0
        _pass_once(jobs, deadline - (kept if kept <= deadline - began else 0.0))
    for track in tracks:
        track.drop_missing()


def _look_deeper(tracks: Sequence[_Track], end: float) -> None:
    """Measure once the widths that are missing at this context, if there is time to repeat them; first those of most
    use."""
    room, wanted = end - tracks[0].clock(), []
    for track, width in _by_use(tracks):
        room -= _ENOUGH * _DEEPER * track.first_seconds(width)
        if room < 0.0:
            break
        wanted.append((track, width))
    _pass_once(wanted, end)


def _pass_once(jobs: Sequence[tuple[_Track, int]], end: float) -> bool:
    """Measure what is missing at this context. False if there was no time for all."""
    for track, width in jobs:
        if track.clock() >= end:
            return False
        if width not in track.here():
            track.repeat(width)
    return True


def _sweep(tracks: Sequence[_Track], end: float, latest: float) -> None:
    """Repeat what is measured here until `end`; the first few times until `latest`."""
    jobs, clock, rng = _jobs(tracks), tracks[0].clock, np.random.default_rng(0)
    order = list(range(len(jobs)))
    for number in range(_MOST_REPEATS - 1):
        order = order[::-1] if number % 2 else rng.permutation(len(jobs)).tolist()
        for place in order:
            if clock() >= (latest if number < _ENOUGH else end):
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
    """What is measured at this context."""
    return [(track, width) for track in tracks for width in track.widths if width in track.here()]


def _by_use(tracks: Sequence[_Track]) -> list[tuple[_Track, int]]:
    """All widths, those of most use first: the few, powers of two, the others."""

    def rank(job: tuple[_Track, int]) -> tuple[bool, bool, int]:
        track, width = job
        return width not in track.key_widths, width & (width - 1) != 0, width

    return sorted(((track, width) for track in tracks for width in track.widths), key=rank)


def _doubtful(track: _Track) -> list[int]:
    """Widths whose repeats scatter, or that cost more than the next wider one."""
    here = track.here()
    widths = sorted(here)
    found = {width for width in widths if _scatter(_settled(here[width])) > _SCATTER}
    for width, wider in pairwise(widths):
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
    return [_settled(ms) for track in tracks for here in track.ms.values() for ms in here.values()]


def _repeats(tracks: Sequence[_Track]) -> str:
    counts = [len(values) for values in _points(tracks)]
    return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(min(counts))


def _scatter_of(tracks: Sequence[_Track]) -> float:
    return float(np.median([_scatter(values) for values in _points(tracks)]))
