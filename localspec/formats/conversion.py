"""Writes a GGUF file from what a Hugging Face folder holds: configuration, weights, tokenizer.

Covers the dense llama, qwen2 and qwen3 families; for anything else llama.cpp's own converter is the
tool. The same input gives the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from localspec.errors import ModelFileError, SettingError, UnsupportedModelError

from . import safetensors

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = [
    "ARCHITECTURES",
    "FILE_TYPES",
    "LAYER_MODULES",
    "OUTER_TENSORS",
    "QUANTIZATIONS",
    "SPLIT_PATTERNS",
    "Checkpoint",
    "Progress",
    "StoredWeights",
    "add_tokenizer",
    "begin_gguf",
    "check_architecture",
    "gguf_name",
    "interleave_heads",
    "read_safetensors",
    "reading_order",
    "write_gguf_file",
]

QUANTIZATIONS = ("Q4_0", "Q8_0", "F16", "F32")
"""Types a matrix may be stored in. Norms and biases are always F32."""

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7}
"""Numbers that GGUF metadata name them by."""

ARCHITECTURES = ("llama", "qwen2", "qwen3")

Progress = Callable[[int, int], None]
"""Told (number done, number in all)."""

OUTER_TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

LAYER_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

# How a tokenizer splits text before merging, by the pattern in its tokenizer.json; the values are
# llama.cpp's names for the same splits.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT_PATTERNS = {_LETTERS + "{1,3}" + _REST: "llama-bpe", _LETTERS + _REST: "qwen2"}

_MAX_TOKENIZER = 128 * 2**20
_SAFETENSORS_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model as a Hugging Face folder holds it.

    config: `config.json`.  weights: float32, by Hugging Face name.  tokenizer: `tokenizer.json`.
    tokenizer_config: `tokenizer_config.json`.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, NDArray[np.float32]]
    tokenizer: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]

    @classmethod
    def from_folder(cls, folder: Path) -> Checkpoint:
        """Read a folder with `config.json`, weights in one file or several, `tokenizer.json` and its config.

        Weights are read when asked for. Raises ModelFileError.
        """
        return cls(
            config=safetensors.read_json(folder / "config.json"),
            weights=StoredWeights(safetensors.read_folder(folder)),
            tokenizer=safetensors.read_json(folder / "tokenizer.json", _MAX_TOKENIZER),
            tokenizer_config=safetensors.read_json(folder / "tokenizer_config.json", _MAX_TOKENIZER),
        )


class StoredWeights(Mapping[str, NDArray[np.float32]]):
    """The tensors of safetensors files as float32, each read when asked for."""

    def __init__(self, parts: Sequence[tuple[Path, Mapping[str, safetensors.StoredTensor]]]) -> None:
        self._places = {name: (path, tensor) for path, tensors in parts for name, tensor in tensors.items()}

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        path, tensor = self._places[name]
        if tensor.dtype not in _SAFETENSORS_TYPES:  # numpy has no bfloat16, and packed weights need their scales
            known = ", ".join(_SAFETENSORS_TYPES)
            raise ModelFileError(f"tensor {name} of {path.name} cannot be read", got=tensor.dtype, expected=known)
        with path.open("rb") as file:
            file.seek(tensor.start)
            raw = file.read(tensor.num_bytes)
        if len(raw) != tensor.num_bytes:
            raise ModelFileError(f"{path.name} became shorter while it was read")
        stored = np.frombuffer(raw, _SAFETENSORS_TYPES[tensor.dtype]).reshape(tensor.shape)
        if tensor.dtype == "BF16":  # the upper half of a float32
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_safetensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every tensor as float32, by name. Raises ModelFileError."""
    return dict(StoredWeights([(path, safetensors.read_header(path))]))


def write_gguf_file(
    path: Path,
    checkpoint: Checkpoint,
    quantization: str,
    *,
    name: str,
    licence: str = "",
    description: str = "",
    on_tensor: Progress | None = None,
) -> None:
    """Write `checkpoint` to `path`, all matrices in `quantization`, all vectors in float32."""
    writer = begin_gguf(path, checkpoint, quantization, name=name, licence=licence, description=description)
    _add_tensors(writer, checkpoint.config, checkpoint.weights, quantization, on_tensor)
    _finish(writer)


def begin_gguf(
    path: Path, checkpoint: Checkpoint, quantization: str, *, name: str, licence: str = "", description: str = ""
) -> GGUFWriter:
    """A writer that knows all but the tensors; nothing is on disk yet.

    Raises SettingError for an unknown quantization, UnsupportedModelError for an unknown architecture.
    """
    writer = _begin(path, checkpoint.config, quantization)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_description(description)
    writer.add_license(licence)
    _add_shape(writer, checkpoint.config, quantization)
    add_tokenizer(writer, checkpoint)
    return writer


