"""Writes a GGUF head, as llama.cpp's draft architectures want it, from a safetensors head and its target.

    dflash    DSpark, DFlash, JetSpec and DFlash 2
    eagle3    EAGLE-3 with three taps and one layer

The head's own tensors keep their values; the tokenizer is the target's, whose GGUF file or folder must be at hand,
since the head has none. What llama.cpp's graphs cannot compute is refused by name: it would load and guess badly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from localspec.errors import HeadFileError, ModelFileError, PairMismatchError, SettingError, UnsupportedModelError

from . import eagle3_conversion, gguf, safetensors
from .conversion import FILE_TYPES, LAYER_MODULES, QUANTIZATIONS, Checkpoint, Progress, StoredWeights, add_tokenizer
from .summary import ModelSummary, summarize

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["copy_tokenizer", "is_head_folder", "write_head_gguf"]

_PREFIXES = ("model.", "logit_head.")
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
_TABLES = frozenset({"markov_w1.weight", "selector_predecessor.weight", "selector_successor.weight"})
"""Looked up by row, not multiplied: never quantised below F16."""

_EXACT = frozenset({"conf_proj.weight", "attn_conv_base", "ffn_conv_base"})
"""Small, and always F32."""

_NOT_IN_LLAMA_CPP = ("medusa", "assistant", "mtp")
_UNUSED = ("t2d", "d2t")  # d2t is written apart, with absolute ids
_SELECTOR = {
    "conv_kernel_size": "conv_kernel_size",
    "conv_group_size": "conv_group_size",
    "selector_rank": "selector_rank",
    "selector_top_k": "selector_top_k",
}
_VALUE_TYPES = {"b1": "BOOL", "u1": "UINT8", "i1": "INT8", "u2": "UINT16", "i2": "INT16", "u4": "UINT32",
                "i4": "INT32", "u8": "UINT64", "i8": "INT64", "f4": "FLOAT32", "f8": "FLOAT64"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class HeadSource:
    """A head as its folder holds it. config: flat, nested parts above the rest.  weights: float32 by name, without
    the prefixes that some trainers write.  ids: d2t, absolute."""

    config: Mapping[str, Any]
    weights: Mapping[str, NDArray[np.float32]]
    ids: NDArray[np.int64] | None

    @classmethod
    def from_folder(cls, folder: Path) -> HeadSource:
        """Raises ModelFileError."""
        raw = safetensors.read_json(folder / "config.json")
        config = {**raw, **(raw.get("transformer_layer_config") or {}), **(raw.get("dflash_config") or {})}
        parts = safetensors.read_folder(folder)
        names = {_plain(name): name for _, tensors in parts for name in tensors}
        return cls(config, _Renamed(StoredWeights(parts), names), _read_ids(parts))

    def number(self, *keys: str) -> int:
        """The first of these keys that is there. Raises HeadFileError."""
        for key in keys:
            value = self.config.get(key)
            if type(value) is int:
                return value
        raise HeadFileError(f"config.json of the head has no {keys[0]}", got=self.config.get(keys[0]))


class _Renamed(Mapping[str, NDArray[np.float32]]):
    """Tensors by other names, read when asked for."""

    def __init__(self, weights: StoredWeights, names: Mapping[str, str]) -> None:
        self._weights, self._names = weights, names

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self._weights[self._names[name]]

    def __contains__(self, name: object) -> bool:  # inherited, it would read the tensor
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def is_head_folder(folder: Path) -> bool:
    """Is this a head that reads another model's hidden states? Raises ModelFileError."""
    return folder.is_dir() and summarize(folder).drafter_kind is not None


def write_head_gguf(
    path: Path, folder: Path, target: Path, quantization: str, *, on_tensor: Progress | None = None
) -> None:
    """Write the head in `folder` to `path`; `target` is the model it was trained for, a GGUF file or a folder.

    Raises SettingError, HeadFileError (also for tensors without a place), PairMismatchError, UnsupportedModelError.
    """
    from gguf import GGUFWriter

    if quantization not in QUANTIZATIONS:
        raise SettingError("unknown quantization", got=quantization, expected=f"one of {', '.join(QUANTIZATIONS)}")
    kind = summarize(folder).drafter_kind
    if kind in _NOT_IN_LLAMA_CPP:
        raise UnsupportedModelError("llama.cpp has no architecture for such a head", got=kind)
    source, about = HeadSource.from_folder(folder), summarize(target)
    if about.drafter_kind is not None:
        raise SettingError("the target is a head itself", got=target.name)
    is_eagle = eagle3_conversion.is_eagle3(source.weights)
    writer = GGUFWriter(path, "eagle3" if is_eagle else "dflash")
    writer.add_type("model")
    writer.add_name(folder.resolve().name)
    writer.add_file_type(FILE_TYPES[quantization])
    writer.add_quantization_version(2)
    if is_eagle:
        tensors = eagle3_conversion.tensors(source.config, source.weights)
        eagle3_conversion.add_metadata(writer, source.config, source.weights, about)
    else:
        tensors = _tensors(source)
        _check_block(source)
        _add_block_metadata(writer, source, about)
    _add_shape(writer, source, about)
    num_tokens = copy_tokenizer(writer, target)
    if num_tokens != about.vocab_size:
        raise ModelFileError(f"{target.name} names too few tokens", got=num_tokens, expected=about.vocab_size)
    _write(writer, source, tensors, about, quantization, on_tensor)


