"""Trying a drafter without verifying anything: its guesses are compared with what plain decoding then says.

Verifying guesses that most likely are wrong costs a wide pass, and on a device the pass that had begun. What they would
have been worth shows without it, a few tokens later, for no more than the drafter's own time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from localspec.protocols import Drafter, DraftRequest, Outcome, Proposal
from localspec.schedule.asking import Asker, paying_length
from localspec.schedule.decision import Asked, Decision, Tried
from localspec.schedule.drafting import DraftPrices
from localspec.schedule.experience import Experience, Record
from localspec.schedule.plan import Valuation
from localspec.tree.token_tree import TokenTree

_LONGEST = 8  # tokens of a chain that is tried
_SHARE_OF_PLAIN = 0.5  # of a plain round, for the guesses of a trial
_BESIDE_START = 1.2  # of a head of one pass more guesses take hardly more
_NEWS = 0.2  # that a trial is, beside what was known


@dataclass(slots=True)
class Shadow:
    """Guesses that nobody verifies, perhaps still on a device, and what was emitted since they were made."""

    proposal: Proposal
    tokens: list[int] = field(default_factory=list)
    _tree: TokenTree | None = None

    @property
    def tree(self) -> TokenTree:
        """The guesses. May wait for the device."""
        if self._tree is None:
            self._tree = self.proposal.tree()
        return self._tree

    def follow(self, tokens: Sequence[int]) -> bool:
        """Tokens were emitted; is it known what became of the guesses?"""
        self.tokens += tokens
        path = self.path()
        return len(path) < len(self.tokens) or not self.tree.children(path[-1] if path else -1)

    def path(self) -> list[int]:
        """Nodes that came true, one below the other."""
        steps, path = self.tree.steps(), list[int]()
        for token in self.tokens:
            child = steps.get((path[-1] if path else -1, token))
            if child is None:
                break
            path.append(child)
        return path


@dataclass(frozen=True, slots=True)
class _Trial:
    """shadow: its guesses.  part, asked: whose, and what was expected of them.  prices, drafting: of that round."""

    shadow: Shadow
    part: Drafter
    asked: Asked
    prices: Valuation
    drafting: DraftPrices

    def drafting_ms(self, kept: Collection[int]) -> float:
        """What guessing these would have taken: no deeper than that, where all were guessed to learn from them."""
        depth = self.shadow.tree.depth
        return min(self.asked.ms, self.drafting.chain(1 + max((int(depth[node]) for node in kept), default=0)))

    def worth_verifying(self, record: Record) -> Collection[int]:
        """Nodes that one who knows what became of them would verify of the next such guesses."""
        asked, prices = self.asked, self.prices
        if asked.tree is None:
            length = paying_length(record.reliability, prices, self.drafting, asked.proposal.num_nodes)
            return range(max(length, 1))
        change = record.hindsight.factor / asked.factor
        order = sorted(range(len(asked.reach)), key=asked.reach.__getitem__, reverse=True)
        return order[: prices.best([change * asked.reach[node] for node in order]).nodes]


class Trying:
    """Of one session: a trial of each drafter at a time."""

    def __init__(self, experience: Experience, asker: Asker) -> None:
        self._experience, self._asker = experience, asker
        self._trials: dict[str, _Trial] = {}

    def begin(self) -> None:
        """Another answer."""
        self._trials.clear()

    def price(self, part: Drafter, record: Record, decision: Decision, prices: Valuation) -> float:
        """Tokens that asking it once takes."""
        ms = record.trials.ms if record.trials.num else self._asker.prices(part, decision).start
        return prices.rate * (ms + self._asker.entry_ms(part))

    def try_if_due(self, part: Drafter, decision: Decision, request: DraftRequest, prices: Valuation) -> None:
        """Ask it for guesses that nobody verifies, if its guard has put enough aside."""
        record = self._asker.record(part.name, decision)
        price = self.price(part, record, decision, prices)
        if part.name in self._trials or not record.guard.pays(price):
            return
        started = perf_counter()
        exactly = self._enough_to_learn(part, decision, prices)
        asked = self._asker.ask(part, decision, request, prices, exactly=exactly)
        decision.asked.remove(asked)
        if asked.proposal.meanwhile is not None:  # nobody verifies it
            asked.proposal.meanwhile()
        real_ms = (perf_counter() - started) * 1e3 if self._experience.by_clock else asked.ms
        record.trials.observe(asked.ms)
        if not self._asker.is_free(part):  # who looks things up keeps nobody waiting, and costs what it said
            decision.tried.append(Tried(record.guard, asked.ms, price, real_ms, prices.rate))
        drafting = self._asker.prices(part, decision)
        self._trials[part.name] = _Trial(Shadow(asked.proposal), part, asked, prices, drafting)

    def _enough_to_learn(self, part: Drafter, decision: Decision, prices: Valuation) -> int:
        """Length of a chain that is tried: as much as takes little beside a plain round."""
        drafting = self._asker.prices(part, decision)
        most = min(_LONGEST, prices.max_nodes)
        plain_ms = self._experience.plain_ms(len(self._asker.context))
        little_ms = max(_SHARE_OF_PLAIN * plain_ms, _BESIDE_START * drafting.start)
        return sum(drafting.chain(count) <= little_ms for count in range(1, most + 1))

    def follow(self, outcome: Outcome, decision: Decision) -> None:
        """What became of guesses that nobody verified. What would have been verified of them is decided with that in
        mind: one that learned on other text that its guesses fail would verify none, and never find out."""
        for trial in tuple(self._trials.values()):
            if trial.shadow.follow(outcome.tokens):
                del self._trials[trial.part.name]
                self._judge(trial, decision)

    def _judge(self, trial: _Trial, decision: Decision) -> None:
        record, path = self._asker.record(trial.part.name, decision), trial.shadow.path()
        record.reliability.observe(trial.shadow.tree, trial.shadow.tokens)
        record.hindsight.observe(sum(trial.asked.reach) / trial.asked.factor, len(path))
        kept = trial.worth_verifying(record)
        accepted = next((depth for depth, node in enumerate(path) if node not in kept), len(path))
        extra_ms = trial.drafting_ms(kept) + trial.prices.extra_ms(len(kept))
        plain_ms = self._experience.plain_ms(len(self._asker.context))
        record.usual_value += _NEWS * (accepted - extra_ms / plain_ms - record.usual_value)
        if record.guard.parked:
            record.guard.observe(float(accepted), extra_ms, plain_ms)
            if not record.guard.parked:
                record.usual_value = max(record.usual_value, 0.0)
