"""What it takes to ask a drafter that runs a network: each has times of its own, corrected by what its rounds took.

A draft model's pass costs by its width, whatever it reads, and lanes that draft side by side share it. A trained head
has a start and levels: of a block head nearly all the time is in the start, whatever the tree; any other runs a pass
per level. It works for one lane at a time, and never has to catch up, since the target's passes feed it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from localspec.schedule.cost import Costs, Curve, HeadCosts
from localspec.schedule.haste import Haste
from localspec.schedule.live import about

_MEMORY = 0.98  # a round
_TRUST_START, _TRUST_RATIO = 0.5, 4.0  # rounds before what they say of either counts more than the table
_LEAST_RATIO, _MOST_RATIO = 0.2, 5.0
_STALL = 2.0
_KEPT = 10.0  # rounds that outlive the process


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

    def as_dict(self) -> dict[str, Any]:
        """For `recall`."""
        ...

    def recall(self, data: Mapping[str, Any]) -> None:
        """Go on from what `as_dict` gave. Raises KeyError, TypeError and ValueError for anything else."""
        ...


class _Fit:
    """start + ratio * (what the table says of a round's passes) milliseconds, by least squares over the last rounds;
    both times what the machine is slower just now.

    The table's passes were measured by themselves. Around them a round has work of its own, which does not grow with
    its passes: taken for a part of each, it made the second guess look twice as dear as it is, and where seconds are
    never made nothing would show the error. So where all rounds have one pass most of what is missing is given to the
    start. Sums are of the last rounds' ones, table times and times.
    """

    def __init__(self) -> None:
        self._start, self._ratio = 0.0, 1.0
        self._haste = Haste()
        self._ones = self._table = self._squares = self._ms = self._products = 0.0
        self._least = math.inf

    def sums(self) -> list[float]:
        """For `recall`. What the machine is slower just now is part of them: what of it is the machine, and what the
        table, nobody knows."""
        now = self._haste.factor
        return [self._ones, self._table, self._squares, now * self._ms, now * self._products, self._least]

    def recall(self, sums: Sequence[float]) -> None:
        """Go on from these, as if they were of a few rounds."""
        if len(sums) != 6 or not all(0.0 < float(one) < math.inf for one in sums):
            raise ValueError(f"times of drafting: {sums}")
        *parts, self._least = map(float, sums)
        share = min(1.0, _KEPT / parts[0])
        self._ones, self._table, self._squares, self._ms, self._products = (share * part for part in parts)
        self._solve()

    @property
    def start(self) -> float:
        """Milliseconds around a round's passes."""
        return self._start * self._haste.factor

    @property
    def ratio(self) -> float:
        """Of a pass to the table's."""
        return self._ratio * self._haste.factor

    def add(self, expected_ms: float, ms: float) -> None:
        """A round was expected to take so long, and took so long. A stall counts as a few rounds at most."""
        table = max(expected_ms - self.start, 0.0) / self.ratio
        if table <= 0.0:
            return
        ms = self._haste.observe(expected_ms, min(ms, _STALL * expected_ms), self._ones)
        self._least = min(self._least, table)
        self._ones = _MEMORY * self._ones + 1.0
        self._table = _MEMORY * self._table + table
        self._squares = _MEMORY * self._squares + table**2
        self._ms = _MEMORY * self._ms + ms
        self._products = _MEMORY * self._products + table * ms
        self._solve()

    def _solve(self) -> None:
        doubt = _TRUST_RATIO * self._least**2
        ones, squares, products = self._ones + _TRUST_START, self._squares + doubt, self._products + doubt
        start = (squares * self._ms - self._table * products) / (ones * squares - self._table**2)
        self._start = max(start, 0.0)
        self._ratio = min(max((products - self._table * self._start) / squares, _LEAST_RATIO), _MOST_RATIO)


class _Fits:
    """By about how many lanes draft."""

    def __init__(self) -> None:
        self._fits: dict[int, _Fit] = {}

    def of(self, drafting: int) -> _Fit:
        """With about so many."""
        return self._fits.setdefault(about(drafting), _Fit())

    def observe(self, expected_ms: float, ms: float, drafting: int) -> None:
        """Corrects the table."""
        self.of(drafting).add(expected_ms, ms)

    def as_dict(self) -> dict[str, Any]:
        """As `DraftTimes`."""
        return {str(load): fit.sums() for load, fit in self._fits.items() if fit.sums()[0] > 0.0}

    def recall(self, data: Mapping[str, Any]) -> None:
        """As `DraftTimes`."""
        for load, sums in data.items():
            self.of(int(load)).recall(sums)


class ModelTimes(_Fits):
    """Of the draft model. table: of its passes, by width; none costs nothing."""

    is_shared = True

    def __init__(self, table: Curve | None) -> None:
        super().__init__()
        self._table = table

    def prices(self, context: int, drafting: int) -> DraftPrices:
        """A lane's part of passes that all share."""
        fit = self.of(drafting)

        def extend(width: int) -> float:
            return 0.0 if self._table is None else fit.ratio * self._table.at(width * drafting, context) / drafting

        return DraftPrices(fit.start + extend(1), extend)

    def missed_ms(self, count: int, context: int) -> float:
        """As part of the first pass."""
        extend = self.prices(context, 1).extend
        return extend(1 + count) - extend(1)


class HeadTimes(_Fits):
    """Of a trained head."""

    is_shared = False

    def __init__(self, costs: HeadCosts) -> None:
        super().__init__()
        self._costs = costs

    def prices(self, context: int, drafting: int) -> DraftPrices:
        """Its own passes."""
        fit = self.of(drafting)

        def extend(width: int) -> float:
            return fit.ratio * self._costs.extend.at(width, context)

        return DraftPrices(fit.start + fit.ratio * self._costs.start.at(1, context), extend)

    def missed_ms(self, count: int, context: int) -> float:
        """It was fed all along."""
        return 0.0


def times_of(name: str, known: Costs) -> DraftTimes:
    """Of the drafter with that name: a head of which something is known, or the draft model."""
    costs = known.heads.get(name)
    return ModelTimes(known.draft) if costs is None else HeadTimes(costs)
