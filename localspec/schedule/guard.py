"""Never slower than plain: what each drafter really gained, and when one that loses is tried again.

A round that emits 1 + a tokens in the time of plain decoding plus `extra` beats plain decoding exactly if
a > extra / (time of a plain round). The difference is the drafter's gain in tokens. Single rounds say little (a is 0
or 5), so what is watched is the drawdown: how far the sum of gains lies below its highest point. A drafter that
pays comes back from a bad stretch before the drawdown reaches the limit, one that loses does not, and the limit is
what finding out may cost. Then it is parked.

A parked drafter is tried again on credit: a small share of all decoding time is put aside, and when it covers
what a trial takes, one is made. Credit always grows, so nothing stays parked for ever, and the share bounds what trying
costs. The first trial of an answer, whose text may be another one, is made in advance; one that gained is followed up
at once. A few that gain together end the parking, or fewer that gain much.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

_SHARE = 0.008  # of the decoding time goes into trials; with what looking takes (`rest.py`) that stays below 2%
_LIMIT = 8.0  # tokens of drawdown
_TRIALS = 4  # that must gain together
_CLEAR = 2.0  # tokens that fewer must have gained
_LEAST_PRICE = 0.02  # tokens that a trial is taken to cost at least
_MOST_CREDIT = 3.0  # trials; without a bound a long parked stretch would buy a long losing one
_OFTEN = 0.7  # of what a dear trial cost is remembered behind a cheap one: who is dear now and then is charged for it
_SMOOTHING = 0.03


class Guard:
    """One drafter's record against plain decoding."""

    def __init__(self) -> None:
        self.gain = 0.0
        """Tokens a round above plain decoding in the same time, over the last rounds."""
        self.parked = False
        self._drawdown = 0.0
        self._credit = 0.0  # tokens
        self._in_advance = False
        self._last_real: float | None = None  # tokens that one of the last trials really cost
        self._trials: deque[float] = deque(maxlen=_TRIALS)

    def as_dict(self) -> dict[str, Any]:
        """For `recall`."""
        return {"gain": self.gain, "parked": self.parked, "credit": self._credit, "trial": self._last_real}

    def recall(self, data: Mapping[str, Any]) -> None:
        """Go on from what `as_dict` gave: parked, or on probation. Raises KeyError, TypeError and ValueError."""
        self.gain, self.parked, self._credit = float(data["gain"]), bool(data["parked"]), float(data.get("credit", 0.0))
        trial = data.get("trial")
        self._last_real = None if trial is None else float(trial)
        self._drawdown = -0.5 * _LIMIT

    def begin(self) -> None:
        """Another answer."""
        self._in_advance = True

    def allows(self, price: float) -> bool:
        """May the drafter work this round? price: of a trial, in tokens."""
        return not self.parked or self.pays(price)

    def pays(self, price: float) -> bool:
        """Is there credit for a trial? Then it is spent."""
        price = max(price, _LEAST_PRICE)
        promising = bool(self._trials) and self._trials[-1] > 0.0 and len(self._trials) < _TRIALS
        if not promising and self._credit < (0.0 if self._in_advance else price):
            return False
        self._in_advance = False
        self._credit -= price
        return True

    def spent(self, price: float, real: float) -> None:
        """A trial that was taken to cost `price` tokens cost so many. What is done once for all trials (a kernel is
        built) must not forbid the next ones: behind the first one no more is charged than what the last ones cost, and
        no more is owed than finding out may cost."""
        before = self._last_real
        charged = real if before is None else min(real, max(before, price))
        self._last_real = real if before is None else max(real, _OFTEN * before)
        more = max(charged, _LEAST_PRICE) - max(price, _LEAST_PRICE)
        self._credit = max(self._credit - more, min(self._credit, -_LIMIT))

    def idle(self, round_ms: float, plain_ms: float, price: float) -> None:
        """A round went by without the drafter."""
        most = _MOST_CREDIT * max(price, _LEAST_PRICE)
        self._credit = min(self._credit + _SHARE * round_ms / plain_ms, most)

    def observe(self, brought: float, extra_ms: float, plain_ms: float) -> None:
        """A round with the drafter. brought: accepted tokens.  extra_ms: what the round took longer than plain."""
        gain = brought - extra_ms / plain_ms
        self.gain += _SMOOTHING * (gain - self.gain)
        if not self.parked:
            self._drawdown = min(self._drawdown + gain, 0.0)
            if self._drawdown < -_LIMIT:
                self.parked = True
                self._trials.clear()
            return
        if self._trials and gain <= 0.0 and sum(self._trials) + gain <= 0.0:
            self._trials.clear()  # a run of good ones begins anew
        self._trials.append(gain)
        gained = sum(self._trials)
        if gained > _CLEAR or (len(self._trials) == _TRIALS and gained > 0.0):
            self.parked = False
            self._drawdown = -0.5 * _LIMIT  # on probation

    def because(self, name: str) -> str:
        """Why it is parked."""
        return f"{name} is parked: it was slower than plain decoding"
