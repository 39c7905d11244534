"""Reads back what `conversion.py` wrote: a GGUF file as the checkpoint it was made from.

Quantised matrices come back as the values they stand for. Tokenizers are byte-level BPE with the splits
that `conversion.py` knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localspec.errors import ModelFileError, UnsupportedModelError
from localspec.formats import gguf
from localspec.formats.conversion import (
    ARCHITECTURES,
    LAYER_MODULES,
    OUTER_TENSORS,
    SPLIT_PATTERNS,
    Checkpoint,
    interleave_heads,
)

__all__ = ["read_gguf"]

_OUTER = {theirs: ours for ours, theirs in OUTER_TENSORS.items()}
_MODULES = {theirs: ours for ours, theirs in LAYER_MODULES.items()}
_SHAPE_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
}


def read_gguf(path: Path) -> Checkpoint:
    """Raises ModelFileError, and UnsupportedModelError for what the converter does not write."""
    header = gguf.read_header(path)
    metadata = {
        key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in header.metadata.items()
    }
    weights = _Weights(path, header.tensors.values())
    config = _config(path, metadata, weights)
    weights.config = config
    return Checkpoint(config, weights, _tokenizer(metadata), _tokenizer_config(metadata))


class _Weights(Mapping[str, NDArray[np.float32]]):
    """Tensors by Hugging Face name, dequantised when asked for."""

    def __init__(self, path: Path, tensors: Iterable[gguf.TensorInfo]) -> None:
        self._path = path
        self._tensors = {_our_name(tensor.name): tensor for tensor in tensors}
        self.config: Mapping[str, Any] = {}

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        raw = np.fromfile(self._path, np.uint8, tensor.num_bytes, offset=tensor.offset)
        if len(raw) != tensor.num_bytes:
            raise ModelFileError(f"{self._path.name} became shorter while it was read")
        try:
            values = dequantize(raw.reshape(*tensor.shape[:-1], -1), GGMLQuantizationType[tensor.kind])
        except (NotImplementedError, ValueError) as error:
            raise UnsupportedModelError(f"tensor {name} of {self._path.name} cannot be read", got=error) from error
        return interleave_heads(name, values.astype(np.float32, copy=False), self.config, back=True)

    def __contains__(self, name: object) -> bool:  # inherited, it would read the tensor
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _our_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _MODULES:
        raise UnsupportedModelError("this converter does not know the tensor", got=name)
    return f"model.layers.{match[1]}.{_MODULES[match[2]]}.{match[3]}"


def _config(path: Path, metadata: Mapping[str, Any], names: Mapping[str, object]) -> dict[str, Any]:
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            "this converter does not know the architecture", got=architecture, expected=", ".join(ARCHITECTURES)
        )
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise UnsupportedModelError("this converter does not know scaled positions", got=scaling)
    config = {ours: metadata.get(f"{architecture}.{theirs}") for ours, theirs in _SHAPE_KEYS.items()}
    if config["head_dim"] is None and config["hidden_size"] and config["num_attention_heads"]:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    missing = [_SHAPE_KEYS[name] for name, value in config.items() if value is None]
    if missing:
        raise ModelFileError(f"the header of {path.name} is incomplete", got=f"no {', '.join(missing)}")
    return {
        **config,
        "architectures": [f"{architecture.capitalize()}ForCausalLM"],
        "model_type": architecture,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "tie_word_embeddings": "lm_head.weight" not in names,
    }


def _tokenizer(metadata: Mapping[str, Any]) -> dict[str, Any]:
    from gguf import TokenType

    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    patterns = {name: pattern for pattern, name in SPLIT_PATTERNS.items()}
    if kind != "gpt2" or (split != "gpt-2" and split not in patterns):
        raise UnsupportedModelError(
            "this converter does not know the tokenizer",
            got=f"{kind}, split {split}",
            expected=f"gpt2, split gpt-2 or {' or '.join(patterns)}",
        )
    vocab: dict[str, int] = {}
    added = []
    pairs = zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
    for token, (text, role) in enumerate(pairs):
        if role != TokenType.UNUSED:
            vocab[text] = token
        if role in (TokenType.CONTROL, TokenType.USER_DEFINED):
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added.append({"id": token, "content": text, **flags, "special": role == TokenType.CONTROL})
    parts: list[dict[str, Any]] = [_byte_level(use_regex=split == "gpt-2")]
    if split in patterns:
        parts.insert(
            0, {"type": "Split", "pattern": {"Regex": patterns[split]}, "behavior": "Isolated", "invert": False}
        )
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": split == "llama-bpe",
        "vocab": vocab,
        "merges": metadata["tokenizer.ggml.merges"],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts},
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": model,
    }


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]

    def text(name: str) -> str | None:
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if token is None else str(tokens[token])

    if text("eos") is None:
        raise ModelFileError("the GGUF header names no token that ends an answer")
    found = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text("bos"),
        "eos_token": text("eos"),
        "pad_token": text("padding"),
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    return {name: value for name, value in found.items() if value is not None}
