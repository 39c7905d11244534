"""Tiny random-weight GGUF files of many architectures, one for each way in which a model can remember.

    write_architecture(folder / "mamba.gguf", "mamba")

An architecture is metadata and tensor shapes, as llama.cpp asks for them when it loads the file (shapes in its
order: inputs first). Hidden size 64, 2 to 4 layers, float32, the tokenizer of `testing/files.py`. A sliding
window is 16 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localspec.errors import SettingError
from localspec.formats.conversion import FILE_TYPES, add_tokenizer
from localspec.testing.files import tiny_checkpoint

__all__ = ["ARCHITECTURES", "Architecture", "write_architecture"]

HIDDEN, HEADS, KV_HEADS, HEAD, FEED_FORWARD, WINDOW = 64, 4, 2, 16, 128, 16
_QUERIES, _KEYS = HEADS * HEAD, KV_HEADS * HEAD
_EXPERTS, _EXPERTS_USED, _EXPERT_SIZE = 4, 2, 32

Value = int | float | bool | list[int] | list[bool]
Tensors = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Architecture:
    """kind: what is special about its memory.  metadata: beyond the common keys, or instead of them.
    layer: tensors of a layer, by number.  outer: tensors beside the layers.  mtp: tensors of one more layer that
    guesses ahead, where one is known."""

    name: str
    kind: str
    num_layers: int
    metadata: dict[str, Value]
    layer: Callable[[int], Tensors]
    outer: Tensors
    mtp: Tensors = field(default_factory=dict)

    def tensors(self, num_rows: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of everything, for a vocabulary of num_rows."""
        yield "token_embd.weight", (HIDDEN, num_rows)
        for name, shape in self.outer.items():
            yield name, tuple(num_rows if size < 0 else size for size in shape)
        for number in range(self.num_layers):
            for name, shape in self.layer(number).items():
                yield f"blk.{number}.{name}", shape


# ---------------------------------------------------------------- parts of layers

