"""What the guesses of trained heads take, measured through the contract alone, in bounded time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from time import perf_counter

import numpy as np

from localspec.protocols import DraftHead, HeadInfo, HeadState, HostTokens, LanguageModel, Rewind
from localspec.schedule.cost import Costs, Curve, HeadCosts
from localspec.schedule.passes import Clock, Passes

WIDTHS = (1, 2, 4, 8)
"""Guesses fed at once."""
CONTEXTS = (64, 512)
_SECONDS = 1.0  # per head and context
_ENOUGH, _MOST = 4, 25  # repeats
_USUAL_LEVELS = 8
_MOST_WAITING = 0.25  # of a pass of the target
MOST_CHILDREN = 4  # read of each row


def measure_heads(
    target: LanguageModel, heads: Sequence[DraftHead], *, seconds: float = _SECONDS, clock: Clock = perf_counter
) -> Mapping[str, HeadCosts]:
    """By kind. One sequence of the target must be free. Contexts that do not fit are left out; of a target that cannot
    take tokens back nothing is measured."""
    if target.capabilities.rewind is Rewind.NEVER:
        return {}
    longest = target.info.context_length // 2
    contexts = [context for context in CONTEXTS if context <= longest] or [max(longest, 1)]
    found = {}
    for head in heads:
        with Passes(target) as passes, closing(head.open(passes.state)) as beside:
            track = _Track(head, beside, passes, clock)
            for context in contexts:
                passes.grow(context)
                track.measure(context, clock() + seconds)
            found[head.info.kind] = track.costs()
    return found


def build_heads(target: LanguageModel, heads: Sequence[DraftHead]) -> None:
    """Have all built that guesses need, where passes need something built in every process
    (`Capabilities.width_steps`), by making each kind of them once. One sequence of the target must be free."""
    known = target.capabilities
    if not known.width_steps or known.rewind is Rewind.NEVER:
        return
    for head in heads:
        with Passes(target) as passes, closing(head.open(passes.state)) as beside:
            passes.grow(min(CONTEXTS[0], max(target.info.context_length // 2, 1)))
            _Track(head, beside, passes, perf_counter).once()


def pays_to_wait(info: HeadInfo, costs: Costs) -> bool:
    """Is a tree worth waiting for a device level by level? Only of a head of one pass, and where all levels together
    take little beside a pass of the target. A chain is guessed without waiting."""
    if not info.one_pass:
        return False
    own = costs.heads.get(info.kind)
    levels = info.levels or _USUAL_LEVELS
    return own is None or levels * own.extend.at(1, CONTEXTS[0]) <= _MOST_WAITING * costs.target.at(1, CONTEXTS[0])


def assumed_heads(heads: Sequence[DraftHead], one_ms: float, num_parameters: int) -> Mapping[str, HeadCosts]:
    """Where nothing was measured: in proportion to the target's, which takes `one_ms` a token."""
    found = {}
    for head in heads:
        own = one_ms * head.info.num_parameters / max(num_parameters, 1)
        more = 0.02 * own if head.info.one_pass else own
        found[head.info.kind] = HeadCosts(_flat((1,), own), _flat(WIDTHS, more))
    return found


def _flat(widths: Sequence[int], ms: float) -> Curve:
    least = max(ms, 1e-6)
    return Curve(tuple(widths), (64,), (tuple(least * (1.0 + 0.05 * (width - 1)) for width in widths),))


class _Track:
    """Repeats of one head's work by context."""

    def __init__(self, head: DraftHead, beside: HeadState, passes: Passes, clock: Clock) -> None:
        self._on_host = head.info.host_scores
        levels = head.info.levels
        most = 1 if not head.info.trees else max(WIDTHS)
        self._widths = [width for width in WIDTHS if width <= most] if levels is None or levels > 1 else []
        self._beside, self._passes, self._clock = beside, passes, clock
        self._start: dict[int, float] = {}
        self._extend: dict[int, list[float]] = {}

    def once(self) -> None:
        """Start and one level of each width."""
        for width in self._widths or [0]:
            self._time(0)
            if width:
                self._time(width)

    def measure(self, context: int, until: float) -> None:
        """Start and one level of each width, again and again; the first time is warming up."""
        starts: list[float] = []
        extends: dict[int, list[float]] = {width: [] for width in self._widths}
        for number in range(_MOST):
            if number >= _ENOUGH and self._clock() >= until:
                break
            for width in self._widths or [0]:
                starts.append(self._time(0))
                if width:
                    extends[width].append(self._time(width))
        self._start[context] = float(np.median(starts[1:]))
        self._extend[context] = [float(np.median(extends[width][1:])) for width in self._widths]

    def costs(self) -> HeadCosts:
        """The medians."""
        contexts = tuple(self._start)
        start = Curve((1,), contexts, tuple((ms,) for ms in self._start.values()))
        if not self._widths:  # a single level, behind which nothing is ever fed
            return HeadCosts(start, start)
        return HeadCosts(start, Curve(tuple(self._widths), contexts, tuple(map(tuple, self._extend.values()))))

    def _time(self, width: int) -> float:
        """Milliseconds until the best children are on the host. width: guesses fed below the anchor; 0: the start."""
        ids = self._passes.random(max(width, 1))
        started = self._clock()
        beside = self._beside
        scores = beside.extend(HostTokens(ids), [-1] * width) if width else beside.start(int(ids[0]))
        if self._on_host:
            scores.rows((0,)).argmax()
        else:
            scores.top(MOST_CHILDREN).numpy()
        beside.confidence()
        return max((self._clock() - started) * 1e3, 1e-6)
