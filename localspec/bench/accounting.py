"""What of a foreign drafter's accepted length is the drafter's, and what its tokenizer's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from localspec.context import Context
from localspec.drafters import Draft
from localspec.drafters.aligned_cache import AlignedCache
from localspec.drafters.draft_cache import DraftCache
from localspec.drafters.guesser import ANCHOR
from localspec.protocols import HostTokens
from localspec.types import TokenIds


class WordStarts:
    """How far a drafter alone, writing greedily in its own tokens, agrees with the target from word starts on.

    A word start is a token of the target's that begins with a space: a boundary in all tokenizers we know. So
    no tokenizer is at an advantage there, and what differs is the drafters'.
    """

    def __init__(self, draft: Draft, num: int) -> None:
        self._relation = draft.relation
        self._num = num
        self._cache = DraftCache(draft.model) if draft.relation.same else AlignedCache(draft.model, draft.relation)

    def agreement(self, prompt: TokenIds, answer: Sequence[int]) -> tuple[int, int]:
        """(tokens of the target's that are agreed in, at most `num` per place; number of places)."""
        texts = self._relation.target.texts
        places = [place for place in range(1, len(answer) - self._num + 1) if texts[answer[place]].startswith(b" ")]
        return sum(self._at(prompt, answer, place) for place in places), len(places)

    def close(self) -> None:
        """Give the cache back."""
        self._cache.close()

    def _at(self, prompt: TokenIds, answer: Sequence[int], place: int) -> int:
        texts = self._relation.target.texts
        wanted = [texts[token] for token in answer[place : place + self._num]]
        want = b"".join(wanted)
        self._cache.begin(Context([*prompt.tolist(), *answer[:place]]))
        scores = self._cache.start()
        found, parent = b"", ANCHOR
        while True:
            token = int(scores.argmax().numpy()[0])
            if token in self._relation.draft.special or token >= len(self._relation.draft):
                break
            found += self._relation.draft.texts[token]
            if len(found) >= len(want) or not want.startswith(found):
                break
            scores = self._cache.extend(HostTokens(np.array([token], np.int32)), [parent])
            parent += 1
        same = next(
            (at for at, (a, b) in enumerate(zip(found, want, strict=False)) if a != b), min(len(found), len(want))
        )
        ends = np.cumsum([len(text) for text in wanted])
        return int(np.count_nonzero(ends <= same))


def foreign(draft: Draft) -> Draft:
    """The same draft model, as if its tokenizer were another one."""
    return replace(draft, relation=replace(draft.relation, same=False))


def cut(draft: Draft, tokens: Iterable[int], share: float) -> Draft:
    """A draft model of the target's own tokenizer, as if only this share of a text's tokens were shared.

    Tokens of several bytes become the target's alone, in random order, until the share is reached: a foreign
    vocabulary has all bytes.
    """
    relation = draft.relation
    counts = Counter(token for token in tokens if token not in relation.target.special)
    order = sorted(token for token in counts if len(relation.target.texts[token]) > 1)
    np.random.default_rng(0).shuffle(order)
    left = (1.0 - share) * counts.total()
    to_draft, to_target = relation.to_draft.copy(), relation.to_target.copy()
    for token in order:
        if counts[token] <= left:
            left -= counts[token]
            to_draft[token] = to_target[token] = -1
    return replace(draft, relation=replace(relation, same=False, to_draft=to_draft, to_target=to_target))
