"""How fast the machine is just now, beside what was learned of it.

Another program, heat, or a processor that changes its clock makes all passes slower alike, for a second or for an
hour. Learned width by width that takes as long to forget as it took to learn, and what was not tried meanwhile is
believed to be what it was: behind a busy minute a plan chose badly for hundreds of tokens (docs/log.md). So one factor
for all passes of a model is followed quickly, and what is learned of each width is learned beside it.
"""

from __future__ import annotations

_QUICKLY = 0.15  # how much of a pass's news the factor takes over, in logarithms
_LEAST, _MOST = 0.2, 10.0


class Haste:
    """factor: what passes take now, over what was learned of them."""

    def __init__(self) -> None:
        self.factor = 1.0

    def observe(self, expected_ms: float, ms: float) -> float:
        """A pass was expected to take so long, the factor included, and took so long; what it would take usually."""
        if expected_ms > 0.0 and ms > 0.0:
            self.factor = min(max(self.factor * (ms / expected_ms) ** _QUICKLY, _LEAST), _MOST)
        return ms / self.factor
