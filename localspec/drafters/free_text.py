"""Text that a draft model writes freely in its own tokens, and what it is in the target's.

One round: a tree of the draft's tokens grows behind the conversation (or some tokens before its end,
`continuation.py`), every branch is encoded with the target's tokenizer behind the target's last word, and
all become one tree of the target's tokens. A branch's last token is held back: more text could lengthen it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localspec import noise
from localspec.drafters.aligned_cache import AlignedCache
from localspec.drafters.byte_encoder import ByteEncoder, incomplete
from localspec.drafters.continuation import Prefixes, continuations
from localspec.drafters.guesser import ANCHOR
from localspec.drafters.mirror import Tail
from localspec.drafters.shape import MOST_CHILDREN, MOST_NODES
from localspec.fingerprint import Relation
from localspec.protocols import DraftRequest, HostTokens, LanguageModel, Rewind
from localspec.ranking import top_ids
from localspec.sampling import chances
from localspec.tree.grow import Grower, merge, prune
from localspec.tree.token_tree import TokenTree
from localspec.types import Logits, Probabilities

_BACK = 2
"""How many of the last tokens a guess may replace. More brought nothing (docs/log.md)."""
_MOST_RATIO = 8.0
_MOST_COUPLED = 256
"""First tokens that are looked at where noise decides among them."""


@dataclass(frozen=True, slots=True)
class Written:
    """tree: the target's tokens.  held_back: tokens that were encoded and not guessed.  stepped_back: of the draft's
    tokens that begin the text, those that replace some of the conversation's last ones."""

    tree: TokenTree
    held_back: int
    stepped_back: int


class Writer:
    """What does not change between rounds. min_prob, guess: as of `DraftModel`."""

    def __init__(
        self, model: LanguageModel, aligned: AlignedCache, relation: Relation, min_prob: float, guess: str
    ) -> None:
        self.aligned = aligned
        self.relation = relation
        self.min_prob = min_prob
        self.guess = guess
        self.encoder = ByteEncoder(relation.target)
        self.may_guess = _guessable(relation, model.vocab_size)
        self.heads = relation.to_target
        self.prefixes = Prefixes(relation.draft)
        self.back = _BACK if model.capabilities.rewind is Rewind.FREE else 0

    def write(self, request: DraftRequest, num: int, branching: Sequence[int]) -> Written:
        """At most `num` tokens of the target's, with so many children per level."""
        text = _Text(self, request, num, branching)
        text.grow()
        return text.translated()