_ATTENTION: Tensors = {
    "attn_norm.weight": (HIDDEN,),
    "attn_q.weight": (HIDDEN, _QUERIES),
    "attn_k.weight": (HIDDEN, _KEYS),
    "attn_v.weight": (HIDDEN, _KEYS),
    "attn_output.weight": (_QUERIES, HIDDEN),
}
_HEAD_NORMS: Tensors = {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
_DENSE: Tensors = {
    "ffn_norm.weight": (HIDDEN,),
    "ffn_gate.weight": (HIDDEN, FEED_FORWARD),
    "ffn_up.weight": (HIDDEN, FEED_FORWARD),
    "ffn_down.weight": (FEED_FORWARD, HIDDEN),
}
_EXPERT_MATRICES: Tensors = {
    "ffn_gate_inp.weight": (HIDDEN, _EXPERTS),
    "ffn_gate_exps.weight": (HIDDEN, _EXPERT_SIZE, _EXPERTS),
    "ffn_up_exps.weight": (HIDDEN, _EXPERT_SIZE, _EXPERTS),
    "ffn_down_exps.weight": (_EXPERT_SIZE, HIDDEN, _EXPERTS),
}
_MIXTURE: Tensors = {"ffn_norm.weight": (HIDDEN,), **_EXPERT_MATRICES}
_SHARED_EXPERT: Tensors = {
    "ffn_gate_shexp.weight": (HIDDEN, _EXPERT_SIZE),
    "ffn_up_shexp.weight": (HIDDEN, _EXPERT_SIZE),
    "ffn_down_shexp.weight": (_EXPERT_SIZE, HIDDEN),
}
_GEMMA: Tensors = {
    **_ATTENTION,
    **_DENSE,
    "post_attention_norm.weight": (HIDDEN,),
    "post_ffw_norm.weight": (HIDDEN,),
}
_NORM: Tensors = {"output_norm.weight": (HIDDEN,)}
_NORM_AND_HEAD: Tensors = {**_NORM, "output.weight": (HIDDEN, -1)}

_MIXTURE_KEYS: dict[str, Value] = {
    "expert_count": _EXPERTS,
    "expert_used_count": _EXPERTS_USED,
    "expert_feed_forward_length": _EXPERT_SIZE,
}

_CONV, _INNER, _STATE, _RANK = 4, 2 * HIDDEN, 16, 8
_SSM_KEYS: dict[str, Value] = {
    "ssm.conv_kernel": _CONV,
    "ssm.inner_size": _INNER,
    "ssm.state_size": _STATE,
    "ssm.time_step_rank": _RANK,
}
_MAMBA: Tensors = {
    "attn_norm.weight": (HIDDEN,),
    "ssm_in.weight": (HIDDEN, 2 * _INNER),
    "ssm_conv1d.weight": (_CONV, _INNER),
    "ssm_conv1d.bias": (_INNER,),
    "ssm_x.weight": (_INNER, _RANK + 2 * _STATE),
    "ssm_dt.weight": (_RANK, _INNER),
    "ssm_dt.bias": (_INNER,),
    "ssm_a": (_STATE, _INNER),
    "ssm_d": (_INNER,),
    "ssm_out.weight": (_INNER, HIDDEN),
}
_MAMBA2: Tensors = {
    "attn_norm.weight": (HIDDEN,),
    "ssm_in.weight": (HIDDEN, 2 * _INNER + 2 * _STATE + _RANK),
    "ssm_conv1d.weight": (_CONV, _INNER + 2 * _STATE),
    "ssm_conv1d.bias": (_INNER + 2 * _STATE,),
    "ssm_dt.bias": (_RANK,),
    "ssm_a": (1, _RANK),
    "ssm_d": (1, _RANK),
    "ssm_norm.weight": (_INNER, 1),
    "ssm_out.weight": (_INNER, HIDDEN),
}
_MAMBA2_KEYS: dict[str, Value] = {**_SSM_KEYS, "ssm.group_count": 1}

# Gated delta net: two key heads and four value heads of 16.
_DELTA_KEYS: dict[str, Value] = {
    "ssm.conv_kernel": _CONV,
    "ssm.inner_size": 64,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 2,
    "full_attention_interval": 2,
}
_DELTA: Tensors = {
    "attn_qkv.weight": (HIDDEN, 128),
    "attn_gate.weight": (HIDDEN, 64),
    "ssm_conv1d.weight": (_CONV, 128),
    "ssm_dt.bias": (4,),
    "ssm_a": (4,),
    "ssm_norm.weight": (16,),
    "ssm_out.weight": (64, HIDDEN),
}
_GATED_ATTENTION: Tensors = {**_ATTENTION, "attn_q.weight": (HIDDEN, 2 * _QUERIES), **_HEAD_NORMS}
_AROUND_DELTA: Tensors = {"attn_norm.weight": (HIDDEN,), "post_attention_norm.weight": (HIDDEN,)}

_DENSE_AFTER_NORM: Tensors = {name: shape for name, shape in _DENSE.items() if "norm" not in name}
_NEXTN: Tensors = {
    "nextn.eh_proj.weight": (2 * HIDDEN, HIDDEN),
    "nextn.enorm.weight": (HIDDEN,),
    "nextn.hnorm.weight": (HIDDEN,),
    "nextn.shared_head_norm.weight": (HIDDEN,),
}

_LATENT, _ROTATED, _LATENT_QUERIES = 32, 8, 48
_LATENT_ATTENTION: Tensors = {
    "attn_norm.weight": (HIDDEN,),
    "attn_q_a.weight": (HIDDEN, _LATENT_QUERIES),
    "attn_q_a_norm.weight": (_LATENT_QUERIES,),
    "attn_q_b.weight": (_LATENT_QUERIES, HEADS * (HEAD + _ROTATED)),
    "attn_kv_a_mqa.weight": (HIDDEN, _LATENT + _ROTATED),
    "attn_kv_a_norm.weight": (_LATENT,),
    "attn_k_b.weight": (HEAD, _LATENT, HEADS),
    "attn_v_b.weight": (_LATENT, HEAD, HEADS),
    "attn_output.weight": (_QUERIES, HIDDEN),
}
_SINKS: Tensors = {
    **_ATTENTION,
    **_EXPERT_MATRICES,
    "attn_sinks.weight": (HEADS,),
    "post_attention_norm.weight": (HIDDEN,),
    "attn_output.bias": (HIDDEN,),
    "ffn_gate_inp.bias": (_EXPERTS,),
    "ffn_gate_exps.bias": (_EXPERT_SIZE, _EXPERTS),
    "ffn_up_exps.bias": (_EXPERT_SIZE, _EXPERTS),
    "ffn_down_exps.bias": (HIDDEN, _EXPERTS),
}

_LORA = 8
_RWKV7: Tensors = {
    **{
        f"{norm}.{part}": (HIDDEN,)
        for norm in ("attn_norm", "attn_norm_2", "time_mix_ln")
        for part in ("weight", "bias")
    },
    **{f"time_mix_{name}.weight": (HIDDEN,) for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k")},
    **{f"time_mix_{name}1.weight": (HIDDEN, _LORA) for name in "wavg"},
    **{f"time_mix_{name}2.weight": (_LORA, HIDDEN) for name in "wavg"},
    **{f"time_mix_{name}.weight": (HIDDEN, HIDDEN) for name in ("key", "value", "receptance", "output")},
    "time_mix_lerp_fused.weight": (HIDDEN, 1, 1, 6),
    "channel_mix_lerp_k.weight": (HIDDEN, 1, 1),
    "channel_mix_key.weight": (HIDDEN, FEED_FORWARD),
    "channel_mix_value.weight": (FEED_FORWARD, HIDDEN),
}
_SHORT_CONV: Tensors = {
    "attn_norm.weight": (HIDDEN,),
    "shortconv.conv.weight": (3, HIDDEN),
    "shortconv.in_proj.weight": (HIDDEN, 3 * HIDDEN),
    "shortconv.out_proj.weight": (HIDDEN, HIDDEN),
}


def _every(*parts: Tensors) -> Callable[[int], Tensors]:
    """All layers alike."""
    merged = {name: shape for part in parts for name, shape in part.items()}
    return lambda _: merged


def _second(attention: Tensors, others: Tensors, *parts: Tensors) -> Callable[[int], Tensors]:
    """Every second layer attends, the others do not; `parts` are in all of them."""
    merged = {name: shape for part in parts for name, shape in part.items()}
    return lambda number: {**(attention if number % 2 else others), **merged}


_NO_ATTENTION: dict[str, Value] = {"attention.head_count": 0, "attention.head_count_kv": 0}
_EVERY_SECOND: dict[str, Value] = {"attention.head_count_kv": [0, KV_HEADS, 0, KV_HEADS]}
_NARROW: dict[str, Value] = {"attention.sliding_window": WINDOW}

_LIST = (
    Architecture("llama", "attention", 2, {}, _every(_ATTENTION, _DENSE), _NORM_AND_HEAD),
    Architecture("qwen3", "attention", 2, {}, _every(_ATTENTION, _HEAD_NORMS, _DENSE), _NORM),
    Architecture(
        "gemma2",
        "sliding window",
        2,
        {**_NARROW, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        _every(_GEMMA),
        _NORM,
    ),
    Architecture(
        "gemma3",
        "sliding window",
        3,
        {**_NARROW, "attention.sliding_window_pattern": [True, True, False]},
        _every(_GEMMA, _HEAD_NORMS),
        _NORM,
    ),
    Architecture(
        "mixtral",
        "experts",
        2,
        _MIXTURE_KEYS | {"feed_forward_length": _EXPERT_SIZE},
        _every(_ATTENTION, _MIXTURE),
        _NORM_AND_HEAD,
    ),
    Architecture("qwen3moe", "experts", 2, _MIXTURE_KEYS, _every(_ATTENTION, _HEAD_NORMS, _MIXTURE), _NORM),
    Architecture(
        "gpt-oss",
        "attention sinks, sliding window, experts",
        2,
        {**_NARROW, **_MIXTURE_KEYS},
        _every(_SINKS),
        _NORM_AND_HEAD,
    ),
    Architecture(
        "deepseek2",
        "latent attention, experts",
        2,
        {
            **_MIXTURE_KEYS,
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_weights_scale": 1.0,
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": _LATENT_QUERIES,
            "attention.kv_lora_rank": _LATENT,
            "attention.key_length": _LATENT + _ROTATED,
            "attention.value_length": _LATENT,
            "attention.key_length_mla": HEAD + _ROTATED,
            "attention.value_length_mla": HEAD,
            "rope.dimension_count": _ROTATED,
        },
        lambda number: {**_LATENT_ATTENTION, **({**_MIXTURE, **_SHARED_EXPERT} if number else _DENSE)},
        _NORM_AND_HEAD,
    ),
    Architecture("mamba", "recurrent", 2, {**_SSM_KEYS, **_NO_ATTENTION}, _every(_MAMBA), _NORM),
    Architecture("mamba2", "recurrent", 2, {**_MAMBA2_KEYS, **_NO_ATTENTION}, _every(_MAMBA2), _NORM),
    Architecture(
        "rwkv7",
        "recurrent",
        2,
        {
            **_NO_ATTENTION,
            "wkv.head_size": HIDDEN,  # the kernel on CPU works on 64 numbers at a time
            "attention.layer_norm_epsilon": 1e-5,
            "attention.decay_lora_rank": _LORA,
            "attention.iclr_lora_rank": _LORA,
            "attention.value_residual_mix_lora_rank": _LORA,
            "attention.gate_lora_rank": _LORA,
            "token_shift_count": 2,
        },
        _every(_RWKV7),
        {
            **_NORM_AND_HEAD,
            "output_norm.bias": (HIDDEN,),
            "token_embd_norm.weight": (HIDDEN,),
            "token_embd_norm.bias": (HIDDEN,),
        },
    ),
    Architecture(
        "jamba",
        "hybrid",
        4,
        {**_SSM_KEYS, **_EVERY_SECOND},
        _second(
            _ATTENTION,
            {**_MAMBA, "ssm_dt_norm.weight": (_RANK,), "ssm_b_norm.weight": (_STATE,), "ssm_c_norm.weight": (_STATE,)},
            _DENSE,
        ),
        _NORM,
    ),
    Architecture(
        "granitehybrid", "hybrid", 4, {**_MAMBA2_KEYS, **_EVERY_SECOND}, _second(_ATTENTION, _MAMBA2, _DENSE), _NORM
    ),
    Architecture(
        "falcon-h1",
        "hybrid",
        2,
        _MAMBA2_KEYS,
        _every(
            _ATTENTION,
            _MAMBA2,
            {("ffn_norm" if name == "ffn_norm.weight" else name): shape for name, shape in _DENSE.items()},
        ),
        _NORM,
    ),
    Architecture(
        "lfm2",
        "hybrid",
        4,
        {"shortconv.l_cache": 3, **_EVERY_SECOND},
        _second({**_ATTENTION, **_HEAD_NORMS}, _SHORT_CONV, _DENSE),
        {"token_embd_norm.weight": (HIDDEN,)},
    ),
    Architecture(
        "qwen3next",
        "hybrid, experts",
        4,
        {**_DELTA_KEYS, **_MIXTURE_KEYS, "expert_shared_feed_forward_length": _EXPERT_SIZE},
        _second(
            _GATED_ATTENTION,
            {**_DELTA, "ssm_ba.weight": (HIDDEN, 8)},
            _AROUND_DELTA,
            _EXPERT_MATRICES,
            _SHARED_EXPERT,
            {"ffn_gate_inp_shexp.weight": (HIDDEN,)},
        ),
        _NORM,
        {
            **_GATED_ATTENTION,
            **_AROUND_DELTA,
            **_EXPERT_MATRICES,
            **_SHARED_EXPERT,
            "ffn_gate_inp_shexp.weight": (HIDDEN,),
            **_NEXTN,
        },
    ),
    Architecture(
        "qwen35moe",
        "hybrid, experts",
        4,
        {
            **_DELTA_KEYS,
            **_MIXTURE_KEYS,
            "expert_shared_feed_forward_length": _EXPERT_SIZE,
            "rope.dimension_sections": [4, 2, 2, 0],
        },
        _second(
            _GATED_ATTENTION,
            {**_DELTA, "ssm_beta.weight": (HIDDEN, 4), "ssm_alpha.weight": (HIDDEN, 4)},
            _AROUND_DELTA,
            _EXPERT_MATRICES,
            _SHARED_EXPERT,
            {"ffn_gate_inp_shexp.weight": (HIDDEN,)},
        ),
        _NORM,
        {
            **_GATED_ATTENTION,
            **_AROUND_DELTA,
            **_EXPERT_MATRICES,
            **_SHARED_EXPERT,
            "ffn_gate_inp_shexp.weight": (HIDDEN,),
            **_NEXTN,
        },
    ),
    Architecture(
        "qwen35",
        "hybrid",
        4,
        {**_DELTA_KEYS, "rope.dimension_sections": [4, 2, 2, 0]},
        _second(
            _GATED_ATTENTION,
            {**_DELTA, "ssm_beta.weight": (HIDDEN, 4), "ssm_alpha.weight": (HIDDEN, 4)},
            _AROUND_DELTA,
            _DENSE_AFTER_NORM,
        ),
        _NORM,
        {**_GATED_ATTENTION, **_AROUND_DELTA, **_DENSE_AFTER_NORM, **_NEXTN},
    ),
)

ARCHITECTURES = {architecture.name: architecture for architecture in _LIST}
"""By name. `mixtral` is llama with experts, as llama.cpp has it."""


# ---------------------------------------------------------------- the file


def write_architecture(
    path: Path, name: str, *, quantization: str = "F32", seed: int = 0, jitter: float = 0.0, mtp: bool = False
) -> Path:
    """Write a tiny model and return `path`.

    quantization: of the large matrices, as converters choose them.  seed: the weights.  jitter: standard deviation
    of noise added to them, relative to their own: a drafter that often agrees.  mtp: with a layer that guesses ahead.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    if name not in ARCHITECTURES:
        raise SettingError("unknown architecture", got=name, expected=", ".join(ARCHITECTURES))
    architecture, tokenizer = ARCHITECTURES[name], tiny_checkpoint()
    if mtp:
        architecture = _with_mtp(architecture)
    num_rows = int(tokenizer.config["vocab_size"])
    in_file = "llama" if name == "mixtral" else name
    writer = GGUFWriter(path, in_file)
    writer.add_name(path.stem)
    writer.add_file_type(FILE_TYPES[quantization])
    for key, value in {**_common_metadata(num_rows, architecture.num_layers), **architecture.metadata}.items():
        _add(writer, f"{in_file}.{key}", value)
    add_tokenizer(writer, tokenizer)
    values, noise = np.random.default_rng((seed, 0)), np.random.default_rng((seed, 1))
    for tensor, shape in architecture.tensors(num_rows):
        weight = _initial(tensor, shape, values, noise, np.float32(jitter))
        kind = GGMLQuantizationType[quantization if _is_large(tensor, shape) else "F32"]
        writer.add_tensor(tensor, quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _with_mtp(architecture: Architecture) -> Architecture:
    if not architecture.mtp:
        raise SettingError("no layer that guesses ahead is known of this architecture", got=architecture.name)
    last = architecture.num_layers
    return replace(
        architecture,
        num_layers=last + 1,
        metadata={**architecture.metadata, "nextn_predict_layers": 1},
        layer=lambda number: architecture.mtp if number == last else architecture.layer(number),
    )


def _is_large(name: str, shape: tuple[int, ...]) -> bool:
    """Would a converter quantise it? Not what is small or takes part in no matrix product."""
    is_small = any(part in name for part in ("norm", "conv", "lerp", "ssm_a", "ssm_d.", "ssm_dt.", "gate_inp", "bias"))
    return len(shape) > 1 and shape[0] % 32 == 0 and not is_small


def _common_metadata(num_rows: int, num_layers: int) -> dict[str, Value]:
    return {
        "vocab_size": num_rows,
        "context_length": 512,
        "embedding_length": HIDDEN,
        "block_count": num_layers,
        "feed_forward_length": FEED_FORWARD,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": HEAD,
        "rope.freq_base": 10000.0,
    }


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


def _initial(
    name: str, shape: tuple[int, ...], values: np.random.Generator, noise: np.random.Generator, jitter: np.float32
) -> NDArray[np.float32]:
    """Random weights [shape reversed, as numpy has them] that let every token be felt for a while."""
    weight = values.standard_normal(shape[::-1], np.float32)
    weight += jitter * noise.standard_normal(shape[::-1], np.float32)
    kind = name.split(".", 2)[-1] if name.startswith("blk.") else name
    if "norm" in kind or kind in ("ssm_d", "time_mix_ln.weight"):
        weight /= np.float32(10)
        weight += np.float32(0 if kind.endswith("bias") else 1)
        return weight
    if kind == "ssm_a":  # how fast the state fades, always negative
        fading: NDArray[np.float32] = np.exp(weight / np.float32(2))
        return fading * np.float32(-0.25)
    if "lerp" in kind:
        return np.float32(0.5) + weight / np.float32(8)
    if kind in ("token_embd.weight", "output.weight"):
        return weight * np.float32(2 / HIDDEN**0.5)
    if len(shape) == 1 or kind.endswith("bias"):
        return weight / np.float32(2)
    return weight * np.float32(shape[0] ** -0.5)
