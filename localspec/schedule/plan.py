"""How much to guess this round: what a node may bring against what it costs.

Over many rounds the speed is (tokens emitted) / (time spent), and it is highest when every round maximises
(tokens) - rate * (milliseconds), where `rate` is the speed that is reached: time is worth the tokens it could
bring elsewhere. (That is Dinkelbach's method for a ratio, or the renewal-reward rule; maximising each round's
own ratio, as the literature does, overspends on rounds that are good anyway.) Costs are a table, so
all sizes are compared: the curve is a staircase, and the first drop of the value is not its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from localspec.schedule.live import LiveCosts

_RECENTLY = 40.0  # rounds that say how fast this text goes, after which older ones count half
_BEFORE = 4.0  # what earlier texts count for when another one begins, in rounds
_FAINT = 0.1  # a leaf with that share of the best one's chance is not worth thinking of
_GLIMPSE = 4  # levels looked ahead when asking whether to go on


@dataclass(frozen=True, slots=True)
class Choice:
    """nodes: how many of the best to verify.  width: of the pass.  value: tokens expected from them, less what
    their time is worth."""

    nodes: int
    width: int
    value: float


class Valuation:
    """One round's prices: `rate` tokens per millisecond, and the pass's cost by number of nodes.

    lanes: so many share the pass, each with as many nodes; a lane then pays its part. `rate` counts all their tokens.
    restart_ms: what verifying anything costs besides.
    """

    def __init__(
        self,
        live: LiveCosts,
        rate: float,
        context: int,
        max_nodes: int,
        lanes: int = 1,
        restart_ms: float = 0.0,
    ) -> None:
        whole, self._widths = live.by_nodes(context, lanes)
        self._ms = whole if lanes == 1 else [ms / lanes for ms in whole]
        if restart_ms > 0.0:
            self._ms = [self._ms[0], *(ms + restart_ms for ms in self._ms[1:])]
        self.rate = rate
        self.max_nodes = min(max_nodes, len(self._ms) - 1)
        base = self._ms[0]
        self._prices = [rate * (ms - base) for ms in self._ms[1 : self.max_nodes + 1]]  # of 1, 2, ... nodes

    def width(self, num_nodes: int) -> int:
        """Of the pass over so many nodes."""
        return self._widths[min(num_nodes, len(self._widths) - 1)]

    def extra_ms(self, num_nodes: int) -> float:
        """What a round that verifies so many takes longer than one that verifies none."""
        return self._ms[min(num_nodes, len(self._ms) - 1)] - self._ms[0]

    def best(self, reach: Sequence[float]) -> Choice:
        """The best number of leading nodes. reach: [N] chances of whole paths, best first."""
        nodes, value = self._best(reach)
        return Choice(nodes, self._widths[nodes], value)

    def _best(self, reach: Sequence[float]) -> tuple[int, float]:
        """(how many, their value)."""
        best, nodes, total = 0.0, 0, 0.0
        for count, (chance, price) in enumerate(zip(reach, self._prices, strict=False), start=1):
            total += chance
            if total - price > best:
                best, nodes = total - price, count
        return nodes, best

    def best_together(self, reaches: Sequence[Sequence[float]], least: int = 0) -> Choice:
        """The best number of leading nodes in every lane, for a pass in which each is as wide as the widest.

        reaches: of each lane [N], best first.  least: nodes that some lane has in any case. A lane that has fewer is
        padded, so all lanes compete for the next place by what it brings to any of them: the search is over all.
        """
        most = min(self.max_nodes, max(map(len, reaches), default=0))
        gains = [sum(reach[count] for reach in reaches if count < len(reach)) for count in range(most)]
        total = sum(gains[:least])
        base, share = self._ms[min(least, len(self._ms) - 1)], len(reaches)
        best, nodes = total, least
        for count in range(least + 1, most + 1):
            total += gains[count - 1]
            value = total - self.rate * share * (self._ms[count] - base)
            if value > best:
                best, nodes = value, count
        return Choice(nodes, self.width(nodes), best)

    def total(self, reach: Sequence[float]) -> float:
        """The value of verifying exactly these nodes."""
        return sum(reach) - self.rate * (self._ms[len(reach)] - self._ms[0])

    def worth_expanding(
        self,
        reach: Sequence[float],
        leaves: Sequence[float],
        usual: float,
        extend_ms: Callable[[int], float],
    ) -> int:
        """How many of the best leaves should get children: 0 if drafting should end.

        reach: chances of all nodes so far.  leaves: those of the nodes that could be expanded, best first.
        usual: chance of the best child of a node where nothing else is known. Looks a few levels ahead, as a single
        one may not reach the next step of the staircase.  extend_ms: of the drafter's pass over so many leaves.
        """
        if not leaves:
            return 0
        most = self.max_nodes  # others can never be verified
        top = sorted(reach, reverse=True)[:most]
        best, chosen = self._best(top)[1], 0
        second = 0.4 * (1.0 - usual)
        hopeful = sum(leaf >= _FAINT * leaves[0] for leaf in leaves)
        for width in sorted({1, 2, 4, 8, hopeful}):
            if width > hopeful:
                break
            price = self.rate * extend_ms(width)
            grown, level = top, leaves[:width]
            for depth in range(1, _GLIMPSE + 1):
                others = [leaf * second for leaf in level] if width > 1 and depth == 1 else []
                level = [leaf * usual for leaf in level]
                grown = sorted([*grown, *others, *level], reverse=True)[:most]
                value = self._best(grown)[1] - depth * price
                if value > best:
                    best, chosen = value, width
                if level[0] * usual < _FAINT:
                    break
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

    def renew(self) -> None:
        """Another text begins: what was seen of others counts no more than a few rounds of it."""
        if self._count > _BEFORE:
            share = _BEFORE / self._count
            self._tokens, self._ms, self._count = share * self._tokens, share * self._ms, _BEFORE

    def add(self, tokens: float, ms: float) -> None:
        """One round."""
        self._tokens += tokens
        self._ms += ms
        self._count += 1.0
        if self._count > _RECENTLY:
            self._tokens, self._ms, self._count = self._tokens / 2.0, self._ms / 2.0, self._count / 2.0
