"""EAGLE-3: one layer, or a few, over pairs of fused hidden states and tokens, with a vocabulary of its own.

Source: Li et al., EAGLE-3 (2025); layouts in `localspec.formats.eagle3`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.rope_utils import initialize_rope

from localspec.errors import HeadFileError, PairMismatchError
from localspec.formats.eagle3 import Eagle3Config
from localspec.formats.head import HeadHeader

from ..cache import Pass, TreeCache
from ..device import builds_attention
from ..grafts import place_positions
from ..model import MlxModel
from .attention import attend
from .borrowed import Borrowed
from .pairs import PairHead
from .parameters import head_info, read_tensors, share, take_weights


class _Attention(nn.Module):
    """inputs: how often the hidden size goes into the projections."""

    def __init__(self, config: Eagle3Config, inputs: int) -> None:
        super().__init__()
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self._num_heads, self._num_kv_heads, self._head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(inputs * config.hidden, queries, bias=config.biases)
        self.k_proj = nn.Linear(inputs * config.hidden, keys, bias=config.biases)
        self.v_proj = nn.Linear(inputs * config.hidden, keys, bias=config.biases)
        self.o_proj = nn.Linear(queries, config.hidden, bias=config.output_bias)
        if config.head_norms:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.eps)
        self.rope = initialize_rope(config.head_dim, config.rope_base, False, _scaling(config), config.max_positions)

    def __call__(self, x: mx.array, cache: TreeCache) -> mx.array:
        """[1, K, E] of [1, K, inputs * E]."""
        num = x.shape[1]
        queries = self.q_proj(x).reshape(1, num, self._num_heads, self._head_dim)
        keys = self.k_proj(x).reshape(1, num, self._num_kv_heads, self._head_dim)
        values = self.v_proj(x).reshape(1, num, self._num_kv_heads, self._head_dim).transpose(0, 2, 1, 3)
        if "q_norm" in self:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        offset, mask = cache.offset, cache.make_mask(num)
        queries = self.rope(queries.transpose(0, 2, 1, 3), offset=offset)
        keys = self.rope(keys.transpose(0, 2, 1, 3), offset=offset)
        keys, values = cache.update_and_fetch(keys, values)
        seen = attend(queries, keys, values, self._head_dim**-0.5, mask)
        return self.o_proj(seen.transpose(0, 2, 1, 3).reshape(1, num, -1))


class _Mlp(nn.Module):
    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.down_proj = nn.Linear(config.feed_forward, config.hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    """The first layer reads the token's embedding beside the hidden state, the others only what came before."""

    def __init__(self, config: Eagle3Config, is_first: bool) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden, eps=config.eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden, eps=config.eps)
        self.self_attn = _Attention(config, 2 if is_first else 1)
        self.mlp = _Mlp(config)
        self._normed_residual = config.norm_before_residual
        if is_first:
            self.hidden_norm = nn.RMSNorm(config.hidden, eps=config.eps)

    def __call__(self, hidden: mx.array, embedded: mx.array | None, cache: TreeCache) -> mx.array:
        """[1, K, E]."""
        residual, inputs = hidden, hidden
        if embedded is None:
            inputs = self.input_layernorm(hidden)
        else:
            normed = self.hidden_norm(hidden)
            residual = normed if self._normed_residual else hidden
            inputs = mx.concatenate([self.input_layernorm(embedded), normed], axis=-1)
        hidden = residual + self.self_attn(inputs, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class _Module(nn.Module):
    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        width = config.num_taps * config.target_hidden
        self.fc = nn.Linear(width, config.hidden, bias=False)
        self.layers = [_Layer(config, not index) for index in range(config.num_layers)]
        self.norm = nn.RMSNorm(config.hidden, eps=config.eps)
        if config.norm_together:
            self.input_norm = nn.RMSNorm(width, eps=config.eps)
        if config.norm_each:
            self.fc_norm = [nn.RMSNorm(config.target_hidden, eps=config.eps) for _ in range(config.num_taps)]
        if config.own_head:
            self.lm_head = nn.Linear(config.hidden, config.draft_vocab, bias=False)
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab or 1, config.hidden)


