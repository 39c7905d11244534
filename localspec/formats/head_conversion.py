"""Writes a GGUF head, as llama.cpp's draft architectures want it, from a safetensors head and its target.

    dflash    DSpark, DFlash, JetSpec and DFlash 2
    eagle3    EAGLE-3 with three taps and one layer

The head's own tensors keep their values; the tokenizer is the target's, whose GGUF file or folder must be at hand,
since the head has none. What llama.cpp's graphs cannot compute is refused by name: it would load and guess badly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from localspec.errors import HeadFileError, ModelFileError, PairMismatchError, SettingError, UnsupportedModelError

from . import block_conversion, eagle3_conversion, gguf, safetensors
from .block_tensors import BlockDetails
from .conversion import FILE_TYPES, QUANTIZATIONS, Checkpoint, Progress, StoredWeights, add_tokenizer
from .eagle3 import Eagle3Config
from .head import read_head_header
from .head_plan import Plan, Value
from .summary import ModelSummary, summarize

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["copy_tokenizer", "write_head_gguf"]

_TABLES = frozenset({"markov_w1.weight", "selector_predecessor.weight", "selector_successor.weight"})
"""Looked up by row, not multiplied: never quantised below F16."""

_EXACT = ("conf_proj.weight", "attn_conv_base", "ffn_conv_base")
"""Small, and always F32."""

_UNUSED = ("t2d", "d2t")  # d2t is written apart, with absolute ids
_VALUE_TYPES = {
    "b1": "BOOL", "u1": "UINT8", "i1": "INT8", "u2": "UINT16", "i2": "INT16", "u4": "UINT32", "i4": "INT32",
    "u8": "UINT64", "i8": "INT64", "f4": "FLOAT32", "f8": "FLOAT64",
}  # fmt: skip


def write_head_gguf(
    path: Path, folder: Path, target: Path, quantization: str, *, on_tensor: Progress | None = None
) -> None:
    """Write the head in `folder` to `path`; `target` is the model it was trained for, a GGUF file or a folder.

    Raises SettingError, HeadFileError, PairMismatchError, UnsupportedModelError.
    """
    from gguf import GGUFWriter

    if quantization not in QUANTIZATIONS:
        raise SettingError("unknown quantization", got=quantization, expected=f"one of {', '.join(QUANTIZATIONS)}")
    header, about = read_head_header(folder), summarize(target)
    if header is None:
        raise HeadFileError(f"{folder.name} is no trained head")
    if about.drafter_kind is not None:
        raise SettingError("the target is a head itself", got=target.name)
    if header.target_hidden != about.hidden_size:
        raise PairMismatchError(
            "the head was trained for another target: its hidden size differs",
            got=header.target_hidden,
            expected=about.hidden_size,
            fix="Give the model that the head was trained for.",
        )
    names = [name for name in header.files.shapes if name.removeprefix("model.") not in _UNUSED]
    if isinstance(header.details, BlockDetails):
        plan = block_conversion.plan(header, header.details, names, about)
    elif isinstance(header.details, Eagle3Config):
        plan = eagle3_conversion.plan(header.details, names, about)
    else:
        raise UnsupportedModelError("llama.cpp has no architecture for such a head", got=header.kind)
    parts = safetensors.read_folder(folder)
    plan = _without_tied_output(plan, StoredWeights(parts))
    writer = GGUFWriter(path, plan.architecture)
    writer.add_type("model")
    writer.add_name(folder.resolve().name)
    writer.add_file_type(FILE_TYPES[quantization])
    writer.add_quantization_version(2)
    for key, value in {**plan.metadata, "vocab_size": about.vocab_size}.items():
        _add(writer, f"{plan.architecture}.{key}", value)
    num_tokens = copy_tokenizer(writer, target)
    if num_tokens != about.vocab_size:
        raise ModelFileError(f"{target.name} names too few tokens", got=num_tokens, expected=about.vocab_size)
    if plan.mask_token is not None:
        writer.add_uint32("tokenizer.ggml.mask_token_id", plan.mask_token)
    ids = _read_ids(parts, about)
    _write(writer, plan, StoredWeights(parts), ids, about, quantization, on_tensor)


def _without_tied_output(plan: Plan, weights: StoredWeights) -> Plan:
    """An output matrix that equals the embedding is left out: llama.cpp then uses the embedding."""
    stored = {theirs: name for name, theirs in plan.tensors.items()}
    embedding, output = stored.get("token_embd.weight"), stored.get("output.weight")
    if embedding is None or output is None or not np.array_equal(weights[embedding], weights[output]):
        return plan
    kept = {name: theirs for name, theirs in plan.tensors.items() if name != output}
    return replace(plan, tensors=kept)


def _read_ids(
    parts: Sequence[tuple[Path, Mapping[str, safetensors.StoredTensor]]], target: ModelSummary
) -> NDArray[np.int64] | None:
    """d2t as target ids (the file holds their distances from the draft's); None where these are all, in order."""
    for path, tensors in parts:
        for name, tensor in tensors.items():
            if name.removeprefix("model.") != "d2t":
                continue
            if tensor.dtype not in ("I64", "I32"):
                raise HeadFileError("tensor d2t of the head has the wrong type", got=tensor.dtype, expected="I64")
            raw = np.fromfile(path, np.uint8, tensor.num_bytes, offset=tensor.start)
            distances = raw.view("<i8" if tensor.dtype == "I64" else "<i4").astype(np.int64)
            ids: NDArray[np.int64] = distances + np.arange(len(distances))
            if len(np.unique(ids)) != len(ids) or ids.min(initial=0) < 0 or ids.max(initial=0) >= target.vocab_size:
                raise HeadFileError("d2t of the head names tokens twice, or beyond the target's vocabulary")
            is_all = len(ids) == target.vocab_size and np.array_equal(ids, np.arange(len(ids)))
            return None if is_all else ids
    return None


# ---------------------------------------------------------------- metadata


def copy_tokenizer(writer: GGUFWriter, target: Path) -> int:
    """Write the target's tokenizer; how many tokens it names."""
    if target.is_dir():
        checkpoint = Checkpoint.from_folder(target)
        add_tokenizer(writer, checkpoint)
        return int(checkpoint.config["vocab_size"])
    metadata = gguf.read_parts(target)[0][1].metadata
    for key, value in metadata.items():
        if key.startswith("tokenizer.") and key != "tokenizer.ggml.mask_token_id":
            _add(writer, key, value)
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else 0


def _add(writer: GGUFWriter, key: str, value: gguf.Value | Value) -> None:
    from gguf import GGUFValueType

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


# ---------------------------------------------------------------- tensors


def _write(
    writer: GGUFWriter,
    plan: Plan,
    weights: StoredWeights,
    ids: NDArray[np.int64] | None,
    target: ModelSummary,
    quantization: str,
    on_tensor: Progress | None,
) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if ids is not None:
        writer.add_tensor("d2t", ids, raw_dtype=GGMLQuantizationType.I64)
    for number, (name, theirs) in enumerate(sorted(plan.tensors.items()), start=1):
        if on_tensor is not None:
            on_tensor(number, len(plan.tensors))
        weight = weights[name]
        if plan.heads is not None:
            weight = eagle3_conversion.arranged(name, weight, plan.heads)
        if theirs in ("token_embd.weight", "markov_w1.weight") and len(weight) != target.vocab_size:
            raise PairMismatchError(
                f"the head was trained for another vocabulary: {name} has other rows",
                got=len(weight),
                expected=target.vocab_size,
            )
        kind = _kind(theirs, weight, quantization)
        writer.add_tensor(theirs, quantize(weight, GGMLQuantizationType[kind]), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _kind(name: str, weight: NDArray[np.float32], quantization: str) -> str:
    if weight.ndim != 2 or name.endswith(_EXACT):
        return "F32"
    if quantization in ("F32", "F16"):
        return quantization
    return "F16" if name in _TABLES or weight.shape[1] % 32 else quantization
