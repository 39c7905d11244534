"""Heads that guess a whole block in one pass: DSpark, DFlash, DFlash 2 and JetSpec on MLX.

`start` runs the block once behind the committed tokens; `extend` only adds what the chosen tokens say about the slots
behind them. Rows are what tokens are chosen by, so they are q.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, cast

import mlx.core as mx
import numpy as np

from localspec.errors import HeadFileError, PairMismatchError
from localspec.formats.block_tensors import BlockDetails
from localspec.formats.head import HeadHeader
from localspec.protocols import HeadInfo, HeadState, Scores, Tokens
from localspec.types import Probabilities

from ..companion import Companion
from ..model import MlxModel
from ..scores import DeviceScores, DeviceTokens
from ..state import MlxState
from .backbone import BlockBackbone
from .base import MlxHead, MlxHeadState
from .markov import Markov
from .selector import Selector
from .tensors import Linear, Weights

_DRAFTERS = {"dflash2": "dflash"}  # forms of a head that one drafter runs
_MOST_GUESSES = 4096  # fed to one start; each keeps a few numbers only


def build(header: HeadHeader, target: MlxModel) -> BlockHead:
    """The head of a checked header. Raises PairMismatchError where it is not for this target."""
    check_pair(header, target)
    return BlockHead(header, target)


def check_pair(header: HeadHeader, target: MlxModel) -> None:
    """Raise PairMismatchError, or UnsupportedModelError, unless a head's sizes are those of the target."""
    num_layers = target.network.taps.num_layers
    if header.num_target_layers is not None and header.num_target_layers != num_layers:
        raise PairMismatchError(
            "the head was trained for a target with other layers", got=header.num_target_layers, expected=num_layers
        )
    if max(header.taps, default=-1) >= num_layers:
        raise PairMismatchError(
            "the head reads a layer that the target lacks", got=max(header.taps), expected=num_layers
        )
    if header.target_hidden != target.ends.hidden_size:
        raise PairMismatchError(
            "the head was trained for another hidden size", got=header.target_hidden, expected=target.ends.hidden_size
        )
    if header.vocab_size is not None and header.vocab_size != target.vocab_size:
        raise PairMismatchError(
            "the head was trained for another vocabulary", got=header.vocab_size, expected=target.vocab_size
        )
    target.ends.check_taps(header.taps)


