"""Drafting with a language model of another tokenizer.

Two ways behind one object. *intersection*: only tokens that both vocabularies have, byte for byte, are
guessed; the drafter then works as one of the target's own tokenizer, its guesses coupled to the target's
noise. *bytes*: the draft model writes freely in its own tokens; what it writes is encoded with the target's
tokenizer behind the last word, and the last token is held back until more text has proved where it ends.

The context reaches the draft model as the target's bytes (`mirror.py`), so nothing is lost or replaced.
Whatever is guessed, the acceptance rule alone decides: under the walk the text equals plain decoding.
String-level exact match: Timor et al. 2025 (arXiv 2502.05202), here in bytes and as a tree; intersection:
the same authors' token-level method, here also under the walk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from localspec import noise
from localspec.context import Context
from localspec.drafters.aligned_cache import AlignedCache, SharedTokens
from localspec.drafters.byte_encoder import ByteEncoder, incomplete
from localspec.drafters.draft_cache import ANCHOR
from localspec.drafters.draft_model import DraftModel
from localspec.drafters.mirror import MAP, Tail
from localspec.drafters.shape import MOST_CHILDREN, MOST_NODES, Shape
from localspec.errors import SettingError
from localspec.fingerprint import Relation
from localspec.protocols import DraftRequest, HostTokens, LanguageModel, Outcome, Proposal, Scores
from localspec.ranking import top_ids
from localspec.sampling import chances
from localspec.tree.grow import Grower, merge, prune
from localspec.tree.token_tree import TokenTree
from localspec.types import Logits, NoiseKeys, Probabilities, TokenIds

AUTO, INTERSECTION, BYTES = "auto", "intersection", "bytes"
_MODES = (AUTO, INTERSECTION, BYTES)
_ENOUGH_SHARED = 0.97
_RECENT = 1024
_MOST_RATIO = 8.0


class CrossTokenizer:
    """Guesses of `model`, whose tokenizer is not the target's.

    mode: intersection, bytes, or auto: intersection where nearly all recent tokens of the conversation are
    shared, bytes otherwise.  num, shape, depth, min_prob, guess: as of `DraftModel`, counted in the target's
    tokens.  specials: map, text or skip (`Mirror`).

    In bytes mode the target's penalties, bias and truncation do not reach the guesses, and a guess is coupled to
    the target's noise where it is a token of the target's, too.
    """

    name = "cross_tokenizer"

    def __init__(
        self,
        model: LanguageModel,
        relation: Relation,
        num_rows: int,
        *,
        mode: str = AUTO,
        num: int = 0,
        shape: str = "chain",
        depth: int = 0,
        min_prob: float = 0.0,
        guess: str = "coupled",
        specials: str = MAP,
    ) -> None:
        if mode not in _MODES:
            raise SettingError("cross_tokenizer: unknown mode", got=mode, expected=" or ".join(_MODES))
        self.shape = Shape.parse(self.name, shape, num, depth)
        self.relation = relation
        self.mode = mode
        self.min_prob = min_prob
        self.guess = guess
        self._aligned = AlignedCache(model, relation, specials)
        try:
            shared = SharedTokens(self._aligned, relation, num_rows)
            self._restricted = DraftModel(
                model, shared, num=num, shape=shape, depth=depth, min_prob=min_prob, guess=guess
            )
        except BaseException:
            self._aligned.close()
            raise
        self._encoder = ByteEncoder(relation.target)
        self._may_guess = _guessable(relation, model.vocab_size)
        self._heads = np.where(relation.to_target >= 0, relation.to_target, 0)
        self._has_head = relation.to_target >= 0
        self._current = BYTES if mode == AUTO else mode
        self._context = Context()
        self._told = 0

    @property
    def num(self) -> int:
        """Most nodes of a proposal."""
        return self.shape.num

    @property
    def needs_trees(self) -> bool:
        """True unless it guesses chains."""
        return not self.shape.is_chain

    def begin(self, context: Context) -> None:
        """Bring the mirror to the new context, and choose the mode by what it consists of."""
        self._context = context
        self._aligned.begin(context)
        if self.mode == AUTO:
            recent = self.relation.coverage_of(context.tokens[-_RECENT:])
            self._current = INTERSECTION if recent >= _ENOUGH_SHARED else BYTES

    def propose(self, request: DraftRequest) -> Proposal:
        """Guess in the mode that was chosen; a chain where trees were not asked for."""
        counts = {f"{self._current}_rounds": 1, "re_encoded": self._aligned.num_fed_again - self._told}
        self._told = self._aligned.num_fed_again
        if self._aligned.free < 1:
            return Proposal(self.name, counts={**counts, "draft_context_full": 1})
        if self._current == INTERSECTION:
            made = self._restricted.propose(request)
            return Proposal(self.name, made.tokens, made.parents, made.laws, made.log_q, counts=counts)
        if min(request.max_nodes, request.max_depth) < 1:
            return Proposal(self.name, counts=counts)
        tree, held_back = self._write(request)
        log_q = None if tree.log_q is None else tuple(tree.log_q.tolist())
        counts["held_back"] = held_back
        return Proposal(self.name, (HostTokens(tree.token),), tree.parent, log_q=log_q, counts=counts)

    def observe(self, outcome: Outcome) -> None:
        """Take in what was emitted."""
        self._aligned.observe()

    def close(self) -> None:
        """Give the draft model's cache back (the model itself belongs to the pair)."""
        self._aligned.close()

    # ------------------------------------------------------------ free writing

    def _write(self, request: DraftRequest) -> tuple[TokenTree, int]:
        """(the target's tokens of what the draft model writes, number of tokens held back)."""
        num = min(self.num, request.max_nodes)
        branching = self.shape.branching[: request.max_depth]
        if not request.trees:
            branching = (1,) * len(branching)
        draft = _Draft(self, request, num, branching)
        draft.grow(self._aligned.start())
        return draft.translated()


