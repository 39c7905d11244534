"""EAGLE-3 heads: tiny ones on disk in the layouts that are released, and their pass in slow numpy."""

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
)

__all__ = ["LAYOUTS", "Eagle3Reference", "write_eagle3"]

LAYOUTS = ("eagle", "specforge", "speculators", "speculators-fc-norm", "deepspec")

_HEAD, _HEADS, _KV_HEADS, _EPS = 16, 4, 2, 1e-5
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def write_eagle3(
    folder: Path,
    layout: str,
    *,
    target: tuple[int, int, int],
    hidden: int = 0,
    draft_vocab: int = 0,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Write config.json and model.safetensors with random weights; returns both as they were written.

    layout: one of LAYOUTS.  target: (hidden size, layers, V) of the target.  hidden: of the head (0: the target's).
    draft_vocab: tokens that it can guess (0: all).  changes: settings to write instead.
    EAGLE's own layout reads the default layers and has none of the options; SpecForge's has an embedding and
    stretched wavelengths, speculators' biases and a norm of all taps or of each, DeepSpec's five taps and norms of
    every head.
    """
    width, num_layers, vocab = target
    hidden, drafts = hidden or width, draft_vocab or vocab
    backbone: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD,
        "hidden_act": "silu",
        "rms_norm_eps": _EPS,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "model_type": "llama",
    }
    config: dict[str, Any] = {"draft_vocab_size": drafts}
    num_taps, block = 3, "midlayer"
    if layout == "eagle":
        config |= {"architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0} | backbone
    elif layout == "specforge":
        config |= {"architectures": ["LlamaForCausalLMEagle3"], "rope_theta": 5e5, "rope_scaling": _LLAMA3} | backbone
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [1, 2, num_layers - 1]}
    elif layout.startswith("speculators"):
        block = "layers.0"
        backbone |= {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 20000.0}}
        config |= {"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3"}
        config |= {"transformer_layer_config": backbone, "eagle_aux_hidden_state_layer_ids": [2, 3, num_layers]}
        config |= {"norm_before_residual": True, "norm_output": True}
        config["norm_before_fc" if layout == "speculators" else "fc_norm"] = True
    elif layout == "deepspec":
        block, num_taps = "layers.0", 5
        config |= {"architectures": ["Qwen3Eagle3Model"], "num_target_layers": num_layers, "ttt_length": 7}
        config |= backbone | {"model_type": "qwen3", "rope_parameters": {"rope_theta": 10000.0}}
        config["target_layer_ids"] = [0, 1, 2, num_layers - 2, num_layers - 1]
    else:
        raise ValueError(f"layout {layout!r}: one of {', '.join(LAYOUTS)}")
    config |= changes or {}
    shapes = _shapes(layout, (width, vocab, hidden, drafts), num_taps, block)
    weights = random_weights(shapes, seed)
    if drafts < vocab:
        ids = np.sort(np.random.default_rng((seed, 1)).permutation(vocab)[:drafts])
        weights["d2t"] = ids - np.arange(drafts)
        weights["t2d"] = np.isin(np.arange(vocab), ids)
    write_folder(folder, config, weights)
    return config, weights


def _shapes(layout: str, sizes: tuple[int, int, int, int], num_taps: int, block: str) -> dict[str, tuple[int, ...]]:
    width, vocab, hidden, drafts = sizes
    queries, keys = _HEADS * _HEAD, _KV_HEADS * _HEAD
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, num_taps * width), "norm.weight": (hidden,)}
    for norm in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        shapes[f"{block}.{norm}.weight"] = (hidden,)
    for name, num_rows in (("q", queries), ("k", keys), ("v", keys)):
        shapes[f"{block}.self_attn.{name}_proj.weight"] = (num_rows, 2 * hidden)
        if layout.startswith("speculators"):
            shapes[f"{block}.self_attn.{name}_proj.bias"] = (num_rows,)
    shapes[f"{block}.self_attn.o_proj.weight"] = (hidden, queries)
    shapes[f"{block}.mlp.gate_proj.weight"] = shapes[f"{block}.mlp.up_proj.weight"] = (96, hidden)
    shapes[f"{block}.mlp.down_proj.weight"] = (hidden, 96)
    shapes["lm_head.weight"] = (drafts, hidden)
    if layout == "specforge" or hidden != width:
        shapes["embed_tokens.weight"] = (vocab, hidden)
    if layout == "speculators":
        shapes["input_norm.weight"] = (num_taps * width,)
    if layout == "deepspec":
        shapes[f"{block}.self_attn.q_norm.weight"] = shapes[f"{block}.self_attn.k_norm.weight"] = (_HEAD,)
    if layout == "speculators-fc-norm":
        shapes |= {f"fc_norm.{tap}.weight": (width,) for tap in range(num_taps)}
    return shapes


class Eagle3Reference:
    """`pair_heads.PairReference` of what `write_eagle3` writes."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, NDArray[Any]], ends: TargetEnds) -> None:
        self._layer: Mapping[str, Any] = config.get("transformer_layer_config", config)
        self._config = config
        self._weights = {name: value.astype(np.float64) for name, value in weights.items()}
        self._block = "midlayer" if any(name.startswith("midlayer") for name in weights) else "layers.0"
        self._ends = ends
        parameters = self._layer.get("rope_parameters", {})
        scaling = self._layer.get("rope_scaling") or (parameters if "factor" in parameters else None)
        base = float(self._layer.get("rope_theta") or parameters["rope_theta"])
        self._frequencies = frequencies_of(_HEAD, base, scaling)

    def _normed(self, x: Array, name: str) -> Array:
        return rms_norm(x, self._weights[f"{name}.weight"], _EPS)

    def feature(self, taps: Array) -> Array:
        """fc of the taps, normed where the head has norms for them."""
        if "input_norm.weight" in self._weights:
            taps = self._normed(taps, "input_norm")
        if "fc_norm.0.weight" in self._weights:
            parts = np.split(taps, self._weights["fc.weight"].shape[1] // self._ends.embedding.shape[1])
            taps = np.concatenate([self._normed(part, f"fc_norm.{tap}") for tap, part in enumerate(parts)])
        return np.asarray(self._weights["fc.weight"] @ taps)

    def step(self, hidden: Array, token: int, position: int, seen: Seen) -> Array:
        """One pair through the layer."""
        weights, block = self._weights, self._block
        embedding = weights.get("embed_tokens.weight", self._ends.embedding)[token]
        context = self._normed(hidden, f"{block}.hidden_norm")
        joined = np.concatenate([self._normed(embedding, f"{block}.input_layernorm"), context])
        parts = {}
        for name, count in (("q", _HEADS), ("k", _KV_HEADS), ("v", _KV_HEADS)):
            bias = weights.get(f"{block}.self_attn.{name}_proj.bias", np.zeros(1))
            parts[name] = (weights[f"{block}.self_attn.{name}_proj.weight"] @ joined + bias).reshape(count, _HEAD)
            if f"{block}.self_attn.{name}_norm.weight" in weights:
                parts[name] = self._normed(parts[name], f"{block}.self_attn.{name}_norm")
        seen.keys.append(rotated(parts["k"], position, self._frequencies))
        seen.values.append(parts["v"])
        mixed = attended(rotated(parts["q"], position, self._frequencies), seen.keys, seen.values)
        residual = context if self._config.get("norm_before_residual") else hidden
        out = residual + weights[f"{block}.self_attn.o_proj.weight"] @ mixed.reshape(-1)
        normed = self._normed(out, f"{block}.post_attention_layernorm")
        gate = silu(weights[f"{block}.mlp.gate_proj.weight"] @ normed)
        return np.asarray(
            out + weights[f"{block}.mlp.down_proj.weight"] @ (gate * (weights[f"{block}.mlp.up_proj.weight"] @ normed))
        )

    def fed_back(self, output: Array) -> Array:
        """Raw, or normed where the header says so."""
        return self._normed(output, "norm") if self._config.get("norm_output") else output

    def logits(self, output: Array) -> Array:
        """[V]."""
        row = self._weights["lm_head.weight"] @ self._normed(output, "norm")
        if "d2t" not in self._weights:
            return np.asarray(row)
        full = np.full(len(self._ends.embedding), -np.inf)
        for place, offset in enumerate(self._weights["d2t"]):
            full[place + int(offset)] = row[place]
        return full
