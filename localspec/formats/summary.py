"""A GGUF file or a safetensors folder in one small record: sizes, shape and kind, from headers alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localspec.errors import ModelFileError, ModelNotFoundError

from . import gguf, safetensors, states
from .head_kind import head_kind
from .numbers import MAX_LAYERS, Numbers

GGUF_HEADS = frozenset({"dflash", "dspark", "eagle3", "medusa", "gemma4-assistant"})
"""Architectures of GGUF files that read another model's hidden states."""

_GGUF_LAYER = re.compile(r"blk\.(\d{1,4})\.(\w+)\.weight")
_FOLDER_LAYER = re.compile(r".*layers\.(\d{1,4})\.(?:.*\.)?([\w]+)\.weight")
_KEY_TENSORS = frozenset(
    {"attn_k", "attn_kv_a_mqa", "k_proj", "kv_a_proj_with_mqa", "qkv_proj", "Wqkv", "query_key_value", "wk"}
)
_FUSED = "attn_qkv"  # in hybrid models also the name of a recurrent layer's input, beside ssm_ tensors


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """What a model's headers say. None: not stated.

    format: gguf or safetensors.  kv_heads: of each layer, 0 where a layer keeps no keys.  key_size, value_size:
    numbers per head.  sliding_window: tokens, where any layer has one.  quantization: for people.  weight_bytes: by
    stored type.  num_parameters: as if nothing was packed.  is_recurrent: has layers with a state of fixed size.
    state_values: numbers of one such state, over all layers.  drafter_kind: for a head that cannot run alone, its
    kind; target_hidden, num_target_layers: the target it was trained for.
    """

    name: str
    path: Path
    format: str
    architecture: str
    num_layers: int
    hidden_size: int
    feed_forward: int
    num_heads: int
    kv_heads: tuple[int, ...]
    key_size: int
    value_size: int
    vocab_size: int
    trained_context: int | None
    sliding_window: int | None
    quantization: str
    weight_bytes: Mapping[str, int]
    file_bytes: int
    num_parameters: int
    num_experts: int
    is_recurrent: bool
    state_values: int | None
    drafter_kind: str | None = None
    target_hidden: int | None = None
    num_target_layers: int | None = None

    @property
    def total_weight_bytes(self) -> int:
        return sum(self.weight_bytes.values())

    @property
    def kv_values(self) -> int:
        """Numbers that one token of context adds to the cache."""
        return sum(self.kv_heads) * (self.key_size + self.value_size)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "path": str(self.path)}


def summarize(path: Path) -> ModelSummary:
    """Read the headers of a GGUF file (any part of a split one), a safetensors file or a folder.

    Raises ModelNotFoundError, ModelFileError, and UnsupportedModelError for unknown GGUF versions and types.
    """
    if not path.exists():
        raise ModelNotFoundError(f"no such file or folder: {path}", fix="Check the path.")
    if path.is_dir() or path.suffix == ".safetensors":
        return _of_folder(path)
    return _of_gguf(path)


# ---------------------------------------------------------------- GGUF