class _Draft:
    """One round's text in the making: a tree of the draft model's tokens, and what it is in the target's."""

    def __init__(self, owner: CrossTokenizer, request: DraftRequest, num: int, branching: Sequence[int]) -> None:
        self._owner = owner
        self._request = request
        self._num = num
        self._depth = len(branching)
        self._is_chain = max(branching) == 1
        relation, aligned = owner.relation, owner._aligned
        self._texts = relation.draft.texts
        self._to_target = relation.to_target
        self._tail = Tail(aligned.mirror, owner._encoder, request.context.tokens)
        ratio = _ratio(aligned.mirror.ids, len(request.context))
        self._steps = math.ceil(self._depth * ratio * 1.5) + 2
        budget = min(MOST_NODES, max(aligned.free, 1), math.ceil(num * ratio * (1.0 if self._is_chain else 2.0)) + 2)
        if self._is_chain:
            budget = min(max(aligned.free, 1), self._steps)
        widest = _stretched(branching, self._steps)
        self._grower = Grower(budget, widest)
        self._raw: dict[int, bytes] = {ANCHOR: b""}

    def grow(self, scores: Scores) -> None:
        """Write level by level until there is enough."""
        grower, aligned = self._grower, self._owner._aligned
        fed = {ANCHOR: ANCHOR}
        nodes = [ANCHOR]
        while nodes:
            rows = scores.rows(range(scores.num_rows))
            for node, row in zip(nodes, rows, strict=True):
                self._offer(node, row)
            nodes = [node for node in grower.frontier(aligned.room) if not self._ends_text(node)]
            if self._is_chain and nodes and self._is_enough(nodes[-1]):
                return
            if nodes:
                tokens = HostTokens(np.array([grower.token(node) for node in nodes], np.int32))
                scores = aligned.extend(tokens, [fed[grower.parent(node)] for node in nodes])
                fed.update({node: len(fed) - 1 + index for index, node in enumerate(nodes)})

    def _offer(self, node: int, row: Logits) -> None:
        """The likeliest next tokens behind a node."""
        owner, raw = self._owner, self._raw[node]
        ids, log_q = self._ranked(row, len(self._tail.encode(raw)[0].ids) if raw else 0)
        if node == ANCHOR:
            keep = self._joining(ids)
            ids, log_q = ids[keep], log_q[keep]
        if owner.min_prob > 0.0:
            likely = max(int(np.count_nonzero(log_q >= math.log(owner.min_prob))), int(node == ANCHOR))
            ids, log_q = ids[:likely], log_q[:likely]
        first = len(self._grower)
        self._grower.offer(node, ids.tolist(), log_q.tolist())
        for child in range(first, len(self._grower)):
            token = self._grower.token(child)
            self._raw[child] = raw + (b"" if self._is_special(token) else self._texts[token])

    def _ranked(self, row: Logits, ahead: int) -> tuple[TokenIds, Probabilities]:
        """(ids, log chances), best first, of the likeliest tokens `ahead` target tokens behind the context."""
        owner, sampler = self._owner, self._request.sampler
        row = np.where(owner._may_guess, row, -np.inf)
        temperature = sampler.params.temperature
        if temperature == 0.0 or owner.guess != "coupled" or self._request.needs_law:
            ids = top_ids(row, MOST_CHILDREN)
            values = row[ids] / (temperature or 1.0)
            ids, values = ids[np.isfinite(values)], values[np.isfinite(values)]
            return ids, chances(values, 0.0) if len(ids) else np.zeros(0)
        keys = sampler.keys(np.array([len(self._request.context) + ahead], np.int32))
        ids, values = _noisy_top(row, temperature, keys, owner._heads, owner._has_head)
        return ids, chances(values, temperature) if len(ids) else np.zeros(0)

    def _joining(self, ids: TokenIds) -> list[int]:
        """Places of the tokens behind which the target's last token stays what it is. Where none does, all."""
        places = []
        for place, token in enumerate(ids.tolist()):
            if self._is_special(token) or self._tail.encode(self._texts[token])[1]:
                places.append(place)
                if self._is_chain:
                    break
        return places or list(range(len(ids)))

    def _is_special(self, token: int) -> bool:
        return token in self._owner.relation.draft.special

    def _ends_text(self, node: int) -> bool:
        """Nothing is written behind special tokens."""
        return self._is_special(self._grower.token(node))

    def _is_enough(self, node: int) -> bool:
        """Does this chain hold as many proved tokens as were asked for?"""
        return len(self._translate(node)[0]) >= min(self._num, self._depth)

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
        eos = self._owner.relation.target.eos
        assert eos is not None  # otherwise it may not be guessed
        return eos

    def translated(self) -> tuple[TokenTree, int]:
        """(all branches in one tree of the target's tokens, number of tokens held back)."""
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
        return tree, held_back

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


def _ratio(ids: list[int], num_tokens: int) -> float:
    """The draft's tokens per token of the target in this conversation."""
    return min(max(len(ids) / max(num_tokens, 1), 1.0), _MOST_RATIO)


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


def _noisy_top(
    row: Logits,
    temperature: float,
    keys: NoiseKeys,
    heads: TokenIds,
    has_head: np.ndarray[tuple[int], np.dtype[np.bool_]],
) -> tuple[TokenIds, Logits]:
    """(ids, values) of the tokens with the best logit / temperature + noise of the target's token; none is added to
    tokens that the target does not have."""
    low_high = (int(keys[0, 0]), int(keys[0, 1]))
    scaled = (row - row.max()) / np.float32(temperature)
    near = np.flatnonzero(scaled >= -2 * np.float32(noise.MAX_GUMBEL))
    near = near[near < len(heads)]
    sums = scaled[near] + np.where(has_head[near], noise.gumbel(low_high, heads[near]), np.float32(0.0))
    chosen = top_ids(sums, min(MOST_CHILDREN, len(sums)))
    return near[chosen].astype(np.int32), sums[chosen]
