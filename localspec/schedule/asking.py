"""Asking one drafter: by what budget it guesses, what its guesses are worth, what that took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from operator import mul
from time import perf_counter

import numpy as np

from localspec.constraint import obey
from localspec.context import Context
from localspec.protocols import Budget, Drafter, DraftRequest, HostTokens, Proposal
from localspec.schedule.acceptance import Reliability
from localspec.schedule.decision import Asked, Decision
from localspec.schedule.drafting import FREE, DraftPrices
from localspec.schedule.experience import Experience, Record
from localspec.schedule.plan import Valuation
from localspec.tree.grow import Grower
from localspec.tree.token_tree import TokenTree

_STALL, _BUILDING = 2.0, 1.25  # drafting that takes so many times what was expected is not the drafter's fault
_NO_TREE = Proposal("").tree()


class Plan:
    """The budget of one drafter in one round."""

    def __init__(self, prices: Valuation, drafting: DraftPrices, record: Record) -> None:
        self._prices, self._drafting, self._record = prices, drafting, record
        self._factor = record.hindsight.factor
        self._reach: list[float] = []
        self.expected_ms = drafting.start

    def expand(self, grower: Grower, nodes: Sequence[int]) -> list[int]:
        """The best of the newest nodes, as many as pay for a pass."""
        reach, record = self._reach, self._record
        new = range(len(reach), len(grower))
        chances = record.reliability.chances(map(grower.log_q, new), map(grower.depth, new))
        for node, chance in zip(new, chances, strict=True):
            parent = grower.parent(node)
            reach.append(chance * (reach[parent] if parent >= 0 else self._factor))
        ranked = sorted(nodes, key=lambda node: -reach[node])
        leaves = [reach[node] for node in ranked]
        deeper = 1 + max((grower.depth(node) for node in nodes), default=0)
        count = self._prices.worth_expanding(reach, leaves, record.reliability.chance_at(deeper), self._drafting.extend)
        if count:
            self.expected_ms += self._drafting.extend(count)
        return sorted(ranked[:count])


class Beside:
    """Work that is done once, by whoever finds the time first. ms: what it took, 0 until it is done."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self.ms = 0.0

    def __call__(self) -> None:
        """Do it, if nobody has."""
        if self._work is not None:
            work, self._work = self._work, None
            started = perf_counter()
            work()
            self.ms = (perf_counter() - started) * 1e3


def products(tree: TokenTree, chances: Sequence[float]) -> list[float]:
    """[N] chance of the whole path to each node, from those [N] of the edges."""
    reach: list[float] = []
    for parent, chance in zip(tree.parent.tolist(), chances, strict=True):
        reach.append(chance * (reach[parent] if parent >= 0 else 1.0))
    return reach