# ---------------------------------------------------------------- what is there


def _plain(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _read_ids(parts: Sequence[tuple[Path, Mapping[str, safetensors.StoredTensor]]]) -> NDArray[np.int64] | None:
    """d2t as target ids; the file holds their distances from the draft's."""
    for path, tensors in parts:
        for name, tensor in tensors.items():
            if _plain(name) == "d2t":
                if tensor.dtype not in ("I64", "I32"):
                    raise HeadFileError("tensor d2t of the head has the wrong type", got=tensor.dtype, expected="I64")
                kind = np.dtype("<i8" if tensor.dtype == "I64" else "<i4")
                raw = np.fromfile(path, np.uint8, tensor.num_bytes, offset=tensor.start)
                distances = raw.view(kind).astype(np.int64)
                ids: NDArray[np.int64] = distances + np.arange(len(distances))
                return ids
    return None


def _tensors(source: HeadSource) -> dict[str, str]:
    """The head's tensors: llama.cpp's name for each. Raises UnsupportedModelError for others."""
    found = {}
    for name in source.weights:
        if name in _UNUSED:
            continue
        layer, _, rest = name.removeprefix("layers.").partition(".")
        if name.startswith("layers.") and rest in _LAYER:
            found[name] = f"blk.{layer}.{_LAYER[rest]}"
        elif name in _OUTER:
            found[name] = _OUTER[name]
        else:
            raise UnsupportedModelError("llama.cpp's dflash architecture has no place for the head's tensor", got=name)
    embedding, output = (source.weights.get(f"{part}.weight") for part in ("embed_tokens", "lm_head"))
    if embedding is not None and output is not None and np.array_equal(embedding, output):
        del found["lm_head.weight"]  # llama.cpp then uses the embedding
    return found


def _check_block(source: HeadSource) -> None:
    """Raise UnsupportedModelError for what llama.cpp's graph leaves out."""
    config, kind = source.config, source.config.get("markov_head_type", "vanilla")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    scaled = scaling.get("rope_type", scaling.get("type", "default"))
    family = config.get("model_type", "qwen3")
    for what, got, known in (
        ("Markov head", kind if config.get("markov_rank", 1) else "vanilla", "vanilla"),
        ("scaling of positions", scaled, "default"),
        ("rotation of neighbours", not config.get("rope_is_neox_style", True), False),
        ("bias in attention", bool(config.get("attention_bias")), False),
        ("backbone", "gemma4" if "gemma4" in str(family) else "qwen3", "qwen3"),
        ("confidence head without Markov part", _lacks_markov_part(source), False),
    ):
        if got != known:
            raise UnsupportedModelError(f"a head with another {what} is not converted", got=got, expected=known)
    for needed in ("fc.weight", "hidden_norm.weight", "norm.weight"):
        if needed not in source.weights:
            raise HeadFileError("the head lacks a tensor", got=needed)


def _lacks_markov_part(source: HeadSource) -> bool:
    return "confidence_head.proj.weight" in source.weights and "markov_head.markov_w1.weight" not in source.weights


# ---------------------------------------------------------------- metadata


def _taps(source: HeadSource) -> list[int]:
    """Layers whose *inputs* are read, which is what llama.cpp counts by."""
    inputs = source.config.get("aux_hidden_state_layer_ids")
    outputs = source.config.get("target_layer_ids")
    taps = inputs if inputs is not None else [tap + 1 for tap in outputs] if outputs is not None else None
    if not taps:
        raise HeadFileError("config.json of the head names no taps", expected="target_layer_ids")
    return [int(tap) for tap in taps]


def _add_block_metadata(writer: GGUFWriter, source: HeadSource, target: ModelSummary) -> None:
    config, taps = source.config, _taps(source)
    width = source.weights["fc.weight"].shape[1]
    if width != len(taps) * target.hidden_size:
        raise PairMismatchError(
            "the head was trained for another target: fc.weight is not as wide as its taps together",
            got=width,
            expected=f"{len(taps)} x {target.hidden_size}",
        )
    writer.add_array("dflash.target_layers", taps)
    writer.add_uint32("dflash.block_size", source.number("block_size"))
    writer.add_bool("dflash.sample_from_anchor", _starts_at_anchor(source))
    writer.add_bool("dflash.has_confidence_head", "confidence_head.proj.weight" in source.weights)
    causal = next((config[key] for key in ("is_causal", "causal", "causal_head") if config.get(key) is not None), False)
    writer.add_bool("dflash.attention.causal", bool(causal))
    for key, name in _SELECTOR.items():
        if key in config:
            writer.add_uint32(f"dflash.{name}", int(config[key]))
    window = config.get("swa_window_size") or config.get("sliding_window")
    if window and (config.get("use_sliding_window") or config.get("use_swa")):
        kinds = config.get("layer_types") or []
        every = bool(config.get("use_swa"))
        writer.add_uint32("dflash.attention.sliding_window", int(window))
        pattern = [every or kind == "sliding_attention" for kind in kinds]
        num_layers = source.number("num_hidden_layers")
        writer.add_array(
            "dflash.attention.sliding_window_pattern", pattern if len(pattern) == num_layers else [every] * num_layers
        )
    writer.add_uint32("tokenizer.ggml.mask_token_id", source.number("mask_token_id"))


def _starts_at_anchor(source: HeadSource) -> bool:
    """Does slot 0 guess? DeepSpec's heads do, also without a Markov part; z-lab's begin at slot 1."""
    stated = source.config.get("sample_from_anchor")
    if stated is not None:
        return bool(stated)
    if "aux_hidden_state_layer_ids" in source.config:
        return "markov_head.markov_w1.weight" in source.weights
    names = source.config.get("architectures") or [""]
    return "markov_head.markov_w1.weight" in source.weights or "DSpark" in str(names[0])


def _add_shape(writer: GGUFWriter, source: HeadSource, target: ModelSummary) -> None:
    config, number = source.config, source.number
    head_size = config.get("head_dim") or number("hidden_size") // number("num_attention_heads")
    rope = config.get("rope_parameters")
    base = config.get("rope_theta", rope.get("rope_theta") if isinstance(rope, dict) else None)
    if not isinstance(base, int | float):
        raise HeadFileError("config.json of the head names no rope_theta", got=base)
    writer.add_vocab_size(target.vocab_size)
    writer.add_context_length(int(config.get("max_position_embeddings") or target.trained_context or 4096))
    writer.add_embedding_length(number("hidden_size"))
    writer.add_block_count(number("num_hidden_layers"))
    writer.add_feed_forward_length(number("intermediate_size"))
    writer.add_head_count(number("num_attention_heads"))
    writer.add_head_count_kv(number("num_key_value_heads", "num_attention_heads"))
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(float(base))
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))


