"""What one drafter says in one round, and the budget that it guesses by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

from localspec.protocols import Budget, Proposal
from localspec.schedule.drafting import DraftPrices
from localspec.schedule.experience import Record
from localspec.schedule.plan import Valuation
from localspec.tree.grow import Grower
from localspec.tree.token_tree import TokenTree

NO_TREE = Proposal("").tree()


@dataclass(slots=True)
class Asked:
    """One drafter's part in the round. tree: what it guessed, None while that is on the device.  chances: [N] of each
    edge, corrected.  reach: [N] of each whole path.  hidden_ms: of its work, what the device had yet to do when it was
    asked, so that the target's pass seemed to take it.  on_trial: others were expected to bring more.
    factor: what reach was multiplied by, in hindsight; None for a drafter that is not judged so."""

    name: str
    proposal: Proposal
    tree: TokenTree | None
    chances: list[float]
    reach: list[float]
    ms: float
    used: bool = False
    hidden_ms: float = 0.0
    on_trial: bool = False
    factor: float | None = None

    def value(self, prices: Valuation) -> float:
        """What verifying the best of it is worth; all of it, where it cannot be cut any more."""
        if self.tree is None:
            return prices.total(self.reach)
        return prices.best(sorted(self.reach, reverse=True)).value


class Plan:
    """The budget of one drafter in one round."""

    def __init__(self, prices: Valuation, drafting: DraftPrices, record: Record) -> None:
        self._prices, self._drafting, self._record = prices, drafting, record
        self._reach: list[float] = []
        self.expected_ms = drafting.start

    def expand(self, grower: Grower, nodes: Sequence[int]) -> list[int]:
        """The best of the newest nodes, as many as pay for a pass."""
        reach, record = self._reach, self._record
        for node in range(len(reach), len(grower)):
            parent = grower.parent(node)
            chance = record.reliability.chance(grower.log_q(node), grower.depth(node))
            reach.append(chance * (reach[parent] if parent >= 0 else 1.0))
        ranked = sorted(nodes, key=lambda node: -reach[node])
        leaves = [reach[node] for node in ranked]
        deeper = 1 + max((grower.depth(node) for node in nodes), default=0)
        count = self._prices.worth_expanding(reach, leaves, record.reliability.chance_at(deeper), self._drafting.extend)
        if count:
            self.expected_ms += self._drafting.extend(count)
        return sorted(ranked[:count])


class Beside:
    """Work that is done once, by whoever finds the time first. ms: what it took, 0 until it is done."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self.ms = 0.0

    def __call__(self) -> None:
        """Do it, if nobody has."""
        if self._work is not None:
            work, self._work = self._work, None
            started = perf_counter()
            work()
            self.ms = (perf_counter() - started) * 1e3


def products(tree: TokenTree, chances: Sequence[float]) -> list[float]:
    """[N] chance of the whole path to each node, from those [N] of the edges."""
    reach: list[float] = []
    for parent, chance in zip(tree.parent.tolist(), chances, strict=True):
        reach.append(chance * (reach[parent] if parent >= 0 else 1.0))
    return reach


def counted(asked: Sequence[Asked]) -> Mapping[str, int]:
    """What all drafters count, together."""
    total: dict[str, int] = {}
    for one in asked:
        for name, number in one.proposal.counts.items():
            total[name] = total.get(name, 0) + number
    return total


_: type[Budget] = Plan
