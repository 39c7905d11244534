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
from itertools import accumulate
from operator import mul

from localspec.protocols import Drafter, DraftRequest, Outcome

_PATIENCE = 3  # decisions in a row that come out alike
_SHARE = 0.01  # of the time may go into deciding
_MOST = 4  # rounds without it
_SMOOTHING = 0.1
_NEWS = 0.02  # that a round is of how often guesses come true
_ENOUGH = 20  # rounds that say so
_STAYING = 1.01  # what passes of the same width are worth more: another one costs some passes


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
        self._came: dict[tuple[str, bool], _Came] = {}
        self._too_many: set[tuple[str, int]] = set()  # guesses that a drafter did not make when asked for one more

    def begin(self) -> None:
        """Another answer: decide first, and see again what one guess more would bring."""
        self._alike = self._left = 0
        for came in self._came.values():
            came.forget(self.num)

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
        """A look came out so; None: otherwise than for one drafter's chain. deciding_ms: what it took besides all
        guesses."""
        before, seen = self._decided
        if part is None or part is not self.part or width not in (seen, self.width):
            self._alike, before = 0, 0
        self.part, self._decided = part, (max(num, before), width)
        if part is None:
            self._left = 0
            return
        self._alike += 1
        self._deciding_ms += _SMOOTHING * (deciding_ms - self._deciding_ms) if self._deciding_ms else deciding_ms
        pays = int(self._deciding_ms / (_SHARE * round_ms)) if round_ms > 0.0 else 0
        self._left = min(pays, _MOST) if self._alike >= _PATIENCE and not self._stopped else 0

    @property
    def begins(self) -> bool:
        """Will the next rounds go on with what was decided?"""
        return self._left > 0

    def settle(self, greedy: bool, prices: Callable[[int], tuple[float, int]]) -> None:
        """Take as many guesses as were decided; once it is known how often they come true, as many as brought most in
        the time that they take, up to one more than that. prices: (milliseconds of a round, width) by guesses, if those
        before it were alike."""
        assert self.part is not None
        most, best, chosen = self._decided[0], 0.0, self._decided
        came = self._came_of(self.part, greedy)
        for num in range(1, most + 2) if came.rounds >= _ENOUGH else ():
            if (self.part.name, num) in self._too_many:
                continue
            ms, width = prices(num)
            value = (1.0 + came.expected(num)) / ms * (_STAYING if width == self.width else 1.0)
            if value >= best:
                best, chosen = value, (num, width)
        self.num, self.width = chosen

    def observe(self, context: int, greedy: bool, outcome: Outcome, draft_ms: float) -> None:
        """What became of a round that went on. One without guesses is the last."""
        num = len(outcome.tree)
        self._left = max(self._left - 1, 0) if num else 0
        if self._stopped:
            return
        assert self.part is not None
        self.rounds.append(Repeated(self.part, context, outcome, draft_ms))
        if num == self.num:
            self._came_of(self.part, greedy).add(num, len(outcome.path))
        elif self.num > self._decided[0]:
            self._too_many.add((self.part.name, self.num))

    def _came_of(self, part: Drafter, greedy: bool) -> _Came:
        return self._came.setdefault((part.name, greedy), _Came())


class _Came:
    """How often each guess of a chain came true behind those that had, of chains that were made whatever the text
    was."""

    def __init__(self) -> None:
        self.rounds = 0
        self._shares: list[float] = []
        self._counts: list[int] = []

    def expected(self, num: int) -> float:
        """Of so many guesses; one beyond those that were made is taken to come true as often as the last one."""
        shares = self._shares[:num]
        shares += shares[-1:] * (num - len(shares))
        total: float = sum(accumulate(shares, mul))
        return total

    def add(self, num: int, accepted: int) -> None:
        """One more round."""
        self.rounds += 1
        for depth in range(min(num, accepted + 1)):
            if depth == len(self._shares):
                self._shares.append(0.0)
                self._counts.append(0)
            self._counts[depth] += 1
            news = max(_NEWS, 1.0 / self._counts[depth])
            self._shares[depth] += news * ((accepted > depth) - self._shares[depth])

    def forget(self, num: int) -> None:
        """What came of guesses beyond so many."""
        del self._shares[max(num, 1) :], self._counts[max(num, 1) :]
