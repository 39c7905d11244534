"""How large the states of recurrent layers are. For GGUF files as llama.cpp computes it (llama-hparams.cpp,
n_embd_r and n_embd_s), for folders from the configurations of the families that mlx-lm has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .numbers import Numbers

_GGUF_LAYER = re.compile(r"blk\.(\d{1,4})\.(?:ssm_|time_mix_|shortconv)")
_FOLDER_LAYER = re.compile(
    r".*(?:layers|blocks|h)\.(\d{1,4})\.(?:.*\.)?"
    r"(?:linear_attn|mamba|ssm|rg_lru|conv1d|[qkv]_conv1d|conv_1d|A_log|[qkv]*_?conv\.conv|key_conv|conv_k|g_norm|r_k)"
    r"(?:\.|$)"
)
_KERNELS = ("linear_conv_kernel_dim", "mamba_d_conv", "conv_kernel", "d_conv", "conv1d_width")
_SIZES = ("mamba_d_state", "ssm_state_size", "state_size", "d_state")
_GROUPS = ("mamba_n_groups", "n_groups", "mamba_ngroups")
_HEAD_SIZES = ("mamba_d_head", "mamba_head_dim", "hidden_size_per_head", "head_dim")


def of_gguf(fields: Numbers, hidden: int, num_heads: int, names: Iterable[str]) -> int | None:
    """Numbers of one state over all layers; 0 without recurrent layers, None where the metadata does not say."""
    layers = {match[1] for name in names if (match := _GGUF_LAYER.match(name)) is not None}
    if not layers:
        return 0
    kernel = fields.size("ssm.conv_kernel", 0)
    each = None
    if head := fields.size("wkv.head_size", 0):
        each = hidden * (fields.size("token_shift_count", 2) + head)
    elif short := fields.size("shortconv.l_cache", 0):
        each = hidden * (short - 1)
    elif head := fields.size("kda.head_dim", 0):
        each = 3 * (kernel - 1 if kernel else 3) * num_heads * head + head * head * num_heads
    elif inner := fields.size("ssm.inner_size", 0):
        size = fields.size("ssm.state_size", 0)
        each = max(0, kernel - 1) * (inner + 2 * fields.size("ssm.group_count", 0) * size) + size * inner
    return None if each is None else each * len(layers)


def of_folder(shape: Mapping[str, Any], where: str, names: Iterable[str]) -> int | None:
    """The same of a folder. shape: its configuration.  where: what errors call that. Raises ModelFileError."""
    layers = {match[1] for name in names if (match := _FOLDER_LAYER.match(name)) is not None}
    if not layers:
        return 0
    each = _of_layer(_Fields(shape, where))
    return each * len(layers) if each else None


class _Fields:
    """A configuration in which one thing has many names."""

    def __init__(self, shape: Mapping[str, Any], where: str) -> None:
        self._numbers = Numbers({key: value for key, value in shape.items() if value is not None}, "", where)
        inner = shape.get("linear_attn_config")
        self.inner = _Fields(inner, where) if isinstance(inner, Mapping) else None

    def first(self, *names: str) -> int:
        """The first of these that is there and above zero; 0 without."""
        return next((size for name in names if (size := self._numbers.size(name, 0))), 0)


def _of_layer(fields: _Fields) -> int | None:
    """Numbers of one layer's state: what a convolution remembers, and the matrix or row behind it."""
    hidden, kernel = fields.first("hidden_size", "d_model", "n_embd"), fields.first(*_KERNELS)
    if fields.inner is not None:  # Kimi delta attention
        heads, head = fields.inner.first("num_heads"), fields.inner.first("head_dim")
        return 3 * max(0, fields.inner.first("short_conv_kernel_size") - 1) * heads * head + heads * head * head
    if heads := fields.first("linear_num_value_heads"):  # gated delta net
        key, width = fields.first("linear_key_head_dim"), heads * fields.first("linear_value_head_dim")
        return max(0, kernel - 1) * (2 * fields.first("linear_num_key_heads") * key + width) + width * key
    if short := fields.first("conv_L_cache"):
        return hidden * (short - 1)
    if fields.first("conv1d_width"):  # Griffin
        return (fields.first("lru_width") or hidden) * kernel
    if fields.first("decay_low_rank_dim"):  # RWKV 7
        return hidden * (2 + fields.first("head_dim"))
    size = fields.first(*_SIZES)
    if fields.first("group_norm_size"):  # linear attention
        return fields.first("num_attention_heads") * fields.first("head_dim") ** 2
    if not size:
        return None
    groups, heads = fields.first(*_GROUPS), fields.first("mamba_n_heads", "mamba_num_heads")
    if groups or heads:  # Mamba 2
        inner = (heads or fields.first("num_heads")) * fields.first(*_HEAD_SIZES)
    elif expand := fields.first("mamba_expand", "expand"):
        inner = expand * hidden
    else:
        inner = fields.first("intermediate_size", "d_inner")
    return max(0, kernel - 1) * (inner + 2 * groups * size) + inner * size