class Eagle3:
    """`pairs.PairNetwork`. Raises HeadFileError, and PairMismatchError for another target's.

    weights: by their names in the file.  borrowed: the target's ends, for what the head does not bring.
    """

    def __init__(self, config: Eagle3Config, weights: dict[str, mx.array], borrowed: Borrowed) -> None:
        if config.target_hidden != borrowed.hidden_size:
            raise PairMismatchError(
                "tensor fc.weight reads another hidden size than the target's",
                got=config.target_hidden,
                expected=borrowed.hidden_size,
            )
        weights = {name.removeprefix("model."): value for name, value in weights.items()}
        offsets, allowed = weights.pop("d2t", None), weights.pop("t2d", None)
        self._places = _places(config, offsets, allowed, borrowed.vocab_size)
        self.current = Pass(blocks=builds_attention())
        self.module = _Module(config)
        take_weights(self.module, {_renamed(name, config.block): value for name, value in weights.items()})
        place_positions(self.module, self.current)
        self._config, self._borrowed = config, borrowed
        self._dtype = self.module.fc.weight.dtype
        self.width = config.hidden

    def caches(self) -> list[Any]:
        """One per layer."""
        return [TreeCache(self.current) for _ in self.module.layers]

    def features(self, taps: mx.array) -> mx.array:
        """[K, E] of [K, W]."""
        taps = taps.astype(self._dtype)
        if self._config.norm_together:
            taps = self.module.input_norm(taps)
        if self._config.norm_each:
            parts = mx.split(taps, self._config.num_taps, axis=-1)
            normed = [norm(part) for norm, part in zip(self.module.fc_norm, parts, strict=True)]
            taps = mx.concatenate(normed, axis=-1)
        return self.module.fc(taps)

    def run(self, hidden: mx.array, tokens: mx.array, caches: list[Any]) -> mx.array:
        """[K, E] outputs, before the last norm."""
        embed = self.module.embed_tokens if self._config.own_embedding else self._borrowed.embed
        embedded: mx.array | None = embed(tokens).astype(self._dtype)[None]
        hidden = hidden.astype(self._dtype)[None]
        for layer, cache in zip(self.module.layers, caches, strict=True):
            hidden, embedded = layer(hidden, embedded, cache), None
        return hidden[0]

    def fed_back(self, outputs: mx.array) -> mx.array:
        """[N, E], raw except where speculators say `norm_output`."""
        return self.module.norm(outputs) if self._config.feedback_normed else outputs

    def logits(self, outputs: mx.array) -> mx.array:
        """[N, V]."""
        normed = self.module.norm(outputs)
        rows = self.module.lm_head(normed) if self._config.own_head else self._borrowed.score(normed)
        if self._places is None:
            return rows
        nothing = mx.full((rows.shape[0], 1), -mx.inf, rows.dtype)
        return mx.take(mx.concatenate([rows, nothing], axis=-1), self._places, axis=-1)


def _scaling(config: Eagle3Config) -> dict[str, Any] | None:
    return None if config.rope_scaling is None else dict(config.rope_scaling)


def _renamed(name: str, block: str) -> str:
    """This module's parameter for a tensor."""
    return "layers.0" + name.removeprefix(block) if name.startswith(f"{block}.") else name


def _places(
    config: Eagle3Config, offsets: mx.array | None, allowed: mx.array | None, vocab_size: int
) -> mx.array | None:
    """[V] where each of the target's tokens stands among the draft's logits, Vd for one that the head cannot guess;
    None where both vocabularies are one. Raises HeadFileError."""
    num = config.draft_vocab if config.own_head else vocab_size
    ids = np.arange(num) if offsets is None else np.arange(num) + np.array(offsets, np.int64)
    if num > vocab_size or np.any(ids < 0) or np.any(ids >= vocab_size) or len(np.unique(ids)) != num:
        raise HeadFileError(
            "tensor d2t names tokens twice, or tokens that the target does not have" if offsets is not None
            else "tensor lm_head.weight has more rows than the target has tokens",
            got=f"{num} tokens, the highest {int(ids.max())}",
            expected=f"different ones below {vocab_size}",
        )  # fmt: skip
    if allowed is not None and not np.array_equal(np.flatnonzero(np.array(allowed)), np.sort(ids)):
        raise HeadFileError("tensors t2d and d2t do not name the same tokens")
    if num == vocab_size and np.array_equal(ids, np.arange(num)):
        return None
    places = np.full(vocab_size, num, np.int32)
    places[ids] = np.arange(num)
    return mx.array(places)


def build(header: HeadHeader, target: MlxModel) -> PairHead:
    """The head beside its target. Raises HeadFileError, PairMismatchError, and UnsupportedModelError for a target that
    cannot be read."""
    config = header.details
    assert isinstance(config, Eagle3Config)
    num_layers = target.network.taps.num_layers
    if header.num_target_layers not in (None, num_layers):
        raise PairMismatchError(
            "the head was trained for a target with other layers", got=header.num_target_layers, expected=num_layers
        )
    taps = config.taps(num_layers)
    network = Eagle3(config, read_tensors(header), target.ends)
    share(network.module, target.ends.matrices())
    target.ends.check_taps(taps)
    return PairHead(head_info(header, network.module, taps), target, network)
