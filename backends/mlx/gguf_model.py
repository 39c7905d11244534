"""Builds mlx-lm's model classes from a GGUF file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from localspec.errors import ModelFileError, UnsupportedModelError
from localspec.formats.gguf import GgufHeader, TensorInfo, Value, read_header

from .gguf_tokenizer import open_gguf_tokenizer
from .loader import Opened

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
# What mlx.core.load hands over packed, in groups of 32. K-quants are refused because it does not read
# them: of 0.32.4, Q3_K and Q5_K fail and Q4_K comes out wrong (compared with gguf's own dequantiser).
_QUANTIZED = ("Q4_0", "Q4_1", "Q8_0")
_PLAIN = ("F32", "F16", "BF16")
_GROUP = 32

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


class FactorRope(nn.Module):
    """Rotary positions whose wavelengths are stretched one by one, as llama-3.1's `rope_freqs` says."""

    def __init__(self, num_dims: int, base: float, factors: mx.array) -> None:
        super().__init__()
        self._num_dims = num_dims
        self._freqs = base ** (mx.arange(0, num_dims, 2, dtype=mx.float32) / num_dims) * factors

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """x turned."""
        return mx.fast.rope(
            x, self._num_dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._freqs
        )


def open_gguf(path: Path) -> Opened:
    """Raises ModelFileError, or UnsupportedModelError naming the architecture, type or setting."""
    header = read_header(path)
    config = _config(header)
    _check_types(header)
    tokenizer = open_gguf_tokenizer(header.metadata)
    weights = _renamed(_load(path, header), header, config)
    factors = weights.pop(_ROPE_FACTORS, None)
    module = _module(config, weights)
    if factors is not None:
        for layer in module.layers:
            layer.self_attn.rope = FactorRope(config["head_dim"], config["rope_theta"], factors)
    kinds = Counter(t.kind for t in header.tensors.values() if len(t.shape) > 1)
    name = header.metadata.get("general.name")
    return Opened(
        module=module,
        tokenizer=tokenizer,
        name=name if isinstance(name, str) and name else path.stem,
        architecture=config["model_type"],
        quantization=kinds.most_common(1)[0][0] if kinds else "none",
        trained_context=config["max_position_embeddings"],
        # As the matrices or their scales are; the file's float32 norms would otherwise widen everything.
        dtype=mx.bfloat16 if kinds["BF16"] else mx.float32 if set(kinds) == {"F32"} else mx.float16,
    )


# ---------------------------------------------------------------- configuration


class _Fields:
    """The metadata below one architecture's prefix, with types checked."""

    def __init__(self, metadata: Mapping[str, Value], prefix: str) -> None:
        self._metadata = metadata
        self._prefix = prefix

    def number(self, name: str, default: float | None = None) -> float:
        """A number; without a default it must be there."""
        key = f"{self._prefix}.{name}"
        value = self._metadata.get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # one per layer, all the same
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelFileError(f"the GGUF header lacks {key}", got=_brief(value), expected="a number")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer below 2^31."""
        value = self.number(name, default)
        if value != int(value) or not 0 < value < 2**31:
            raise ModelFileError(f"{self._prefix}.{name} out of range", got=value, expected="a positive integer")
        return int(value)

    def refuse(self, name: str, *harmless: object) -> None:
        """Raise UnsupportedModelError if the setting is there and is not one of `harmless`."""
        value = self._metadata.get(f"{self._prefix}.{name}")
        if value is not None and value not in harmless:
            raise UnsupportedModelError(f"the mlx backend does not know {self._prefix}.{name}", got=_brief(value))


def _brief(value: object) -> str:
    return str(value)[:60]


def _config(header: GgufHeader) -> dict[str, Any]:
    """What the folder's config.json would say."""
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelFileError("the GGUF header names no general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModelError(
            "the mlx backend opens no GGUF files of this architecture",
            got=architecture,
            expected=f"one of {', '.join(_ARCHITECTURES)}",
            fix="Use the llamacpp backend, or the model's safetensors folder.",
        )
    fields = _Fields(header.metadata, architecture)
    fields.refuse("expert_count", 0)
    fields.refuse("attention.sliding_window", 0)
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModelError(
            "the GGUF file is one part of several", fix="Join them with llama-gguf-split --merge."
        )
    if "token_embd.weight" not in header.tensors:
        raise ModelFileError("tensor token_embd.weight is missing")
    hidden, num_heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", max(1, hidden // num_heads))
    fields.refuse("attention.value_length", head_dim)
    fields.refuse("rope.dimension_count", head_dim)
    num_layers = fields.integer("block_count")
    if num_layers > len(header.tensors):
        raise ModelFileError("the header does not fit the tensors", got=f"{num_layers} layers")
    if architecture == "qwen2" and head_dim * num_heads != hidden:
        raise UnsupportedModelError("mlx-lm's qwen2 wants heads that fill the hidden size", got=head_dim)
    return {
        "model_type": architecture,
        "hidden_size": hidden,
        "num_hidden_layers": num_layers,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": fields.integer("context_length"),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "rope_traditional": False,
        "rope_scaling": _rope_scaling(fields, header),
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }


