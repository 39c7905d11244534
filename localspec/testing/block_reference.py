"""Block heads in slow numpy, from the released recipes: nothing is cached, and every path is computed anew.

[deepseek-ai/DeepSpec modeling/dspark, z-lab/dflash, vllm-project/speculators models/dspark, JetSpec draft_head]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localspec.testing.block_heads import BlockSpec

__all__ = ["BlockReference"]

Array = NDArray[np.float64]


class BlockReference:
    """embedding, output: the target's [V, hidden], for heads without their own."""

    def __init__(
        self, spec: BlockSpec, tensors: Mapping[str, NDArray[Any]], embedding: NDArray[Any], output: NDArray[Any]
    ) -> None:
        self._spec = spec
        self._w: dict[str, Any] = {
            name: array if array.dtype.kind in "bi" else array.astype(np.float64) for name, array in tensors.items()
        }
        self._embedding = self._w.get("embed_tokens.weight", embedding.astype(np.float64))
        self._output = self._w.get("lm_head.weight", output.astype(np.float64))

    def rows(
        self, features: NDArray[Any], places: Sequence[int], anchor: int, path: Sequence[int]
    ) -> tuple[Array, Array | None]:
        """([1 + len(path), V] behind the anchor and behind each token of a chain of guesses, the same of confidence).

        features: [n, taps * hidden] of the tokens at `places`; the anchor stands at places[-1] + 1, or at 0.
        """
        spec = self._spec
        start = places[-1] + 1 if len(places) else 0
        hidden = self._block(features.astype(np.float64), np.array(places, np.int64), anchor, start)
        slots = hidden[1:] if spec.in_place else hidden
        logits = slots @ self._output.T
        if spec.softcap:
            logits = np.tanh(logits / spec.softcap) * spec.softcap
        before = [anchor, *path]
        rows = np.array([self._chosen(logits, slots, before[: i + 1]) for i in range(len(before))])
        sure = np.array([self._sure(slots[i], token) for i, token in enumerate(before)]) if spec.confidence else None
        return self._spread(rows), sure

    # ------------------------------------------------------------ the block

    def _block(self, features: Array, places: NDArray[np.int64], anchor: int, start: int) -> Array:
        """[B, hidden] behind the final norm."""
        spec, w = self._spec, self._w
        context = _norm(features @ w["fc.weight"].T, w["hidden_norm.weight"], spec.eps)
        h = self._embedding[[anchor] + [spec.mask_token] * (spec.slots - 1)]
        if spec.gemma:
            h = h * np.sqrt(spec.target[0])
        for layer in range(spec.num_layers):
            h = self._layer(f"layers.{layer}.", h, context, places, start, layer == spec.num_layers - 1)
        return _norm(h, w["norm.weight"], spec.eps)

    def _layer(self, name: str, h: Array, context: Array, places: NDArray[np.int64], start: int, last: bool) -> Array:
        spec, w = self._spec, self._w
        window = spec.window if last else 0
        u = _norm(h, w[f"{name}input_layernorm.weight"], spec.eps)
        attend = partial(self._attention, f"{name}self_attn.", context, places, start, window)
        h = h + self._around(f"{name}attention_conv", u, attend, f"{name}post_attention_layernorm.weight")
        between = "pre_feedforward_layernorm" if spec.gemma else "post_attention_layernorm"
        u = _norm(h, w[f"{name}{between}.weight"], spec.eps)
        feed = partial(self._fed, f"{name}mlp.")
        h = h + self._around(f"{name}mlp_conv", u, feed, f"{name}post_feedforward_layernorm.weight")
        return h * self._w[f"{name}layer_scalar"] if spec.gemma else h

    def _around(self, convolution: str, u: Array, sublayer: Callable[[Array], Array], norm: str) -> Array:
        """What is added to the residual stream."""
        if self._spec.convolved:
            kernels = self._kernels(convolution, u)
            return _convolved(sublayer(_convolved(u, kernels[:, 0])), kernels[:, 1])
        return _norm(sublayer(u), self._w[norm], self._spec.eps) if self._spec.gemma else sublayer(u)

    def _fed(self, name: str, u: Array) -> Array:
        gate, up = u @ self._w[f"{name}gate_proj.weight"].T, u @ self._w[f"{name}up_proj.weight"].T
        fed: Array = ((_gelu(gate) if self._spec.gemma else gate * _sigmoid(gate)) * up) @ self._w[
            f"{name}down_proj.weight"
        ].T
        return fed

    def _attention(
        self, name: str, context: Array, places: NDArray[np.int64], start: int, window: int, u: Array
    ) -> Array:
        spec, w, size = self._spec, self._w, self._spec.head_size
        slots = np.arange(start, start + len(u))
        everywhere = np.concatenate([places, slots])
        both = np.concatenate([context, u])
        queries = (u @ w[f"{name}q_proj.weight"].T).reshape(len(u), spec.num_heads, size)
        raw = (both @ w[f"{name}k_proj.weight"].T).reshape(len(both), spec.num_kv_heads, size)
        values = raw
        if not spec.keys_are_values:
            values = (both @ w[f"{name}v_proj.weight"].T).reshape(len(both), spec.num_kv_heads, size)
        if spec.gemma:
            values = _norm(values, np.ones(size), spec.eps)
        queries = self._turned(_norm(queries, w[f"{name}q_norm.weight"], spec.eps), slots)
        keys = self._turned(_norm(raw, w[f"{name}k_norm.weight"], spec.eps), everywhere)
        out = np.zeros((len(u), spec.num_heads, size))
        for slot in range(len(u)):
            seen = [i for i in range(len(both)) if self._sees(slot, i, len(places), everywhere, start, window)]
            for head in range(spec.num_heads):
                pair = head // (spec.num_heads // spec.num_kv_heads)
                scores = keys[seen, pair] @ queries[slot, head] * (1.0 if spec.gemma else size**-0.5)
                weight = np.exp(scores - scores.max())
                out[slot, head] = weight / weight.sum() @ values[seen, pair]
        attended: Array = out.reshape(len(u), -1) @ w[f"{name}o_proj.weight"].T
        return attended

    def _sees(
        self, slot: int, cell: int, num_context: int, everywhere: NDArray[np.int64], start: int, window: int
    ) -> bool:
        spec = self._spec
        if cell >= num_context:
            causal = spec.causal == "all" or (spec.causal == "windows" and window > 0)
            return not causal or cell - num_context <= slot
        if not window:
            return True
        if spec.layout == "speculators":
            return bool(everywhere[cell] >= start - window)
        return bool(start + slot - everywhere[cell] < window)

    def _turned(self, x: Array, places: NDArray[np.int64]) -> Array:
        size = self._spec.head_size
        frequencies = self._spec.rope_theta ** (-np.arange(0, size, 2) / size)
        if self._spec.gemma:  # a quarter is turned, the rest stands
            frequencies = np.where(np.arange(size // 2) < size // 8, frequencies, 0.0)
        angles = places[:, None, None] * frequencies
        low, high = x[..., : size // 2], x[..., size // 2 :]
        return np.concatenate(
            [low * np.cos(angles) - high * np.sin(angles), high * np.cos(angles) + low * np.sin(angles)], axis=-1
        )

    def _kernels(self, name: str, u: Array) -> Array:
        """[B, 2, taps, hidden] of both sides."""
        spec, hidden = self._spec, self._spec.target[0]
        added = (u @ self._w[f"{name}.kernel_projection.weight"].T).reshape(
            len(u), 2, spec.kernel, hidden // spec.group
        )
        kernels: Array = self._w[f"{name}.base_kernel"] + np.repeat(added, spec.group, axis=-1)
        return kernels

    # ------------------------------------------------------------ the choice

    def _chosen(self, logits: Array, hidden: Array, before: Sequence[int]) -> Array:
        """[Vd] of the slot behind the tokens `before`."""
        spec, w, slot = self._spec, self._w, len(before) - 1
        if spec.convolved:
            return self._selected(logits[slot], hidden[slot], before[-1])
        row: Array = logits[slot]
        if not spec.markov:
            return row
        project: Array
        entries, project = w["markov_head.markov_w1.weight"], w["markov_head.markov_w2.weight"]
        entry = entries[before[-1]]
        if spec.markov == "vanilla":
            return np.asarray(row + project @ entry)
        if spec.markov == "gated":
            both = np.concatenate([hidden[slot], entry])
            gate = _sigmoid(w["markov_head.gate_proj.weight"] @ both + w["markov_head.gate_proj.bias"])
            return np.asarray(row + project @ (gate * entry))
        memory, output = np.zeros(spec.rank), np.zeros(spec.rank)
        for place, token in enumerate(before):
            joined = np.concatenate([memory, entries[token], hidden[place]])
            gate, candidate, output = np.split(
                w["markov_head.joint_proj.weight"] @ joined + w["markov_head.joint_proj.bias"], 3
            )
            memory = _sigmoid(gate) * memory + (1 - _sigmoid(gate)) * np.tanh(candidate)
        return np.asarray(row + project @ np.tanh(output))

    def _selected(self, logits: Array, hidden: Array, before: int) -> Array:
        w, name = self._w, "candidate_selector."
        mixed = w[f"{name}predecessor_codebook"][before] * (w[f"{name}hidden_projection.weight"] @ hidden)
        row = np.full(len(logits), -np.inf)
        for token in np.argsort(-logits)[: self._spec.candidates]:
            row[token] = logits[token] + mixed @ w[f"{name}successor_codebook"][token]
        return row

    def _sure(self, hidden: Array, before: int) -> float:
        w, name = self._w, "confidence_head.proj"
        seen = hidden
        if self._spec.confidence == "markov":
            seen = np.concatenate([hidden, w["markov_head.markov_w1.weight"][before]])
        return float(_sigmoid(w[f"{name}.weight"][0] @ seen + w[f"{name}.bias"][0]))

    def _spread(self, rows: Array) -> Array:
        if not self._spec.draft_vocab:
            return rows
        spread = np.full((len(rows), self._spec.target[2]), -np.inf)
        spread[:, np.flatnonzero(self._w["t2d"])] = rows
        return spread


def _norm(x: Array, weight: Array, eps: float) -> Array:
    normed: Array = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight
    return normed


def _sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-x))


def _gelu(x: Array) -> Array:
    curved: Array = 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))
    return curved


def _convolved(x: Array, kernels: Array) -> Array:
    """[B, hidden]; kernels [B, taps, hidden]."""
    out = np.zeros_like(x)
    for slot in range(len(x)):
        for tap in range(kernels.shape[1]):
            if slot >= tap:
                out[slot] += kernels[slot, tap] * x[slot - tap]
    return out