class Asker:
    """Asks one session's drafters. `dear` ones run a network, `free` ones only look things up."""

    def __init__(self, experience: Experience, free: Sequence[Drafter], dear: Sequence[Drafter]) -> None:
        self._experience = experience
        self.free_names = frozenset(part.name for part in free)
        self.parts = (*free, *dear)
        for part in dear:
            experience.times(part.name)
        self.context = Context()
        self._read: dict[str, int] = {}  # how much of the context each drafter has seen

    def turn(self, context: Context) -> None:
        """Another answer begins."""
        self.context = context
        self._read = {}

    def begin(self, part: Drafter) -> None:
        """Have a drafter read the context."""
        part.begin(self.context)
        self._read[part.name] = len(self.context)

    def has_begun(self, part: Drafter) -> bool:
        """Did it, in this answer?"""
        return part.name in self._read

    def is_free(self, part: Drafter) -> bool:
        """Does it only look things up?"""
        return part.name in self.free_names

    def record(self, name: str, decision: Decision) -> Record:
        """Of a drafter, for such text as this round's."""
        return self._experience.record(name, decision.greedy, decision.lanes)

    def prices(self, part: Drafter, decision: Decision) -> DraftPrices:
        """What it takes to ask it this round."""
        if self.is_free(part):
            return FREE
        return self._experience.times(part.name).prices(len(self.context), decision.drafting)

    def settled(self, part: Drafter, decision: Decision) -> Callable[[int], tuple[float, int]]:
        """(milliseconds, width) of a round by the number of its guesses in a chain, if those before it were alike."""
        live, context = self._experience.live, len(self.context)
        drafting = self.prices(part, decision)

        def prices(num: int) -> tuple[float, int]:
            ms, width = live.settled_ms(num, context)
            return ms + live.costs.overhead_ms + drafting.chain(num), width

        return prices

    def entry_ms(self, part: Drafter) -> float:
        """What it takes a drafter to read what it missed while others worked."""
        if self.is_free(part):
            return 0.0
        missed = len(self.context) - self._read.get(part.name, 0)
        return self._experience.times(part.name).missed_ms(missed, len(self.context))

    def repeat(self, part: Drafter, request: DraftRequest) -> Proposal:
        """Its guesses, as many as the request says."""
        proposal = part.propose(request)
        self._read[part.name] = len(self.context)
        return proposal

    def ask(
        self,
        part: Drafter,
        decision: Decision,
        request: DraftRequest,
        prices: Valuation,
        *,
        exactly: int = 0,
        meanwhile: Beside | None = None,
    ) -> Asked:
        """Its guesses, as many as pay, for which the decision is told; `exactly`: so many in any case, and none is
        waited for to decide that. meanwhile: what may be done while its first pass runs, and is not its work."""
        record, drafting = self.record(part.name, decision), self.prices(part, decision)
        dear = not self.is_free(part)
        budget = Plan(prices, drafting, record) if dear and not exactly else None
        most = exactly or prices.max_nodes
        if not (record.states_chances or exactly):
            most = max(1, paying_length(record.reliability, prices, drafting, min(most, request.max_depth)))
        if not self.has_begun(part):
            self.begin(part)
        entry_ms = self.entry_ms(part)
        asked_for = replace(request, max_nodes=min(most, request.max_nodes), budget=budget, meanwhile=meanwhile)
        started = perf_counter()
        proposal = obey(part.propose(asked_for), request)
        ms = (perf_counter() - started) * 1e3 - (0.0 if meanwhile is None else meanwhile.ms)
        if not dear or self._experience.times(part.name).is_shared:  # all that draft side by side take this long
            ms /= decision.drafting
        drafted_ms = max(ms - entry_ms, 0.0)
        if decision.lanes == 1:  # else all wait while one reads
            ms = drafted_ms
        self._read[part.name] = len(self.context)
        expected_ms, hidden_ms = 0.0 if budget is None else budget.expected_ms, 0.0
        unread = dear and proposal.num_nodes > 0 and proposal.log_q is None  # not planned pass by pass
        if unread or (dear and exactly):
            expected_ms = drafting.chain(proposal.num_nodes)
        if not self._experience.by_clock:
            ms = expected_ms
        elif unread and not all(isinstance(segment, HostTokens) for segment in proposal.tokens):
            # what was measured was waited for pass by pass: more is work that is done once, building a graph, say
            hidden_ms = max(expected_ms - drafted_ms, 0.0)
            ms = ms - drafted_ms + max(expected_ms, min(drafted_ms, _BUILDING * expected_ms))
        elif dear:
            self._experience.times(part.name).observe(expected_ms, drafted_ms, decision.drafting)
            ms = ms - drafted_ms + min(drafted_ms, _STALL * expected_ms)
        if proposal.num_nodes:
            record.states_chances = proposal.log_q is not None
        asked = Asked(part.name, proposal, None, [], [], ms, hidden_ms=hidden_ms)
        _expect(asked, record)
        decision.asked.append(asked)
        return asked


def _expect(asked: Asked, record: Record) -> None:
    """What is to be expected of its guesses. How easy the text is just now shows in the chances by depth themselves."""
    proposal, reliability = asked.proposal, record.reliability
    if not proposal.num_nodes:
        asked.tree = _NO_TREE
    elif proposal.log_q is None:
        asked.reach = chain_reach(reliability, proposal.num_nodes)
    else:
        asked.tree = proposal.tree()
        asked.chances = reliability.chances(proposal.log_q, asked.tree.depth.tolist())
        asked.factor = record.hindsight.factor
        asked.reach = [asked.factor * chance for chance in products(asked.tree, asked.chances)]


def paying_length(reliability: Reliability, prices: Valuation, drafting: DraftPrices, most: int) -> int:
    """Length of a chain that must be decided before it is guessed."""
    reach = chain_reach(reliability, most)
    values = [prices.total(reach[:count]) - prices.rate * drafting.chain(count) for count in range(1, most + 1)]
    best = int(np.argmax(values)) if values else 0
    return best + 1 if values and values[best] > 0.0 else 0


def chain_reach(reliability: Reliability, length: int) -> list[float]:
    """[length] by what is known of depths alone."""
    return list(accumulate((reliability.chance_at(depth) for depth in range(length)), mul))


_: type[Budget] = Plan