class BlockHead(MlxHead["BlockCompanion"]):
    """`protocols.DraftHead`; its network."""

    def __init__(self, header: HeadHeader, target: MlxModel) -> None:
        details, backbone = header.details, header.backbone
        assert isinstance(details, BlockDetails) and backbone is not None
        borrowed = [
            name for name, own in (("embedding", details.own_embedding), ("output", details.own_output)) if not own
        ]
        if borrowed and backbone.hidden_size != target.ends.hidden_size:
            raise PairMismatchError(
                f"the head has no {borrowed[0]} of its own and another hidden size than the target",
                got=backbone.hidden_size,
                expected=target.ends.hidden_size,
            )
        if header.draft_vocab is not None and not details.own_output:
            raise HeadFileError("the head lacks the tensor lm_head.weight", expected=f"{header.draft_vocab} rows")
        weights = Weights(header)
        self.details = details
        self.backbone = BlockBackbone(header, weights)
        ends, name = target.ends.matrices(), "embed_tokens.weight"
        self._embedding = weights.take_or_share(name, ends) if details.own_embedding else None
        if self._embedding is not None:
            ends.append(self._embedding)
        self._output = Linear(weights.take_or_share("lm_head.weight", ends)) if details.own_output else None
        self.markov = Markov(details, weights) if details.markov else None
        self.selector = Selector(details, weights) if details.selector is not None else None
        name = details.logits_prefix + details.confidence_name
        self._confidence = weights.linear(name) if details.confidence else None
        self._places = None if header.draft_vocab is None else _places(weights, target.vocab_size)
        weights.read()
        super().__init__(
            HeadInfo(
                name=header.path.resolve().name,
                path=header.path,
                kind=_DRAFTERS.get(header.kind, header.kind),
                num_parameters=header.num_parameters,
                taps=header.taps,
                levels=details.num_levels,
                one_pass=True,
                confident=details.confidence,
            ),
            target,
        )

    def drop_weights(self) -> None:
        """Nothing is computed any more."""
        for name in ("backbone", "markov", "selector", "_embedding", "_output", "_confidence", "_places"):
            vars(self).pop(name, None)

    def new_companion(self) -> BlockCompanion:
        """Empty."""
        return BlockCompanion(self)

    def new_state(self, state: MlxState, companion: BlockCompanion) -> HeadState:
        """Guesses beside a sequence."""
        return cast("HeadState", BlockHeadState(self, state, companion))

    def embed(self, ids: mx.array) -> mx.array:
        """[N, hidden] of N tokens."""
        if self._embedding is None:
            return self.target.ends.embed(ids)
        return self._embedding[ids] * mx.array(self.details.embedding_scale, self._embedding.dtype)

    def score(self, hidden: mx.array) -> mx.array:
        """[N, draft vocabulary] float32 logits of N slots, before any choice."""
        if self._output is None:
            return self.target.ends.score(hidden).astype(mx.float32)
        logits = self._output(hidden).astype(mx.float32)
        cap = self.details.softcap
        return logits if cap is None else mx.tanh(logits / cap) * cap

    def sure(self, hidden: mx.array, entries: mx.array | None) -> mx.array | None:
        """[N] chance that the best guess of a slot is accepted, with the Markov entries of the tokens before."""
        if self._confidence is None:
            return None
        if self.details.confidence_sees_markov and entries is not None:
            hidden = mx.concatenate([hidden, entries], axis=-1)
        return mx.sigmoid(self._confidence(hidden).astype(mx.float32)[:, 0])

    def spread(self, rows: mx.array) -> mx.array:
        """[N, V] of [N, draft vocabulary]: -inf for what the head cannot guess."""
        if self._places is None:
            return rows
        return mx.take(mx.pad(rows, [(0, 0), (0, 1)], constant_values=-mx.inf), self._places, axis=-1)


