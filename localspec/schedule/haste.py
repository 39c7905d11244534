"""How fast the machine is just now, beside what was learned of it.

Another program, heat, or a processor that changes its clock makes all passes slower alike, for a second or for an
hour. Learned width by width that takes as long to forget as it took to learn, and what was not tried meanwhile is
believed to be what it was: behind a busy minute a plan chose badly for hundreds of tokens (docs/log.md). So one factor
for all passes of a model is followed quickly, and what is learned of each width is learned beside it.
"""

from __future__ import annotations

import math

_QUICKLY = 0.15  # how much of a pass's news the factor takes over, in logarithms
_SMOOTHING = 0.3  # of what passes take longer or shorter than expected, one behind the other
_SUDDEN = 0.12  # so much of that in a row, in logarithms, and the machine is changing
_NEW = 2.0  # passes of a kind before news of it are as much the machine's as its own
_LEAST, _MOST = 0.2, 10.0


class Haste:
    """factor: what passes take now, over what was learned of them."""

    def __init__(self) -> None:
        self.factor = 1.0
        self._drift = 0.0

    @property
    def trust(self) -> float:
        """How far a pass says something about its width, 0 to 1: while all that passes take longer, or shorter, than
        expected has one sign, it says something about the machine."""
        return 1.0 / (1.0 + (self._drift / _SUDDEN) ** 4)

    def observe(self, expected_ms: float, ms: float, seen: float = math.inf) -> float:
        """A pass was expected to take so long, the factor included, and took so long; what it would take usually.
        seen: such passes before it. What a new one takes says something about such passes, not about the machine:
        where wide passes take twice what a table says, plain decoding, which nobody did meanwhile, does not."""
        if expected_ms > 0.0 and ms > 0.0:
            share = 1.0 if seen == math.inf else seen / (seen + _NEW)
            news = share * math.log(ms / expected_ms)
            self._drift += _SMOOTHING * (news - self._drift)
            self.factor = min(max(self.factor * math.exp(_QUICKLY * news), _LEAST), _MOST)
        return ms / self.factor