def _begin(path: Path, config: Mapping[str, Any], quantization: str) -> GGUFWriter:
    from gguf import GGUFWriter

    if quantization not in QUANTIZATIONS:
        raise SettingError("unknown quantization", got=quantization, expected=f"one of {', '.join(QUANTIZATIONS)}")
    check_architecture(config)
    return GGUFWriter(path, config["model_type"])


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_architecture(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError, naming what is known, for a model that would come out wrong."""
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            "this converter does not know the architecture", got=architecture, expected=", ".join(ARCHITECTURES)
        )
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
    for name, found, known in (
        ("scaling of positions", kind, ("default",)),
        ("sliding window", bool(config.get("use_sliding_window")), (False,)),
        ("quantised source", config.get("quantization") or config.get("quantization_config"), (None,)),
    ):
        if found not in known:
            raise UnsupportedModelError(f"this converter does not know a model with a {name}", got=str(found)[:80])


def _add_shape(writer: GGUFWriter, config: Mapping[str, Any], quantization: str) -> None:
    head_size = _head_size(config)
    writer.add_file_type(FILE_TYPES[quantization])
    writer.add_quantization_version(2)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(_rope_base(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def add_tokenizer(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    """Write the checkpoint's byte-level BPE tokenizer as GGUF metadata."""
    from gguf import TokenType

    tokenizer, settings = checkpoint.tokenizer, checkpoint.tokenizer_config
    size = checkpoint.config["vocab_size"]
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size
    for text, index in tokenizer["model"]["vocab"].items():
        tokens[index], types[index] = text, TokenType.NORMAL
    for entry in tokenizer["added_tokens"]:
        kind = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
        tokens[entry["id"]], types[entry["id"]] = entry["content"], kind
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(tokenizer["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    if settings.get("bos_token"):
        writer.add_bos_token_id(tokens.index(settings["bos_token"]))
    writer.add_eos_token_id(tokens.index(settings["eos_token"]))
    if settings.get("pad_token"):
        writer.add_pad_token_id(tokens.index(settings["pad_token"]))
    writer.add_add_bos_token(bool(settings.get("add_bos_token", False)))
    if settings.get("chat_template"):
        writer.add_chat_template(settings["chat_template"])


def _split_name(pre_tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the split that `tokenizer.json` describes."""
    if pre_tokenizer["type"] == "ByteLevel" and pre_tokenizer["use_regex"]:
        return "gpt-2"
    for part in pre_tokenizer.get("pretokenizers", ()):
        pattern = part.get("pattern", {}).get("Regex")
        if part["type"] == "Split" and pattern in SPLIT_PATTERNS:
            return SPLIT_PATTERNS[pattern]
    raise UnsupportedModelError(
        "this converter does not know how the tokenizer splits text",
        got=json.dumps(pre_tokenizer),
        expected="the split of GPT-2, Llama 3 or Qwen 2",
    )


def _add_tensors(
    writer: GGUFWriter,
    config: Mapping[str, Any],
    weights: Mapping[str, NDArray[np.float32]],
    quantization: str,
    on_tensor: Progress | None,
) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    for number, name in enumerate(sorted(weights, key=reading_order), start=1):
        if on_tensor is not None:
            on_tensor(number, len(weights))
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue  # the same matrix as the embedding, which llama.cpp then uses twice
        weight = interleave_heads(name, weights[name], config)
        kind = GGMLQuantizationType[quantization if weight.ndim == 2 else "F32"]
        writer.add_tensor(gguf_name(name), quantize(weight, kind), raw_dtype=kind)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor. Raises UnsupportedModelError."""
    if name in OUTER_TENSORS:
        return OUTER_TENSORS[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None or match[2] not in LAYER_MODULES:
        raise UnsupportedModelError("this converter does not know the tensor", got=name)
    return f"blk.{match[1]}.{LAYER_MODULES[match[2]]}.{match[3]}"


def reading_order(name: str) -> tuple[int, int, str]:
    """Embedding, layers by number, then the rest: the order in which a forward pass reads them."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    if match:
        return (1, int(match[1]), name)
    return (0 if "embed_tokens" in name else 2, 0, name)


def interleave_heads(
    name: str, weight: NDArray[np.float32], config: Mapping[str, Any], *, back: bool = False
) -> NDArray[np.float32]:
    """The tensor with each head's rows (a1 a2 .. b1 b2 ..) reordered to (a1 b1 a2 b2 ..) where GGUF wants them so,
    or back.

    Hugging Face rotates a head's first half with its second, llama.cpp's `llama` architecture
    rotates neighbours (its qwen architectures do not).
    """
    projection = re.search(r"\.([qk])_proj\.", name)
    if config["model_type"] != "llama" or projection is None:
        return weight
    num_heads = config["num_attention_heads" if projection[1] == "q" else "num_key_value_heads"]
    halves = weight.reshape(num_heads, *((-1, 2) if back else (2, -1)), *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _rope_base(config: Mapping[str, Any]) -> float:
    """Newer configurations keep it one level down."""
    inner = config.get("rope_parameters")
    base = config.get("rope_theta", inner.get("rope_theta") if isinstance(inner, dict) else None)
    if not isinstance(base, int | float):
        raise ModelFileError("config.json names no rope_theta", got=base, expected="a number")
    return float(base)


def _head_size(config: Mapping[str, Any]) -> int:
    size: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return size
