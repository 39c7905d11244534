"""How often to decide anew where decisions come out alike.

Looking things up, and asking again and again whether to go on guessing, takes the host some tenths of a millisecond a
round. Beside a pass of 20 ms that is nothing; beside one of 5 ms on a GPU it was what `auto` lacked to the best chain,
though it chose well (docs/log.md). So behind some decisions in a row for the same drafter, alone, in a chain, in passes
of the same width, the next rounds guess as much without a look, as many as bring its cost down to a small share; in an
answer behind one that ended so the first decision is enough. What they bring and take is learned at the next look.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from localspec.protocols import Drafter, DraftRequest, Outcome

_PATIENCE = 3  # decisions in a row that come out alike
_SHARE = 0.007  # of the time may go into deciding
_MOST = 6  # rounds without it
_SMOOTHING = 0.1
_RECENT = 0.2  # that an answer is of how long they are
_NEWS = 0.02  # that a round is of how often guesses come true
_ENOUGH = 20  # rounds that say so
_GUESSED = 4  # rounds that what nobody tried yet is taken to have shown
_MORE = 1.2  # times as many that come true are another text
_AHEAD, _FAR = 16, 64  # rounds for which another width is paid: at first, and at most; else as many as there were
_ANEW, _SELDOM = 1, 32  # answers until one guess more than was best is tried again: at first, and at most


@dataclass(frozen=True, slots=True)
class Repeated:
    """A round that guessed as the last ones did. part: who guessed.  context: tokens.  draft_ms: what that took.
    place: of its pass among those of its width in a row."""

    part: Drafter
    context: int
    outcome: Outcome
    draft_ms: float
    place: int


class Steady:
    """What one session decided last, and the rounds since then that went on with it.

    part, num, width: who guesses, how many in a chain, in passes of what width.  usual: whose guesses were last
    repeated.  rounds: of which nobody has learned.
    """

    def __init__(self) -> None:
        self.part: Drafter | None = None
        self.usual: Drafter | None = None
        self.num = self.width = 0
        self.rounds: list[Repeated] = []
        self._decided = 0, 0  # (guesses, width) of the last decisions
        self._alike = self._left = 0
        self._deciding_ms = 0.0
        self._rounds = 0  # of this answer
        self._usual_rounds = float(_AHEAD)  # of an answer
        self._others = 0  # looks in a row that came out otherwise
        self._is_new = False  # nothing was decided in it yet: any width may be the first one
        self._stopped = False
        self._came: dict[tuple[str, bool], _Came] = {}
        self._fell_short: dict[tuple[str, int], int] = {}  # how often in a row a drafter made fewer guesses than that

    def begin(self) -> None:
        """Another answer: decide first, and now and then see again what one guess more would bring."""
        if self._rounds:
            self._usual_rounds += _RECENT * (self._rounds - self._usual_rounds)
        self._alike = _PATIENCE - 1 if self._alike >= _PATIENCE else 0  # as before, if one look says so
        self._left = self._rounds = 0
        self._is_new = True
        for came in self._came.values():
            if came.begin():
                self._fell_short.clear()

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
        is_other = width not in (seen, self.width)
        if part is None or part is not self.part or (is_other and not self._is_new):
            self._alike = before = 0
        self.part, self._decided, self._is_new = part, (num if is_other else max(num, before), width), False
        self._rounds += 1
        self._others = 0 if part is not None else self._others + 1
        if part is None:
            self._left = 0
            return
        self._alike += 1
        self._deciding_ms += _SMOOTHING * (deciding_ms - self._deciding_ms) if self._deciding_ms else deciding_ms
        pays = int(self._deciding_ms / (_SHARE * round_ms)) if round_ms > 0.0 else 0
        self._left = min(pays, _MOST) if self._alike >= _PATIENCE and not self._stopped else 0

    @property
    def has_ended(self) -> bool:
        """Did the last looks come out otherwise, and not only one of them?"""
        return self._stopped or self._others > 1

    @property
    def begins(self) -> bool:
        """Will the next rounds go on with what was decided?"""
        return self._left > 0

    def settle(
        self, greedy: bool, prices: Callable[[int], tuple[float, int]], change_ms: Callable[[int], float]
    ) -> None:
        """Take as many guesses as were decided; once it is known how often they come true, as many as brought most in
        the time that they take, up to one more than that. prices: (milliseconds of a round, width) by guesses, if those
        before it were alike.  change_ms: that passes of a width take more until they are as quick as in a row."""
        assert self.part is not None
        most, _ = self._decided
        came = self._came_of(self.part, greedy)
        came.see_change()
        ahead = min(max(self._rounds, _AHEAD), _FAR)

        def charged(num: int) -> tuple[float, int]:
            ms, other = prices(num)
            return (ms + change_ms(other) / ahead if ms < math.inf else ms), other

        self.num, self.width = self._best(self.part, came, most, charged) or self._decided
        self.usual, came.best = self.part, self.num

    def width_for(
        self,
        part: Drafter,
        greedy: bool,
        prices: Callable[[int], tuple[float, int]],
        second_ms: Callable[[int], float],
    ) -> int:
        """Of passes in which such an answer is best begun with that drafter. 0 where nothing is known. prices: as
        `settle`.  second_ms: that the second one of another width takes more, which an answer of the usual length has
        to pay; the first one takes longer in any."""
        came = self._came_of(part, greedy)

        def charged(num: int) -> tuple[float, int]:
            ms, width = prices(num)
            return (ms + second_ms(width) / self._usual_rounds if ms < math.inf else ms), width

        best = self._best(part, came, came.best, charged) if came.best and not self._stopped else None
        return 0 if best is None else best[1]

    def _best(
        self, part: Drafter, came: _Came, most: int, prices: Callable[[int], tuple[float, int]]
    ) -> tuple[int, int] | None:
        """(guesses, width) that brought most in their time, of up to one more than so many; None: nobody knows."""
        best, chosen = 0.0, None
        for num in range(1, most + 2) if came.rounds >= _ENOUGH else ():
            if self._fell_short.get((part.name, num), 0) >= _PATIENCE:  # a text's end is no reason, a limit is
                continue
            ms, width = prices(num)
            value = (1.0 + came.expected(num)) / ms
            if value >= best:
                best, chosen = value, (num, width)
        return chosen

    def observe(self, context: int, greedy: bool, outcome: Outcome, draft_ms: float, place: int = 2) -> None:
        """What became of a round that went on. One without guesses is the last."""
        num = len(outcome.tree)
        self._rounds += 1
        self._left = max(self._left - 1, 0) if num else 0
        if self._stopped:
            return
        assert self.part is not None
        self.rounds.append(Repeated(self.part, context, outcome, draft_ms, place))
        asked_for = self.part.name, self.num
        if num == self.num:
            self._fell_short.pop(asked_for, None)
            self._came_of(self.part, greedy).add(num, len(outcome.path))
        else:
            self._fell_short[asked_for] = self._fell_short.get(asked_for, 0) + 1

    def _came_of(self, part: Drafter, greedy: bool) -> _Came:
        return self._came.setdefault((part.name, greedy), _Came())


class _Came:
    """How often each guess of a chain came true behind those that had, of chains that were made whatever the text
    was. One that nobody tried yet is taken to come true as often as the one before it.

    best: guesses that brought most.
    """

    def __init__(self) -> None:
        self.rounds = self.best = 0
        self._shares: list[float] = []
        self._counts: list[int] = []
        self._answers, self._anew, self._before = 0, _ANEW, 0
        self._value = math.inf  # of the best number, when what came of more was forgotten

    def expected(self, num: int) -> float:
        """Of so many guesses."""
        shares = self._shares[:num]
        shares += shares[-1:] * (num - len(shares))
        total: float = sum(accumulate(shares, mul))
        return total

    def add(self, num: int, accepted: int) -> None:
        """One more round."""
        self.rounds += 1
        for depth in range(min(num, accepted + 1)):
            if depth == len(self._shares):
                self._shares.append(self._shares[-1] if depth else 0.0)
                self._counts.append(_GUESSED if depth else 0)
            self._counts[depth] += 1
            news = max(_NEWS, 1.0 / self._counts[depth])
            self._shares[depth] += news * ((accepted > depth) - self._shares[depth])

    def begin(self) -> bool:
        """Another answer. Is it one of those, ever more seldom, before which it is forgotten what came of guesses
        beyond the best number?"""
        self._answers += 1
        if self.best > self._before:  # the last time showed something new
            self._anew = _ANEW
        if self._answers < self._anew:
            return False
        self._anew = min(2 * self._anew, _SELDOM)
        self._forget()
        return True

    def see_change(self) -> None:
        """Where many more come true than did then, more may, too."""
        if self.expected(self._before) > _MORE * self._value:
            self._anew = _ANEW
            self._forget()

    def _forget(self) -> None:
        self._answers, self._before, self._value = 0, self.best, self.expected(self.best)
        del self._shares[max(self.best, 1) :], self._counts[max(self.best, 1) :]
