"""DFlash 2's choice among a slot's best tokens by the one before it (z-lab/dflash)."""

from __future__ import annotations

import mlx.core as mx

from localspec.formats.block_tensors import BlockDetails

from .tensors import Weights


class Selector:
    """Scores of each slot's `num` best tokens: their own, and what the token before says of them."""

    def __init__(self, details: BlockDetails, weights: Weights) -> None:
        assert details.selector is not None
        self.num = details.selector[1]
        name = "candidate_selector"
        self._before = weights.take(f"{name}.predecessor_codebook")
        self._after = weights.take(f"{name}.successor_codebook")
        self._hidden = weights.linear(f"{name}.hidden_projection")

    def candidates(self, logits: mx.array) -> mx.array:
        """[L, num] the best tokens of L slots, in any order."""
        num = min(self.num, logits.shape[-1])
        return mx.argpartition(-logits, kth=num - 1, axis=-1)[:, :num]

    def rows(self, logits: mx.array, candidates: mx.array, hidden: mx.array, before: mx.array) -> mx.array:
        """[N, V] float32 scores of N slots behind the tokens `before` [N]; -inf but for the candidates."""
        mixed = self._before[before] * self._hidden(hidden)
        edges = (mixed[:, None].astype(mx.float32) * self._after[candidates].astype(mx.float32)).sum(-1)
        scores = mx.take_along_axis(logits, candidates, axis=-1) + edges
        return mx.put_along_axis(mx.full(logits.shape, -mx.inf), candidates, scores, axis=-1)
