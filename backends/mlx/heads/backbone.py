"""The layers of a block head: a block of slots that attends to the target's features and to itself.

What a layer makes of the features of committed tokens is keys and values only, which never change: they are computed
once per token, when it is committed.
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models.rope_utils import initialize_rope

from localspec.formats.block_tensors import BlockDetails
from localspec.formats.head import HeadHeader
from localspec.types import Positions

from ..cache import Pass, TreeCache
from ..device import builds_attention
from .attention import attend
from .convolution import Convolution
from .sight import Sight
from .tensors import Norm, Weights, gelu_gated, silu_gated


class BlockAttention:
    """One layer's attention. causal: slots do not see later ones.  window: see `BlockDetails.windows`."""

    def __init__(self, header: HeadHeader, weights: Weights, layer: int) -> None:
        details, backbone = header.details, header.backbone
        assert isinstance(details, BlockDetails) and backbone is not None
        name = f"layers.{layer}.self_attn"
        self._backbone = backbone
        self._gemma = backbone.family == "gemma4"
        self._scale = 1.0 if self._gemma else backbone.head_size**-0.5
        self._queries, self._output = weights.linear(f"{name}.q_proj"), weights.linear(f"{name}.o_proj")
        self._keys = weights.linear(f"{name}.k_proj")
        self._values = None if details.keys_are_values else weights.linear(f"{name}.v_proj")
        normed = backbone.family != "llama"
        self._query_norm = weights.norm(f"{name}.q_norm", backbone.norm_eps) if normed else None
        self._key_norm = weights.norm(f"{name}.k_norm", backbone.norm_eps) if normed else None
        self._value_norm = Norm(None, backbone.norm_eps) if self._gemma else None
        self._rope = initialize_rope(
            backbone.head_size,
            backbone.rope_theta,
            backbone.rope_interleaved,
            None if backbone.rope_scaling is None else dict(backbone.rope_scaling),
            backbone.max_positions,
        )
        self._causal, self._window = details.causal[layer], details.windows[layer]

    def keys_and_values(self, x: mx.array, start: int) -> tuple[mx.array, mx.array]:
        """([1, H, T, D], the same) of rows [1, T, hidden] that stand at start, start + 1, ..."""
        raw = self._keys(x)
        keys = self._heads(raw, self._backbone.num_kv_heads)
        values = self._heads(raw if self._values is None else self._values(x), self._backbone.num_kv_heads)
        if self._key_norm is not None:
            keys = self._key_norm(keys)
        if self._value_norm is not None:
            values = self._value_norm(values)
        return self._rope(keys, offset=start), values

    def __call__(self, x: mx.array, cache: TreeCache, sight: Sight) -> mx.array:
        """[1, B, hidden] of the block's rows; the cache holds the context, and is left as it was."""
        queries = self._heads(self._queries(x), self._backbone.num_heads)
        if self._query_norm is not None:
            queries = self._query_norm(queries)
        queries = self._rope(queries, offset=sight.start)
        size, num_rows = x.shape[1], cache.num_rows
        keys, values = cache.update_and_fetch(*self.keys_and_values(x, sight.start))
        cache.num_rows = num_rows
        first, mask = sight.cells(self._window, self._causal)
        if first:
            keys, values = keys[:, :, first:], values[:, :, first:]
        attended = attend(queries, keys, values, self._scale, mask)
        return self._output(attended.transpose(0, 2, 1, 3).reshape(1, size, -1))

    def _heads(self, x: mx.array, num_heads: int) -> mx.array:
        return x.reshape(1, x.shape[1], num_heads, self._backbone.head_size).transpose(0, 2, 1, 3)


class BlockLayer:
    """Attention and feed-forward around a residual stream, in the family's order of norms."""

    def __init__(self, header: HeadHeader, weights: Weights, layer: int) -> None:
        details, backbone = header.details, header.backbone
        assert isinstance(details, BlockDetails) and backbone is not None
        name, eps = f"layers.{layer}", backbone.norm_eps
        self.attention = BlockAttention(header, weights, layer)
        self._gemma = backbone.family == "gemma4"
        self._enter, self._middle = (
            weights.norm(f"{name}.{norm}", eps) for norm in ("input_layernorm", "post_attention_layernorm")
        )
        if self._gemma:
            self._before_feed, self._after_feed = (
                weights.norm(f"{name}.{norm}_feedforward_layernorm", eps) for norm in ("pre", "post")
            )
            self._factor = weights.take(f"{name}.layer_scalar")
        self._gate, self._up, self._down = (
            weights.linear(f"{name}.mlp.{part}_proj") for part in ("gate", "up", "down")
        )
        self._convolutions = (
            None
            if details.convolution is None
            else [Convolution(weights, f"{name}.{part}_conv", details.convolution[1]) for part in ("attention", "mlp")]
        )

    def __call__(self, h: mx.array, cache: TreeCache, sight: Sight) -> mx.array:
        """[1, B, hidden]; the rest as for the attention."""
        if self._gemma:
            h = h + self._middle(self.attention(self._enter(h), cache, sight))
            return (h + self._after_feed(self._feed(self._before_feed(h)))) * self._factor
        if self._convolutions is None:
            h = h + self.attention(self._enter(h), cache, sight)
            return h + self._feed(self._middle(h))
        around_attention, around_feed = self._convolutions
        x, kernel = around_attention.prepare(self._enter(h))
        h = h + around_attention.finish(self.attention(x, cache, sight), kernel)
        x, kernel = around_feed.prepare(self._middle(h))
        return h + around_feed.finish(self._feed(x), kernel)

    def _feed(self, x: mx.array) -> mx.array:
        product = gelu_gated if self._gemma else silu_gated
        return self._down(product(self._gate(x), self._up(x)))


class BlockBackbone:
    """From features and a block's embeddings to what the output matrix reads."""

    def __init__(self, header: HeadHeader, weights: Weights) -> None:
        details, backbone = header.details, header.backbone
        assert isinstance(details, BlockDetails) and backbone is not None
        self.dtype = weights.dtype
        self.current = Pass(blocks=builds_attention())
        self._from_anchor = details.window_from_anchor
        self._fuse = weights.linear("fc")
        self._fused_norm, self._norm = (weights.norm(name, backbone.norm_eps) for name in ("hidden_norm", "norm"))
        self.layers = [BlockLayer(header, weights, layer) for layer in range(backbone.num_layers)]

    def caches(self) -> list[TreeCache]:
        """One per layer, without rows."""
        return [TreeCache(self.current) for _ in self.layers]

    def context(self, features: mx.array, start: int) -> list[tuple[mx.array, mx.array]]:
        """Of each layer, keys and values of T features [T, taps * target_hidden] of tokens at start, start + 1, ..."""
        fused = self._fused_norm(self._fuse(features.astype(self.dtype)[None]))
        return [layer.attention.keys_and_values(fused, start) for layer in self.layers]

    def __call__(self, h: mx.array, caches: list[TreeCache], places: Positions, start: int) -> mx.array:
        """[B, hidden] behind the final norm, of embeddings [B, hidden] at start, start + 1, ...; the caches' rows stand
        at `places`."""
        sight = Sight(self.current, places, start, h.shape[0], self._from_anchor)
        h = h.astype(self.dtype)[None]
        for layer, cache in zip(self.layers, caches, strict=True):
            h = layer(h, cache, sight)
        return self._norm(h)[0]
