"""How much to guess this round: what a node may bring against what it costs.

Over many rounds the speed is (tokens emitted) / (time spent), and it is highest when every round maximises
(tokens) - rate * (milliseconds), where `rate` is the speed that is reached: time is worth the tokens it could
bring elsewhere. (That is Dinkelbach's method for a ratio, or the renewal-reward rule; maximising each round's
own ratio, as the literature does, overspends on rounds that are good anyway.) Costs are a table, so
all sizes are compared: the curve is a staircase, and the first drop of the value is not its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from localspec.protocols import WidthClass
from localspec.schedule.cost import Costs

MOST_NODES = 64
"""Nodes a round verifies at most."""

_MEMORY = 200.0  # observations after which older ones count half
_TRUST = 2.0  # rounds at a width before its own times outweigh the general correction
_TRUST_PLAIN = 0.25  # the same for plain decoding, by which all gains are judged and which is seldom seen
_OPTIMISM = 0.9
_FORGETTING = 0.98  # of what was seen of a width, per round at another one
_SHARE_OF_CHANGE = 1.0 / 3.0  # of what another width costs at first: it is paid once for some rounds
_WORTH_PADDING = 0.97  # padding a pass is only worth its while if it saves this much
_GLIMPSE = 4  # levels looked ahead when asking whether to go on


@dataclass(slots=True)
class _Seen:
    """What passes of one width took, as a ratio to the table, and the weight of that."""

    ratio: float
    weight: float = 0.0

    def add(self, ratio: float) -> None:
        """One more."""
        weight = min(self.weight, 30.0)
        self.ratio = (weight * self.ratio + ratio) / (weight + 1.0)
        self.weight = weight + 1.0


class LiveCosts:
    """The measured table, corrected by what rounds really took here and now.

    A pass may be quicker if the one before had its width (graphs and kernels are reused; the table, measured in mixed
    order, does not show that). So passes in a row are told apart from first ones.

    optimism: share of its table time that a width is taken to cost until it was tried, so that it is tried: what is
    never used would never be corrected. What was seen of a width is forgotten while others are used, for the same
    reason: a few rounds in which the machine was busy would shut it out. Plain decoding's own width is not flattered,
    and not forgotten.
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
        self.max_width = max(self._steps, default=most)
        self._first: dict[int, _Seen] = {}  # by width, behind another one
        self._again: dict[int, _Seen] = {}  # behind the same one
        self._general = 1.0
        self._steady = 1.0  # what a pass in a row takes, over a first one
        self._last = 0
        self._draft_general = 1.0
        self._cache: tuple[int, list[float], list[int]] | None = None

    def verify_ms(self, width: int, context: int) -> float:
        """A pass of the target of exactly that width, behind what ran last."""
        first, again = self._ratios(width)
        ratio = again if width == self._last else again + _SHARE_OF_CHANGE * (first - again)
        return self.costs.target.at(width, context) * ratio

    def plain_ms(self, context: int) -> float:
        """A pass of plain decoding among others of its kind, padded where a wider one is quicker."""
        alone = self.costs.target.at(self.min_width, context) * self._ratios(self.min_width)[1]
        return min(alone, self.by_nodes(context)[0][0])

    def _ratios(self, width: int) -> tuple[float, float]:
        """(of a first pass, of one in a row) to the table."""
        trust, hope = (_TRUST, self._optimism) if width > self.min_width else (_TRUST_PLAIN, 1.0)

        def believed(seen: _Seen | None, otherwise: float) -> float:
            return otherwise if seen is None else (seen.weight * seen.ratio + trust * otherwise) / (seen.weight + trust)

        first = believed(self._first.get(width), hope * self._general)
        return first, believed(self._again.get(width), first * self._steady)

    def draft_ms(self, width: int, context: int) -> float:
        """A pass of the draft model; 0 without one."""
        return 0.0 if self.costs.draft is None else self.costs.draft.at(width, context) * self._draft_general

    def by_nodes(self, context: int) -> tuple[list[float], list[int]]:
        """(milliseconds, width) of verifying 0, 1, 2, ... nodes: padded where a wider pass is quicker."""
        bucket = context >> 5
        if self._cache is not None and self._cache[0] == bucket:
            return self._cache[1], self._cache[2]
        ms: list[float] = []
        widths: list[int] = []
        for width in range(self.max_width, 0, -1):
            own = self.verify_ms(max(width, self.min_width), context)
            if ms and (ms[-1] < _WORTH_PADDING * own or (self._steps and width not in self._steps)):
                ms.append(ms[-1])
                widths.append(widths[-1])
            else:
                ms.append(own)
                widths.append(max(width, self.min_width))
        ms.reverse()
        widths.reverse()
        self._cache = (bucket, ms, widths)
        return ms, widths

    def observe_verify(self, width: int, context: int, ms: float) -> None:
        """What a pass took. A stall (another program, a page fault) counts as at most three times what was usual."""
        if width < 1 or ms <= 0.0:
            return
        in_a_row = width == self._last
        self._last = width
        first, again = self._ratios(width)
        usual = again if in_a_row else first
        ratio = min(ms / self.costs.target.at(width, context), 3.0 * usual)
        for by_width in (self._first, self._again):
            for other, seen in by_width.items():
                if other != width and other > self.min_width:
                    seen.weight *= _FORGETTING
        (self._again if in_a_row else self._first).setdefault(width, _Seen(ratio)).add(ratio)
        if in_a_row and width in self._first:
            self._steady += 0.05 * (min(ratio / self._first[width].ratio, 1.0) - self._steady)
        self._general += 0.03 * (ratio / (self._steady if in_a_row else 1.0) - self._general)
        self._cache = None

    def observe_draft(self, expected_ms: float, ms: float) -> None:
        """What drafting took, beside what the table says for its passes."""
        if expected_ms > 0.0:
            self._draft_general += 0.05 * (min(self._draft_general * ms / expected_ms, 5.0) - self._draft_general)


