"""What llama.cpp's `dflash` architecture wants to have said about a head that guesses a block."""

from __future__ import annotations

from collections.abc import Sequence

from localspec.errors import UnsupportedModelError

from .block_tensors import BlockDetails
from .conversion import LAYER_MODULES
from .head_header import Backbone, HeadHeader
from .head_plan import Plan, Value
from .summary import ModelSummary

_OUTER = {
    "embed_tokens.weight": "token_embd.weight",
    "lm_head.weight": "output.weight",
    "norm.weight": "output_norm.weight",
    "hidden_norm.weight": "enc.output_norm.weight",
    "fc.weight": "fc.weight",
    "markov_head.markov_w1.weight": "markov_w1.weight",
    "markov_head.markov_w2.weight": "markov_w2.weight",
    "confidence_head.proj.weight": "conf_proj.weight",
    "confidence_head.proj.bias": "conf_proj.bias",
    "candidate_selector.predecessor_codebook": "selector_predecessor.weight",
    "candidate_selector.successor_codebook": "selector_successor.weight",
    "candidate_selector.hidden_projection.weight": "selector_hidden.weight",
}
_LAYER = {
    **{f"{ours}.weight": f"{theirs}.weight" for ours, theirs in LAYER_MODULES.items()},
    "attention_conv.base_kernel": "attn_conv_base",
    "attention_conv.kernel_projection.weight": "attn_conv_proj.weight",
    "mlp_conv.base_kernel": "ffn_conv_base",
    "mlp_conv.kernel_projection.weight": "ffn_conv_proj.weight",
}


def plan(header: HeadHeader, details: BlockDetails, names: Sequence[str], target: ModelSummary) -> Plan:
    """Raises UnsupportedModelError for what llama.cpp's graph leaves out."""
    backbone = header.backbone
    assert backbone is not None
    _refuse(header, details, backbone)
    metadata: dict[str, Value] = {
        **shape(backbone, target),
        "target_layers": [tap + 1 for tap in header.taps],  # llama.cpp counts inputs of layers
        "block_size": details.block_size,
        "sample_from_anchor": not details.in_place,
        "has_confidence_head": details.confidence,
        "attention.causal": details.causal[0],
    }
    windows = {window for window in details.windows if window is not None}
    if windows:
        metadata["attention.sliding_window"] = windows.pop()
        metadata["attention.sliding_window_pattern"] = [window is not None for window in details.windows]
    if details.convolution is not None:
        metadata["conv_kernel_size"], metadata["conv_group_size"] = details.convolution
    if details.selector is not None:
        metadata["selector_rank"], metadata["selector_top_k"] = details.selector
    tensors = {name: _name(name.removeprefix(header.prefix).removeprefix(details.logits_prefix)) for name in names}
    return Plan("dflash", metadata, tensors, details.mask_token)


def shape(backbone: Backbone, target: ModelSummary) -> dict[str, Value]:
    """Keys of any transformer."""
    return {
        "context_length": backbone.max_positions or target.trained_context or 4096,
        "embedding_length": backbone.hidden_size,
        "block_count": backbone.num_layers,
        "feed_forward_length": backbone.feed_forward,
        "attention.head_count": backbone.num_heads,
        "attention.head_count_kv": backbone.num_kv_heads,
        "attention.key_length": backbone.head_size,
        "attention.value_length": backbone.head_size,
        "attention.layer_norm_rms_epsilon": backbone.norm_eps,
        "rope.dimension_count": backbone.head_size,
        "rope.freq_base": backbone.rope_theta,
    }


def _refuse(header: HeadHeader, details: BlockDetails, backbone: Backbone) -> None:
    windows = {window for window in details.windows if window is not None}
    scaling = backbone.rope_scaling or {}
    for what, got, known in (
        ("Markov head", details.markov or "vanilla", "vanilla"),
        ("confidence head", details.confidence and not details.confidence_sees_markov, False),
        ("backbone", backbone.family, "qwen3"),
        ("scaling of positions", scaling.get("rope_type", scaling.get("type", "default")), "default"),
        ("rotation", "neighbours" if backbone.rope_interleaved else "halves", "halves"),
        ("bias in attention", backbone.attention_bias, False),
        ("order in its layers", f"{len(set(details.causal))} kinds", "1 kinds"),
        ("window", f"{len(windows)} sizes" if len(windows) > 1 else "one size", "one size"),
        ("hidden size than its target's", backbone.hidden_size, header.target_hidden),
    ):
        if got != known:
            raise UnsupportedModelError(f"llama.cpp runs no head with another {what}", got=got, expected=known)


def _name(name: str) -> str:
    """llama.cpp's name of a tensor. Raises UnsupportedModelError."""
    layer, _, rest = name.removeprefix("layers.").partition(".")
    if name.startswith("layers.") and rest in _LAYER:
        return f"blk.{layer}.{_LAYER[rest]}"
    if name not in _OUTER:
        raise UnsupportedModelError("llama.cpp's dflash architecture has no place for the head's tensor", got=name)
    return _OUTER[name]