class _Text:
    """One round's text in the making."""

    def __init__(self, writer: Writer, request: DraftRequest, num: int, branching: Sequence[int]) -> None:
        self._writer = writer
        self._request = request
        self._num = num
        self._depth = len(branching)
        self._is_chain = max(branching) == 1
        relation, aligned = writer.relation, writer.aligned
        self._texts = relation.draft.texts
        self._to_target = relation.to_target
        self._tail = Tail(aligned.mirror, writer.encoder, request.context.tokens)
        ratio = min(max(len(aligned.mirror.ids) / max(len(request.context), 1), 1.0), _MOST_RATIO)
        self._steps = math.ceil(self._depth * ratio * 1.5) + 2
        budget = min(MOST_NODES, max(aligned.free, 1), math.ceil(num * ratio * (1.0 if self._is_chain else 2.0)) + 2)
        if self._is_chain:
            budget = min(max(aligned.free, 1), self._steps)
        self._grower = Grower(budget, _stretched(branching, self._steps))
        self._raw: dict[int, bytes] = {ANCHOR: b""}
        self._behind: dict[int, int] = {}  # child of the anchor -> how many tokens before the end it begins
        self._temperature = request.sampler.params.temperature
        self._is_noisy = self._temperature > 0.0 and writer.guess == "coupled" and not request.needs_law

    # ------------------------------------------------------------ writing

    def grow(self) -> None:
        """Write level by level until there is enough."""
        grower, aligned = self._grower, self._writer.aligned
        last = self._replaceable()
        scores = aligned.start(len(last) + 1)
        self._begin(scores.rows(range(scores.num_rows)), last)
        places = {node: ANCHOR - back for node, back in self._behind.items()}  # where the parent is in the cache
        if self._is_chain and len(grower) and self._behind[0]:
            aligned.step_back(self._behind[0])
            places[0] = ANCHOR
        num_fed = 0
        while nodes := [node for node in grower.frontier(aligned.room) if not self._ends_text(node)]:
            if self._is_chain and self._is_enough(nodes[-1]):
                return
            tokens = HostTokens(np.array([grower.token(node) for node in nodes], np.int32))
            scores = aligned.extend(tokens, [places[node] for node in nodes])
            for node, row in zip(nodes, scores.rows(range(scores.num_rows)), strict=True):
                first = len(grower)
                self._continue(node, row)
                places.update(dict.fromkeys(range(first, len(grower)), num_fed))
                num_fed += 1

    def _replaceable(self) -> list[int]:
        """The last tokens that a guess may replace: behind the last special token, not all there are, and no more
        than some token begins with."""
        mirror = self._writer.aligned.mirror
        ids, ends, start = mirror.ids, mirror.ends, mirror.segment_start
        useful = count = 0
        suffix = b""
        while count < min(self._writer.back, len(ids) - 1) and ends[-count - 1] > start:
            count += 1
            suffix = self._texts[ids[-count]] + suffix
            if len(self._writer.prefixes.longer_than(suffix)):
                useful = count
        return ids[len(ids) - useful :]

    def _begin(self, rows: NDArray[np.float32], last: Sequence[int]) -> None:
        """The likeliest first tokens."""
        writer = self._writer
        scaled = self._scaled(rows)
        count = _MOST_COUPLED if self._is_noisy else MOST_CHILDREN
        found = continuations(scaled, last, self._texts, writer.prefixes, count)
        sizes = np.cumsum([0, *(len(self._texts[token]) for token in reversed(last))]).tolist()
        ids, behind = found.ids.tolist(), found.behind.tolist()
        raws = [self._text(token)[sizes[back] :] for token, back in zip(ids, behind, strict=True)]
        values = found.values
        if self._is_noisy:
            same = writer.relation.target.ids
            heads = [same.get(raw, -1) if back else -2 for raw, back in zip(raws, behind, strict=True)]
            values = values + self._noise(np.where(found.behind == 0, writer.heads[found.ids], heads), 0)
        order = np.argsort(-values, kind="stable")[:MOST_CHILDREN]
        log_q = chances(values[order], self._temperature if self._is_noisy else 0.0)
        places = order.tolist()
        first = len(self._grower)
        kept = self._offer(ANCHOR, [ids[place] for place in places], [raws[place] for place in places], log_q)
        self._behind.update({first + index: behind[places[place]] for index, place in enumerate(kept)})

    def _continue(self, node: int, row: Logits) -> None:
        """The likeliest next tokens behind a node."""
        raw = self._raw[node]
        row = self._scaled(row)
        if self._is_noisy:
            near = np.flatnonzero(row >= row.max() - 2 * np.float32(noise.MAX_GUMBEL))
            sums = row[near] + self._noise(self._writer.heads[near], len(self._tail.encode(raw)[0].ids))
            chosen = top_ids(sums, MOST_CHILDREN)
            ids, log_q = near[chosen].astype(np.int32), chances(sums[chosen], self._temperature)
        else:
            ids = top_ids(row, MOST_CHILDREN)
            ids = ids[np.isfinite(row[ids])]
            log_q = chances(row[ids], 0.0) if len(ids) else np.zeros(0)
        tokens = ids.tolist()
        self._offer(node, tokens, [raw + self._text(token) for token in tokens], log_q)

    def _scaled(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of what may be guessed, at the temperature that is asked for."""
        allowed = np.where(self._writer.may_guess, logits, np.float32(-np.inf))
        return np.asarray(allowed / np.float32(self._temperature or 1.0), np.float32)

    def _offer(self, parent: int, ids: Sequence[int], raws: Sequence[bytes], log_q: Probabilities) -> list[int]:
        """Offer children, best first; the places of those that were taken."""
        places = self._joining(ids, raws) if self._is_open(parent) else list(range(len(ids)))
        if self._writer.min_prob > 0.0:
            likely = [place for place in places if log_q[place] >= math.log(self._writer.min_prob)]
            places = likely or places[: int(parent == ANCHOR)]
        first = len(self._grower)
        self._grower.offer(parent, [ids[place] for place in places], [float(log_q[place]) for place in places])
        taken = places[: len(self._grower) - first]
        self._raw.update({first + index: raws[place] for index, place in enumerate(taken)})
        return taken

    def _noise(self, heads: NDArray[np.int32], ahead: int) -> NDArray[np.float32]:
        """The target's noise of its tokens `heads`, so far ahead; 0 where there is none (-1)."""
        keys = self._request.sampler.keys(np.array([len(self._request.context) + ahead], np.int32))
        drawn = noise.gumbel((int(keys[0, 0]), int(keys[0, 1])), np.maximum(heads, 0).astype(np.int32))
        return np.where(heads >= 0, drawn, np.float32(0.0))

    def _is_open(self, node: int) -> bool:
        """Could what is written behind a node still lengthen the target's last token?"""
        if node == ANCHOR:
            return True
        encoded, joins = self._tail.encode(self._raw[node])
        return joins and len(encoded.ids) <= 1

    def _joining(self, ids: Sequence[int], raws: Sequence[bytes]) -> list[int]:
        """Places of the texts behind which the target's last token stays what it is. Where none does, all."""
        places = []
        for place, raw in enumerate(raws):
            if self._is_special(ids[place]) or self._tail.encode(raw)[1]:
                places.append(place)
                if self._is_chain:
                    break
        return places or list(range(len(ids)))

    def _text(self, token: int) -> bytes:
        """What a token adds to the text."""
        return b"" if self._is_special(token) else self._texts[token]

    def _is_special(self, token: int) -> bool:
        return token in self._writer.relation.draft.special

    def _ends_text(self, node: int) -> bool:
        """Nothing is written behind special tokens."""
        return self._is_special(self._grower.token(node))

    def _is_enough(self, node: int) -> bool:
        """Does this chain hold as many proved tokens as were asked for?"""
        return len(self._translate(node)[0]) >= min(self._num, self._depth)

    # ------------------------------------------------------------ translating

    def _translate(self, node: int) -> tuple[list[int], list[int], int]:
        """(the target's tokens up to a node, where each ends, number of tokens held back)."""
        raw, special = self._raw[node], self._ends_text(node)
        raw = raw[: len(raw) - incomplete(self._tail.raw + raw)]
        encoded = self._tail.encode(raw)[0] if raw else None
        ids, ends = (list(encoded.ids), list(encoded.ends)) if encoded and not encoded.num_lost else ([], [])
        held_back = 0
        if special:
            ids.append(self._stop(self._grower.token(node)))
            ends.append(len(raw) + 1)
        elif ids:
            ids.pop()
            ends.pop()
            held_back = 1
        return ids[: self._depth], ends[: self._depth], held_back

    def _stop(self, token: int) -> int:
        """The target's token of a special one."""
        same = int(self._to_target[token])
        if same >= 0:
            return same
        eos = self._writer.relation.target.eos
        assert eos is not None  # otherwise it may not be guessed
        return eos

    def translated(self) -> Written:
        """All branches in one tree of the target's tokens."""
        grown = self._grower.finish()
        inner = set(grown.tree.parent.tolist())
        branches = []
        held_back = 0
        for place, node in enumerate(grown.offered):
            if place not in inner:
                ids, ends, held = self._translate(node)
                held_back += held
                branches.append(_Branch(node, ids, ends))
        trees = [_chain(branch.ids) for branch in branches]
        merged = merge(trees)
        log_q = self._log_q(branches, merged.places, merged.tree)
        tree, _ = prune(TokenTree.from_parents(merged.tree.token, merged.tree.parent, log_q), self._num)
        return Written(tree, held_back, sum(back > 0 for back in self._behind.values()))

    def _log_q(self, branches: list[_Branch], places: Sequence[tuple[int, ...]], tree: TokenTree) -> list[float]:
        """[N] logarithm of the chance that each node is accepted if its parent is: what the draft model gives to all
        that it wrote with these bytes, against the same of the parent's."""
        writers: list[set[int]] = [set() for _ in range(len(tree))]
        for branch, where in zip(branches, places, strict=True):
            path = self._path(branch.node)
            for node, end in zip(where, branch.ends, strict=True):
                writers[node].add(next((above for above in path if len(self._raw[above]) >= end), branch.node))
        reach = [math.log(sum(math.exp(self._reach(node)) for node in found) + 1e-30) for found in writers]
        return [
            min(reach[node] - (reach[parent] if parent >= 0 else 0.0), 0.0)
            for node, parent in enumerate(tree.parent.tolist())
        ]

    def _path(self, node: int) -> list[int]:
        """Nodes from a child of the anchor down to `node`."""
        path = []
        while node != ANCHOR:
            path.append(node)
            node = self._grower.parent(node)
        return path[::-1]

    def _reach(self, node: int) -> float:
        return self._grower.reach(node)


@dataclass(frozen=True, slots=True)
class _Branch:
    """A leaf of the draft's tree: its tokens in the target's vocabulary and where in the bytes each ends."""

    node: int
    ids: list[int]
    ends: list[int]


def _chain(ids: list[int]) -> TokenTree:
    return TokenTree.from_parents(np.array(ids, np.int32), np.arange(-1, len(ids) - 1, dtype=np.int32))


def _stretched(branching: Sequence[int], levels: int) -> tuple[int, ...]:
    """Children per level for so many levels of the draft's tokens."""
    return (*branching, *(branching[-1],) * levels)[:levels]


def _guessable(relation: Relation, num_rows: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """[V of the draft] tokens that add bytes, special ones that the target has, and the end of an answer."""
    allowed = np.zeros(num_rows, np.bool_)
    for token, text in enumerate(relation.draft.texts):
        if token not in relation.draft.special:
            allowed[token] = bool(text)
        else:
            ends = token in relation.draft.stop_tokens and relation.target.eos is not None
            allowed[token] = relation.to_target[token] >= 0 or ends
    return allowed
