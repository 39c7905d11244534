"""The drafter that decides: of several drafters it asks those that pay this round, and verifies what is worth it.

It is a drafter like any other, so nothing else knows that there is a plan. Whatever it decides, the text is
the target's (`docs/exactness.md`): under the walk a plan may look at anything, the guessed tokens included. Under
rejection it must not look at what was drawn, so there it only says beforehand how much to draw.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
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
from localspec.schedule.asking import Asker, Beside, paying_length, products
from localspec.schedule.decision import Asked, Decision, counted
from localspec.schedule.experience import Experience, Record
from localspec.schedule.learning import Learning
from localspec.schedule.opinions import Opinion, Opinions
from localspec.schedule.plan import Valuation
from localspec.schedule.rest import Rest
from localspec.schedule.shadow import Trying
from localspec.tree.grow import merge
from localspec.tree.token_tree import TokenTree

_SMOOTHING = 0.1
_MUCH = 0.5  # tokens that lookup promises
_FORGETTING = 0.005  # of a low opinion, each round that a drafter is left out
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
        self._trying = Trying(experience, self._asker)
        self._learning = Learning(experience, self._asker)
        self._rest = Rest()
        self._plain: Proposal | None = None  # of the last round in which nothing was found
        self._resting = False  # this round is one without a look
        self._look_ms = 0.0  # what deciding took in this round
        self._is_new = True  # no round of this answer yet
        self._in_a_row = False  # the next pass of plain decoding has begun

    def attach(self, state: SequenceState) -> None:
        """The sequence, for all."""
        for part in self.parts:
            part.attach(state)

    def begin(self, context: Context) -> None:
        """A new turn, for all that may work in it: a parked drafter that runs a model reads when it is tried again,
        and with several lanes each when it is first asked, so that reading counts as what it costs."""
        self._catch_up()
        self._asker.turn(context)
        self._rest.begin()
        self._trying.begin()
        self._is_new = True
        self._in_a_row = False
        self._learning.begin()
        self._decision = Decision(greedy=self._decision.greedy, load=self.experience.lately)
        for part in self.parts:
            if self._asker.is_free(part) or (self._decision.lanes == 1 and not self._record(part.name).guard.parked):
                self._asker.begin(part)

    def propose(self, request: DraftRequest) -> Proposal:
        """The guesses that are worth verifying; where the round is shared, those that might be."""
        plain = self._plain
        self._resting = (
            plain is not None and self._rest.is_on and request.load is None and plain.width <= request.max_nodes + 1
        )
        if self._resting and plain is not None:
            return plain
        started = perf_counter()
        self._plain = None
        proposal = self._look(request)
        own = None if self._unlearned is None else self._catch_up
        proposal = proposal.later(in_turn((own, *(one.proposal.meanwhile for one in self._decision.asked))))
        self._look_ms = (perf_counter() - started) * 1e3
        return proposal

    def _look(self, request: DraftRequest) -> Proposal:
        """Ask those that might bring something."""
        experience, load, context, last = self.experience, request.load, len(request.context), self._decision
        decision = self._decision = Decision(context, request.sampler.is_greedy, load, request.begins_early)
        if load is None and self._is_new:
            experience.begin(decision.greedy)
        rate = experience.rate(context, decision.lanes, decision.greedy if load is None else None)
        if self._in_a_row and request.begins_early:
            decision.restart_ms = experience.restart_ms(context)
        barrier_ms = experience.part_of_restart() * decision.restart_ms
        prices = Valuation(experience.live, rate, context, request.max_nodes, decision.lanes, barrier_ms)
        if self._is_new:
            self._is_new = False
            for part in self.parts:
                record = self._record(part.name)
                record.guard.begin()
                # this text may be another one: a few rounds show it, and cost less than going without
                start_ms = self._asker.prices(part, decision).start
                record.usual_value = max(record.usual_value, -0.5 * _LEAST_BACK * rate * start_ms)
        if load is not None and load.plain:
            return Proposal(self.name, because=load.because)
        if not request.max_nodes or not request.max_depth:
            return Proposal(self.name)
        if load is None and experience.wants_plain(begins_early=request.begins_early):
            return Proposal(self.name, width=self._plain_width(prices, request), because=LOOKING)
        if request.needs_law:
            return self._drawn(request, prices)
        parked: list[str] = []
        free = self._lookups if request.sampler.constraint is None else self._free

        def look_up() -> None:
            values = (self._ask_if_allowed(part, request, prices, parked) for part in free)
            decision.lookup = max(values, default=0.0)

        looking, at_hand = Beside(look_up), None  # at_hand: of dear drafters; None until one was heard
        sure = self._sure(last, rate) if load is None else None
        if sure is not None:
            at_hand = self._hear(sure, request, prices, parked, meanwhile=looking)
        looking()
        for part, on_trial in self._in_order(decision.lookup, rate):
            record = self._record(part.name)
            if part is not sure and (
                on_trial or record.guard.parked or self._may_beat(record, decision.lookup, at_hand, request.trees)
            ):
                heard = self._hear(part, request, prices, parked, on_trial=on_trial)
                if heard is not None:
                    at_hand = max(at_hand or 0.0, heard)
        proposal = self._chosen(request, prices)
        if proposal.num_nodes:
            return proposal
        proposal = replace(proposal, because=parked[0] if parked else _NOTHING_WORTH)
        if request.sampler.constraint is None:  # what a grammar leaves no choice about is found for nothing
            self._plain = replace(proposal, counts={})
        return proposal

    def _sure(self, last: Decision, rate: float) -> Drafter | None:
        """The dear drafter that will be asked whatever lookup says, as in the last round, and that runs on a device:
        there looking up takes no time while its first pass runs."""
        if last.lookup > _MUCH:
            return None
        asked = {one.name for one in last.asked if one.name in self._ahead_names and not one.on_trial}
        for part in self._dear:
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
        own = value - prices.rate * asked.ms
        record.usual_value += _SMOOTHING * (own - record.usual_value)
        if decision.lookup > 0.0:
            much = decision.lookup > _MUCH
            record.beside[much] += _SMOOTHING * (own - record.beside[much])
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
        usual = {part.name: self._record(part.name).usual_value for part in self._dear}
        order = sorted(self._dear, key=lambda part: -usual[part.name])
        if len(order) < 2 or usual[order[0].name] <= best:
            return [(part, False) for part in order]
        due = [part for part in order[1:] if self._record(part.name).trials.is_due(rate)][:1]
        return [(part, True) for part in due] + [(part, False) for part in order if part not in due]

    def observe(self, outcome: Outcome) -> None:
        """The outcome, for all; and what it teaches, where guesses were verified only once the next pass runs."""
        self._catch_up()
        for part in self.parts:
            part.observe(outcome)
        started = perf_counter()
        plain, decision = not len(outcome.tree), self._decision
        self._trying.follow(outcome, decision)
        self._in_a_row = outcome.begun_early and plain
        if self._resting:
            self._rest.observe(outcome)
            return
        if plain or decision.load is not None:  # the next round may ask when the last plain one was
            self._learn(decision, outcome)
        else:
            self._unlearned = decision, outcome
        self._look_ms += (perf_counter() - started) * 1e3
        if decision.load is None and self.experience.by_clock:
            # one that runs a model says of each place anew what it is worth
            ran = not all(one.name in self._asker.free_names for one in decision.asked)
            found = self._plain is None or ran
            look_ms = None if ran or decision.tried else self._look_ms
            plain_ms = 0.0 if found else self.experience.plain_ms(len(self._asker.context))
            self._rest.looked(found, look_ms, self.experience.look, plain_ms)

    def _learn(self, decision: Decision, outcome: Outcome) -> None:
        self._learning.learn_from_rest(self._rest, decision)
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
        self._catch_up()
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

    def _may_beat(self, record: Record, best: float, at_hand: float | None, trees: bool) -> bool:
        """Is a drafter that takes time worth asking, beside what was guessed for nothing and what other such drafters
        have guessed? In a tree all would count, in a chain only the best; of two that take time the second seldom
        guesses what the first did not, and where that found nothing the text is hard for both. Where nobody was asked
        and nothing was guessed the guard alone decides. Where lookup guesses well the text is easy, and so it is for
        the others: what counts is what they bring there, not what they bring elsewhere.
        """
        if record.guard.parked:
            return True
        much = best > _MUCH
        if best > 0.0 and record.beside[much] <= (0.5 * best if trees else best):
            record.beside[much] += _FORGETTING * (1.0 - record.beside[much])
            return False
        if at_hand is not None and record.usual_value <= at_hand:
            record.usual_value += _FORGETTING * (1.0 - record.usual_value)
            return False
        return True

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

    def _chosen(self, request: DraftRequest, prices: Valuation) -> Proposal:
        """What is worth verifying of everything that was guessed."""
        guessing = [one for one in self._decision.asked if one.proposal.num_nodes]
        counts = counted(self._decision.asked)
        if not guessing:
            return Proposal(self.name, counts=counts, width=self._plain_width(prices, request))
        if len(guessing) > 1 and request.trees and all(one.tree is not None for one in guessing):
            return self._merged(guessing, prices, request, counts)
        chosen = max(guessing, key=lambda one: one.value(prices))
        if chosen.tree is None:  # still on the device, and no longer than pays
            chosen.used = True
            self._decision.expected = sum(chosen.reach)
            width = min(prices.width(chosen.proposal.num_nodes), request.max_nodes + 1)
            return replace(chosen.proposal, counts=counts, width=max(width, chosen.proposal.width))
        return self._cut(chosen.tree, chosen.reach, [chosen] * len(chosen.tree), prices, request, counts)

    def _merged(
        self, guessing: Sequence[Asked], prices: Valuation, request: DraftRequest, counts: Mapping[str, int]
    ) -> Proposal:
        free = self._asker.free_names
        merged = merge([one.tree for one in guessing if one.tree is not None])
        said = [
            (one.name in free, Opinion(places, one.chances, self._record(one.name).dissent))
            for one, places in zip(guessing, merged.places, strict=True)
        ]
        # who runs a network read more than who looks up
        opinions = Opinions(merged.tree, [opinion for _, opinion in sorted(said, key=itemgetter(0))])
        self._decision.opinions = opinions
        reach = products(merged.tree, opinions.chances)
        owners = [guessing[index] for index in merged.origin]
        return self._cut(merged.tree, reach, owners, prices, request, counts)

    def _cut(
        self,
        tree: TokenTree,
        reach: list[float],
        owners: Sequence[Asked],
        prices: Valuation,
        request: DraftRequest,
        counts: Mapping[str, int],
    ) -> Proposal:
        """The best nodes, as many as pay; all of them where others choose, for whom they are marked. A child never
        reaches further than its parent, so parents are kept."""
        if self._decision.load is not None:
            self._decision.open = reach, list(owners)
            log_q = None if tree.log_q is None else tuple(tree.log_q.tolist())
            sources = tuple(owner.proposal.source for owner in owners)
            tokens = (HostTokens(tree.token),)
            return Proposal(
                self.name, tokens, tree.parent, log_q=log_q, sources=sources, counts=counts, reach=tuple(reach)
            )
        order = sorted(range(len(reach)), key=reach.__getitem__, reverse=True)
        choice = prices.best([reach[node] for node in order])
        kept = sorted(order[: choice.nodes])
        self._decision.expected = sum(reach[node] for node in kept)
        width = min(choice.width, request.max_nodes + 1)
        if not kept:
            return Proposal(self.name, counts=counts, width=width)
        for node in kept:
            owners[node].used = True
        sources = tuple(owners[node].proposal.source for node in kept)
        return Proposal.of_tree(self.name, tree.only(kept), sources=sources, counts=counts, width=width)

    def _plain_width(self, prices: Valuation, request: DraftRequest) -> int:
        return min(prices.best(()).width, request.max_nodes + 1)
