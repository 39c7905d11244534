"""Prompt lookup: guess that what followed the last few tokens before will follow them again.

Looks for the longest recent n-gram over prompt and output and proposes what came after its latest
earlier occurrence. Costs no model pass; pays on text that repeats (edits, code, quotations). Source:
prompt lookup decoding (Saxena, 2023); the incremental index is ours.
"""

from __future__ import annotations

import numpy as np

from localspec.context import Context, common_prefix
from localspec.errors import SettingError
from localspec.protocols import DraftRequest, HostTokens, Outcome, Proposal
from localspec.types import TokenIds


class Ngram:
    """Chains of up to `num` tokens, found by n-grams of `max` down to `min` tokens.

    The index follows the context: tokens are added as they are emitted and taken back when a turn
    starts from a shorter history, so a round costs O(num), not O(context).
    """

    name = "ngram"
    needs_trees = False

    def __init__(self, *, num: int = 8, max: int = 4, min: int = 2) -> None:  # noqa: A002 - users type these words
        if not 1 <= num <= 256:
            raise SettingError("ngram: num out of range", got=num, expected="1 to 256")
        if not 1 <= min <= max <= 32:
            raise SettingError(
                "ngram: sizes out of range", got=f"min={min}, max={max}", expected="1 <= min <= max <= 32"
            )
        self.num = num
        self.sizes = range(max, min - 1, -1)
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # n-gram -> where its continuations start

    def begin(self, context: Context) -> None:
        """Index the new turn's context, keeping what it shares with the last one."""
        self._forget(common_prefix(np.array(self._tokens, np.int32), context.tokens))
        self._extend(context.tokens)

    def propose(self, request: DraftRequest) -> Proposal:
        """What followed the longest n-gram the last time."""
        self._extend(request.context.tokens)
        num = min(self.num, request.max_nodes, request.max_depth)
        if num < 1:
            return Proposal(self.name)
        for size in self.sizes:
            starts = self._ends.get(tuple(self._tokens[-size:])) if len(self._tokens) >= size else None
            if starts:
                guess = np.array(self._tokens[starts[-1] : starts[-1] + num], np.int32)
                parents = np.arange(-1, len(guess) - 1, dtype=np.int32)
                return Proposal(self.name, (HostTokens(guess),), parents)
        return Proposal(self.name)

    def observe(self, outcome: Outcome) -> None:
        """The index catches up when the next proposal is asked for."""

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
