"""Random heads as GGUF files, for tests of backends that run llama.cpp's draft architectures.

    write_block_head(folder / "head.gguf", target, kind="dspark")
    write_eagle3_head(folder / "head.gguf", target)

A head reads the hidden states of `target`, a GGUF file, and has its tokenizer. It guesses nonsense; what matters is
that every part of it is felt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localspec.errors import SettingError
from localspec.formats import summarize
from localspec.formats.conversion import FILE_TYPES
from localspec.formats.head_conversion import copy_tokenizer

__all__ = ["BLOCK_KINDS", "write_block_head", "write_eagle3_head"]

BLOCK_KINDS = ("dspark", "dspark-late", "dflash", "dflash-window", "jetspec", "dflash2")
"""dspark-late: the anchor's slot guesses nothing, as speculators trains some.  dflash-window: its first layer sees the
last 12 tokens only."""

_HEADS, _KV_HEADS, _HEAD, _FEED_FORWARD, _RANK, _BLOCK = 4, 2, 16, 96, 16, 5
_KERNEL, _GROUP, _TOP = 2, 16, 6  # of DFlash 2; TOP * (TOP + 1) must fit into the hidden size
_MASK, _WINDOW = 2, 12
Value = bool | int | float | list[int] | list[bool]
Shapes = dict[str, tuple[int, ...]]


def write_block_head(
    path: Path,
    target: Path,
    *,
    kind: str = "dspark",
    taps: Sequence[int] = (1, 2),
    own_tokens: Sequence[int] | None = None,
    own_embedding: bool = True,
    seed: int = 0,
    change: Mapping[str, Value] | None = None,
) -> Path:
    """Write a head of `BLOCK_KINDS` and return `path`.

    taps: layers of the target whose inputs are read.  own_tokens: the only ones that it can guess.  own_embedding: with
    an embedding and an output matrix; otherwise the target's are used.  change: metadata.
    """
    if kind not in BLOCK_KINDS:
        raise SettingError("unknown kind of head", got=kind, expected=", ".join(BLOCK_KINDS))
    about = summarize(target)
    hidden, num_tokens = about.hidden_size, about.vocab_size
    num_rows = num_tokens if own_tokens is None else len(own_tokens)
    shapes: Shapes = {
        "fc.weight": (hidden, len(taps) * about.hidden_size),
        "enc.output_norm.weight": (hidden,),
        "output_norm.weight": (hidden,),
    }
    if own_embedding:
        shapes |= {"token_embd.weight": (num_tokens, hidden), "output.weight": (num_rows, hidden)}
    for layer in range(2):
        block = _attention(hidden, hidden) | _feed_forward(hidden)
        block |= {"attn_q_norm.weight": (_HEAD,), "attn_k_norm.weight": (_HEAD,)}
        if kind == "dflash2":
            projected = 2 * _KERNEL * (hidden // _GROUP)
            for part in ("attn", "ffn"):
                block |= {f"{part}_conv_base": (2, _KERNEL, hidden), f"{part}_conv_proj.weight": (projected, hidden)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    metadata: dict[str, Value] = {
        "target_layers": list(taps),
        "block_size": _BLOCK,
        "attention.causal": kind == "jetspec",
    }
    if kind.startswith("dspark"):
        shapes |= {
            "markov_w1.weight": (num_tokens, _RANK),
            "markov_w2.weight": (num_rows, _RANK),
            "conf_proj.weight": (1, hidden + _RANK),
            "conf_proj.bias": (1,),
        }
        metadata |= {"sample_from_anchor": kind == "dspark", "has_confidence_head": True}
    if kind == "dflash-window":
        metadata |= {"attention.sliding_window": _WINDOW, "attention.sliding_window_pattern": [True, False]}
    if kind == "dflash2":
        shapes |= {f"selector_{name}.weight": (num_tokens, _RANK) for name in ("predecessor", "successor")}
        shapes["selector_hidden.weight"] = (_RANK, hidden)
        metadata |= {"conv_kernel_size": _KERNEL, "conv_group_size": _GROUP, "selector_rank": _RANK}
        metadata["selector_top_k"] = _TOP
    _write(path, "dflash", target, hidden, 2, {**metadata, **(change or {})}, shapes, own_tokens, seed)
    return path


def write_eagle3_head(
    path: Path,
    target: Path,
    *,
    taps: Sequence[int] = (1, 2, 3),
    own_tokens: Sequence[int] | None = None,
    norm_before_residual: bool = False,
    norm_before_fc: bool = False,
    seed: int = 0,
    change: Mapping[str, Value] | None = None,
) -> Path:
    """Write an EAGLE-3 head and return `path`. Arguments as of `write_block_head`."""
    about = summarize(target)
    hidden, num_tokens = about.hidden_size, about.vocab_size
    width = len(taps) * hidden
    shapes: Shapes = {
        "fc.weight": (hidden, width),
        "output_norm.weight": (hidden,),
        "output.weight": (num_tokens if own_tokens is None else len(own_tokens), hidden),
    }
    if norm_before_fc:
        shapes["enc.output_norm.weight"] = (width,)
    block = _attention(2 * hidden, hidden) | _feed_forward(hidden)
    block |= {"attn_norm.weight": (hidden,), "attn_norm_2.weight": (hidden,)}
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    metadata: dict[str, Value] = {
        "target_layers": list(taps),
        "target_hidden_size": hidden,
        "norm_before_residual": norm_before_residual,
        "norm_before_fc": norm_before_fc,
    }
    _write(path, "eagle3", target, hidden, 1, {**metadata, **(change or {})}, shapes, own_tokens, seed)
    return path


def _attention(width: int, hidden: int) -> Shapes:
    return {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (_HEADS * _HEAD, width),
        "attn_k.weight": (_KV_HEADS * _HEAD, width),
        "attn_v.weight": (_KV_HEADS * _HEAD, width),
        "attn_output.weight": (hidden, _HEADS * _HEAD),
    }


def _feed_forward(hidden: int) -> Shapes:
    return {
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (_FEED_FORWARD, hidden),
        "ffn_up.weight": (_FEED_FORWARD, hidden),
        "ffn_down.weight": (hidden, _FEED_FORWARD),
    }


def _write(
    path: Path,
    architecture: str,
    target: Path,
    hidden: int,
    num_layers: int,
    metadata: Mapping[str, Value],
    shapes: Shapes,
    own_tokens: Sequence[int] | None,
    seed: int,
) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, architecture)
    writer.add_name(path.stem)
    writer.add_file_type(FILE_TYPES["F32"])
    common: dict[str, Value] = {
        "context_length": 512,
        "embedding_length": hidden,
        "block_count": num_layers,
        "feed_forward_length": _FEED_FORWARD,
        "attention.head_count": _HEADS,
        "attention.head_count_kv": _KV_HEADS,
        "attention.key_length": _HEAD,
        "attention.value_length": _HEAD,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": _HEAD,
        "rope.freq_base": 10000.0,
    }
    for key, value in {**common, **metadata}.items():
        _add(writer, f"{architecture}.{key}", value)
    copy_tokenizer(writer, target)
    writer.add_uint32("tokenizer.ggml.mask_token_id", _MASK)
    values = np.random.default_rng(seed)
    for name, shape in shapes.items():
        writer.add_tensor(name, _initial(name, shape, values))
    if own_tokens is not None:
        writer.add_tensor("d2t", np.array(own_tokens, np.int64), raw_dtype=GGMLQuantizationType.I64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: object, key: str, value: Value) -> None:
    from gguf import GGUFWriter

    assert isinstance(writer, GGUFWriter)
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def _initial(name: str, shape: tuple[int, ...], values: np.random.Generator) -> NDArray[np.float32]:
    weight = values.standard_normal(shape, np.float32)
    if "norm" in name:
        return np.float32(1) + weight / np.float32(10)
    if name in ("token_embd.weight", "markov_w1.weight", "conf_proj.bias"):
        return weight
    if "conv_base" in name:
        return weight / np.float32(2)
    return weight * np.float32(shape[-1] ** -0.5)
