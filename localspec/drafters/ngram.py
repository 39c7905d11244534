"""Prompt lookup: guess that what followed the last few tokens before will follow them again.

Looks for the longest recent n-gram over prompt and output and proposes what came after its latest
earlier occurrence, or as a tree what came after its latest 32. Costs no model pass; pays on text that
repeats (edits, code, quotations). Source: prompt lookup decoding (Saxena, 2023); the incremental index and
the trie are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from localspec.context import Context, common_prefix
from localspec.drafters.shape import Shape
from localspec.errors import SettingError
from localspec.protocols import DraftRequest, HostTokens, Outcome, Proposal, SavedDraft, SequenceState
from localspec.tree.grow import Grower
from localspec.tree.token_tree import TokenTree
from localspec.types import TokenIds

_CHAIN_NUM = 8
_MOST_OCCURRENCES = 32


class Ngram:
    """Up to `num` tokens, found by n-grams of `max` down to `min` tokens.

    num: most nodes (0: 8 in a chain, 16 in a tree).  shape: chain, tree, or children per level.  depth: most
    levels (0: as many as nodes, at most 12 in a tree). Of n occurrences of which m go on with a token, the
    chance of that token is taken to be m / (n + 1).
    The index follows the context: tokens are added as they are emitted and taken back when a turn
    starts from a shorter history, so a round costs O(num), not O(context).
    """

    name = "ngram"

    def __init__(
        self,
        *,
        num: int = 0,
        max: int = 4,  # noqa: A002 - users type these words
        min: int = 2,  # noqa: A002
        shape: str = "chain",
        depth: int = 0,
    ) -> None:
        if not 1 <= min <= max <= 32:
            raise SettingError(
                "ngram: sizes out of range", got=f"min={min}, max={max}", expected="1 <= min <= max <= 32"
            )
        self.shape = Shape.parse(self.name, shape, num or (_CHAIN_NUM if shape == "chain" else 0), depth)
        self.sizes = range(max, min - 1, -1)
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # n-gram -> where its continuations start

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
        """Index the new turn's context, keeping what it shares with the last one."""
        self._forget(common_prefix(np.array(self._tokens, np.int32), context.tokens))
        self._extend(context.tokens)

    def propose(self, request: DraftRequest) -> Proposal:
        """What followed the longest n-gram."""
        self._extend(request.context.tokens)
        num, branching = min(self.num, request.max_nodes), self.shape.branching[: request.max_depth]
        starts = self._starts()
        if not starts or num < 1 or not branching:
            return Proposal(self.name)
        branches = request.trees and not self.shape.is_chain
        tree = self._trie(starts, num, branching) if branches else self._chain(starts, min(num, len(branching)))
        assert tree.log_q is not None
        return Proposal(self.name, (HostTokens(tree.token),), tree.parent, log_q=tuple(tree.log_q.tolist()))

    def _starts(self) -> list[int]:
        """Where the longest n-gram that occurred before went on, the latest last."""
        for size in self.sizes:
            starts = self._ends.get(tuple(self._tokens[-size:])) if len(self._tokens) >= size else None
            if starts:
                return starts[-_MOST_OCCURRENCES:]
        return []

    def _chain(self, starts: list[int], num: int) -> TokenTree:
        """The latest continuation."""
        guess = self._tokens[starts[-1] : starts[-1] + num]
        log_q: list[float] = []
        for step, token in enumerate(guess):
            agreeing = [start for start in starts if self._at(start + step) == token]
            log_q.append(math.log(len(agreeing) / (len(starts) + 1)))
            starts = agreeing
        parents = np.arange(-1, len(guess) - 1, dtype=np.int32)
        return TokenTree.from_parents(np.array(guess, np.int32), parents, log_q)

    def _trie(self, starts: list[int], num: int, branching: Sequence[int]) -> TokenTree:
        """All continuations, by how many occurrences agree."""
        grower = Grower(num, branching)
        following = {-1: starts}  # offered node -> occurrences that went this way
        nodes = [-1]
        while nodes:
            for node in nodes:
                self._offer(grower, node, following)
            nodes = grower.frontier()
        return grower.finish().tree

    def _offer(self, grower: Grower, node: int, following: dict[int, list[int]]) -> None:
        step = len(grower.path(node))
        groups: dict[int, list[int]] = {}
        for start in reversed(following[node]):
            token = self._at(start + step)
            if token is not None:
                groups.setdefault(token, []).insert(0, start)
        ranked = sorted(groups, key=lambda token: -len(groups[token]))  # stable: among equals the latest first
        total = len(following[node]) + 1
        first = len(grower)
        grower.offer(node, ranked, [math.log(len(groups[token]) / total) for token in ranked])
        following.update({number: groups[grower.token(number)] for number in range(first, len(grower))})

    def _at(self, place: int) -> int | None:
        return self._tokens[place] if place < len(self._tokens) else None

    def observe(self, outcome: Outcome) -> None:
        """The index catches up when the next proposal is asked for."""

    def save(self) -> tuple[SavedDraft, ...]:
        """No model has read anything."""
        return ()

    def restore(self, saved: Sequence[SavedDraft]) -> None:
        """Nothing of it is needed."""

    def close(self) -> None:
        """Nothing to give back."""

    def _extend(self, tokens: TokenIds) -> None:
        """Index what the context has beyond the index."""
        for token in tokens[len(self._tokens) :].tolist():
            self._add(token)

    def _add(self, token: int) -> None:
        """Index the n-grams that end just before `token`: they now have a continuation."""
        end = len(self._tokens)
        for size in self.sizes:
            if end >= size:
                self._ends.setdefault(tuple(self._tokens[end - size : end]), []).append(end)
        self._tokens.append(token)

    def _forget(self, length: int) -> None:
        """Take back the tokens from `length` on, newest first."""
        while len(self._tokens) > length:
            self._tokens.pop()
            end = len(self._tokens)
            for size in self.sizes:
                if end >= size:
                    gram = tuple(self._tokens[end - size : end])
                    self._ends[gram].pop()
                    if not self._ends[gram]:
                        del self._ends[gram]
