"""How often to look for guesses where none is worth its time.

Deciding takes the host a few tenths of a millisecond. Beside a pass of 30 ms that is nothing; beside one of 5 ms that a
GPU runs while the host builds the next, it alone would make `auto` slower than plain decoding by a tenth. So behind
some looks that found nothing the next rounds are plain without a look, as many as bring its cost down to a small share
of decoding. What follows is found a few tokens later, and what is found is looked for in every round again. A look in
which a drafter that runs a model was asked is none of these: that is done where it is expected to pay.
"""

from __future__ import annotations

from localspec.protocols import Outcome

_PATIENCE = 3  # looks in a row that find nothing
_SHARE = 0.007  # of the decoding time may go into looking
_MOST = 12  # rounds without a look
_SMOOTHING = 0.1


class LookTime:
    """What a look takes here, whoever looks: kept by a pair's sessions together."""

    def __init__(self) -> None:
        self.ms = 0.0
        self._count = 0

    def observe(self, ms: float) -> None:
        """One look in which no drafter that runs a model was asked. A stall counts little."""
        self._count += 1
        usual = ms if self._count == 1 else min(ms, 3.0 * self.ms)
        self.ms += max(_SMOOTHING, 1.0 / self._count) * (usual - self.ms)


class Rest:
    """The rounds of one session without a look, and what they took since somebody learned from them.

    tokens, ms, rounds: sums.  width: of the last one's pass.
    """

    def __init__(self) -> None:
        self._fruitless = 0
        self._left = 0
        self.width = 1
        self.clear()

    def begin(self) -> None:
        """Another answer: look first."""
        self._fruitless = self._left = 0

    @property
    def is_on(self) -> bool:
        """Is this round plain without a look?"""
        return self._left > 0

    def looked(self, found: bool, ms: float | None, look: LookTime, plain_ms: float) -> None:
        """A look found something worth its time, or nothing. ms: what it took, None where that is not typical.
        plain_ms: of a plain round, where nothing was found."""
        if ms is not None:
            look.observe(ms)
        self._fruitless = 0 if found else self._fruitless + 1
        self._left = min(int(look.ms / (_SHARE * plain_ms)), _MOST) if self._fruitless >= _PATIENCE else 0

    def observe(self, outcome: Outcome) -> None:
        """A round without a look."""
        self._left -= 1
        self.tokens += len(outcome.tokens)
        self.ms += outcome.verify_ms
        self.rounds += 1
        self.width = outcome.width

    def clear(self) -> None:
        """What they took was learned."""
        self.tokens, self.ms, self.rounds = 0, 0.0, 0
