"""A draft model's state that follows a conversation in another vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localspec.context import Context
from localspec.drafters.draft_cache import DraftCache
from localspec.drafters.mirror import MAP, Mirror
from localspec.fingerprint import Relation
from localspec.host_scores import HostScores
from localspec.protocols import HostTokens, LanguageModel, SavedDraft, Scores, Tokens
from localspec.types import Probabilities


class AlignedCache:
    """`DraftCache` over the mirrored conversation. num_fed_again: tokens that were dropped from the state because
    new text changed how the words before it are split."""

    def __init__(self, model: LanguageModel, relation: Relation, specials: str = MAP) -> None:
        self.mirror = Mirror(relation, specials)
        self.num_fed_again = 0
        self._cache = DraftCache(model)
        self._target_context = Context()
        self._draft_context = Context()

    @property
    def is_empty(self) -> bool:
        """Is there nothing that the draft model could read?"""
        return not len(self._draft_context)

    @property
    def room(self) -> int:
        """How many more guesses can be fed."""
        return self._cache.room

    @property
    def free(self) -> int:
        """Tokens that the draft model's context has room for behind the conversation."""
        return 0 if self.is_empty else self._cache.free

    def begin(self, context: Context) -> None:
        """Follow another conversation."""
        self._target_context = context
        self.mirror.begin(context.tokens)
        self._draft_context = Context(self.mirror.ids)
        if not self.is_empty:
            self._cache.begin(self._draft_context)

    def start(self, num_rows: int = 1) -> Scores:
        """Forget earlier guesses, feed what is missing; scores [num_rows, V] of the last tokens."""
        return self._cache.start(num_rows)

    def step_back(self, count: int) -> None:
        """Guess on from `count` tokens before the conversation's end."""
        self._cache.step_back(count)

    def extend(self, tokens: Tokens, parents: Sequence[int]) -> Scores:
        """Feed guesses of the draft model's vocabulary; scores [N, V] of all of them."""
        return self._cache.extend(tokens, parents)

    def observe(self) -> None:
        """Take in what was emitted; commit the guesses that it consists of in the draft's own split."""
        if self.is_empty:
            self.begin(self._target_context)
            return
        before = len(self._draft_context)
        kept = self.mirror.follow(self._target_context.tokens)
        self.num_fed_again += before - kept
        self._draft_context.truncate(kept)
        self._draft_context.extend(self.mirror.ids[kept:])
        if kept < self._cache.length:
            self._cache.rewind(min(kept, len(self._draft_context) - 1))
        else:
            self._cache.observe()

    def save(self) -> tuple[SavedDraft, ...]:
        """A copy of what the draft model has read."""
        return self._cache.save()

    def restore(self, saved: Sequence[SavedDraft]) -> None:
        """Hold what the draft model had read."""
        self._cache.restore(saved)

    def close(self) -> None:
        """Give the cache back."""
        self._cache.close()


class SharedTokens:
    """The same for a drafter that speaks the target's vocabulary: rows of scores and guesses are translated.

    Tokens that only one of the two has score minus infinity, so what is drawn from a row follows the draft
    model's distribution over the shared tokens.
    """

    def __init__(self, aligned: AlignedCache, relation: Relation, num_rows: int) -> None:
        self._aligned = aligned
        self._to_draft = relation.to_draft
        shared = np.flatnonzero(relation.to_draft >= 0)
        self._mine, self._other = shared, relation.to_draft[shared]
        self._num_rows = num_rows

    @property
    def room(self) -> int:
        """How many more guesses can be fed."""
        return self._aligned.room

    @property
    def free(self) -> int:
        """Tokens that the draft model's context has room for behind the conversation."""
        return self._aligned.free

    def begin(self, context: Context) -> None:
        """Follow another conversation."""
        self._aligned.begin(context)

    def start(self) -> Scores:
        """Scores [1, V of the target] of the last token."""
        return self._translated(self._aligned.start())

    def extend(self, tokens: Tokens, parents: Sequence[int]) -> Scores:
        """Feed guesses of the target's vocabulary; scores [N, V of the target] of all of them."""
        return self._translated(self._aligned.extend(HostTokens(self._to_draft[tokens.numpy()]), parents))

    def confidence(self) -> Probabilities | None:
        """A model says no more than its rows do."""
        return None

    def observe(self) -> None:
        """Take in what was emitted."""
        self._aligned.observe()

    def save(self) -> tuple[SavedDraft, ...]:
        """A copy of what the draft model has read."""
        return self._aligned.save()

    def restore(self, saved: Sequence[SavedDraft]) -> None:
        """Hold what the draft model had read."""
        self._aligned.restore(saved)

    def close(self) -> None:
        """Give the cache back."""
        self._aligned.close()

    def _translated(self, scores: Scores) -> Scores:
        rows = np.full((scores.num_rows, self._num_rows), -np.inf, np.float32)
        rows[:, self._mine] = scores.rows(range(scores.num_rows))[:, self._other]
        return HostScores(rows)
