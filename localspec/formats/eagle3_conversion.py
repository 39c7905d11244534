"""What llama.cpp's `eagle3` architecture wants to have said about an EAGLE-3 head: three taps, one layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from localspec.errors import UnsupportedModelError

from .conversion import LAYER_MODULES, interleave_heads
from .eagle3 import Eagle3Config
from .head_plan import Plan, Value
from .summary import ModelSummary

_OUTER = {
    "embed_tokens.weight": "token_embd.weight",
    "lm_head.weight": "output.weight",
    "norm.weight": "output_norm.weight",
    "fc.weight": "fc.weight",
    "input_norm.weight": "enc.output_norm.weight",
}
_LAYER = {**LAYER_MODULES, "hidden_norm": "attn_norm_2"}


def plan(head: Eagle3Config, names: Sequence[str], target: ModelSummary) -> Plan:
    """Raises UnsupportedModelError for what llama.cpp's graph leaves out, HeadFileError for taps beyond the target."""
    for what, got, known in (
        ("number of taps", head.num_taps, 3),
        ("number of layers", head.num_layers, 1),
        ("scaling of positions", (head.rope_scaling or {}).get("rope_type", "default"), "default"),
        ("norm around each tap", head.norm_each, False),
        ("norm of queries and keys", head.head_norms, False),
        ("bias in attention", head.biases or head.output_bias, False),
        ("way back of its state", "normed" if head.feedback_normed else "as it is", "as it is"),
    ):
        if got != known:
            raise UnsupportedModelError(
                f"llama.cpp runs no EAGLE-3 head with another {what}", got=got, expected=known, fix="MLX may."
            )
    metadata: dict[str, Value] = {
        "context_length": head.max_positions,
        "embedding_length": head.hidden,
        "block_count": 1,
        "feed_forward_length": head.feed_forward,
        "attention.head_count": head.num_heads,
        "attention.head_count_kv": head.num_kv_heads,
        "attention.key_length": head.head_dim,
        "attention.value_length": head.head_dim,
        "attention.layer_norm_rms_epsilon": head.eps,
        "rope.dimension_count": head.head_dim,
        "rope.freq_base": head.rope_base,
        "target_layers": [tap + 1 for tap in head.taps(target.num_layers)],  # llama.cpp counts inputs of layers
        "target_hidden_size": head.target_hidden,
        "norm_before_residual": head.norm_before_residual,
        "norm_before_fc": head.norm_together,
    }
    tensors = {name: _name(name.removeprefix("model."), head.block) for name in names}
    return Plan("eagle3", metadata, tensors, heads=(head.num_heads, head.num_kv_heads))


def _name(name: str, block: str) -> str:
    """llama.cpp's name of a tensor. Raises UnsupportedModelError."""
    module = name.removeprefix(f"{block}.").removesuffix(".weight")
    if name.startswith(f"{block}.") and name.endswith(".weight") and module in _LAYER:
        return f"blk.0.{_LAYER[module]}.weight"
    if name not in _OUTER:
        raise UnsupportedModelError("llama.cpp's eagle3 architecture has no place for the head's tensor", got=name)
    return _OUTER[name]


def arranged(name: str, weight: NDArray[np.float32], heads: tuple[int, int]) -> NDArray[np.float32]:
    """A tensor as llama.cpp wants it: it rotates neighbours where the head's own framework rotates halves."""
    config = {"model_type": "llama", "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    return interleave_heads(name, weight, config)
