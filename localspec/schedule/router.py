"""When a dear drafter that is not the best one is tried nevertheless.

Of several the one that was worth most lately is asked, others only where they alone are expected to bring more than
what is at hand. What is never asked would never be found to have become better: so each is asked a few times at the
start, and later on credit. A small share of a token is put aside in every round that goes by without it, and pays for
a trial once that covers what its work takes.
"""

from __future__ import annotations

from dataclasses import dataclass

_FIRST = 4  # rounds in which each is asked at the start
_SHARE = 0.01  # tokens put aside per round: what trials may cost
_MOST_CREDIT = 2.0  # trials
_SMOOTHING = 0.1


@dataclass(slots=True)
class Trials:
    """Of one drafter. num: rounds in which it was asked.  ms: what that took lately.  owed: trials that need no
    credit."""

    num: int = 0
    ms: float = 0.0
    credit: float = 0.0  # tokens
    owed: int = 0

    def observe(self, ms: float) -> None:
        """It was asked."""
        self.num += 1
        self.ms += max(_SMOOTHING, 1.0 / self.num) * (ms - self.ms)

    def again(self) -> None:
        """Ask it as often as at the start: it may be better by now."""
        self.owed = _FIRST

    def is_due(self, rate: float) -> bool:
        """Is it time for one? If not, some more is put aside. rate: tokens that a millisecond is worth."""
        if self.num < _FIRST or self.owed:
            self.owed = max(self.owed - 1, 0)
            return True
        price = rate * self.ms
        if self.credit >= price:
            self.credit -= price
            return True
        self.credit = min(self.credit + _SHARE, _MOST_CREDIT * price)
        return False
