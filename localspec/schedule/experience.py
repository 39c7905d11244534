"""What a pair's sessions learn together while the process lives: what things cost here and now, and what each drafter
is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from localspec.protocols import Capabilities, Load
from localspec.schedule.acceptance import Reliability
from localspec.schedule.cost import Costs
from localspec.schedule.drafting import DraftTimes, times_of
from localspec.schedule.guard import Guard
from localspec.schedule.listening import Listening
from localspec.schedule.live import LiveCosts, about
from localspec.schedule.opinions import Dissent, Hindsight
from localspec.schedule.plan import Rate
from localspec.schedule.rest import LookTime
from localspec.schedule.router import Trials

_SMOOTHING = 0.1
_FIRST_PLAIN = 3  # rounds at the start of a pair's first answer
_PLAIN_EVERY = 100  # rounds; costs less than a hundredth of what speculation gains
_EARLY_ROUNDS = 3  # until passes begin before the last token is read
_LONGEST_RUN = 16
_LEAST_KEPT = 30  # rounds; less is not worth remembering
_MOST_RESTART = 3.0  # plain rounds; a stall is not taken for it
MUCH = 0.5  # tokens that lookup promises
_MOST_LEFT = 3  # answers
_FORGETTING = 0.005  # of a low opinion, each round that a drafter is left out


@dataclass(slots=True)
class Record:
    """What is known of one drafter, for greedy or for sampled text: how reliable it is, what it gains."""

    reliability: Reliability
    guard: Guard = field(default_factory=Guard)
    usual_value: float = 1.0  # tokens a round that asking it is expected to bring, its own time paid
    beside: list[float] = field(default_factory=lambda: [1.0, 1.0])  # the same where lookup promises little, or much
    states_chances: bool = True
    trials: Trials = field(default_factory=Trials)
    dissent: Dissent = field(default_factory=Dissent)
    hindsight: Hindsight = field(default_factory=Hindsight)
    in_vain: int = 0  # answers in a row at whose start it was worth less than is asked for
    left: int = 0  # answers until it is asked again at the start of one all the same

    def begin(self, least: float) -> None:
        """Another answer, whose text may be another one: a few rounds show it, and cost less than going without. Where
        they never did they come less often: trials would show it, too. least: what it is asked from."""
        self.guard.begin()
        if self.usual_value >= least:
            self.in_vain = self.left = 0
        elif self.left:
            self.left -= 1
        else:
            self.usual_value = 0.5 * least
            self.in_vain += 1
            self.left = min(self.in_vain - 1, _MOST_LEFT)

    def back(self, least: float) -> None:
        """It could not be asked for some answers: it is tried a few times, in rounds that ask others, too."""
        self.usual_value, self.left = max(self.usual_value, 0.5 * least), 0
        self.trials.again()

    def asked(self, value: float, lookup: float) -> None:
        """What asking it was worth, its time paid, where lookup promised so much."""
        self.usual_value += _SMOOTHING * (value - self.usual_value)
        if lookup > 0.0:
            much = lookup > MUCH
            self.beside[much] += _SMOOTHING * (value - self.beside[much])

    def may_beat(self, best: float, at_hand: float | None, trees: bool) -> bool:
        """Is a drafter that takes time worth asking, beside what was guessed for nothing and what other such drafters
        have guessed? In a tree all would count, in a chain only the best; of two that take time the second seldom
        guesses what the first did not, and where that found nothing the text is hard for both. Where nobody was asked
        and nothing was guessed the guard alone decides. Where lookup guesses well the text is easy, and so it is for
        the others: what counts is what they bring there, not what they bring elsewhere.
        """
        if self.guard.parked:
            return True
        much = best > MUCH
        if best > 0.0 and self.beside[much] <= (0.5 * best if trees else best):
            self.beside[much] += _FORGETTING * (1.0 - self.beside[much])
            return False
        if at_hand is not None and self.usual_value <= at_hand:
            self.usual_value += _FORGETTING * (1.0 - self.usual_value)
            return False
        return True

    def as_dict(self) -> dict[str, Any]:
        """For `recall`, without the reliability, which records share."""
        return {
            "guard": self.guard.as_dict(),
            "usual_value": self.usual_value,
            "beside": self.beside,
            "states_chances": self.states_chances,
            "trials": [self.trials.num, self.trials.ms],
            "dissent": [self.dissent.expected, self.dissent.came],
        }

    def recall(self, data: Mapping[str, Any]) -> None:
        """Go on from what `as_dict` gave. Raises KeyError, TypeError and ValueError for anything else."""
        self.guard.recall(data["guard"])
        self.usual_value = float(data["usual_value"])
        little, much = data["beside"]
        self.beside = [float(little), float(much)]
        self.states_chances = bool(data["states_chances"])
        num, ms = data["trials"]
        self.trials = Trials(int(num), float(ms))
        self.dissent.recall(*data["dissent"])


class Experience:
    """What a pair's sessions have learned together: costs as they are here and now, and each drafter's record.

    Speed, and what drafting gains, are different things with one lane in a pass and with sixteen. So they are learned
    apart for loads of about 1, 2, 4, 8, ... lanes; how reliable a drafter is does not depend on that.
    by_clock: False believes the costs and never looks at a clock, so that the same text is decided alike every time.
    """

    def __init__(self, costs: Costs, capabilities: Capabilities, *, by_clock: bool = True) -> None:
        self.by_clock = by_clock
        hope = {} if by_clock else {"optimism": 1.0}
        known = capabilities
        self.live = LiveCosts(costs, known.width_class, known.max_width, steps=known.width_steps, **hope)
        self._pace: dict[int, _Pace] = {}
        self._rates: dict[tuple[int, bool | None], Rate] = {}
        self._reliability: dict[tuple[str, bool], Reliability] = {}
        self._records: dict[tuple[str, bool, int], Record] = {}
        self._times: dict[str, DraftTimes] = {}
        self.listening: dict[str, Listening] = {}
        """Of drafters that read the target's hidden states."""
        self._restart = 1.0  # plain rounds
        self._run = 1.0  # rounds with guesses behind each other
        self.look = LookTime()
        """What deciding takes."""
        self.lately: Load | None = None
        """The last round that several lanes shared, or might have."""
        self.recalled = 0
        """Rounds of earlier runs that it goes on from."""
        self._rounds = 0

    @property
    def worth_keeping(self) -> bool:
        """Was there something to learn?"""
        return self.by_clock and self._rounds >= _LEAST_KEPT

    def as_dict(self) -> dict[str, Any]:
        """For `recall`: numbers about drafters and times, nothing about texts."""
        return {
            "rounds": self.recalled + self._rounds,
            "live": self.live.as_dict(),
            "times": {name: times.as_dict() for name, times in self._times.items()},
            "reliability": [[*key, one.as_dict()] for key, one in self._reliability.items()],
            "records": [[*key, one.as_dict()] for key, one in self._records.items()],
            "listening": [[name, one.in_vain, one.left] for name, one in self.listening.items()],
            "restart": [self._restart, self._run],
            "look_ms": self.look.ms,
        }

    def recall(self, data: Mapping[str, Any]) -> None:
        """Go on from what `as_dict` gave. What it says outweighs assumptions, and is outweighed by some rounds of
        today. Raises KeyError, TypeError and ValueError for anything else; then this experience is not to be used."""
        _check_finite(data)
        self.recalled = int(data["rounds"])
        self.live.recall(data["live"])
        for name, times in data["times"].items():
            self.times(name).recall(times)
        for name, greedy, found in data["reliability"]:
            self._reliability.setdefault((str(name), bool(greedy)), Reliability()).recall(found)
        for name, greedy, lanes, found in data["records"]:
            self.record(str(name), bool(greedy), int(lanes)).recall(found)
        for name, in_vain, left in data.get("listening", ()):  # files of before have none
            one = self.listening[str(name)] = Listening(int(in_vain), int(left))
            one.is_back = one.is_try and one.is_on
        self._restart, self._run = map(float, data["restart"])
        if data["look_ms"] > 0.0:
            self.look.observe(float(data["look_ms"]))

    def record(self, name: str, greedy: bool, lanes: int = 1) -> Record:
        """Of the drafter with that name, at temperature 0 or above."""
        key = (name, greedy, about(lanes))
        if key not in self._records:
            reliability = self._reliability.setdefault((name, greedy), Reliability())
            hindsight = Hindsight.of_network() if name in self._times else Hindsight()
            self._records[key] = Record(reliability, hindsight=hindsight)
        return self._records[key]

    def times(self, name: str) -> DraftTimes:
        """What it takes to ask the dear drafter with that name. To be asked for before its record: none but dear ones
        have times."""
        if name not in self._times:
            self._times[name] = times_of(name, self.live.costs)
        return self._times[name]

    def rate(self, context: int, lanes: int = 1, greedy: bool | None = None) -> float:
        """What a millisecond is worth, in tokens of all lanes together: what was reached lately, at least what plain
        decoding brings. greedy: at temperature 0 or above, where guesses come true less often; None: lanes of both
        kinds."""
        plain = lanes / self.plain_ms(context, lanes)
        return max(self._rate(lanes, greedy).value * lanes / about(lanes), plain)

    def begin(self, greedy: bool) -> None:
        """Another answer of one lane, whose text may be another one."""
        self._rate(1, greedy).renew()

    def wants_plain(self, lanes: int = 1, *, begins_early: bool = False) -> bool:
        """Is it time to see again what plain decoding takes? All gains are judged by it, and a table that was wrong
        about its width would never be found out. begins_early: it takes some rounds in a row to see, so less often."""
        pace = self._paced(lanes)
        every = _PLAIN_EVERY * (_EARLY_ROUNDS if begins_early else 1)
        return self.by_clock and (pace.plain_rounds < _FIRST_PLAIN or pace.rounds_since_plain >= every)

    def plain_ms(self, context: int, lanes: int = 1) -> float:
        """A plain round."""
        return self.live.plain_ms(context, lanes) + self.live.costs.overhead_ms

    def restart_ms(self, context: int) -> float:
        """What a guess costs besides its round, where passes of plain decoding begin early: the one that has begun is
        dropped, and the next ones wait again."""
        return self._restart * self.plain_ms(context) if self.by_clock else 0.0

    def part_of_restart(self) -> float:
        """Of that, what the first guess should be worth: others mostly follow, which cost it no more."""
        return 1.0 / self._run

    def observe_run(self, rounds: int) -> None:
        """So many rounds behind each other had guesses, then one had none."""
        self._run += _SMOOTHING * (min(rounds, _LONGEST_RUN) - self._run)

    def observe_restart(self, longer: float) -> None:
        """The first plain rounds behind a guess took so many plain rounds longer than in a row."""
        self._restart += _SMOOTHING * (min(max(longer, 0.0), _MOST_RESTART) - self._restart)

    def observe(self, tokens: int, round_ms: float, *, plain: bool, lanes: int = 1, greedy: bool | None = None) -> None:
        """A round emitted so many tokens in all lanes. plain: nobody guessed anything, and it took what that usually
        does.  greedy: as for `rate`."""
        self._rounds += 1
        pace = self._paced(lanes)
        pace.rounds_since_plain = 0 if plain else pace.rounds_since_plain + 1
        pace.plain_rounds += plain
        self._rate(lanes, greedy).add(tokens * about(lanes) / lanes, round_ms)

    def _paced(self, lanes: int) -> _Pace:
        return self._pace.setdefault(about(lanes), _Pace())

    def _rate(self, lanes: int, greedy: bool | None) -> Rate:
        load = about(lanes)
        if (load, greedy) not in self._rates:
            self._rates[load, greedy] = Rate(load / self.plain_ms(0, load))
        return self._rates[load, greedy]


@dataclass(slots=True)
class _Pace:
    """With about so many lanes: how long ago it went without speculation, and how often."""

    rounds_since_plain: int = 0
    plain_rounds: int = 0


def _check_finite(data: object) -> None:
    """A number that is none would spoil every choice that it has a part in."""
    if isinstance(data, float) and not math.isfinite(data):
        raise ValueError(f"{data} among what was learned")
    if isinstance(data, Mapping | list):
        for one in data.values() if isinstance(data, Mapping) else data:
            _check_finite(one)