class BlockCompanion(Companion):
    """Keys and values that each layer made of the features of committed tokens."""

    def __init__(self, head: BlockHead) -> None:
        super().__init__(head, head.info.taps)
        self._backbone = head.backbone
        self.caches = head.backbone.caches()
        self.places = np.zeros(0, np.int32)  # [rows] positions of the tokens, ascending

    def feed(self, tokens: mx.array, features: mx.array, start: int) -> None:
        """The tokens themselves are not read."""
        for cache, rows in zip(self.caches, self._backbone.context(features, start), strict=True):
            cache.append(*rows)
        self.places = np.concatenate([self.places, np.arange(start, start + features.shape[0], dtype=np.int32)])

    def truncate(self, length: int) -> None:
        """Rows stay where they are and are written over."""
        self.places = self.places[self.places < length]
        for cache in self.caches:
            cache.num_rows = len(self.places)
            if not length:
                cache.drop()

    def copy(self) -> Self:
        """Shares memory until either is written to."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other.caches = [cache.copy() for cache in self.caches]
        return other

    def arrays(self) -> list[mx.array]:
        """Keys and values of all layers."""
        return [array for cache in self.caches for array in cache.arrays()]


class BlockHeadState(MlxHeadState[BlockCompanion]):
    """`protocols.HeadState`."""

    head: BlockHead

    def __init__(self, head: BlockHead, state: MlxState, companion: BlockCompanion) -> None:
        super().__init__(head, state, companion)
        self._reset()

    def _reset(self) -> None:
        self._hidden: mx.array | None = None  # [levels, hidden] of the slots that guess
        self._logits: mx.array | None = None  # [levels, draft vocabulary] of them
        self._candidates: mx.array | None = None  # [levels, K]
        self._depths: list[int] = []  # of the guesses that were fed; children of the anchor 0
        self._memory: mx.array | None = None  # [1 + guesses, rank]: the anchor's, then theirs
        self._sure: mx.array | None = None

    @property
    def room(self) -> int:
        """How many more guesses can be fed."""
        return max(_MOST_GUESSES - len(self._depths), 0)

    def start(self, anchor: int) -> Scores:
        """[1, V]; runs the block."""
        self.check_open()
        head, details = self.head, self.head.details
        if not 0 <= anchor < head.target.vocab_size:
            raise ValueError(f"anchor {anchor}: not a token of the target")
        self._reset()
        ids = mx.array([anchor] + [details.mask_token] * (details.block_size - 1), mx.int32)
        companion = self.companion
        hidden = head.backbone(head.embed(ids), companion.caches, companion.places, self.state.length)
        self._hidden = hidden[1:] if details.in_place else hidden
        self._logits = head.score(self._hidden)
        if head.selector is not None:
            self._candidates = head.selector.candidates(self._logits)
        return self._rows(mx.array([0], mx.int32), mx.array([anchor], mx.int32), None)

    def extend(self, tokens: Tokens, parents: Sequence[int]) -> Scores:
        """[N, V]. Raises ValueError for guesses that nothing is guessed behind, and before `start`."""
        self.check_open()
        if self._logits is None:
            raise ValueError("no block was started")
        if len(tokens) != len(parents):
            raise ValueError(f"{len(tokens)} tokens with {len(parents)} parents")
        depths = list(self._depths)
        for parent in parents:
            if not -1 <= parent < len(depths):
                raise ValueError(f"parents {list(parents)}: each must be -1 or the number of an earlier guess")
            depths.append(0 if parent < 0 else depths[parent] + 1)
        slots = [depth + 1 for depth in depths[len(self._depths) :]]
        if max(slots, default=0) >= self.head.details.num_levels:
            raise ValueError(f"the head guesses {self.head.details.num_levels} levels and nothing behind the last")
        if any(parent >= len(self._depths) for parent in parents) and self._memory is not None:
            raise ValueError("a guess and its child in one call")
        memory = None if self._memory is None else self._memory[mx.array([p + 1 for p in parents], mx.int32)]
        ids = tokens.array if isinstance(tokens, DeviceTokens) else mx.array(np.asarray(tokens.numpy(), np.int32))
        self._depths = depths
        return self._rows(mx.array(slots, mx.int32), ids, memory)

    def confidence(self) -> Probabilities | None:
        """[N] of the rows scored last. Waits."""
        self.check_open()
        if self._sure is None:
            return None
        self.head.target.ledger.fetch(self._sure)
        return np.array(self._sure, np.float64)

    def close(self) -> None:
        """Forget the guesses, and feed no more."""
        super().close()
        self._reset()

    def _rows(self, slots: mx.array, before: mx.array, memory: mx.array | None) -> Scores:
        """Scores of N slots behind the tokens `before` [N], and the memory [N, rank] of those."""
        head = self.head
        assert self._logits is not None and self._hidden is not None
        hidden, logits, entries = self._hidden[slots], self._logits[slots], None
        if head.markov is not None:
            entries = head.markov.entries(before)
            bias, after = head.markov.bias(entries, hidden, memory)
            logits = logits + bias.astype(mx.float32)
            if after is not None:
                self._memory = after if self._memory is None else mx.concatenate([self._memory, after])
        if head.selector is not None and self._candidates is not None:
            logits = head.selector.rows(logits, self._candidates[slots], hidden, before)
        self._sure = head.sure(hidden, entries)
        return cast("Scores", DeviceScores(head.spread(logits), head.target.ledger))


def _places(weights: Weights, vocab_size: int) -> mx.array:
    """[V] the draft id of each token of the target, one behind the last for those that have none. d2t [Vd] is what is
    added to a draft id, t2d [V] true for those that are one. Raises HeadFileError."""
    offsets = np.array(weights.take("d2t").astype(mx.int64))
    ids = np.arange(len(offsets)) + offsets
    if len(np.unique(ids)) != len(ids) or ids.min() < 0 or ids.max() >= vocab_size:
        raise HeadFileError(
            "tensor d2t names tokens twice, or tokens that the target lacks", expected=f"0..{vocab_size - 1}"
        )
    if not np.array_equal(np.flatnonzero(np.array(weights.take("t2d"))), np.sort(ids)):
        raise HeadFileError("tensors d2t and t2d name different tokens")
    places = np.full(vocab_size, len(ids), np.int32)
    places[ids] = np.arange(len(ids))
    return mx.array(places)
