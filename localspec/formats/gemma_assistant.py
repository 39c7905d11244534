"""Gemma 4's assistants: a few layers without keys of their own, which read those of the target.

Source: google/gemma-4-*-it-assistant; transformers models/gemma4_assistant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from localspec.errors import HeadFileError

from .head_header import HeadFiles, HeadHeader
from .head_settings import HeadSettings
from .head_tensors import require_shapes

_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
_KINDS = ("full_attention", "sliding_attention")
_CENTROIDS, _ORDERING = "masked_embedding.centroids.weight", "masked_embedding.token_ordering"


@dataclass(frozen=True, slots=True)
class AssistantConfig:
    """target_hidden: of the target.  layer_types: full_attention or sliding_attention, of each layer.  window: tokens
    that the latter see.  num_clusters: into which the tokens are sorted (0: all are scored); of those the best
    `num_chosen` are scored.  settings: of Gemma 4's layers."""

    settings: Mapping[str, Any]
    hidden: int
    target_hidden: int
    vocab: int
    layer_types: tuple[str, ...]
    window: int
    num_clusters: int
    num_chosen: int
    tensors: tuple[str, ...]


def read_gemma_assistant(files: HeadFiles) -> HeadHeader | None:
    """Its header; None for another kind. `details` is the `AssistantConfig`. Raises HeadFileError."""
    if files.format != "safetensors" or files.config.get("model_type") not in _TYPES:
        return None
    config = _read(files)
    return HeadHeader(
        kind="mtp",
        layout="gemma4-assistant",
        files=files,
        taps=(-2,),
        target_hidden=config.target_hidden,
        num_parameters=sum(math.prod(files.shapes[name]) for name in config.tensors if name != _ORDERING),
        vocab_size=config.vocab,
        prefix="",
        details=config,
    )


def _read(files: HeadFiles) -> AssistantConfig:
    outer = HeadSettings(files.config)
    text = outer.inside("text_config")
    for key in ("hidden_size_per_layer_input", "enable_moe_block", "use_double_wide_mlp", "attention_bias"):
        name, value = text.find(key)
        if value:
            raise HeadFileError(f"config.json: {name} is not known of assistants", got=str(value)[:80])
    num_layers = text.size("num_hidden_layers", least=1, most=256)
    types = text.get("layer_types")
    if not isinstance(types, list) or len(types) != num_layers or any(kind not in _KINDS for kind in types):
        raise HeadFileError(
            "config.json: text_config.layer_types is wrong or missing",
            got=str(types)[:80],
            expected=f"{num_layers} of {', '.join(_KINDS)}",
        )
    if text.size("num_kv_shared_layers", num_layers) not in (0, num_layers):
        raise HeadFileError("config.json: text_config.num_kv_shared_layers is not all layers", expected=num_layers)
    hidden, vocab = text.size("hidden_size", least=1), text.size("vocab_size", least=1)
    target = outer.size("backbone_hidden_size", least=1)
    clusters = outer.size("num_centroids", 2048, least=1) if outer.flag("use_ordered_embeddings", False) else 0
    if clusters and vocab % clusters:
        raise HeadFileError("config.json: num_centroids does not divide the vocabulary", got=clusters, expected=vocab)
    chosen = outer.size("centroid_intermediate_top_k", 32, least=1, most=max(clusters, 1)) if clusters else 0
    must: dict[str, tuple[int, ...]] = {
        "pre_projection.weight": (hidden, 2 * target),
        "post_projection.weight": (target, hidden),
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if clusters:
        must |= {_CENTROIDS: (clusters, hidden), _ORDERING: (vocab,)}
    for layer, kind in enumerate(types):
        must |= _layer(f"model.layers.{layer}.", text, kind)
    require_shapes(files.shapes, must, {"lm_head.weight": (vocab, hidden)})
    return AssistantConfig(
        settings=files.config["text_config"],
        hidden=hidden,
        target_hidden=target,
        vocab=vocab,
        layer_types=tuple(types),
        window=text.size("sliding_window", 512, least=1),
        num_clusters=clusters,
        num_chosen=chosen,
        tensors=tuple(must),
    )


def _layer(prefix: str, text: HeadSettings, kind: str) -> dict[str, tuple[int, ...]]:
    hidden, wide = text.size("hidden_size", least=1), text.size("intermediate_size", least=1)
    size = text.size("head_dim", 256, least=1)
    if kind == "full_attention":
        size = text.size("global_head_dim", 512, least=1)
    queries = text.size("num_attention_heads", least=1) * size
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}{norm}.weight": (hidden,) for norm in norms}
    return shapes | {
        f"{prefix}layer_scalar": (1,),
        f"{prefix}self_attn.q_proj.weight": (queries, hidden),
        f"{prefix}self_attn.q_norm.weight": (size,),
        f"{prefix}self_attn.o_proj.weight": (hidden, queries),
        f"{prefix}mlp.gate_proj.weight": (wide, hidden),
        f"{prefix}mlp.up_proj.weight": (wide, hidden),
        f"{prefix}mlp.down_proj.weight": (hidden, wide),
    }
