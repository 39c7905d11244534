"""One round's choice and what it was made from: what the next rounds learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from localspec.protocols import Load, Proposal
from localspec.schedule.guard import Guard
from localspec.schedule.opinions import Opinions
from localspec.schedule.plan import Valuation
from localspec.tree.token_tree import TokenTree


@dataclass(slots=True)
class Asked:
    """One drafter's part in the round. tree: what it guessed, None while that is on the device.  chances: [N] of each
    edge, corrected.  reach: [N] of each whole path.  hidden_ms: of its work, what the device had yet to do when it was
    asked, so that the target's pass seemed to take it.  on_trial: others were expected to bring more.
    factor: what reach was multiplied by, in hindsight."""

    name: str
    proposal: Proposal
    tree: TokenTree | None
    chances: list[float]
    reach: list[float]
    ms: float
    used: bool = False
    hidden_ms: float = 0.0
    on_trial: bool = False
    factor: float = 1.0

    def value(self, prices: Valuation) -> float:
        """What verifying the best of it is worth; all of it, where it cannot be cut any more."""
        if self.tree is None:
            return prices.total(self.reach)
        return prices.best(sorted(self.reach, reverse=True)).value


@dataclass(frozen=True, slots=True)
class Tried:
    """A drafter that runs a network was asked for guesses that nobody verifies. ms: what it takes to ask it.
    price: tokens that its guard was charged with.  real_ms: what the host was kept from everything else, reading and
    building included.  rate: tokens that a millisecond is worth."""

    guard: Guard
    ms: float
    price: float
    real_ms: float
    rate: float


@dataclass(slots=True)
class Decision:
    """context: tokens.  restart_ms: what dropping the plain pass that had begun would cost.  begins_early: could it?
    lookup: what its guesses are worth, in tokens.  expected: accepted tokens, where that was known.  open: reach and
    owner of the nodes that others choose from.  opinions: where several guessed.  place: of its pass among those of its
    width in a row."""

    context: int = 0
    greedy: bool = True
    load: Load | None = None
    begins_early: bool = False
    restart_ms: float = 0.0
    lookup: float = 0.0
    asked: list[Asked] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)
    expected: float | None = None
    open: tuple[list[float], list[Asked]] | None = None
    opinions: Opinions | None = None
    place: int = 0

    @property
    def lanes(self) -> int:
        """That share the pass."""
        return 1 if self.load is None else self.load.lanes

    @property
    def drafting(self) -> int:
        """Of them, those that share the draft model's passes."""
        return 1 if self.load is None else self.load.drafting


def counted(asked: Sequence[Asked]) -> Mapping[str, int]:
    """What all drafters count, together."""
    total: dict[str, int] = {}
    for one in asked:
        for name, number in one.proposal.counts.items():
            total[name] = total.get(name, 0) + number
    return total