@dataclass(frozen=True, slots=True)
class Choice:
    """nodes: how many of the best to verify.  width: of the pass.  value: tokens expected from them, less what
    their time is worth."""

    nodes: int
    width: int
    value: float


class Valuation:
    """One round's prices: `rate` tokens per millisecond, and the pass's cost by number of nodes."""

    def __init__(self, live: LiveCosts, rate: float, context: int, max_nodes: int) -> None:
        self._ms, self._widths = live.by_nodes(context)
        self.rate = rate
        self.max_nodes = min(max_nodes, len(self._ms) - 1)
        self._live, self._context = live, context

    def best(self, reach: Sequence[float]) -> Choice:
        """The best number of leading nodes. reach: [N] chances of whole paths, best first."""
        base = self._ms[0]
        best, nodes, total = 0.0, 0, 0.0
        for count, chance in enumerate(reach[: self.max_nodes], start=1):
            total += chance
            value = total - self.rate * (self._ms[count] - base)
            if value > best:
                best, nodes = value, count
        return Choice(nodes, self._widths[nodes], best)

    def total(self, reach: Sequence[float]) -> float:
        """The value of verifying exactly these nodes."""
        return sum(reach) - self.rate * (self._ms[len(reach)] - self._ms[0])

    def draft_ms(self, width: int) -> float:
        """Milliseconds of a pass of the draft model."""
        return self._live.draft_ms(width, self._context)

    def draft_price(self, width: int) -> float:
        """Tokens that its time is worth."""
        return self.rate * self.draft_ms(width)

    def worth_expanding(self, reach: Sequence[float], leaves: Sequence[float], usual: float) -> int:
        """How many of the best leaves should get children: 0 if drafting should end.

        reach: chances of all nodes so far.  leaves: those of the nodes that could be expanded, best first.
        usual: chance of the best child of a node where nothing else is known. Looks a few levels ahead, as a single
        one may not reach the next step of the staircase.
        """
        if not leaves:
            return 0
        now = self.best(sorted(reach, reverse=True)).value
        best, chosen = now, 0
        second = 0.4 * (1.0 - usual)
        for width in sorted({1, 2, 4, 8, len(leaves)}):
            if width > len(leaves):
                break
            price = self.draft_price(width)
            grown = list(reach)
            level = list(leaves[:width])
            for depth in range(1, _GLIMPSE + 1):
                if width > 1 and depth == 1:
                    grown += [leaf * second for leaf in level]
                level = [leaf * usual for leaf in level]
                grown += level
                value = self.best(sorted(grown, reverse=True)).value - depth * price
                if value > best:
                    best, chosen = value, width
        return chosen


class Rate:
    """Tokens per millisecond, over the last rounds."""

    def __init__(self, rate: float) -> None:
        self._tokens = rate * 1e-3  # next to no weight of its own
        self._ms = 1e-3
        self._count = 0.0

    @property
    def value(self) -> float:
        """Tokens per millisecond."""
        return self._tokens / self._ms

    def add(self, tokens: float, ms: float) -> None:
        """One round."""
        self._tokens += tokens
        self._ms += ms
        self._count += 1.0
        if self._count > _MEMORY:
            self._tokens, self._ms, self._count = self._tokens / 2.0, self._ms / 2.0, self._count / 2.0
