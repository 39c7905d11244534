"""What passes take here and now: the measured table, corrected by what rounds really took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from localspec.protocols import WidthClass
from localspec.schedule.cost import Costs, Curve
from localspec.schedule.haste import Haste

MOST_NODES = 64
"""Nodes a round verifies at most."""

_MEMORY = 200.0  # observations after which older ones count half
_KEPT = 1.0  # rounds at a width that outlive the process
_TRUST = 1.0  # rounds at a width before its own times outweigh the general correction
_TRUST_PLAIN = 0.25  # the same for plain decoding, by which all gains are judged and which is seldom seen
_OPTIMISM, _HOPE = 0.9, 0.94
_SCATTER, _STEEP = 0.06, 3000.0  # of a pass's time; cells of context for which a row may take what the first one does
_LEAST = 0.3  # of what the table says and a width's passes took, however far the context is from theirs
_SLOWLY = 0.03  # how much of a round's news untried widths take over
_FORGETTING = 0.985  # of what was seen of a width, per round at another one
_STALL_AT_FIRST, _STALL, _KNOWN = 3.0, 1.4, 2.0  # most that a pass may count, over what was usual; passes until then
_LONG = 16  # passes of one width, after which little is learned of it
_OFTEN = 8  # passes of a width in a row before it is hoped for nothing
_ALIKE = 1.15  # that the second pass of a width may take over the later ones and count as one of them
_FIRST = 12  # passes that correct the table, before any news may be the machine's
_WORTH_PADDING = 0.97  # padding a pass is only worth its while if it saves this much
_LEAST_ROOM, _WIDER = 4, 2  # nodes a lane may have in any case; a shared pass may be so many times as wide as a lane's
_NEWS = 4  # passes in a row of one width, once that is known, after which prices are worked out again


def about(lanes: int) -> int:
    """The power of two from `lanes` on: what is learned with 9 lanes holds with 16."""
    return 1 << (lanes - 1).bit_length()


@dataclass(slots=True)
class _Seen:
    """What passes of one width took, as a ratio to the table, at which context on average; and the weight of that."""

    ratio: float
    context: float
    weight: float = 0.0

    def add(self, ratio: float, context: float, share: float) -> None:
        """One more, which counts as a share of one."""
        weight = min(self.weight, 30.0)
        self.ratio = (weight * self.ratio + share * ratio) / (weight + share)
        self.context = (weight * self.context + share * context) / (weight + share)
        self.weight = weight + share


@dataclass(slots=True)
class _Trend:
    """Of passes of one width: how what they take beyond the table goes with the context. Sums of deviations."""

    count: float = 0.0
    context: float = 0.0
    ms: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def add(self, context: float, ms: float) -> None:
        """One more. Source: Welford's update."""
        self.count += 1.0
        step = context - self.context
        self.context += step / self.count
        self.ms += (ms - self.ms) / self.count
        self.squares += step * (context - self.context)
        self.products += step * (ms - self.ms)
        if self.count > _MEMORY:
            self.count, self.squares, self.products = self.count / 2.0, self.squares / 2.0, self.products / 2.0


@dataclass(slots=True)
class _Learned:
    """With about so many lanes: passes by width, behind one of another width and behind some of the same; all of them;
    how often any was seen; what a pass in a row takes over a first one, and the second one over later ones; how many of
    each width were in a row, and second ones of all; how passes, by their rows, grow with the context where the table
    does not know; and how fast all are just now."""

    first: dict[int, _Seen] = field(default_factory=dict)
    again: dict[int, _Seen] = field(default_factory=dict)
    general: float = 1.0  # of what the table and the growth say together
    count: int = 0
    steady: float = 1.0
    second: float = 1.0
    in_a_row: dict[int, int] = field(default_factory=dict)
    seconds: int = 0
    trends: dict[tuple[int, bool], _Trend] = field(default_factory=dict)
    slope: float = 0.0  # milliseconds a row and cell of context
    haste: Haste = field(default_factory=Haste)
    width: int = 0  # of the last passes, whatever prompts came between
    row: int = 0  # how many

    def follow(self, curve: Curve, rows: int, context: int, ms: float, in_a_row: bool) -> None:
        """A pass of so many rows took so long. Attention is what grows with the context, for each row alike; that much
        is assumed, and that the table is not far off: little evidence changes little. One of several contexts knows.
        First passes take longer, and stand where contexts are short: next to others they would look like growth.
        """
        if len(curve.contexts) > 1:
            return
        self.trends.setdefault((rows, in_a_row), _Trend()).add(context, ms - curve.at(rows, context))
        evidence, weight = 0.0, (_SCATTER * _STEEP / curve.at(1, context)) ** 2
        for (size, _), trend in self.trends.items():
            usual = curve.at(size, context)  # errors are in proportion to what a pass takes
            evidence += size * trend.products / usual**2
            weight += size**2 * trend.squares / usual**2
        self.slope = evidence / weight


