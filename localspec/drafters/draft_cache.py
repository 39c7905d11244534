"""A draft model's state that follows the conversation: always a prefix of it, plus the guesses in progress."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localspec.context import Context, common_prefix
from localspec.drafters.guesser import ANCHOR
from localspec.protocols import (
    HostTokens,
    LanguageModel,
    SavedDraft,
    Scores,
    Step,
    Tokens,
    chain_parents,
    require_rewind,
)
from localspec.types import Probabilities

_PREFILL_CHUNK = 512


class DraftCache:
    """Feeds a model what it has not seen and the guesses, and commits those guesses that came true.

    Fed guesses are numbered from 0 since `start`; their parent is such a number, or ANCHOR: the
    conversation's last token. ANCHOR - 1 is the token before that one, as far back as `start` gave rows.
    """

    def __init__(self, model: LanguageModel) -> None:
        require_rewind(model)
        self.model = model
        self._state = model.open()
        self._context = Context()
        self._committed: list[int] = []  # what the state holds, to compare with a new turn's context
        self._pending: list[Tokens] = []  # segments that are pending in the state, in order
        self._parents: list[int] = []  # of the pending nodes
        self._base = 0  # pending nodes before the first guess

    @property
    def length(self) -> int:
        """Number of committed tokens."""
        return self._state.length

    @property
    def room(self) -> int:
        """How many more guesses can be fed: each could be a leaf."""
        pending = self._state.num_pending
        in_context = self.model.info.context_length - self._state.length - pending
        leaves = self.model.capabilities.max_leaves
        return max(in_context if leaves is None else min(in_context, leaves - 1 - (pending - self._base)), 0)

    def begin(self, context: Context) -> None:
        """Follow another context: of what is cached the common prefix stays, the rest is read, but for the anchor:
        its row starts the guessing."""
        self._context = context
        same = common_prefix(np.array(self._committed, np.int32), context.tokens)
        self._reset_to(min(same, len(context) - 1))
        self._read(len(context) - 1)

    @property
    def free(self) -> int:
        """Tokens that the model's context has room for behind the conversation."""
        return self.model.info.context_length - len(self._context)

    def rewind(self, length: int) -> None:
        """Forget all guesses, and what was committed from `length` on."""
        self._reset_to(min(length, self._state.length))

    def start(self, num_rows: int = 1) -> Scores:
        """Forget earlier guesses, feed what is missing; scores [num_rows, V] of the last tokens, the anchor's last."""
        tokens = self._context.tokens
        last = len(tokens) - num_rows
        self._reset_to(min(self._state.length, last))
        self._read(min(last, len(tokens) - _PREFILL_CHUNK))
        count = len(tokens) - self._state.length
        if self.model.capabilities.reading(count) != (count, count):
            self._read(last)
        rest = tokens[self._state.length :].copy()
        rows = tuple(range(len(rest) - num_rows, len(rest)))
        scores = self._forward(HostTokens(rest), chain_parents(self._state, len(rest)).tolist(), rows)
        self._base = len(rest)
        return scores

    def _read(self, length: int) -> None:
        """Commit the context up to `length` tokens."""
        while self._state.length < length:
            start = self._state.length
            count, width = self.model.capabilities.reading(min(length - start, _PREFILL_CHUNK))
            chunk = self._context.tokens[start : start + count].copy()
            padding = np.zeros(min(width, self.model.info.context_length - start) - count, np.int32)
            padded = np.concatenate([chunk, padding])
            self._forward(HostTokens(padded), chain_parents(self._state, len(padded)).tolist(), ())
            self._commit(range(count), chunk.tolist())

    def step_back(self, count: int) -> None:
        """Guess on from `count` tokens before the conversation's end, at most as far back as `start` gave rows."""
        kept = self._base - count
        start = self._state.length
        self._commit(range(kept), self._context.tokens[start : start + kept].tolist())
        self._base = 0

    def extend(self, tokens: Tokens, parents: Sequence[int]) -> Scores:
        """Feed guesses; scores [N, V] of all of them."""
        return self._forward(tokens, [self._base + parent for parent in parents], None)

    def confidence(self) -> Probabilities | None:
        """A model says no more than its rows do."""
        return None

    def observe(self) -> None:
        """Commit the fed tokens that the context now holds, whoever proposed them; forget the others."""
        if not self._pending:
            return
        fed = np.concatenate([segment.numpy() for segment in self._pending]).tolist()
        number = {
            (parent, token): node
            for node, (parent, token) in reversed(list(enumerate(zip(self._parents, fed, strict=True))))
        }
        path: list[int] = []
        emitted = self._context.tokens[self._state.length : -1].tolist()  # the last one is the next anchor
        for token in emitted:
            node = number.get((path[-1] if path else ANCHOR, token))
            if node is None:
                break
            path.append(node)
        self._commit(path, emitted[: len(path)])

    def save(self) -> tuple[SavedDraft, ...]:
        """A copy of what is committed, if anything is; guesses are forgotten."""
        self._reset_to(self._state.length)
        if not self._committed:
            return ()
        return (SavedDraft(self.model, np.array(self._committed, np.int32), self._state.save()),)

    def restore(self, saved: Sequence[SavedDraft]) -> None:
        """Hold the longest of those that this model has read, in place of what is held."""
        own = [one for one in saved if one.model is self.model]
        if not own:
            return
        longest = max(own, key=lambda one: len(one.tokens))
        self._state.close()
        self._committed, self._pending, self._parents = [], [], []
        try:
            self._state = longest.state.open()
        except BaseException:
            self._state = self.model.open()
            raise
        self._committed = longest.tokens.tolist()

    def close(self) -> None:
        """Give the cache back."""
        self._state.close()

    def _commit(self, path: Sequence[int], tokens: Sequence[int]) -> None:
        self._state.keep(path)
        self._committed += tokens
        self._pending, self._parents = [], []

    def _reset_to(self, length: int) -> None:
        self._state.truncate(length)
        del self._committed[length:]
        self._pending, self._parents = [], []

    def _forward(self, tokens: Tokens, parents: list[int], rows: tuple[int, ...] | None) -> Scores:
        [scores] = self.model.forward([Step(self._state, (tokens,), np.array(parents, np.int32), rows)])
        self._pending.append(tokens)
        self._parents += parents
        return scores
