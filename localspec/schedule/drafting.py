"""What it takes to ask a drafter that runs a network: each has times of its own, corrected by what its rounds took.

A draft model's pass costs by its width, whatever it reads, and lanes that draft side by side share it. A trained head
has a start and levels: of a block head nearly all the time is in the start, whatever the tree; any other runs a pass
per level. It works for one lane at a time, and never has to catch up, since the target's passes feed it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from localspec.schedule.cost import HeadCosts
from localspec.schedule.plan import LiveCosts, about


@dataclass(frozen=True, slots=True)
class DraftPrices:
    """Milliseconds of one lane in one round. start: until there is something to choose from.  extend: of another pass,
    by the guesses fed to it."""

    start: float
    extend: Callable[[int], float]

    def chain(self, length: int) -> float:
        """Of guessing so many tokens in a row."""
        return self.start + max(length - 1, 0) * self.extend(1)


FREE = DraftPrices(0.0, lambda width: 0.0)
"""Of drafters that only look things up."""


class DraftTimes(Protocol):
    """One drafter's times as they are here and now."""

    is_shared: bool
    """Do lanes that draft side by side share its passes?"""

    def prices(self, context: int, drafting: int) -> DraftPrices:
        """Of a round in which so many lanes draft."""
        ...

    def missed_ms(self, count: int, context: int) -> float:
        """Of reading so many tokens that it has not seen."""
        ...

    def observe(self, expected_ms: float, ms: float, drafting: int) -> None:
        """What a round's guessing took, and what it should have taken."""
        ...


class ModelTimes:
    """Of the draft model."""

    is_shared = True

    def __init__(self, live: LiveCosts) -> None:
        self._live = live

    def prices(self, context: int, drafting: int) -> DraftPrices:
        """A lane's part of passes that all share."""

        def extend(width: int) -> float:
            return self._live.draft_ms(width, context, drafting) / drafting

        return DraftPrices(extend(1), extend)

    def missed_ms(self, count: int, context: int) -> float:
        """As part of the first pass."""
        return self._live.draft_ms(1 + count, context) - self._live.draft_ms(1, context)

    def observe(self, expected_ms: float, ms: float, drafting: int) -> None:
        """Corrects the table."""
        self._live.observe_draft(expected_ms, ms, drafting)


class HeadTimes:
    """Of a trained head."""

    is_shared = False

    def __init__(self, costs: HeadCosts) -> None:
        self._costs = costs
        self._ratio: dict[int, float] = {}  # to the table, by load

    def prices(self, context: int, drafting: int) -> DraftPrices:
        """Its own passes."""
        ratio = self._ratio.get(about(drafting), 1.0)

        def extend(width: int) -> float:
            return ratio * self._costs.extend.at(width, context)

        return DraftPrices(ratio * self._costs.start.at(1, context), extend)

    def missed_ms(self, count: int, context: int) -> float:
        """It was fed all along."""
        return 0.0

    def observe(self, expected_ms: float, ms: float, drafting: int) -> None:
        """Corrects the table."""
        if expected_ms > 0.0:
            ratio = self._ratio.get(about(drafting), 1.0)
            self._ratio[about(drafting)] = ratio + 0.05 * (min(ratio * ms / expected_ms, 5.0) - ratio)


def times_of(name: str, live: LiveCosts) -> DraftTimes:
    """Of the drafter with that name: a head of which something is known, or the draft model."""
    costs = live.costs.heads.get(name)
    return ModelTimes(live) if costs is None else HeadTimes(costs)