def _of_gguf(path: Path) -> ModelSummary:
    parts = gguf.read_parts(path)
    metadata = parts[0][1].metadata
    tensors = [tensor for _, header in parts for tensor in header.tensors.values()]
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise ModelFileError("the GGUF header names no general.architecture")
    fields = Numbers(metadata, f"{architecture}.", path.name)
    num_layers = fields.size("block_count", most=MAX_LAYERS)
    hidden = fields.size("embedding_length")
    num_heads = max(fields.sizes("attention.head_count", 1), default=1)
    kv_heads = fields.sizes("attention.head_count_kv", num_heads)
    key_size = fields.size("attention.key_length", max(1, hidden // max(1, num_heads)))
    tokens = metadata.get("tokenizer.ggml.tokens")
    embedding = next((tensor for tensor in tensors if tensor.name == "token_embd.weight"), None)
    vocab_size = embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else 0
    weight_bytes: Counter[str] = Counter()
    for tensor in tensors:
        weight_bytes[tensor.kind] += tensor.num_bytes
    matrices: Counter[str] = Counter()
    for tensor in tensors:
        matrices[tensor.kind] += tensor.num_bytes if len(tensor.shape) > 1 else 0
    name = metadata.get("general.name")
    names = [tensor.name for tensor in tensors]
    targets = metadata.get(f"{architecture}.target_layers")
    state_values = states.of_gguf(fields, hidden, num_heads, names)
    return ModelSummary(
        name=name if isinstance(name, str) and name else path.stem,
        path=path,
        format="gguf",
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden,
        feed_forward=max(fields.sizes("feed_forward_length", 0), default=0),
        num_heads=num_heads,
        kv_heads=_by_layer(kv_heads, num_layers, _GGUF_LAYER, names),
        key_size=key_size,
        value_size=fields.size("attention.value_length", key_size),
        vocab_size=vocab_size or (len(tokens) if isinstance(tokens, list) else 0),
        trained_context=fields.size("context_length", 0) or None,
        sliding_window=fields.size("attention.sliding_window", 0) or None,
        quantization=max(matrices, key=matrices.__getitem__, default="none"),
        weight_bytes=dict(weight_bytes),
        file_bytes=sum(part.stat().st_size for part, _ in parts),
        num_parameters=sum(int(np.prod(tensor.shape, dtype=object)) for tensor in tensors),
        num_experts=fields.size("expert_count", 0),
        is_recurrent=state_values != 0,
        state_values=state_values,
        drafter_kind=architecture if architecture in GGUF_HEADS else None,
        target_hidden=fields.size("target_hidden_size", 0) or _fc_input(targets, tensors),
    )


def _fc_input(targets: object, tensors: Sequence[gguf.TensorInfo]) -> int | None:
    """The target's hidden size: a head's input matrix is as wide as all its taps together."""
    fc = next((tensor for tensor in tensors if tensor.name == "fc.weight"), None)
    taps = len(targets) if isinstance(targets, np.ndarray) else 0
    if fc is None or not taps or len(fc.shape) != 2 or fc.shape[1] % taps:
        return None
    return fc.shape[1] // taps


def _by_layer(heads: list[int], num_layers: int, pattern: re.Pattern[str], names: Iterable[str]) -> tuple[int, ...]:
    """Key heads of each layer; layers whose tensors make no keys have none, whatever the header says."""
    if len(heads) == 1:
        heads = heads * num_layers
    if len(heads) < num_layers:
        raise ModelFileError("the header gives key heads for too few layers", got=len(heads), expected=num_layers)
    making, recurrent, fused = set[int](), set[int](), set[int]()
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        layer = int(match[1])
        if match[2] in _KEY_TENSORS:
            making.add(layer)
        elif match[2] == _FUSED:
            fused.add(layer)
        elif match[2].startswith("ssm_"):
            recurrent.add(layer)
    making |= fused - recurrent
    if not making:  # names that are not known, or no layer has any: then what the header says
        return tuple(0 if layer in recurrent else heads[layer] for layer in range(num_layers))
    return tuple(heads[layer] if layer in making else 0 for layer in range(num_layers))


# ---------------------------------------------------------------- safetensors


def _of_folder(path: Path) -> ModelSummary:
    folder = path if path.is_dir() else path.parent
    parts = safetensors.read_folder(folder) if path.is_dir() else [(path, safetensors.read_header(path))]
    config = safetensors.read_json(folder / "config.json")
    tensors = {name: tensor for _, found in parts for name, tensor in found.items()}
    kind = head_kind(config, tensors)
    architecture = config.get("model_type") or config.get("speculators_model_type") or kind
    if not isinstance(architecture, str) or not architecture or len(architecture) > 80:
        raise ModelFileError("config.json names no model_type", got=str(architecture)[:80])
    inner = next((config[key] for key in ("text_config", "transformer_layer_config") if key in config), None)
    shape = {**config, **inner} if isinstance(inner, dict) else config
    fields = Numbers({key: value for key, value in shape.items() if value is not None}, "", "config.json")
    num_layers = fields.size("num_hidden_layers", fields.size("n_layer", 0), most=MAX_LAYERS)
    hidden = fields.size("hidden_size", fields.size("n_embd", 0))
    num_heads = fields.size("num_attention_heads", fields.size("n_head", 1))
    key_size = fields.size("head_dim", max(1, hidden // max(1, num_heads)))
    kv_heads, value_size = fields.sizes("num_key_value_heads", num_heads), key_size
    if "kv_lora_rank" in shape:  # one compressed row stands for all heads
        kv_heads, value_size = [1], 0
        key_size = fields.size("kv_lora_rank", 0) + fields.size("qk_rope_head_dim", 0)
    weight_bytes: Counter[str] = Counter()
    for tensor in tensors.values():
        weight_bytes[tensor.dtype] += tensor.num_bytes
    state_values = states.of_folder(shape, fields.where, tensors)
    return ModelSummary(
        name=folder.resolve().name,
        path=path,
        format="safetensors",
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden,
        feed_forward=fields.size("intermediate_size", 0),
        num_heads=num_heads,
        kv_heads=_by_layer(kv_heads, num_layers, _FOLDER_LAYER, tensors),
        key_size=key_size,
        value_size=value_size,
        vocab_size=fields.size("vocab_size", 0),
        trained_context=fields.size("max_position_embeddings", 0) or None,
        sliding_window=_window(shape, fields),
        quantization=_quantization(config, weight_bytes),
        weight_bytes=dict(weight_bytes),
        file_bytes=sum(file.stat().st_size for file, _ in parts),
        num_parameters=_num_parameters(tensors, config),
        num_experts=fields.size("num_experts", fields.size("num_local_experts", 0)),
        is_recurrent=state_values != 0,
        state_values=state_values,
        drafter_kind=kind,
        target_hidden=_target_hidden(config, tensors) if kind else None,
        num_target_layers=(fields.size("num_target_layers", 0) or None) if kind else None,
    )


def _window(shape: Mapping[str, Any], fields: Numbers) -> int | None:
    if shape.get("use_sliding_window") is False:
        return None
    return fields.size("sliding_window", 0) or None


def _quantization(config: Mapping[str, Any], weight_bytes: Counter[str]) -> str:
    said = config.get("quantization") or config.get("quantization_config")
    if isinstance(said, dict):
        if type(said.get("bits")) is int:
            return f"{said['bits']} bits in groups of {str(said.get('group_size', '?'))[:8]}"
        return str(said.get("quant_method", "quantised"))[:40]
    return weight_bytes.most_common(1)[0][0] if weight_bytes else "none"


def _num_parameters(tensors: Mapping[str, safetensors.StoredTensor], config: Mapping[str, Any]) -> int:
    """Packed words are counted as the numbers they hold; scales and biases of groups are not parameters."""
    said = config.get("quantization")
    bits = said.get("bits") if isinstance(said, dict) else None
    total = 0
    for name, tensor in tensors.items():
        size = int(np.prod(tensor.shape, dtype=object))
        stem, _, last = name.rpartition(".")
        if f"{stem}.scales" in tensors and last in ("scales", "biases"):
            continue
        if tensor.dtype == "U32" and last == "weight" and f"{stem}.scales" in tensors:
            own = said.get(stem) if isinstance(said, dict) else None
            here = own.get("bits") if isinstance(own, dict) else bits
            if isinstance(here, int) and 0 < here <= 32:
                size = size * 32 // here
        total += size
    return total


def _target_hidden(config: Mapping[str, Any], tensors: Mapping[str, safetensors.StoredTensor]) -> int | None:
    """A head's input matrix is as wide as all its taps together."""
    nested = config.get("dflash_config") or config.get("eagle_config")
    places = [config, nested if isinstance(nested, dict) else {}]
    keys = ("target_layer_ids", "aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids")
    taps = next((place[key] for place in places for key in keys if isinstance(place.get(key), list)), None)
    fc = tensors.get("fc.weight") or tensors.get("model.fc.weight")
    if fc is None or not taps or len(fc.shape) != 2 or fc.shape[1] % len(taps):
        return None
    return fc.shape[1] // len(taps)
