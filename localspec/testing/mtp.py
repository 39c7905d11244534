"""Layers for multi-token prediction: tiny ones on disk in released layouts, and their pass in slow numpy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localspec.testing.files import write_folder
from localspec.testing.pair_heads import (
    Array,
    Seen,
    TargetEnds,
    attended,
    frequencies_of,
    random_weights,
    rms_norm,
    rotated,
    silu,
    softmax,
)

__all__ = ["LAYOUTS", "MtpReference", "write_mtp"]

LAYOUTS = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "deepseek_v3", "speculators")

_HEAD, _HEADS, _KV_HEADS, _EPS, _FEED, _EXPERTS = 16, 4, 2, 1e-6, 48, 4
_NOPE, _ROPE, _VALUE, _LORA, _Q_LORA = 12, 8, 10, 24, 20
_QWEN_SIZES = {
    "head_dim": _HEAD, "num_attention_heads": _HEADS, "num_key_value_heads": _KV_HEADS, "attention_bias": False,
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "num_experts_per_tok": 2, "moe_intermediate_size": _FEED, "shared_expert_intermediate_size": _FEED,
}  # fmt: skip
_DEEPSEEK_SIZES = {
    "num_attention_heads": _HEADS, "num_key_value_heads": _HEADS, "kv_lora_rank": _LORA, "q_lora_rank": _Q_LORA,
    "qk_rope_head_dim": _ROPE, "qk_nope_head_dim": _NOPE, "v_head_dim": _VALUE, "n_routed_experts": _EXPERTS,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5,
    "moe_intermediate_size": _FEED, "norm_topk_prob": True, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 1,
}  # fmt: skip


def write_mtp(
    folder: Path, layout: str, *, target: tuple[int, int, int], seed: int = 0
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Write config.json and model.safetensors with random weights; returns both as they were written.

    layout: one of LAYOUTS.  target: (hidden size, layers, V) of the target. DeepSeek's layer stands behind the
    target's, with copies of its ends; Qwen's norms are stored less one; Qwen3-Next has its experts one by one, Qwen3.5
    stacked, and the rest are dense.
    """
    hidden, num_layers, vocab = target
    settings: dict[str, Any] = {
        "model_type": layout,
        "hidden_size": hidden,
        "intermediate_size": _FEED,
        "num_hidden_layers": num_layers,
        "rms_norm_eps": _EPS,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    if layout == "qwen3_next":
        settings |= _QWEN_SIZES | {"num_experts": _EXPERTS, "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
        config = settings | {"architectures": ["Qwen3NextForCausalLM"], "norm_topk_prob": True}
    elif layout.startswith("qwen3_5"):
        settings |= _QWEN_SIZES | {"num_experts": _EXPERTS if layout == "qwen3_5_moe" else 0}
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
        config = {"model_type": layout, "text_config": settings | {"model_type": f"{layout}_text"}}
    elif layout == "deepseek_v3":
        settings |= _DEEPSEEK_SIZES | {"rope_theta": 10000.0}
        config = settings | {"architectures": ["DeepseekV3ForCausalLM"]}
    elif layout == "speculators":
        settings |= _QWEN_SIZES | {"model_type": "qwen3", "rope_theta": 10000.0}
        config = {"speculators_model_type": "mtp", "architectures": ["MTPDraftModel"]}
        config |= {"transformer_layer_config": settings, "num_nextn_predict_layers": 1}
    else:
        raise ValueError(f"layout {layout!r}: one of {', '.join(LAYOUTS)}")
    weights = random_weights(_shapes(layout, hidden, num_layers, vocab), seed)
    if layout.startswith("qwen"):
        weights |= {
            name: value - 1 for name, value in weights.items() if name.endswith("norm.weight") or "pre_fc_" in name
        }
    write_folder(folder, config, weights)
    return config, weights


def _shapes(layout: str, hidden: int, num_layers: int, vocab: int) -> dict[str, tuple[int, ...]]:
    around, block = _names(layout, num_layers)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(around, (hidden,))
    shapes[around[0]] = (hidden, 2 * hidden)
    inner: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("input_layernorm.weight", "post_attention_layernorm.weight"), (hidden,)
    )
    if layout == "deepseek_v3":
        shapes[f"{block}embed_tokens.weight"] = shapes[f"{block}shared_head.head.weight"] = (vocab, hidden)
        inner |= _mla_shapes(hidden) | _expert_shapes(hidden, "mlp.shared_experts")
        inner |= {"mlp.gate.weight": (_EXPERTS, hidden), "mlp.gate.e_score_correction_bias": (_EXPERTS,)}
    else:
        gated = 1 if layout == "speculators" else 2
        inner |= {
            "self_attn.q_proj.weight": (gated * _HEADS * _HEAD, hidden),
            "self_attn.k_proj.weight": (_KV_HEADS * _HEAD, hidden),
            "self_attn.v_proj.weight": (_KV_HEADS * _HEAD, hidden),
            "self_attn.o_proj.weight": (hidden, _HEADS * _HEAD),
            "self_attn.q_norm.weight": (_HEAD,),
            "self_attn.k_norm.weight": (_HEAD,),
        }
    if layout in ("qwen3_next", "deepseek_v3"):
        for expert in range(_EXPERTS):
            inner |= _expert_shapes(hidden, f"mlp.experts.{expert}")
    if layout == "qwen3_5_moe":
        inner["mlp.experts.gate_up_proj"] = (_EXPERTS, 2 * _FEED, hidden)
        inner["mlp.experts.down_proj"] = (_EXPERTS, hidden, _FEED)
    if layout in ("qwen3_next", "qwen3_5_moe"):
        inner |= _expert_shapes(hidden, "mlp.shared_expert")
        inner |= {"mlp.gate.weight": (_EXPERTS, hidden), "mlp.shared_expert_gate.weight": (1, hidden)}
    if layout in ("qwen3_5", "speculators"):
        inner |= _expert_shapes(hidden, "mlp")
    return shapes | {f"{block}{name}": shape for name, shape in inner.items()}


def _names(layout: str, num_layers: int) -> tuple[tuple[str, str, str, str], str]:
    """(projection, norms of embedding, hidden state and output), what the block begins with."""
    names = {
        "deepseek_v3": (f"model.layers.{num_layers}.", ("eh_proj", "enorm", "hnorm", "shared_head.norm"), ""),
        "speculators": ("mtp_layers.0.", ("input_proj", "token_layernorm", "hidden_layernorm", "final_layernorm"), ""),
    }
    qwen = ("mtp.", ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"), "layers.0.")
    prefix, (first, second, third, fourth), below = names.get(layout, qwen)
    full = (
        f"{prefix}{first}.weight",
        f"{prefix}{second}.weight",
        f"{prefix}{third}.weight",
        f"{prefix}{fourth}.weight",
    )
    return full, prefix + below


def _expert_shapes(hidden: int, prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (_FEED, hidden),
        f"{prefix}.up_proj.weight": (_FEED, hidden),
        f"{prefix}.down_proj.weight": (hidden, _FEED),
    }


def _mla_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        "self_attn.q_a_proj.weight": (_Q_LORA, hidden),
        "self_attn.q_a_layernorm.weight": (_Q_LORA,),
        "self_attn.q_b_proj.weight": (_HEADS * (_NOPE + _ROPE), _Q_LORA),
        "self_attn.kv_a_proj_with_mqa.weight": (_LORA + _ROPE, hidden),
        "self_attn.kv_a_layernorm.weight": (_LORA,),
        "self_attn.kv_b_proj.weight": (_HEADS * (_NOPE + _VALUE), _LORA),
        "self_attn.o_proj.weight": (hidden, _HEADS * _VALUE),
    }


class MtpReference:
    """`pair_heads.PairReference` of what `write_mtp` writes. The target's hidden states are those behind its norm."""

    def __init__(self, layout: str, num_layers: int, weights: Mapping[str, NDArray[Any]], ends: TargetEnds) -> None:
        self._layout, self._ends = layout, ends
        self._around, block = _names(layout, num_layers)
        self._all = {name: value.astype(np.float64) for name, value in weights.items()}
        self._block = {name.removeprefix(block): value for name, value in self._all.items() if name.startswith(block)}
        self._centre = 1.0 if layout.startswith("qwen") else 0.0
        turned = {"deepseek_v3": _ROPE, "speculators": _HEAD}.get(layout, _HEAD // 4)
        self._frequencies = frequencies_of(turned, 10000.0, None)

    def _normed(self, x: Array, name: str) -> Array:
        return rms_norm(x, self._block[f"{name}.weight"] + self._centre, _EPS)

    def feature(self, taps: Array) -> Array:
        """As it is."""
        return taps

    def step(self, hidden: Array, token: int, position: int, seen: Seen) -> Array:
        """One pair through the layer and its final norm."""
        projection, embedding, context, final = self._around
        parts = [
            rms_norm(self._ends.embedding[token], self._all[embedding] + self._centre, _EPS),
            rms_norm(hidden, self._all[context] + self._centre, _EPS),
        ]
        x = self._all[projection] @ np.concatenate(parts)
        attend = self._latent if self._layout == "deepseek_v3" else self._gated
        x = x + attend(self._normed(x, "input_layernorm"), position, seen)
        x = x + self._mixed(self._normed(x, "post_attention_layernorm"))
        return rms_norm(x, self._all[final] + self._centre, _EPS)

    def fed_back(self, output: Array) -> Array:
        """As it is."""
        return output

    def logits(self, output: Array) -> Array:
        """[V] by the target's output matrix."""
        return np.asarray(self._ends.output @ output)

    def _gated(self, x: Array, position: int, seen: Seen) -> Array:
        """Attention whose outputs are gated; without gates for speculators' Qwen3."""
        block = self._block
        query = (block["self_attn.q_proj.weight"] @ x).reshape(_HEADS, -1)
        gate = query[:, _HEAD:]
        query = self._normed(query[:, :_HEAD], "self_attn.q_norm")
        key = self._normed((block["self_attn.k_proj.weight"] @ x).reshape(_KV_HEADS, _HEAD), "self_attn.k_norm")
        seen.keys.append(rotated(key, position, self._frequencies))
        seen.values.append((block["self_attn.v_proj.weight"] @ x).reshape(_KV_HEADS, _HEAD))
        out = attended(rotated(query, position, self._frequencies), seen.keys, seen.values)
        if gate.size:
            out = out / (1.0 + np.exp(-gate))
        return np.asarray(block["self_attn.o_proj.weight"] @ out.reshape(-1))

    def _latent(self, x: Array, position: int, seen: Seen) -> Array:
        """Multi-head latent attention, keys and values written out."""
        block = self._block
        low = self._normed(block["self_attn.q_a_proj.weight"] @ x, "self_attn.q_a_layernorm")
        query = (block["self_attn.q_b_proj.weight"] @ low).reshape(_HEADS, _NOPE + _ROPE)
        packed = block["self_attn.kv_a_proj_with_mqa.weight"] @ x
        latent = self._normed(packed[:_LORA], "self_attn.kv_a_layernorm")
        opened = (block["self_attn.kv_b_proj.weight"] @ latent).reshape(_HEADS, _NOPE + _VALUE)
        shared = np.repeat(self._turned_in_pairs(packed[None, _LORA:], position), _HEADS, axis=0)
        seen.keys.append(np.concatenate([opened[:, :_NOPE], shared], axis=1))
        seen.values.append(opened[:, _NOPE:])
        query = np.concatenate([query[:, :_NOPE], self._turned_in_pairs(query[:, _NOPE:], position)], axis=1)
        out = attended(query, seen.keys, seen.values)
        return np.asarray(block["self_attn.o_proj.weight"] @ out.reshape(-1))

    def _turned_in_pairs(self, x: Array, position: int) -> Array:
        """[heads, size] with neighbours turned together."""
        turned = (x[:, ::2] + 1j * x[:, 1::2]) * np.exp(1j * position * self._frequencies)
        return np.stack([turned.real, turned.imag], axis=2).reshape(x.shape)

    def _expert(self, x: Array, prefix: str) -> Array:
        gate, up = self._block[f"{prefix}.gate_proj.weight"], self._block[f"{prefix}.up_proj.weight"]
        return np.asarray(self._block[f"{prefix}.down_proj.weight"] @ (silu(gate @ x) * (up @ x)))

    def _mixed(self, x: Array) -> Array:
        """Experts, or the one there is."""
        block = self._block
        if "mlp.gate.weight" not in block:
            return self._expert(x, "mlp")
        scores = block["mlp.gate.weight"] @ x
        if self._layout == "deepseek_v3":
            chances = 1.0 / (1.0 + np.exp(-scores))
            ranked = (chances + block["mlp.gate.e_score_correction_bias"]).reshape(2, -1)  # two groups
            best = np.sort(ranked, axis=1)[:, -2:].sum(axis=1).argmax()
            chosen = np.argsort(ranked[best])[-2:] + best * ranked.shape[1]
            weights = chances[chosen] / chances[chosen].sum() * 2.5
            out = self._expert(x, "mlp.shared_experts")
        else:
            chances = softmax(scores)
            chosen = np.argsort(chances)[-2:]
            weights = chances[chosen] / chances[chosen].sum()
            gate = 1.0 / (1.0 + np.exp(-(block["mlp.shared_expert_gate.weight"] @ x)))
            out = gate * self._expert(x, "mlp.shared_expert")
        for expert, weight in zip(chosen.tolist(), weights.tolist(), strict=True):
            out = out + weight * self._one(x, expert)
        return np.asarray(out)

    def _one(self, x: Array, expert: int) -> Array:
        if "mlp.experts.gate_up_proj" not in self._block:
            return self._expert(x, f"mlp.experts.{expert}")
        gate, up = np.split(self._block["mlp.experts.gate_up_proj"][expert] @ x, 2)
        return np.asarray(self._block["mlp.experts.down_proj"][expert] @ (silu(gate) * up))
