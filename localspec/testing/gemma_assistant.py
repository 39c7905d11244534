"""Gemma 4's assistants: tiny ones on disk, and their pass in slow numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localspec.testing.files import write_folder
from localspec.testing.pair_heads import Array, random_weights, rms_norm, rotated, softmax

__all__ = ["LAYER_TYPES", "assistant_row", "write_gemma_assistant"]

LAYER_TYPES = ("sliding_attention", "sliding_attention", "full_attention")

_HIDDEN, _HEADS, _FEED, _EPS, _WINDOW, _CLUSTERS, _CHOSEN = 32, 4, 48, 1e-6, 8, 8, 3
_SIZES = {"sliding_attention": 16, "full_attention": 32}
_ROPE = {
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def write_gemma_assistant(
    folder: Path, *, target: tuple[int, int, int], clusters: bool = False, seed: int = 0
) -> dict[str, NDArray[Any]]:
    """Write config.json and model.safetensors with random weights; returns the weights.

    target: (hidden size, layers, V) of the target, whose keys are of 16 numbers in sliding and of 32 in full layers.
    clusters: only the tokens of the best clusters are scored, as for the smallest targets; V must be a multiple of 8.
    """
    backbone, _, vocab = target
    text = {
        "model_type": "gemma4_text", "hidden_size": _HIDDEN, "intermediate_size": _FEED, "vocab_size": vocab,
        "num_hidden_layers": len(LAYER_TYPES), "num_kv_shared_layers": len(LAYER_TYPES), "head_dim": 16,
        "num_attention_heads": _HEADS, "num_key_value_heads": 2, "global_head_dim": 32, "rms_norm_eps": _EPS,
        "layer_types": list(LAYER_TYPES), "sliding_window": _WINDOW, "hidden_size_per_layer_input": 0,
        "enable_moe_block": False, "use_double_wide_mlp": False, "rope_parameters": _ROPE,
        "max_position_embeddings": 512,
    }  # fmt: skip
    config = {
        "model_type": "gemma4_assistant", "architectures": ["Gemma4AssistantForCausalLM"], "text_config": text,
        "backbone_hidden_size": backbone, "use_ordered_embeddings": clusters, "num_centroids": _CLUSTERS,
        "centroid_intermediate_top_k": _CHOSEN, "tie_word_embeddings": True,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "pre_projection.weight": (_HIDDEN, 2 * backbone),
        "post_projection.weight": (backbone, _HIDDEN),
        "model.embed_tokens.weight": (vocab, _HIDDEN),
        "model.norm.weight": (_HIDDEN,),
    }
    for layer, kind in enumerate(LAYER_TYPES):
        size, prefix = _SIZES[kind], f"model.layers.{layer}."
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{prefix}{norm}_layernorm.weight"] = (_HIDDEN,)
        shapes |= {
            f"{prefix}layer_scalar": (1,),
            f"{prefix}self_attn.q_proj.weight": (_HEADS * size, _HIDDEN),
            f"{prefix}self_attn.q_norm.weight": (size,),
            f"{prefix}self_attn.o_proj.weight": (_HIDDEN, _HEADS * size),
            f"{prefix}mlp.gate_proj.weight": (_FEED, _HIDDEN),
            f"{prefix}mlp.up_proj.weight": (_FEED, _HIDDEN),
            f"{prefix}mlp.down_proj.weight": (_HIDDEN, _FEED),
        }
    if clusters:
        shapes["masked_embedding.centroids.weight"] = (_CLUSTERS, _HIDDEN)
    weights = random_weights(shapes, seed)
    if clusters:
        weights["masked_embedding.token_ordering"] = np.random.default_rng(seed).permutation(vocab)
    write_folder(folder, config, weights)
    return weights


def assistant_row(
    weights: Mapping[str, NDArray[Any]],
    entered: Array,
    cells: Mapping[str, tuple[Array, Array]],
    hidden: Array,
    path: Sequence[int],
) -> Array:
    """[V] what may follow a path that begins with the anchor.

    entered: [V, target's hidden] what enters the target's first layer for each token.  cells: by layer type, keys and
    values [n, heads, size] of all n committed tokens.  hidden: the target's last one behind its final norm.
    """
    plain = {name: value.astype(np.float64) for name, value in weights.items()}
    x = np.zeros(0)
    for token in path:
        x = plain["pre_projection.weight"] @ np.concatenate([entered[token], hidden])
        for layer, kind in enumerate(LAYER_TYPES):
            x = _layer(plain, f"model.layers.{layer}.", x, kind, cells[kind])
        x = rms_norm(x, plain["model.norm.weight"], _EPS)
        hidden = plain["post_projection.weight"] @ x
    row = plain["model.embed_tokens.weight"] @ x
    if "masked_embedding.token_ordering" not in weights:
        return np.asarray(row)
    best = np.argsort(plain["masked_embedding.centroids.weight"] @ x)[-_CHOSEN:]
    kept = weights["masked_embedding.token_ordering"].reshape(_CLUSTERS, -1)[best].reshape(-1)
    limited = np.full_like(row, -np.inf)
    limited[kept] = row[kept]
    return limited


def _layer(plain: Mapping[str, Array], prefix: str, x: Array, kind: str, cells: tuple[Array, Array]) -> Array:
    keys, values = cells
    position, size = len(keys), _SIZES[kind]
    if kind == "sliding_attention":
        keys, values = keys[1 - _WINDOW :], values[1 - _WINDOW :]
        frequencies = 1e4 ** (-np.arange(0, size, 2) / size)
    else:  # a quarter of the dimensions turns
        frequencies = 1e6 ** (-np.arange(0, size, 2) / size) * (np.arange(size // 2) < size // 8)
    query = plain[f"{prefix}self_attn.q_proj.weight"] @ _normed(plain, f"{prefix}input_layernorm", x)
    query = rms_norm(query.reshape(_HEADS, size), plain[f"{prefix}self_attn.q_norm.weight"], _EPS)
    query = rotated(query, position, frequencies)
    group = _HEADS // keys.shape[1]
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
    seen = np.einsum("hp,phd->hd", softmax(np.einsum("hd,phd->hp", query, keys)), values).reshape(-1)
    x = x + _normed(plain, f"{prefix}post_attention_layernorm", plain[f"{prefix}self_attn.o_proj.weight"] @ seen)
    normed = _normed(plain, f"{prefix}pre_feedforward_layernorm", x)
    gate = plain[f"{prefix}mlp.gate_proj.weight"] @ normed
    gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    out = plain[f"{prefix}mlp.down_proj.weight"] @ (gate * (plain[f"{prefix}mlp.up_proj.weight"] @ normed))
    return np.asarray((x + _normed(plain, f"{prefix}post_feedforward_layernorm", out)) * plain[f"{prefix}layer_scalar"])


def _normed(plain: Mapping[str, Array], name: str, x: Array) -> Array:
    return rms_norm(x, plain[f"{name}.weight"], _EPS)
