"""Heads in plain numpy, from the tensors of a GGUF file: what llama.cpp's draft architectures ought to compute.

Written from the heads' own publications, not from a backend: features and tokens in, rows out, everything in float32
and the whole context again each time. Keys and values are rounded as the cache rounds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from localspec.formats import gguf

Array: TypeAlias = Any
"""[...] float32."""


class Head:
    """Tensors and metadata of a head, or of a target with one inside."""

    def __init__(self, path: Path, target: Path | None = None) -> None:
        self.path, self.header = path, gguf.read_header(path)
        self.name = str(self.header.metadata["general.architecture"])
        self._target = Head(target) if target is not None else None
        self._read: dict[str, Array] = {}

    def key(self, name: str, default: Any = None) -> Any:
        value = self.header.metadata.get(f"{self.name}.{name}", default)
        return value.tolist() if isinstance(value, np.ndarray) else value

    def __contains__(self, name: str) -> bool:
        return name in self.header.tensors

    def __getitem__(self, name: str) -> Array:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        if name not in self._read:
            if name not in self.header.tensors:
                if name == "output.weight" and "token_embd.weight" in self.header.tensors:
                    return self["token_embd.weight"]
                assert self._target is not None, name
                return self._target[name]
            tensor = self.header.tensors[name]
            raw = np.fromfile(self.path, np.uint8, tensor.num_bytes, offset=tensor.offset)
            raw = raw.reshape(*tensor.shape[:-1], -1)
            self._read[name] = dequantize(raw, GGMLQuantizationType[tensor.kind]).astype(np.float32)
        return self._read[name]

    def norm(self, x: Array, name: str) -> Array:
        eps = self.key("attention.layer_norm_rms_epsilon")
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self[name]

    def heads(self, x: Array, count: int) -> Array:
        return x.reshape(len(x), count, -1)

    def rope(self, x: Array, positions: Sequence[int], *, neighbours: bool = False) -> Array:
        size = self.key("rope.dimension_count")
        angles = np.outer(positions, self.key("rope.freq_base") ** (-np.arange(0, size, 2) / size))[:, None]
        cos, sin = np.cos(angles), np.sin(angles)
        turned, rest = x[..., :size], x[..., size:]
        a, b = (turned[..., ::2], turned[..., 1::2]) if neighbours else np.split(turned, 2, -1)
        one, two = a * cos - b * sin, a * sin + b * cos
        joined = np.stack([one, two], -1).reshape(turned.shape) if neighbours else np.concatenate([one, two], -1)
        return np.concatenate([joined, rest], -1).astype(np.float32)

    def attend(self, q: Array, k: Array, v: Array, mask: NDArray[np.bool_]) -> Array:
        """q [T, heads, d] over k, v [S, kv heads, d], mask [T, S]."""
        k, v = (x.astype(np.float16).astype(np.float32) for x in (k, v))
        shared = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, shared, 1), np.repeat(v, shared, 1)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hts,shd->thd", weights, v).reshape(len(q), -1).astype(np.float32)

    def feed_forward(self, x: Array, layer: int) -> Array:
        gate, up = (x @ self[f"blk.{layer}.ffn_{name}.weight"].T for name in ("gate", "up"))
        return (gate / (1 + np.exp(-gate)) * up) @ self[f"blk.{layer}.ffn_down.weight"].T

    def scattered(self, rows: Array, num_tokens: int) -> Array:
        if "d2t" not in self:
            return rows
        tensor = self.header.tensors["d2t"]
        ids = np.fromfile(self.path, np.uint8, tensor.num_bytes, offset=tensor.offset).view("<i8")
        full = np.full((len(rows), num_tokens), -np.inf, np.float32)
        full[:, ids] = rows
        return full


class BlockReference:
    """DSpark, DFlash, JetSpec, DFlash 2."""

    def __init__(self, path: Path, target: Path) -> None:
        self.head = Head(path, target)
        head = self.head
        self.size = head.key("block_size")
        self.first = 0 if head.key("sample_from_anchor", "markov_w1.weight" in head) else 1
        self.num_tokens = len(head["token_embd.weight"])

    def base(self, features: Array, anchor: int) -> tuple[Array, Array]:
        """([B, V] logits without what a guess before adds, [B, E] hidden rows) behind features [n, W]."""
        head, size, n = self.head, self.size, len(features)
        q_heads, kv_heads = head.key("attention.head_count"), head.key("attention.head_count_kv")
        mask_token = head.header.metadata["tokenizer.ggml.mask_token_id"]
        g = head.norm(features @ head["fc.weight"].T, "enc.output_norm.weight")
        h = head["token_embd.weight"][[anchor] + [mask_token] * (size - 1)]
        seen = np.ones((size, n + size), bool)
        if head.key("attention.causal"):
            seen[:, n:] = np.tril(np.ones((size, size), bool))
        behind = np.arange(n, n + size)[:, None] - np.arange(n + size)
        windows = head.key("attention.sliding_window_pattern", [False] * head.key("block_count"))
        for layer in range(head.key("block_count")):
            name = f"blk.{layer}."
            mask = seen & (behind < head.key("attention.sliding_window")) if windows[layer] else seen
            u = head.norm(h, f"{name}attn_norm.weight")
            kernels = self._kernels(u, f"{name}attn_conv")
            u = self._convolved(u, kernels, 0)
            both = np.concatenate([g, u])
            q = head.heads(u @ head[f"{name}attn_q.weight"].T, q_heads)
            k, v = (head.heads(both @ head[f"{name}attn_{x}.weight"].T, kv_heads) for x in "kv")
            q = head.rope(head.norm(q, f"{name}attn_q_norm.weight"), range(n, n + size))
            k = head.rope(head.norm(k, f"{name}attn_k_norm.weight"), range(n + size))
            out = head.attend(q, k, v, mask) @ head[f"{name}attn_output.weight"].T
            h = h + self._convolved(out, kernels, 1)
            w = head.norm(h, f"{name}ffn_norm.weight")
            kernels = self._kernels(w, f"{name}ffn_conv")
            h = h + self._convolved(head.feed_forward(self._convolved(w, kernels, 0), layer), kernels, 1)
        hidden = head.norm(h, "output_norm.weight")
        return head.scattered(hidden @ head["output.weight"].T, self.num_tokens), hidden

    def _kernels(self, w: Array, name: str) -> Array | None:
        """[T, 2 sides, taps, E]."""
        head = self.head
        if f"{name}_base" not in head:
            return None
        taps, group = head.key("conv_kernel_size"), head.key("conv_group_size")
        moving = (w @ head[f"{name}_proj.weight"].T).reshape(len(w), 2, taps, -1)
        return head[f"{name}_base"][None] + np.repeat(moving, group, -1)

    def _convolved(self, x: Array, kernels: Array | None, side: int) -> Array:
        if kernels is None:
            return x
        out = np.zeros_like(x)
        for tap in range(min(kernels.shape[2], len(x))):
            out[tap:] += kernels[tap:, side, tap] * x[: len(x) - tap]
        return out

    def row(self, base: Array, hidden: Array, slot: int, previous: int) -> Array:
        """[V] what guess `slot` (0: the one behind the anchor) is chosen by, behind `previous`."""
        head, place = self.head, slot + self.first
        if "markov_w1.weight" in head:
            bias = (head["markov_w2.weight"] @ head["markov_w1.weight"][previous])[None]
            return base[place] + np.maximum(head.scattered(bias, self.num_tokens)[0], -1e30)
        if "selector_hidden.weight" not in head:
            return base[place]
        ids = np.argsort(-base[place])[: head.key("selector_top_k")]
        gate = head["selector_hidden.weight"] @ hidden[place]
        codes = head["selector_successor.weight"][ids]
        row = np.full(self.num_tokens, -np.inf, np.float32)
        row[ids] = base[place][ids] + codes @ (head["selector_predecessor.weight"][previous] * gate)
        return row

    def confidence(self, hidden: Array, slot: int, previous: int) -> float:
        head = self.head
        both = np.concatenate([hidden[slot + self.first], head["markov_w1.weight"][previous]])
        return float(1 / (1 + np.exp(-(head["conf_proj.weight"][0] @ both + head["conf_proj.bias"][0]))))


class StepReference:
    """EAGLE-3, and the MTP layer of a qwen35 target: the rows behind a text and a path of guesses."""

    def __init__(self, path: Path, target: Path) -> None:
        self.head = Head(path, target)
        self.is_mtp = self.head.name != "eagle3"
        self.layer = self.head.key("block_count") - 1 if self.is_mtp else 0
        self.num_tokens = len(self.head["token_embd.weight"])

    def rows(self, features: Array, tokens: Sequence[int], guesses: Sequence[int]) -> Array:
        """[G + 1, V] behind the anchor (the last of `tokens`) and each guess of a chain; features [n, W] of the
        others. The pairs of committed tokens are (state p, token p + 1)."""
        states = list(self._encoded(features))
        inputs, found = list(tokens[1:]), []
        for number in range(len(guesses) + 1):
            hidden, logits = self._layer(np.array(states, np.float32), inputs)
            found.append(logits)
            states.append(hidden)
            inputs += guesses[number : number + 1]
        return np.array(found)

    def _encoded(self, features: Array) -> Array:
        head = self.head
        if self.is_mtp:
            return features
        if head.key("norm_before_fc"):
            features = head.norm(features, "enc.output_norm.weight")
        return features @ head["fc.weight"].T

    def _layer(self, states: Array, tokens: Sequence[int]) -> tuple[Array, Array]:
        """([E] the state for the next step, [V] logits) of the last pair."""
        head, name, count = self.head, f"blk.{self.layer}.", len(tokens)
        q_heads, kv_heads = head.key("attention.head_count"), head.key("attention.head_count_kv")
        embedded = head["token_embd.weight"][list(tokens)]
        if self.is_mtp:
            e = head.norm(embedded, f"{name}nextn.enorm.weight")
            c = head.norm(states, f"{name}nextn.hnorm.weight")
            residual = np.concatenate([e, c], -1) @ head[f"{name}nextn.eh_proj.weight"].T
            u = head.norm(residual, f"{name}attn_norm.weight")
        else:
            c = head.norm(states, f"{name}attn_norm_2.weight")
            residual = c if head.key("norm_before_residual") else states
            u = np.concatenate([head.norm(embedded, f"{name}attn_norm.weight"), c], -1)
        q, k, v = (u @ head[f"{name}attn_{x}.weight"].T for x in "qkv")
        q, k, v = head.heads(q, q_heads), head.heads(k, kv_heads), head.heads(v, kv_heads)
        gate = None
        if self.is_mtp:
            q, gate = np.split(q, 2, -1)
            q, k = head.norm(q, f"{name}attn_q_norm.weight"), head.norm(k, f"{name}attn_k_norm.weight")
        q, k = (head.rope(x, range(count), neighbours=not self.is_mtp) for x in (q, k))
        out = head.attend(q, k, v, np.tril(np.ones((count, count), bool)))
        if gate is not None:
            out = out / (1 + np.exp(-gate.reshape(count, -1)))
        h = residual + out @ head[f"{name}attn_output.weight"].T
        h = h + head.feed_forward(head.norm(h, f"{name}{self._norm}.weight"), self.layer)
        normed = head.norm(h, self._final)
        logits = head.scattered(normed[-1:] @ head["output.weight"].T, self.num_tokens)[0]
        return (normed if self.is_mtp else h)[-1], logits

    @property
    def _norm(self) -> str:
        return "post_attention_norm" if self.is_mtp else "ffn_norm"

    @property
    def _final(self) -> str:
        own = f"blk.{self.layer}.nextn.shared_head_norm.weight"
        return own if own in self.head else "output_norm.weight"
