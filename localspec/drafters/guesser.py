"""Growing guesses with whatever gives a row of logits per guess: a draft model, a trained head.

Guesses are coupled: the drafter ranks tokens by log q + g with the target's own noise g, so at any
temperature it guesses what the target would sample if the two agreed (DESIGN, "the one idea"); the
children of a node are the k best by that measure. Under rejection it draws from q, without replacement
among siblings and with noise of its own, into a tree whose form was fixed before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from localspec import noise
from localspec.context import Context
from localspec.drafters.shape import MOST_CHILDREN, Shape
from localspec.errors import SettingError
from localspec.noise import Purpose
from localspec.protocols import DraftRequest, HostTokens, Outcome, Proposal, SavedDraft, Scores, Tokens
from localspec.sampling import Law, Sampler, chances
from localspec.tree.grow import Grower, shape
from localspec.types import Logits, Positions, Probabilities, TokenIds

ANCHOR = -1
COUPLED, GREEDY = "coupled", "greedy"
_RANK_CHANCES = (0.65, 0.14, 0.05, 0.03)
"""Assumed chance that the r-th of several draws without replacement is the one accepted."""
_LEAST_CHANCE = 1e-9


class GuessCache(Protocol):
    """What feeds the model or head behind a `Guesser`; `DraftCache` says what each part does."""

    @property
    def room(self) -> int: ...

    @property
    def free(self) -> int: ...

    def begin(self, context: Context) -> None: ...

    def start(self) -> Scores: ...

    def extend(self, tokens: Tokens, parents: Sequence[int]) -> Scores: ...

    def confidence(self) -> Probabilities | None:
        """[N] of the rows scored last: the chance that the best guess behind each is accepted if the guess itself is,
        where that is known apart from the row."""
        ...

    def observe(self) -> None: ...

    def save(self) -> tuple[SavedDraft, ...]: ...

    def restore(self, saved: Sequence[SavedDraft]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Manner:
    """How to guess. shape: the form.  min_prob: leave out a guess, and what would follow it, whose estimated chance
    of acceptance is lower, unless it is the very first (with rejection such a draw stays, nothing follows it).
    guess: coupled, or greedy for the likeliest tokens without noise.  Raises SettingError; drafter: for its words."""

    drafter: str
    shape: Shape
    min_prob: float
    guess: str

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_prob < 1.0:
            raise SettingError(
                f"{self.drafter}: min_prob out of range", got=self.min_prob, expected="at least 0 and below 1"
            )
        if self.guess not in (COUPLED, GREEDY):
            raise SettingError(f"{self.drafter}: unknown guess", got=self.guess, expected=f"{COUPLED} or {GREEDY}")

    def require_chain(self, why: Sequence[str]) -> None:
        """Raise SettingError for any other form, with the reason."""
        if not self.shape.is_chain:
            raise SettingError(
                f"{self.drafter}: only chains can be guessed here", got="; ".join(why) or None, fix="Leave shape out."
            )


class Guesser:
    """A drafter in a manner, over a cache.

    host_scores: logits lie on the host. Where they live on a device, a chain or fan-out under plain sampling is built
    without waiting; a tree, or min_prob above 0, waits once per level.  worth_reading: so does a chain of which
    somebody decides the length (`DraftRequest.budget`).
    """

    def __init__(
        self, name: str, cache: GuessCache, manner: Manner, *, host_scores: bool, worth_reading: bool = False
    ) -> None:
        self.name = name
        self._worth_reading = worth_reading
        self.manner = manner
        self._cache = cache
        self._host_scores = host_scores

    @property
    def shape(self) -> Shape:
        """The form of its guesses."""
        return self.manner.shape

    @property
    def min_prob(self) -> float:
        """As in `Manner`."""
        return self.manner.min_prob

    @property
    def needs_trees(self) -> bool:
        """True unless it guesses chains."""
        return not self.shape.is_chain

    @property
    def num(self) -> int:
        """Most nodes of a proposal."""
        return self.shape.num

    def begin(self, context: Context) -> None:
        """Keep what the cache shares with the new context."""
        self._cache.begin(context)

    def propose(self, request: DraftRequest) -> Proposal:
        """Guess; a chain where trees were not asked for."""
        num, branching = min(self.num, request.max_nodes, self._cache.free), self.shape.branching[: request.max_depth]
        if not request.trees:
            branching = (1,) * len(branching)
        if num < 1 or not branching:
            return Proposal(self.name)
        scores = self._cache.start()
        if request.meanwhile is not None:
            request.meanwhile()
        if request.needs_law and not request.sampler.is_greedy:
            return self._draw(request, scores, num, branching)
        asked = self._worth_reading and request.budget is not None
        waits = self.shape.by_score or self.min_prob > 0.0 or not request.sampler.is_plain or asked
        # a budget is asked only where the scores are at hand anyway: waiting for a device level by level costs more
        if self._host_scores or waits:
            return self._grow(request, scores, num, branching)
        return self._fan_out(request, scores, num, branching)

    def observe(self, outcome: Outcome) -> None:
        """Commit the guesses that were emitted, whoever proposed them."""
        self._cache.observe()

    def save(self) -> tuple[SavedDraft, ...]:
        """What its model has read, besides the target's own state."""
        return self._cache.save()

    def restore(self, saved: Sequence[SavedDraft]) -> None:
        """What its model had read."""
        self._cache.restore(saved)

    def close(self) -> None:
        """Give the cache back."""
        self._cache.close()

    # ------------------------------------------------------------ chosen guesses

    def _grow(self, request: DraftRequest, scores: Scores, num: int, branching: Sequence[int]) -> Proposal:
        """Best-first, level by level, by scores on the host."""
        grower = Grower(num, branching)
        fed = {ANCHOR: ANCHOR}  # offered node -> its number in the cache
        nodes = [ANCHOR]
        while nodes:
            paths = [grower.path(node) for node in nodes]
            for node, (ids, log_q) in zip(nodes, self._scored(request, scores, paths), strict=True):
                likely = len(ids)
                if self.min_prob > 0.0:
                    likely = int(np.count_nonzero(log_q >= math.log(self.min_prob)))
                    likely = max(likely, int(node == ANCHOR))  # the pass is padded to two tokens anyway
                grower.offer(node, ids[:likely].tolist(), log_q[:likely].tolist())
            nodes = grower.frontier(self._cache.room)
            nodes = [node for node in nodes if grower.token(node) not in request.stop_tokens]
            if nodes and request.budget is not None:
                nodes = request.budget.expand(grower, nodes)
            if nodes:
                tokens = HostTokens(np.array([grower.token(node) for node in nodes], np.int32))
                scores = self._cache.extend(tokens, [fed[grower.parent(node)] for node in nodes])
                fed.update({node: len(fed) - 1 + index for index, node in enumerate(nodes)})
        return Proposal.of_tree(self.name, grower.finish().tree)

    def _scored(
        self, request: DraftRequest, scores: Scores, paths: Sequence[list[int]]
    ) -> Iterator[tuple[TokenIds, Probabilities]]:
        """(ids, log chances), best first, of the likeliest next tokens behind each path; with what the cache knows
        of its own reliability."""
        confidence = self._cache.confidence()
        for row, (ids, log_q) in enumerate(self._children(request, scores, paths)):
            yield ids, log_q if confidence is None else with_confidence(log_q, float(confidence[row]))

    def _children(
        self, request: DraftRequest, scores: Scores, paths: Sequence[list[int]]
    ) -> Iterator[tuple[TokenIds, Probabilities]]:
        """(ids, log chances), best first, of the likeliest next tokens behind each path; all are equally long."""
        sampler, context = request.sampler, request.context
        temperature = sampler.params.temperature
        noisy = temperature > 0.0 and self.manner.guess == COUPLED
        if sampler.is_plain:
            position = np.full(len(paths), len(context) + len(paths[0]), np.int32)
            top = scores.top(MOST_CHILDREN, temperature, sampler.keys(position)) if noisy else scores.top(MOST_CHILDREN)
            ids, values = top.numpy()
            # without noise the chance that a sample is this token: q itself
            log_q = chances(values if noisy or not temperature else values / temperature, temperature if noisy else 0.0)
            yield from zip(ids, log_q, strict=True)
            return
        mark = len(context)
        rows = scores.rows(range(scores.num_rows))
        for row, path in zip(rows, paths, strict=True):
            try:
                context.extend(path)
                if noisy or not temperature:
                    yield sampler.guesses(row, context, MOST_CHILDREN)
                else:
                    yield _likeliest(sampler.law(row, context))
            finally:
                context.truncate(mark)

    def _fan_out(self, request: DraftRequest, scores: Scores, num: int, branching: Sequence[int]) -> Proposal:
        """A form that is known beforehand: tokens stay on the device, and nothing waits for them."""
        sampler = request.sampler
        segments: list[Tokens] = []
        parents: list[int] = []
        level = [ANCHOR]
        for depth, most in enumerate(branching):
            children = min(most, (num - len(parents)) // len(level))  # a level is even or not there
            if children < 1:
                break
            if segments:
                scores = self._cache.extend(segments[-1], [parents[node] for node in level])
            position = np.full(len(level), len(request.context) + depth, np.int32)
            segments.append(self._best(sampler, scores, children, position))
            start = len(parents)
            parents += [node for node in level for _ in range(children)]
            level = list(range(start, len(parents)))
        return Proposal(self.name, tuple(segments), np.array(parents, np.int32))

    def _best(self, sampler: Sampler, scores: Scores, count: int, positions: Positions) -> Tokens:
        """[N * count] the best guesses of each row, still on the device."""
        temperature = sampler.params.temperature
        if temperature == 0.0 or self.manner.guess == GREEDY:
            return scores.argmax() if count == 1 else scores.top(count).tokens
        keys = sampler.keys(positions)
        return scores.winners(temperature, keys) if count == 1 else scores.top(count, temperature, keys).tokens

    # ------------------------------------------------------------ drawn guesses

    def _draw(self, request: DraftRequest, scores: Scores, num: int, branching: Sequence[int]) -> Proposal:
        """Draws from q, siblings without replacement, into a form that no draw can change."""
        plan = shape(num, branching, [*_RANK_CHANCES, *(0.02,) * (max(branching) - len(_RANK_CHANCES))])
        tokens: list[int] = []
        parents: list[int] = []
        laws: list[Law] = []
        made = {ANCHOR: ANCHOR}  # node of the plan -> node of the proposal
        fed = {ANCHOR: ANCHOR}
        level = [ANCHOR]
        while level:
            rows = scores.rows(range(scores.num_rows))
            grown: list[int] = []
            for row, node in zip(rows, level, strict=True):
                path = [tokens[made[above]] for above in plan.path(node)] if node != ANCHOR else []
                slots = plan.children(node)
                for slot, (token, law) in zip(slots, _draws(request, row, path, len(slots)), strict=False):
                    made[slot] = len(tokens)
                    tokens.append(token)
                    parents.append(made[node])
                    laws.append(law)
                    # A draw must not be taken back: that would be another law. It just has no children.
                    if token not in request.stop_tokens and law.probability(token) >= self.min_prob:
                        grown.append(slot)
            level = [slot for slot in grown if plan.children(slot)][: self._cache.room]
            if level:
                ids = HostTokens(np.array([tokens[made[slot]] for slot in level], np.int32))
                scores = self._cache.extend(ids, [fed[int(plan.parent[slot])] for slot in level])
                fed.update({slot: len(fed) - 1 + index for index, slot in enumerate(level)})
        return Proposal(self.name, (HostTokens(np.array(tokens, np.int32)),), np.array(parents, np.int32), tuple(laws))


def _likeliest(law: Law) -> tuple[TokenIds, Probabilities]:
    """The likeliest tokens of a law and the logarithms of their probabilities."""
    order = np.lexsort((law.ids, -law.probs))[:MOST_CHILDREN]
    with np.errstate(divide="ignore"):
        return law.ids[order], np.log(law.probs[order])


def _draws(request: DraftRequest, row: Logits, path: Sequence[int], count: int) -> list[tuple[int, Law]]:
    """Up to `count` draws without replacement behind a path, each with the law it was drawn from."""
    context, sampler = request.context, request.sampler
    mark = len(context)
    try:
        context.extend(path)
        law = sampler.law(row, context)
        with np.errstate(divide="ignore"):  # the best of log q + g, in order, are such draws
            logs = np.log(law.probs) + noise.gumbel(noise.key(sampler.seed, Purpose.DRAFT, len(context)), law.ids)
    finally:
        context.truncate(mark)
    draws: list[tuple[int, Law]] = []
    for place in np.argsort(-logs, kind="stable")[:count].tolist():
        if not law.probs[place] > 0.0:
            break
        draws.append((int(law.ids[place]), law))
        left = law.probs.copy()
        left[place] = 0.0
        total = left.sum()
        if not total > 0.0:
            break
        law = Law(law.ids, left / total)
    return draws


def with_confidence(log_q: Probabilities, confidence: float) -> Probabilities:
    """[k] logarithms of chances, best first, where the best one's is known from elsewhere.

    The others share the rest as they did before, and none becomes likelier than the best: who knows how often that
    one is right does not know of a better one.
    """
    best = min(max(confidence, _LEAST_CHANCE), 1.0)
    if not len(log_q):
        return log_q
    others = -math.expm1(min(float(log_q[0]), 0.0))  # 1 - q_0
    rest = max((1.0 - best) / others, _LEAST_CHANCE) if others > _LEAST_CHANCE else 1.0
    chances = np.minimum(log_q + math.log(rest), math.log(best))
    chances[0] = math.log(best)
    return np.asarray(chances)
