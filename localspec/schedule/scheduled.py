"""The drafter that decides: of several drafters it asks those that pay this round, and verifies what is worth it.

It is a drafter like any other, so nothing else knows that there is a plan. Whatever it decides, the text is
the target's (`docs/exactness.md`): under the walk a plan may look at anything, the guessed tokens included. Under
rejection it must not look at what was drawn, so there it only says beforehand how much to draw.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

from localspec.context import Context
from localspec.protocols import (
    Drafter,
    DraftRequest,
    HostTokens,
    Outcome,
    Proposal,
    SavedDraft,
    SequenceState,
    in_turn,
)
from localspec.schedule.asking import Asker, Beside, paying_length
from localspec.schedule.choosing import Choosing, plain_width
from localspec.schedule.decision import Asked, Decision
from localspec.schedule.experience import MUCH, Experience, Record
from localspec.schedule.learning import Learning
from localspec.schedule.listening import Hearing
from localspec.schedule.plan import Valuation
from localspec.schedule.rest import Rest
from localspec.schedule.shadow import Trying
from localspec.schedule.steady import Steady
from localspec.tree.mask import is_chain

_LEAST_BACK = 0.5  # of what asking takes
LOOKING = "a plain round now and then shows what plain decoding takes"
_NOTHING_WORTH = "no guess was worth its time"


class Scheduled:
    """Asks `free` drafters every round and `dear` ones (which run a model) when they are expected to pay.

    experience: shared by the sessions of a pair.  forced: a free one that speaks only where a grammar does. Names of
    drafters must differ.  ahead: those whose first pass runs on a device while others look things up.
    """

    name = "auto"
    needs_trees = False

    def __init__(
        self,
        free: Sequence[Drafter],
        dear: Sequence[Drafter],
        experience: Experience,
        *,
        forced: Drafter | None = None,
        ahead: Collection[str] = (),
    ) -> None:
        self._lookups, self._dear = tuple(free), tuple(dear)
        self._ahead_names = frozenset(ahead)
        self._free = self._lookups if forced is None else (*self._lookups, forced)
        self.parts = (*self._free, *self._dear)
        self.experience = experience
        self._decision = Decision()  # of this round
        self._unlearned: tuple[Decision, Outcome] | None = None  # until the next pass is under way
        self._asker = Asker(experience, self._free, self._dear)
        self._hearing = Hearing(experience.listening, self._dear)
        self._trying = Trying(experience, self._asker)
        self._choosing = Choosing(self.name, self._asker)
        self._learning = Learning(experience, self._asker)
        self._rest = Rest()
        self._steady = Steady()
        self._repeated_ms: float | None = None  # what guessing took in this round, if it goes on as the last ones did
        self._plain: Proposal | None = None  # of the last round in which nothing was found
        self._offered = Proposal(self.name)  # in this round
        self._resting = False  # this round is one without a look
        self._has_room = True  # for guesses
        self._look_ms = 0.0  # what deciding took in this round
        self._is_new = True  # no round of this answer yet
        self._in_a_row = False  # the next pass of plain decoding has begun

    def attach(self, state: SequenceState) -> None:
        """The sequence, for all but those heads that are not worth listening to in the next answer."""
        for part in self._free:
            part.attach(state)
        self._hearing.attach(state)

    def begin(self, context: Context) -> None:
        """A new turn, for all that may work in it: a parked drafter that runs a model reads when it is tried again,
        and with several lanes each when it is first asked, so that reading counts as what it costs."""
        self._catch_up()
        self._learning.learn_late(self._rest, self._steady, self._decision)
        self.experience.live.begin()
        self._asker.turn(context)
        self._rest.begin()
        self._steady.begin()
        self._trying.begin()
        self._is_new = True
        self._in_a_row = False
        self._learning.begin()
        self._decision = Decision(greedy=self._decision.greedy, load=self.experience.lately)
        for part in (*self._free, *self._hearing.able):
            if self._asker.is_free(part) or (self._decision.lanes == 1 and not self._record(part.name).guard.parked):
                self._asker.begin(part)

    def propose(self, request: DraftRequest) -> Proposal:
        """The guesses that are worth verifying; where the round is shared, those that might be."""
        self._offered = self._propose(request)
        return self._offered

    def _propose(self, request: DraftRequest) -> Proposal:
        plain, self._has_room = self._plain, min(request.max_nodes, request.max_depth) > 0
        self._resting = (
            plain is not None and self._rest.is_on and request.load is None and plain.width <= request.max_nodes + 1
        )
        self._repeated_ms = None
        if self._resting and plain is not None:
            return plain
        started = perf_counter()
        if self._steady.goes_on(request) and not self.experience.wants_plain(begins_early=request.begins_early):
            proposal = self._repeat(request)
            self._repeated_ms = (perf_counter() - started) * 1e3
            return proposal
        self._plain = None
        proposal = self._look(request)
        proposal = self._later(proposal, *(one.proposal for one in self._decision.asked))
        self._look_ms = (perf_counter() - started) * 1e3
        return proposal

    def _later(self, proposal: Proposal, *parts: Proposal) -> Proposal:
        """With what was put off."""
        own = None if self._unlearned is None else self._catch_up
        return proposal.later(in_turn((own, *(part.meanwhile for part in parts))))

    def _repeat(self, request: DraftRequest) -> Proposal:
        """Guess as the last rounds did."""
        steady = self._steady
        assert steady.part is not None
        guessed = self._asker.repeat(steady.part, replace(request, max_nodes=steady.num, trees=False))
        if not guessed.num_nodes:
            return self._later(replace(guessed, source=self.name), guessed)
        sources, width = (guessed.source,) * guessed.num_nodes, steady.width
        if all(isinstance(segment, HostTokens) for segment in guessed.tokens):
            tree, counts = guessed.tree(), guessed.counts
            return self._later(Proposal.of_tree(self.name, tree, sources=sources, counts=counts, width=width), guessed)
        steady.stop()  # of guesses on a device drafting would seem to take nothing, and the pass more
        return self._later(replace(guessed, source=self.name, sources=sources, width=width), guessed)

    def _look(self, request: DraftRequest) -> Proposal:
        """Ask those that might bring something."""
        experience, load, context, last = self.experience, request.load, len(request.context), self._decision
        decision = self._decision = Decision(context, request.sampler.is_greedy, load, request.begins_early)
        if load is None and self._is_new:
            experience.begin(decision.greedy)
            usual = self._steady.usual
            if usual in self._hearing.able and not self._record(usual.name).guard.parked:
                settled, live = self._asker.settled(usual, decision), experience.live
                second_ms = partial(live.second_ms, context=context)
                live.keep(self._steady.width_for(usual, decision.greedy, settled, second_ms))
        rate = experience.rate(context, decision.lanes, decision.greedy if load is None else None)
        if self._in_a_row and request.begins_early:
            decision.restart_ms = experience.restart_ms(context)
        barrier_ms = experience.part_of_restart() * decision.restart_ms
        prices = Valuation(experience.live, rate, context, request.max_nodes, decision.lanes, barrier_ms)
        is_first = self._is_new
        if is_first:
            self._is_new = False
            back = self._hearing.back()
            for part in (*self._free, *self._hearing.able):
                record, least = self._record(part.name), -_LEAST_BACK * rate * self._asker.prices(part, decision).start
                record.begin(least)
                if part in back:
                    record.back(least)
        if load is not None and load.plain:
            return Proposal(self.name, because=load.because)
        if not self._has_room:  # the last token: what the next answer needs stays recorded
            return Proposal(self.name, width=plain_width(prices, request))
        if load is None and experience.wants_plain(begins_early=request.begins_early):
            return Proposal(self.name, width=plain_width(prices, request), because=LOOKING)
        if request.needs_law:
            return self._drawn(request, prices)
        parked: list[str] = []
        free = self._lookups if request.sampler.constraint is None else self._free

        def look_up() -> None:
            values = (self._ask_if_allowed(part, request, prices, parked) for part in free)
            decision.lookup = max(values, default=0.0)

        looking, at_hand = Beside(look_up), None  # at_hand: of dear drafters; None until one was heard
        sure = self._sure(last, rate, is_first=is_first) if load is None else None
        if sure is not None:
            at_hand = self._hear(sure, request, prices, parked, meanwhile=looking)
        looking()
        for part, on_trial in self._in_order(decision.lookup, rate):
            record = self._record(part.name)
            if part is not sure and (
                on_trial or record.guard.parked or record.may_beat(decision.lookup, at_hand, request.trees)
            ):
                heard = self._hear(part, request, prices, parked, on_trial=on_trial)
                if heard is not None:
                    at_hand = max(at_hand or 0.0, heard)
        proposal = self._choosing.choose(decision, request, prices)
        if proposal.num_nodes:
            return proposal
        proposal = replace(proposal, because=parked[0] if parked else _NOTHING_WORTH)
        if request.sampler.constraint is None:  # what a grammar leaves no choice about is found for nothing
            self._plain = replace(proposal, counts={})
        return proposal

    def _sure(self, last: Decision, rate: float, *, is_first: bool) -> Drafter | None:
        """The dear drafter that will be asked whatever lookup says, as in the last round (in the first one of an
        answer: as usual), and that runs on a device: there looking up takes no time while its first pass runs."""
        if last.lookup > MUCH:
            return None
        asked = {one.name for one in last.asked if one.name in self._ahead_names and not one.on_trial}
        if is_first and self._steady.usual is not None:
            asked = {self._steady.usual.name} & self._ahead_names
        for part in self._hearing.able:
            record = self._record(part.name)
            if part.name in asked and not record.guard.parked and self._is_worth_asking(part, record, rate):
                return part
        return None

    def _hear(
        self,
        part: Drafter,
        request: DraftRequest,
        prices: Valuation,
        parked: list[str],
        *,
        on_trial: bool = False,
        meanwhile: Beside | None = None,
    ) -> float | None:
        """What a dear drafter's guesses are worth, which its record is told. None where that says nothing of the text:
        it was not asked, could not guess, or nothing came of one that was only on trial."""
        decision, record = self._decision, self._record(part.name)
        value = self._ask_if_allowed(part, request, prices, parked, meanwhile)
        if not decision.asked or decision.asked[-1].name != part.name:
            return None
        asked = decision.asked[-1]
        asked.on_trial = on_trial
        record.asked(value - prices.rate * asked.ms, decision.lookup)
        record.trials.observe(asked.ms)
        tells = not on_trial and not record.guard.parked and asked.proposal.num_nodes > 0
        return value if value > 0.0 or tells else None

    def _ask_if_allowed(
        self,
        part: Drafter,
        request: DraftRequest,
        prices: Valuation,
        parked: list[str],
        meanwhile: Beside | None = None,
    ) -> float:
        """What a drafter's guesses are worth; nothing where it is parked, and `parked` is told so. One that is expected
        to lose is tried now and then."""
        decision, record = self._decision, self._record(part.name)
        if record.guard.parked:
            parked.append(record.guard.because(part.name))
        if request.load is not None:  # a shared round is over before anything could be followed
            allowed = record.guard.allows(self._trial_price(part, record, prices))
            return self._asker.ask(part, decision, request, prices).value(prices) if allowed else 0.0
        if record.guard.parked or not self._is_worth_asking(part, record, prices.rate):
            self._trying.try_if_due(part, decision, request, prices)
            return 0.0
        return self._asker.ask(part, decision, request, prices, meanwhile=meanwhile).value(prices)

    def _trial_price(self, part: Drafter, record: Record, prices: Valuation) -> float:
        """Tokens that asking it once takes, and verifying a guess."""
        return self._trying.price(part, record, self._decision, prices) + prices.rate * prices.extra_ms(1)

    def _in_order(self, best: float, rate: float) -> list[tuple[Drafter, bool]]:
        """The dear drafters, the likeliest to pay first, and whether one of them is only on trial: which it is before
        the others, in a round in which they would be asked."""
        usual = {part.name: self._record(part.name).usual_value for part in self._hearing.able}
        order = sorted(self._hearing.able, key=lambda part: -usual[part.name])
        if len(order) < 2 or usual[order[0].name] <= best:
            return [(part, False) for part in order]
        due = next((part for part in order[1:] if self._record(part.name).trials.is_due(rate)), None)
        first = [] if due is None else [(due, True)]
        return first + [(part, False) for part in order if part is not due]

    def observe(self, outcome: Outcome) -> None:
        """The outcome, for all; and what it teaches, where guesses were verified only once the next pass runs."""
        self._catch_up()
        for part in self.parts:
            part.observe(outcome)
        started = perf_counter()
        plain, decision = not len(outcome.tree), self._decision
        decided = not self._resting and self._repeated_ms is None
        self._hearing.observe(self._offered, outcome, decision.asked if decided else ())
        place = self.experience.live.ran(outcome.width) if decision.load is None else 0
        self._trying.follow(outcome, decision)
        self._in_a_row = outcome.begun_early and plain
        if self._resting:
            self._rest.observe(outcome)
            return
        if self._repeated_ms is not None:
            context = len(self._asker.context) - len(outcome.tokens)
            self._steady.observe(context, decision.greedy, outcome, self._repeated_ms, place)
            return
        decision.place = place
        if plain or decision.load is not None:  # the next round may ask when the last plain one was
            self._learn(decision, outcome)
        else:
            self._unlearned = decision, outcome
        self._look_ms += (perf_counter() - started) * 1e3
        if decision.load is None and self.experience.by_clock and self._has_room:
            # one that runs a model says of each place anew what it is worth
            ran = not all(one.name in self._asker.free_names for one in decision.asked)
            found = self._plain is None or ran
            look_ms = None if ran or decision.tried else self._look_ms
            plain_ms = 0.0 if found else self.experience.plain_ms(len(self._asker.context))
            self._rest.looked(found, look_ms, self.experience.look, plain_ms)
            self._see_if_alike(outcome)

    def _see_if_alike(self, outcome: Outcome) -> None:
        """Tell what this round's decision was."""
        decision, live = self._decision, self.experience.live
        used = [one for one in decision.asked if one.used]
        alone = len(used) == 1 and not used[0].on_trial and used[0].tree is not None and is_chain(outcome.tree.parent)
        part = next((one for one in self._dear if alone and one.name == used[0].name), None)
        # what was guessed in vain, by lookup mostly, is no part of deciding: at other times it brings what it takes
        drafted_ms = sum(one.ms for one in decision.asked)
        deciding_ms = max(self._look_ms - drafted_ms - sum(one.real_ms for one in decision.tried), 0.0)
        round_ms = drafted_ms + outcome.verify_ms
        self._steady.decided(part, len(outcome.tree), outcome.width, deciding_ms, round_ms)
        if self._steady.has_ended:
            live.keep(0)
        if part is None or not self._steady.begins:
            return
        context = len(self._asker.context)
        prices = self._asker.settled(part, decision)
        self._steady.settle(decision.greedy, prices, partial(live.change_ms, context=context))
        live.keep(self._steady.width)

    def _learn(self, decision: Decision, outcome: Outcome) -> None:
        self._learning.learn_late(self._rest, self._steady, decision)
        self._learning.learn(decision, outcome)

    def _catch_up(self) -> None:
        """Learn what was put off."""
        if self._unlearned is not None:
            self._learn(*self._unlearned)
            self._unlearned = None

    def save(self) -> tuple[SavedDraft, ...]:
        """What those have that were asked; the others hold an earlier context."""
        return tuple(one for part in self.parts if self._asker.has_begun(part) for one in part.save())

    def restore(self, saved: Sequence[SavedDraft]) -> None:
        """To each what it can use."""
        for part in self.parts:
            part.restore(saved)

    def close(self) -> None:
        """Close all."""
        self._hearing.end()
        self._catch_up()
        self._learning.learn_late(self._rest, self._steady, self._decision)
        for part in self.parts:
            part.close()

    # ------------------------------------------------------------ inside

    def _record(self, name: str) -> Record:
        return self._asker.record(name, self._decision)

    def _is_worth_asking(self, part: Drafter, record: Record, rate: float) -> bool:
        """Does a drafter that takes time bring back at least half of what asking it for a guess takes?"""
        if self._asker.is_free(part):
            return True
        return record.usual_value >= -_LEAST_BACK * rate * self._asker.prices(part, self._decision).start

    def _drawn(self, request: DraftRequest, prices: Valuation) -> Proposal:
        """Rejection: the first drafter that may work draws as much as the past says pays."""
        for part in (*(dear for dear, _ in self._in_order(0.0, prices.rate)), *self._free):
            record = self._record(part.name)
            if not record.guard.allows(self._trial_price(part, record, prices)):
                continue
            if not self._asker.has_begun(part):
                self._asker.begin(part)
            drafting, most = self._asker.prices(part, self._decision), min(prices.max_nodes, request.max_depth)
            most = max(1, paying_length(record.reliability, prices, drafting, most))
            started = perf_counter()
            proposal = part.propose(replace(request, max_nodes=min(most, request.max_nodes)))
            ms = (perf_counter() - started) * 1e3
            self._decision.asked.append(Asked(part.name, proposal, None, [], [], ms, used=proposal.num_nodes > 0))
            if proposal.num_nodes:
                return proposal
        return Proposal(self.name, because=_NOTHING_WORTH)