def copy_tokenizer(writer: GGUFWriter, target: Path) -> int:
    """Write the target's tokenizer; how many tokens it names."""
    from gguf import GGUFValueType

    if target.is_dir():
        checkpoint = Checkpoint.from_folder(target)
        add_tokenizer(writer, checkpoint)
        return int(checkpoint.config["vocab_size"])
    metadata = gguf.read_parts(target)[0][1].metadata
    for key, value in metadata.items():
        if not key.startswith("tokenizer.") or key == "tokenizer.ggml.mask_token_id":
            continue
        if isinstance(value, np.ndarray):
            kind = GGUFValueType[_VALUE_TYPES[value.dtype.str[1:]]]
            writer.add_key_value(key, value.tolist(), GGUFValueType.ARRAY, sub_type=kind)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, str(value))
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else 0


# ---------------------------------------------------------------- tensors


def _write(
    writer: GGUFWriter,
    source: HeadSource,
    tensors: Mapping[str, str],
    target: ModelSummary,
    quantization: str,
    on_tensor: Progress | None,
) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    is_eagle = writer.arch == "eagle3"

    if source.ids is not None:
        ids = source.ids
        if len(np.unique(ids)) != len(ids) or ids.min(initial=0) < 0 or ids.max(initial=0) >= target.vocab_size:
            raise HeadFileError("d2t of the head names tokens twice, or beyond the target's vocabulary")
        if len(ids) < target.vocab_size or not np.array_equal(ids, np.arange(len(ids))):
            writer.add_tensor("d2t", ids, raw_dtype=GGMLQuantizationType.I64)
    for number, (name, theirs) in enumerate(sorted(tensors.items()), start=1):
        if on_tensor is not None:
            on_tensor(number, len(tensors))
        weight = source.weights[name]
        if is_eagle:
            weight = eagle3_conversion.arranged(name, weight, source.config)
        rows = target.vocab_size if theirs in ("token_embd.weight", "markov_w1.weight") else None
        if rows is not None and weight.shape[0] != rows:
            raise PairMismatchError(
                f"the head was trained for another vocabulary: {name} has other rows", got=len(weight), expected=rows
            )
        kind = _kind(theirs, weight, quantization)
        writer.add_tensor(theirs, quantize(weight, GGMLQuantizationType[kind]), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _kind(name: str, weight: NDArray[np.float32], quantization: str) -> str:
    if weight.ndim != 2 or any(name.endswith(part) for part in _EXACT):
        return "F32"
    if quantization in ("F32", "F16"):
        return quantization
    return "F16" if name in _TABLES or weight.shape[1] % 32 else quantization
