"""Guessing by suffixes: what followed the longest run of the last words that occurred before, in this conversation and,
where the user keeps one, in the history of earlier sessions.

Each guess's chance is counted: how often it followed that run, blended with how often it followed shorter ones, which
are trusted less. Costs no model pass. Source: the idea is that of SuffixDecoding (Oliaro et al., 2024), the blend of
context lengths that of PPM (Cleary and Witten, 1984); how they are put together is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from localspec.context import Context, common_prefix
from localspec.drafters.shape import Shape
from localspec.drafters.suffix_automaton import Place, SuffixAutomaton
from localspec.errors import SettingError
from localspec.history import Entry, Found, History, SuffixArray
from localspec.protocols import DraftRequest, Outcome, Proposal, SavedDraft, SequenceState
from localspec.tree.grow import Grower
from localspec.types import TokenIds

_CHAIN_NUM = 8
_LONGEST = 64  # words behind each other that are told apart from shorter runs
_LONGEST_BEFORE = 32  # likewise in earlier sessions; the rest is for what followed
_MOST_RUNS = 4  # of different lengths that are asked
_FEWEST = 4  # followers of each run that are looked at, though a chain takes one
_NEGLIGIBLE = 0.02  # chance that shorter runs are not asked for
_DOUBT = 2.0
"""A run of L words that was seen n times counts as n of n + _DOUBT / L cases. With 2 chances stated as 0.58, 0.81 and
0.98 came true in 0.53, 0.79 and 0.96 of cases (docs/log.md)."""


@dataclass(frozen=True, slots=True)
class _Run:
    """The last words of a path, as far as they occurred: in this conversation, and in earlier sessions."""

    here: Place | None
    before: Found | None


@dataclass(frozen=True, slots=True)
class _Seen:
    """What followed a run of `length` words, of `total` times that anything could."""

    length: int
    total: int
    followers: Mapping[int, int]


class Suffix:
    """Up to `num` tokens behind the longest run of words, of at least `min`, that occurred before.

    num: most nodes (0: 8 in a chain, 16 in a tree).  shape: chain, tree, or children per level.  depth: most levels
    (0: as many as nodes, at most 12 in a tree).  min_prob: leave out a guess, and what would follow it, whose chance is
    lower.  min_reach: the same by the chance of the whole path to it.
    history: earlier sessions to guess from, and to add this one to; without it nothing outlives the drafter.

    The automaton follows the context: tokens are added as they are emitted and taken back when a turn starts from
    a shorter history, so a round costs what it proposes, not the context.
    """

    name = "suffix"

    def __init__(
        self,
        history: History | None = None,
        *,
        num: int = 0,
        min: int = 1,  # noqa: A002 - users type this word
        shape: str = "chain",
        depth: int = 0,
        min_prob: float = 0.3,
        min_reach: float = 0.0,
    ) -> None:
        if not 1 <= min <= _LONGEST_BEFORE:
            raise SettingError("suffix: min out of range", got=min, expected=f"1 to {_LONGEST_BEFORE}")
        if not 0.0 <= min_prob < 1.0:
            raise SettingError("suffix: min_prob out of range", got=min_prob, expected="at least 0 and below 1")
        if not 0.0 <= min_reach < 1.0:
            raise SettingError("suffix: min_reach out of range", got=min_reach, expected="at least 0 and below 1")
        self.shape = Shape.parse(self.name, shape, num or (_CHAIN_NUM if shape == "chain" else 0), depth)
        self.min, self.min_prob, self.min_reach = min, min_prob, min_reach
        self._words = SuffixAutomaton(_LONGEST)
        self._past = None if history is None else _Past(history)

    @property
    def num(self) -> int:
        """Most nodes of a proposal."""
        return self.shape.num

    @property
    def needs_trees(self) -> bool:
        """True unless it guesses chains."""
        return not self.shape.is_chain

    def attach(self, state: SequenceState) -> None:
        """The target's states are not read."""

    def begin(self, context: Context) -> None:
        """Follow the new turn's context, keeping what it shares with the last one."""
        same = common_prefix(np.array(self._words.tokens, np.int32), context.tokens)
        if self._past is not None:
            self._past.begin(context, continues=2 * same >= len(self._words))
        self._words.truncate(same)
        self._read(context.tokens)

    def propose(self, request: DraftRequest) -> Proposal:
        """What is likeliest to follow, by count."""
        tokens = request.context.tokens
        self._read(tokens)
        num, branching = min(self.num, request.max_nodes), self.shape.branching[: request.max_depth]
        if num < 1 or not branching:
            return Proposal(self.name)
        grower = Grower(num, branching if request.trees else (1,) * len(branching))
        most = max(_FEWEST, *grower.branching)
        runs = {-1: self._run(tokens)}
        nodes = [-1]
        while nodes:
            for node in nodes:
                self._offer(grower, node, runs, most)
            nodes = [node for node in grower.frontier() if grower.token(node) not in request.stop_tokens]
        return Proposal.of_tree(self.name, grower.finish().tree) if len(grower) else Proposal(self.name, log_q=())

    def observe(self, outcome: Outcome) -> None:
        """The automaton catches up when the next proposal is asked for."""

    def save(self) -> tuple[SavedDraft, ...]:
        """The automaton is rebuilt from the tokens."""
        return ()

    def restore(self, saved: Sequence[SavedDraft]) -> None:
        """Nothing was kept."""

    def close(self) -> None:
        """The session is over; the history, where there is one, keeps it."""
        if self._past is not None:
            self._past.end()

    # ------------------------------------------------------------ inside

    def _read(self, tokens: TokenIds) -> None:
        self._words.extend(tokens[len(self._words) :].tolist())

    def _run(self, tokens: TokenIds) -> _Run:
        """The longest runs that the context ends with."""
        match = self._words.match
        before = None if self._past is None else self._past.index.longest(tokens[-_LONGEST_BEFORE:], self.min)
        return _Run(match if match.length >= self.min else None, before)

    def _offer(self, grower: Grower, node: int, runs: dict[int, _Run], most: int) -> None:
        """Offer what may follow a node, of the `most` likeliest behind each run; `runs` gets those that end with it."""
        run, first = runs[node], len(grower)
        above = math.exp(grower.reach(node)) if node >= 0 else 1.0
        least = max(self.min_prob, self.min_reach / above)
        if least > 1.0:
            return
        chances = self._chances(run, most, max(_NEGLIGIBLE, 0.5 * least))
        likely = [token for token, chance in chances.items() if chance >= least]
        ranked = sorted(likely, key=chances.__getitem__, reverse=True)
        grower.offer(node, ranked, [math.log(chances[token]) for token in ranked])
        for number in range(first, len(grower)):
            runs[number] = self._followed(run, grower.token(number))

    def _chances(self, run: _Run, most: int, enough: float) -> dict[int, float]:
        """Token -> its chance to follow, of the `most` likeliest behind each run: longer runs first, what they leave in
        doubt by shorter ones, as long as that is `enough` to matter."""
        chances: dict[int, float] = {}
        left = 1.0
        for seen in self._seen(run, most):
            doubt = _DOUBT / seen.length
            share = left / (seen.total + doubt)
            for token, count in seen.followers.items():
                chances[token] = chances.get(token, 0.0) + share * count
            left = share * doubt
            if left < enough:
                break
        return chances

    def _seen(self, run: _Run, most: int) -> Iterator[_Seen]:
        """Longest run first, and of equal ones that of this conversation."""
        words, here, before = self._words, run.here, run.before
        for _ in range(_MOST_RUNS):
            if here is None or here.length < self.min:
                break
            if before is not None and before.length > here.length:
                yield from self._seen_before(before)
                before = None
            total = words.count(here) - (words.end(here.state) == len(words))  # nothing follows the last words yet
            if total:
                yield _Seen(here.length, total, words.likeliest(here, most))
            here = words.shorter(here)
        if before is not None:
            yield from self._seen_before(before)

    def _seen_before(self, run: Found) -> Iterator[_Seen]:
        assert self._past is not None
        followers, total = self._past.index.followers(run)
        if total:
            yield _Seen(run.length, total, followers)

    def _followed(self, run: _Run, token: int) -> _Run:
        """The longest runs that end with one more token."""
        here, found = run.here, None
        while here is not None and found is None:
            found = self._words.follow(here, token)
            here = self._words.shorter(here)
        before = None
        if run.before is not None and self._past is not None:
            before = self._past.index.follow(run.before, token)
        return _Run(found if found is not None and found.length >= self.min else None, before)


class _Past:
    """A drafter's view of the history: what to look up, and where this conversation is added."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._context = Context()
        self._entry: Entry | None = None
        self.index: SuffixArray = history.index()

    def begin(self, context: Context, *, continues: bool) -> None:
        """A turn starts. continues: it is still the same conversation."""
        if continues:
            self._store()
        else:
            self.end()
            self.index = self._history.index()
        self._context = context

    def end(self) -> None:
        """The conversation is over."""
        self._store()
        if self._entry is not None:
            self._entry.end()
        self._entry, self._context = None, Context()

    def _store(self) -> None:
        if len(self._context):
            self._entry = self._entry or self._history.entry()
            self._entry.write(self._context.tokens)
