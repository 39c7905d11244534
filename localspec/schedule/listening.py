"""Which drafters hear what the target computes, answer by answer.

A trained head reads the target's hidden states. Handing them over takes time in every pass, whether the head is asked
or not (docs/log.md). So a head of no use in some answers in which another drafter guessed rests: the next answers are
not listened to, ever more of them, and then one is, in which it is tried a few times. Where no other drafter is of
use either, the text is another one, and the next answer is listened to. What it missed of a conversation is not read
again for a try, only once it is of use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from localspec.protocols import Drafter, Listener, Outcome, Proposal, SequenceState
from localspec.schedule.decision import Asked

_PATIENCE = 2  # answers in vain
_MOST = 64  # answers that are not listened to: a try takes a GPU 50 to 60 ms (docs/log.md)
_SHORT = 8  # rounds; such an answer says nothing
_USE = 0.05  # of an answer's rounds
_MUCH = 0.25  # the same, of another drafter that it is compared with


@dataclass(slots=True)
class Listening:
    """Of one drafter, in all sessions of a pair. in_vain: answers behind each other.  left: answers until it listens
    again."""

    in_vain: int = 0
    left: int = 0
    is_back: bool = False  # it listens again, and was not asked yet

    def __post_init__(self) -> None:
        self.in_vain, self.left = max(self.in_vain, 0), min(max(self.left, 0), _MOST)

    @property
    def is_on(self) -> bool:
        """Is the next answer listened to?"""
        return not self.left

    @property
    def is_try(self) -> bool:
        """Only to see whether it is of use by now?"""
        return self.in_vain >= _PATIENCE

    def rested(self, others: float) -> None:
        """An answer was not listened to. others: share of its rounds in which a guess of another drafter came true."""
        if self.left:  # else another session's answer has brought it back
            self.left = self.left - 1 if others >= _USE else 0
            self.is_back = not self.left

    def heard(self, own: float, others: float) -> None:
        """An answer was listened to. own: as `others`, for this drafter."""
        if own >= _USE:
            self.in_vain = self.left = 0
        elif others >= _MUCH and not self.left:  # one of several sessions that end alike is enough
            self.in_vain = min(self.in_vain + 1, _MOST)
            if self.is_try:
                self.left = min(2 ** (self.in_vain - 1), _MOST)


class Hearing:
    """Of one session. listening: of the drafters that read hidden states, by name.  dear: all that run a network."""

    def __init__(self, listening: dict[str, Listening], dear: Sequence[Drafter]) -> None:
        self._listening = listening
        self._dear = tuple(dear)
        self._listeners = tuple(part for part in dear if isinstance(part, Listener))
        for part in self._listeners:
            listening.setdefault(part.name, Listening())
        self._resting: frozenset[str] = frozenset()
        self.able = self._dear
        """Drafters that can be asked in this answer."""
        self._used: dict[str, int] = {}
        self._rounds = 0

    def back(self) -> Sequence[Drafter]:
        """Those that hear this answer and rested before it, once."""
        found = [part for part in self._listeners if part in self.able and self._of(part).is_back]
        for part in found:
            self._of(part).is_back = False
        return found

    def attach(self, state: SequenceState) -> None:
        """The sequence of the next answer, for all that hear it."""
        self.end()
        self._resting = frozenset(part.name for part in self._listeners if not self._of(part).is_on)
        self.able = tuple(part for part in self._dear if part.name not in self._resting)
        for part in self._dear:
            if not isinstance(part, Listener):
                part.attach(state)
            else:
                rests = part.name in self._resting
                part.attach(state, whole=not (rests or self._of(part).is_try))
                if rests:  # a copied sequence may have brought along what it heard
                    part.detach()

    def observe(self, proposal: Proposal, outcome: Outcome, asked: Sequence[Asked]) -> None:
        """A round of this answer. asked: for it; what came of those on trial says little."""
        if not self._listeners:
            return
        self._rounds += 1
        sources, kept = proposal.sources, outcome.kept
        nodes = outcome.path if kept is None else [kept[node] for node in outcome.path]
        names = {proposal.source if sources is None else sources[node] for node in nodes}
        for name in names.difference(one.name for one in asked if one.on_trial):
            self._used[name] = self._used.get(name, 0) + 1

    def end(self) -> None:
        """The answer before is over, if there was one."""
        rounds, used = self._rounds, self._used
        self._rounds, self._used = 0, {}
        for part in self._listeners if rounds else ():
            own = used.get(part.name, 0) / rounds
            others = max((used.get(one.name, 0) / rounds for one in self._dear if one is not part), default=0.0)
            if part.name in self._resting:
                self._of(part).rested(others if rounds >= _SHORT else 1.0)
            elif rounds >= _SHORT:
                self._of(part).heard(own, others)

    def _of(self, part: Drafter) -> Listening:
        return self._listening[part.name]
