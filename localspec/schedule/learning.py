"""What a round teaches: what things cost, how often guesses come true, what each drafter gained.

Nothing of it is needed before the next round's guesses are chosen, one round earlier or later. So it waits until the
target's next pass is under way (`Proposal.meanwhile`): on a device the host has nothing else to do then.
"""

from __future__ import annotations

from collections.abc import Sequence

from localspec.protocols import Drafter, Outcome
from localspec.schedule.asking import Asker
from localspec.schedule.decision import Decision
from localspec.schedule.experience import Experience
from localspec.schedule.rest import Rest
from localspec.schedule.steady import Steady

_SMOOTHING = 0.1
_STALL = 2.0  # drafting that takes so many times what was expected is not the drafter's fault
_LEAST_OWN = 0.4  # of a pass's time is its own, whatever drafting may be hidden in it
RESTART = 2
"""Rounds behind a guess that take longer where passes begin early."""


class Learning:
    """Of one session's rounds, for the experience that it shares with others."""

    def __init__(self, experience: Experience, asker: Asker) -> None:
        self._experience, self._asker = experience, asker
        self._run = 0  # rounds with guesses behind each other
        self._since_guess = RESTART  # plain rounds, where passes begin early
        self._restarting = 0.0  # plain rounds that these took longer than in a row

    def begin(self) -> None:
        """Another answer."""
        self._since_guess = RESTART

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """What became of a round that was decided."""
        experience, asked, lanes, context = self._experience, decision.asked, decision.lanes, decision.context
        shared = decision.load is not None
        plain_ms = experience.plain_ms(context, lanes)
        width = outcome.width // lanes
        if shared and lanes == 1:
            width = max(len(outcome.tree) + 1, experience.live.min_width)
        verify_ms = outcome.verify_ms
        plain = not len(outcome.tree)
        # plain decoding is quicker in a row; and what a trial left to the device the pass waits for
        tried = decision.tried
        usual = not tried and (outcome.begun_early or not (plain and decision.begins_early))
        if decision.begins_early:
            self._see_restart(plain, verify_ms - plain_ms, plain_ms)
        for one in tried:
            # reading guesses waits behind the pass that had begun, and the next one begins late
            late_ms = max(verify_ms - plain_ms, 0.0) / len(tried) if experience.by_clock else 0.0
            one.guard.spent(one.price, one.rate * (one.real_ms + late_ms))
        if not experience.by_clock or shared:
            verify_ms = experience.live.verify_ms(width, context, lanes)
        elif verify_ms > 0.0 and usual:
            verify_ms = max(verify_ms - sum(one.hidden_ms for one in asked), _LEAST_OWN * verify_ms)
            early = outcome.begun_early
            experience.live.observe_verify(width, context, verify_ms, early=early, place=decision.place)
        draft_ms = sum(one.ms for one in asked) + sum(one.ms for one in tried)
        round_ms = verify_ms + draft_ms + experience.live.costs.overhead_ms
        if not shared:
            experience.observe(len(outcome.tokens), round_ms, plain=plain and usual, greedy=decision.greedy)
        _see_what_was_kept(decision, outcome)
        if decision.opinions is not None:
            decision.opinions.observe(outcome.tokens)
        # by the corrected table, not by this round's clock: one stall would outweigh many rounds
        extra = experience.live.verify_ms(width, context, lanes) + experience.live.costs.overhead_ms - plain_ms
        if not plain:
            extra += decision.restart_ms
        self._judge(decision, outcome, extra, plain_ms)
        names = {one.name for one in asked}
        self._idle([part for part in self._asker.parts if part.name not in names], decision, round_ms, plain_ms)

    def _judge(self, decision: Decision, outcome: Outcome, extra_ms: float, plain_ms: float) -> None:
        """How reliable each drafter was that was asked, and what it gained. extra_ms: that the round took longer than
        a plain one, drafting left out."""
        asked, accepted = decision.asked, float(len(outcome.path))
        num_used = sum(one.used for one in asked)
        brought = accepted
        if decision.expected is not None:  # half of what was expected is noise as good as gone
            brought = 0.5 * (accepted + decision.expected)
        for one in asked:
            record = self._asker.record(one.name, decision)
            if one.proposal.laws is not None:  # nothing was known of its worth before
                record.usual_value += _SMOOTHING * (accepted - one.ms / plain_ms - record.usual_value)
                record.trials.observe(one.ms)
            record.reliability.observe(one.tree if one.tree is not None else outcome.tree, outcome.tokens)
            if one.on_trial and not one.used:
                continue  # it was asked to see what it says, not because that would pay
            share = extra_ms / num_used if one.used else 0.0
            if not one.used:
                record.hindsight.fade()
            elif decision.expected is not None and decision.opinions is None:
                record.hindsight.observe(decision.expected / one.factor, len(outcome.path))
            # while one lane drafts, all wait
            record.guard.observe(brought / num_used if one.used else 0.0, decision.lanes * one.ms + share, plain_ms)

    def learn_late(self, rest: Rest, steady: Steady, decision: Decision) -> None:
        """What the rounds without a look taught, behind that decision."""
        self.learn_from_rest(rest, decision)
        self.learn_from_steady(steady, decision)

    def learn_from_rest(self, rest: Rest, decision: Decision) -> None:
        """What the rounds without a look took behind that one, and that all drafters were idle."""
        if not rest.rounds:
            return
        experience, context = self._experience, decision.context
        early, place = decision.begins_early, rest.rounds + 1  # of the last one at least
        experience.live.observe_verify(rest.width, context, rest.ms / rest.rounds, early=early, place=place)
        round_ms = rest.ms + rest.rounds * experience.live.costs.overhead_ms
        experience.observe(rest.tokens, round_ms, plain=True, greedy=decision.greedy)
        self._idle(self._asker.parts, decision, round_ms, experience.plain_ms(context))
        rest.clear()

    def learn_from_steady(self, steady: Steady, decision: Decision) -> None:
        """What the rounds brought and took that went on as those before them. How reliable the drafter is, and what
        asking it takes, is learned where it was decided."""
        experience = self._experience
        for one in steady.rounds:
            plain_ms = experience.plain_ms(one.context)
            experience.live.observe_verify(one.outcome.width, one.context, one.outcome.verify_ms, place=one.place)
            expected_ms = self._asker.prices(one.part, decision).chain(len(one.outcome.tree))
            other_ms = min(one.draft_ms, _STALL * expected_ms) + experience.live.costs.overhead_ms
            round_ms = one.outcome.verify_ms + other_ms
            experience.observe(len(one.outcome.tokens), round_ms, plain=False, greedy=decision.greedy)
            extra_ms = experience.live.in_a_row_ms(one.outcome.width, one.context) + other_ms - plain_ms
            guard = self._asker.record(one.part.name, decision).guard
            guard.observe(float(len(one.outcome.path)), extra_ms, plain_ms)
            others = [part for part in self._asker.parts if part is not one.part]
            self._idle(others, decision, round_ms, plain_ms)
        steady.rounds.clear()

    def _idle(self, parts: Sequence[Drafter], decision: Decision, round_ms: float, plain_ms: float) -> None:
        """Time went by without them. What trials may cost is for all together."""
        records = [(part, self._asker.record(part.name, decision)) for part in parts]
        idle = sum(record.trials.num > 0 for _, record in records)  # those that were ever tried
        share_ms = round_ms / max(idle, 1)
        for part, record in records:
            price = decision.lanes * (record.trials.ms + self._asker.entry_ms(part)) / plain_ms
            record.guard.idle(share_ms, plain_ms, price)

    def _see_restart(self, plain: bool, longer_ms: float, plain_ms: float) -> None:
        """Behind a guess it takes plain decoding some rounds until its passes begin early again; what that costs."""
        if not plain:
            self._since_guess, self._restarting = 0, 0.0
            self._run += 1
        elif self._since_guess < RESTART:
            if self._run:
                self._experience.observe_run(self._run)
                self._run = 0
            self._since_guess += 1
            self._restarting += longer_ms / plain_ms
            if self._since_guess == RESTART:
                self._experience.observe_restart(self._restarting)


def _see_what_was_kept(decision: Decision, outcome: Outcome) -> None:
    """Of what was left open: what others chose, whose it was, and what was expected of it."""
    if decision.open is None:
        return
    reach, owners = decision.open
    kept = range(len(reach)) if outcome.kept is None else outcome.kept
    decision.expected = sum(reach[node] for node in kept)
    for node in kept:
        owners[node].used = True