def _rope_scaling(fields: _Fields, header: GgufHeader) -> dict[str, Any] | None:
    fields.refuse("rope.scaling.type", "none", "linear")
    fields.refuse("rope.scaling.attn_factor", 1.0)
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    if factor in (0.0, 1.0):
        return None
    if _ROPE_FACTORS in header.tensors:
        raise UnsupportedModelError("rope_freqs together with rope scaling", got=factor)
    return {"type": "linear", "factor": factor}


# ---------------------------------------------------------------- tensors


def _check_types(header: GgufHeader) -> None:
    known = (*_PLAIN, *_QUANTIZED)
    strange = sorted({t.kind for t in header.tensors.values()} - set(known))
    if strange:
        example = next(t.name for t in header.tensors.values() if t.kind == strange[0])
        raise UnsupportedModelError(
            f"the mlx backend reads no {', '.join(strange)} tensors such as {example}",
            expected=", ".join(known),
            fix="Use the llamacpp backend, or a Q4_0 or Q8_0 file.",
        )


def _load(path: Path, header: GgufHeader) -> dict[str, mx.array]:
    """The file's arrays by name, as mlx.core.load names the parts of quantised tensors."""
    arrays: dict[str, mx.array] = dict(mx.load(str(path), format="gguf"))  # type: ignore[arg-type]
    for tensor in header.tensors.values():
        if tensor.kind == "BF16":  # handed over as float16, which has too small a range
            raw = np.fromfile(path, "<u2", math.prod(tensor.shape), offset=tensor.offset)
            arrays[tensor.name] = mx.array(raw.reshape(tensor.shape)).view(mx.bfloat16)
    return arrays


def _renamed(arrays: dict[str, mx.array], header: GgufHeader, config: dict[str, Any]) -> dict[str, mx.array]:
    """mlx-lm's parameters from the file's tensors: weight, scales, biases and bias of each module."""
    weights: dict[str, mx.array] = {}
    for tensor in header.tensors.values():
        if tensor.name == _ROPE_FACTORS:
            weights[_ROPE_FACTORS] = arrays[tensor.name]
            continue
        target = _target(tensor.name)
        stem = tensor.name.rpartition(".")[0]
        parts = {"weight": f"{stem}.weight", "scales": f"{stem}.scales", "biases": f"{stem}.biases"}
        if tensor.kind not in _QUANTIZED:
            parts = {tensor.name.rpartition(".")[2]: tensor.name}
        for part, source in parts.items():
            if source not in arrays:
                raise ModelFileError(f"tensor {tensor.name} could not be read")
            weights[f"{target}.{part}"] = _unpermuted(arrays[source], tensor, config)
    return weights


def _target(name: str) -> str:
    """mlx-lm's module for a GGUF tensor. Raises UnsupportedModelError for one that has no place."""
    stem, _, part = name.rpartition(".")
    pieces = stem.split(".")
    if part in ("weight", "bias"):
        if len(pieces) == 1 and stem in _OUTER:
            return _OUTER[stem]
        if len(pieces) == 3 and pieces[0] == "blk" and pieces[1].isdecimal() and pieces[2] in _INNER:
            return f"model.layers.{int(pieces[1])}.{_INNER[pieces[2]]}"
    raise UnsupportedModelError("the mlx backend has no place for this tensor", got=name)


def _unpermuted(array: mx.array, tensor: TensorInfo, config: dict[str, Any]) -> mx.array:
    """Rows of q and k as mlx-lm wants them. llama.cpp's converter interleaves the two halves of each
    head for the architecture `llama`; rows are whole in every type, so scales follow weights."""
    part = tensor.name.split(".")[-2]
    if config["model_type"] != "llama" or part not in ("attn_q", "attn_k"):
        return array
    num_heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
    num_rows = array.shape[0]
    if num_rows % (2 * num_heads):
        raise ModelFileError(
            f"tensor {tensor.name} has the wrong shape", got=tensor.shape, expected=f"{num_heads} heads"
        )
    order = np.arange(num_rows).reshape(num_heads, num_rows // num_heads // 2, 2).swapaxes(1, 2).reshape(-1)
    return array[mx.array(order)]


def _module(config: dict[str, Any], weights: dict[str, mx.array]) -> Any:
    """The model, quantised where the weights are, with the weights in."""
    classes = import_module(f"mlx_lm.models.{config['model_type']}")
    module = classes.Model(classes.ModelArgs.from_dict(config))

    def quantized(path: str, child: nn.Module) -> bool | dict[str, int]:
        scales, weight = weights.get(f"{path}.scales"), weights.get(f"{path}.weight")
        if scales is None or weight is None:
            return False
        return {"group_size": _GROUP, "bits": weight.shape[-1] * 32 // (scales.shape[-1] * _GROUP)}

    nn.quantize(module, group_size=_GROUP, bits=4, class_predicate=quantized)
    wanted = dict(tree_flatten(module.parameters()))
    missing, surplus = sorted(wanted.keys() - weights), sorted(weights.keys() - wanted)
    if missing or surplus:
        raise ModelFileError(
            "the file's tensors are not those of its architecture",
            got=f"without a place: {', '.join(surplus[:5])}" if surplus else None,
            expected=f"also {', '.join(missing[:5])}" if missing else None,
        )
    for name, value in wanted.items():
        if value.shape != weights[name].shape:
            raise ModelFileError(f"tensor {name} has the wrong shape", got=weights[name].shape, expected=value.shape)
    module.load_weights(list(weights.items()), strict=True)
    module.eval()
    return module
