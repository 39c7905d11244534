"""How often to decide anew where decisions come out alike.

Looking things up, and asking again and again whether to go on guessing, takes the host some tenths of a millisecond a
round. Beside a pass of 20 ms that is nothing; beside one of 5 ms on a GPU it was what `auto` lacked to the best chain,
though it chose well (docs/log.md). So behind some decisions in a row for the same drafter, alone, in a chain, in passes
of the same width, the next rounds guess as much without a look, as many as bring its cost down to a small share. What
they bring and take is learned at the next look.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from localspec.protocols import Drafter, DraftRequest, Outcome

_PATIENCE = 3  # decisions in a row that come out alike
_SHARE = 0.01  # of the time may go into deciding
_MOST = 4  # rounds without it
_SMOOTHING = 0.1
_NEWS = 0.02  # that a round is of how often guesses come true
_ENOUGH = 20  # rounds that say so
_STAYING = 1.01  # what passes of the same width are worth more: another one costs some passes
_LEAST = 1e-6


@dataclass(frozen=True, slots=True)
class Repeated:
    """A round that guessed as the last ones did. part: who guessed.  context: tokens.  draft_ms: what that took."""

    part: Drafter
    context: int
    outcome: Outcome
    draft_ms: float


class Steady:
    """What one session decided last, and the rounds since then that went on with it.

    part, num, width: who guesses, how many in a chain, in passes of what width.  rounds: of which nobody has learned.
    """

    def __init__(self) -> None:
        self.part: Drafter | None = None
        self.num = self.width = 0
        self.rounds: list[Repeated] = []
        self._decided = 0, 0  # (guesses, width) of the last decisions
        self._alike = self._left = 0
        self._deciding_ms = 0.0
        self._stopped = False
        self._came: dict[str, _Came] = {}

    def begin(self) -> None:
        """Another answer: decide first."""
        self._alike = self._left = 0

    def stop(self) -> None:
        """Decide in every round from now on."""
        self._stopped, self._left = True, 0

    def goes_on(self, request: DraftRequest) -> bool:
        """Is this round one like the last ones?"""
        return (
            self._left > 0
            and self.num <= request.max_depth
            and self.width <= request.max_nodes + 1
            and request.load is None
            and request.sampler.constraint is None
        )

    def decided(self, part: Drafter | None, num: int, width: int, deciding_ms: float, round_ms: float) -> None:
        """A look came out so; None: otherwise than for one drafter's chain. deciding_ms: what it took besides its
        guesses."""
        self._deciding_ms += _SMOOTHING * (deciding_ms - self._deciding_ms) if self._deciding_ms else deciding_ms
        before, seen = self._decided
        if part is None or part is not self.part or width not in (seen, self.width):
            self._alike, before = 0, 0
        self.part, self._decided = part, (max(num, before), width)
        self._alike += part is not None
        pays = int(self._deciding_ms / (_SHARE * round_ms)) if round_ms > 0.0 else 0
        self._left = min(pays, _MOST) if self._alike >= _PATIENCE and not self._stopped else 0

    @property
    def begins(self) -> bool:
        """Will the next rounds go on with what was decided?"""
        return self._left > 0

    def settle(self, greedy: bool, prices: Callable[[int], tuple[float, int]]) -> None:
        """Take as many guesses as brought most in the time that they take, where that is known: up to one more than
        were decided. prices: (milliseconds of a round, width) by guesses, if those before it were alike."""
        assert self.part is not None
        most, best, chosen = self._decided[0], 0.0, (self.num, self.width)
        came = self._came.setdefault(f"{self.part.name} {greedy}", _Came())
        for num in range(1, most + 2) if came.rounds >= _ENOUGH else (most,):
            ms, width = prices(num)
            value = (1.0 + came.expected(num)) / ms * (_STAYING if width == self.width else 1.0)
            if value >= best:
                best, chosen = value, (num, width)
        self.num, self.width = chosen

    def observe(self, context: int, greedy: bool, outcome: Outcome, draft_ms: float) -> None:
        """What became of a round that went on. One without guesses is the last."""
        self._left = max(self._left - 1, 0) if len(outcome.tree) else 0
        assert self.part is not None
        self.rounds.append(Repeated(self.part, context, outcome, draft_ms))
        if len(outcome.tree) == self.num:
            self._came.setdefault(f"{self.part.name} {greedy}", _Came()).add(self.num, len(outcome.path))


class _Came:
    """How often so many guesses came true, of those that were made whatever the text was."""

    def __init__(self) -> None:
        self.rounds = 0
        self.shares: list[float] = []
        self._counts: list[int] = []

    def expected(self, num: int) -> float:
        """Of so many guesses; the first one beyond what was made is taken to come true as the last one did."""
        shares = self.shares[:num]
        if 1 < len(shares) < num:
            shares.append(shares[-1] ** 2 / max(shares[-2], shares[-1], _LEAST))
        return sum(shares)

    def add(self, num: int, accepted: int) -> None:
        """One more round."""
        self.rounds += 1
        while len(self.shares) < num:
            self.shares.append(0.0)
            self._counts.append(0)
        for depth in range(num):
            self._counts[depth] += 1
            share = max(_NEWS, 1.0 / self._counts[depth])
            self.shares[depth] += share * ((accepted > depth) - self.shares[depth])