class LiveCosts:
    """The measured table, corrected by what rounds really took here and now.

    Widths are those of one lane; where `lanes` share a pass, each is as wide. What was learned with about so many lanes
    is kept apart from what was learned with others, and starts from the same table; with several lanes nothing is
    flattered, for all of them would pay.
    A pass may be quicker if the one before had its width (graphs and kernels are reused; the table, measured in mixed
    order, does not show that). So passes in a row are told apart from first ones; and the second of a row from later
    ones, where it takes longer (it may be the one that is recorded). Who decodes in passes of one width mostly says so
    (`keep`, until the next answer), and then another width is charged all that it takes to come to quick ones there.
    optimism: share of its table time that a width is taken to cost until it was tried, so that it is tried: what is
    never used would never be corrected. What was seen of a width is forgotten while others are used, for the same
    reason: a few rounds in which the machine was busy would shut it out. Plain decoding's own width is not flattered,
    and not forgotten.
    steps: the widths to keep to; none: those that were measured, for the curve is no line between them (kernels take
    rows by fours: 15 may cost half as much again as 16). Where lanes share a pass the table is read between its widths.
    """

    def __init__(
        self,
        costs: Costs,
        width_class: WidthClass,
        max_width: int,
        *,
        optimism: float = _OPTIMISM,
        steps: Sequence[int] = (),
    ) -> None:
        self.costs = costs
        self._optimism = optimism
        self.min_width = width_class.min_width
        most = min(max_width, width_class.max_width or max_width, MOST_NODES + 1)
        self._steps = frozenset(step for step in steps if self.min_width <= step <= most)
        measured = frozenset(width for width in costs.target.widths if self.min_width <= width <= most)
        self._alone = self._steps or (measured if len(measured) > 1 else frozenset())
        self.max_width = max(self._steps, default=most)
        self._learned: dict[int, _Learned] = {}
        self._last, self._place = (0, 0), 0  # lanes and width of the last pass; passes before it in its row
        self._behind = (0, 0)  # what the next one is priced behind
        self._kept = 0  # width
        self._recorded, self._is_new = 0, False  # width of the last row of passes; it has one pass yet, behind another
        self._cache: dict[int, tuple[int, list[float], list[int]]] = {}
        self._unpriced = 0  # passes that the cached prices do not know
        self._plain: dict[int, tuple[int, float]] = {}  # by lanes, at a context: asked for several times a round

    def verify_ms(self, width: int, context: int, lanes: int = 1) -> float:
        """A pass of the target of exactly that width, behind what ran last; with what the next one takes longer, where
        it leaves a width that is kept to."""
        first, again = self._expected(width, context, lanes)
        if (lanes, width) == self._behind:
            return again
        leaves = lanes == 1 and self._behind == (1, self._kept)
        return first + (self.second_ms(width, context) if leaves else 0.0)

    def change_ms(self, width: int, context: int) -> float:
        """What passes of one lane of that width take more from here on, until they are as quick as in a row."""
        first, again = self._expected(width, context, 1)
        return (0.0 if self._behind == (1, width) else max(first - again, 0.0)) + self.second_ms(width, context)

    def second_ms(self, width: int, context: int) -> float:
        """What the second of them takes more than later ones: nothing where the last row of passes had that width, be
        it before a prompt."""
        learned, is_recorded = self._of(1), width == self._recorded and not self._is_new
        if is_recorded or learned.seconds <= _KNOWN or learned.second <= _ALIKE:
            return 0.0
        return self._expected(width, context, 1)[1] * (learned.second - 1.0)

    def keep(self, width: int) -> None:
        """Decoding goes on in passes of that width; 0: of no one width. At the start of an answer the
        first pass takes as long in any, so there that one is taken to have run."""
        if width and self._behind == (0, 0):
            self._behind = (1, width)
            self._cache.clear()
        if width != self._kept:
            self._kept = width
            self._cache.clear()

    def begin(self) -> None:
        """Another answer: its first pass is behind one that read the prompt."""
        self._last, self._place, self._behind, self._kept = (0, 0), 0, (0, 0), 0
        self._cache.clear()

    def plain_ms(self, context: int, lanes: int = 1) -> float:
        """A pass of plain decoding among others of its kind, padded where a wider one is quicker."""
        known = self._plain.get(lanes)
        if known is None or known[0] != context:
            alone = self._expected(self.min_width, context, lanes)[1]
            known = self._plain[lanes] = context, min(alone, self.by_nodes(context, lanes)[0][0])
        return known[1]

    def in_a_row_ms(self, width: int, context: int) -> float:
        """A pass of one lane behind others of its width."""
        return self._expected(width, context, 1)[1]

    def settled_ms(self, nodes: int, context: int) -> tuple[float, int]:
        """(milliseconds, width) of verifying so many nodes of one lane, round after round, in the narrowest pass that
        has room. A width that was seldom seen in a row is hoped to gain by it what others do, and a little more, so
        that it is tried. Infinitely many where there is no such pass."""
        if nodes >= self.max_width:
            return math.inf, nodes + 1
        least = max(nodes + 1, self.min_width)
        width = min((step for step in self._alone if step >= least), default=least)
        learned = self._of(1)
        first, again = self._expected(width, context, 1)
        seldom = learned.in_a_row.get(width, 0) < _OFTEN
        return min(again, _HOPE * first * learned.steady) if seldom else again, width

    def by_nodes(self, context: int, lanes: int = 1) -> tuple[list[float], list[int]]:
        """(milliseconds, width) of verifying 0, 1, 2, ... nodes of each lane: padded where a wider pass is quicker."""
        bucket = context >> 5
        if lanes in self._cache and self._cache[lanes][0] == bucket:
            return self._cache[lanes][1:]
        ms: list[float] = []
        widths: list[int] = []
        most = min(self.max_width, max(self.min_width + _LEAST_ROOM, self.max_width * _WIDER // lanes))
        steps = self._alone if lanes == 1 else self._steps
        most = max((step for step in steps if step <= most), default=most)
        for width in range(most, 0, -1):
            skipped = bool(ms and steps) and width not in steps
            own = 0.0 if skipped else self.verify_ms(max(width, self.min_width), context, lanes)
            if skipped or (ms and ms[-1] < _WORTH_PADDING * own):
                ms.append(ms[-1])
                widths.append(widths[-1])
            else:
                ms.append(own)
                widths.append(max(width, self.min_width))
        ms.reverse()
        widths.reverse()
        self._cache[lanes] = (bucket, ms, widths)
        return ms, widths

    def ran(self, width: int, lanes: int = 1) -> int:
        """A pass of that width was the last one: how many of its width were before it in a row, where 1 stands for one
        that may be recorded: not where the last row had its width, too. A single pass of another width is enough for
        what was recorded to be of no use. To be told at once, where what it took is told later."""
        self._place = self._place + 1 if (lanes, width) == self._last else 0
        self._last = lanes, width
        if self._place == 0 and (lanes, width) != (1, self._recorded):
            self._recorded, self._is_new = width if lanes == 1 else 0, lanes == 1
            self._cache.clear()
        elif lanes == 1 and self._place == 1:
            self._place += not self._is_new
            self._is_new = False
        if self._behind != self._last:
            self._behind = self._last
            self._cache.clear()
        return self._place

    def observe_verify(
        self, width: int, context: int, ms: float, lanes: int = 1, *, early: bool = False, place: int | None = None
    ) -> None:
        """What a pass took. early: it had begun before its round did, so it seems to take less than the table says,
        which is true of no other width.  place: what `ran` said of it; None: it is told now. A stall (another program,
        a page fault) counts as a little more than what was usual, once that is known: what is really slower now is
        found out within some rounds all the same. What is slower for all widths is told apart (`haste.py`).
        Of a width that ran for long less and less is learned: what its passes take and the machine's factor can only be
        told apart by passes of another width. Else noise has them wander apart, as one follows the mean and the other
        the mean of logarithms, and widths that do not run seem dear, or quick."""
        if width < 1 or ms <= 0.0:
            return
        place = self.ran(width, lanes) if place is None else place
        learned, in_a_row = self._of(about(lanes)), place > 0
        curve, rows = self.costs.target, lanes * width
        usual = self._expected(width, context, lanes)[in_a_row]
        before = (learned.again if in_a_row else learned.first).get(width)
        known = 0.0 if before is None else before.weight
        if place == 1 and self._is_apart(learned, usual, ms, known):
            return
        learned.row = learned.row + 1 if width == learned.width else 1
        learned.width = width
        most = _STALL_AT_FIRST if known < _KNOWN else _STALL
        ms = learned.haste.observe(usual, min(ms, most * usual), known)
        ratio, trust = ms / curve.at(rows, context), learned.haste.trust if learned.count >= _FIRST else 1.0
        own = trust * min(1.0, _LONG / learned.row)
        for by_width in (learned.first, learned.again):
            for other, seen in by_width.items():
                if other != width and other > self.min_width:
                    seen.weight *= _FORGETTING
        (learned.again if in_a_row else learned.first).setdefault(width, _Seen(ratio, context)).add(ratio, context, own)
        learned.in_a_row[width] = learned.in_a_row.get(width, 0) + in_a_row
        if in_a_row and width in learned.first:
            learned.steady += 0.05 * trust * (min(ratio / learned.first[width].ratio, 1.0) - learned.steady)
        learned.count += 1
        step = _SLOWLY if lanes == 1 else max(_SLOWLY, 1.0 / learned.count)  # several lanes: the table is a guess
        if not early:
            grown = self._grown(rows, context, learned)
            learned.general += step * trust * (ms / grown / (learned.steady if in_a_row else 1.0) - learned.general)
        learned.follow(curve, rows, context, ms, in_a_row)
        self._plain.clear()
        self._unpriced += 1
        if not in_a_row or learned.again[width].weight < _NEWS or self._unpriced >= _NEWS:
            self._cache.clear()
            self._unpriced = 0

    def _is_apart(self, learned: _Learned, usual: float, ms: float, known: float) -> bool:
        """The second pass of a row took so long, where later ones, of which so many are known, are expected to take
        `usual`. Does it tell nothing of them, but of the machine? So it is until it is known that they are alike."""
        haste, is_new = learned.haste, learned.seconds < _KNOWN
        is_apart = is_new or learned.second > _ALIKE
        ms = min(ms, _STALL_AT_FIRST * usual if is_new else _STALL * learned.second * usual)
        now = ms / usual
        if is_apart:
            before = haste.factor
            now = haste.observe(learned.second * usual, ms, known) * before / usual
        trust = haste.trust if learned.count >= _FIRST else 1.0
        learned.seconds += 1
        learned.second += max(0.05, 1.0 / (learned.seconds + 1)) * trust * (now - learned.second)
        self._cache.clear()
        return is_apart

    def as_dict(self) -> dict[str, Any]:
        """For `recall`, as the machine is now."""

        def seen(by_width: Mapping[int, _Seen], now: float) -> dict[str, list[float]]:
            return {str(width): [now * one.ratio, one.context] for width, one in by_width.items()}

        return {
            str(load): {
                "general": learned.haste.factor * learned.general,
                "steady": learned.steady,
                "second": [learned.second, learned.seconds],
                "first": seen(learned.first, learned.haste.factor),
                "again": seen(learned.again, learned.haste.factor),
            }
            for load, learned in self._learned.items()
        }

    def recall(self, data: Mapping[str, Any]) -> None:
        """Go on from what `as_dict` gave, which counts as little. Raises KeyError, TypeError and ValueError."""
        for load, found in data.items():
            learned = _Learned(general=float(found["general"]), steady=float(found["steady"]))
            second, seconds = found.get("second", (1.0, 0))  # unknown before
            learned.second, learned.seconds = float(second), int(seconds)
            for by_width, stored in ((learned.first, found["first"]), (learned.again, found["again"])):
                for width, (ratio, context) in stored.items():
                    by_width[int(width)] = _Seen(float(ratio), float(context), _KEPT)
            self._learned[int(load)] = learned
        self._cache.clear()
        self._plain.clear()

    def _of(self, load: int) -> _Learned:
        found = self._learned.get(load)
        if found is None:
            found = self._learned[load] = _Learned()
        return found

    def _grown(self, rows: int, context: int, learned: _Learned) -> float:
        """What the table says, and how passes grow beyond it."""
        table = self.costs.target.at(rows, context)
        return max(table + learned.slope * rows * (context - self.costs.target.contexts[0]), _LEAST * table)

    def _expected(self, width: int, context: int, lanes: int) -> tuple[float, float]:
        """Milliseconds (of a first pass, of one in a row)."""
        learned = self._of(about(lanes))
        trust = _TRUST if width > self.min_width else _TRUST_PLAIN
        untried = width > self.min_width and width not in learned.first and width not in learned.again
        hope = self._optimism if untried and lanes == 1 else 1.0  # once is enough: more would go on trying what loses
        rows = lanes * width
        table = self.costs.target.at(rows, context)

        def believed(seen: _Seen | None, otherwise: float) -> float:
            if seen is None:
                return otherwise
            own = max(seen.ratio * table + learned.slope * rows * (context - seen.context), _LEAST * table)
            return (seen.weight * own + trust * otherwise) / (seen.weight + trust)

        first = believed(learned.first.get(width), self._grown(rows, context, learned) * learned.general * hope)
        again = believed(learned.again.get(width), first * learned.steady)
        return first * learned.haste.factor, again * learned.haste.factor
