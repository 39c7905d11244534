"""Tiny random-weight models on disk, for tests that need a real file but no download.

    write_gguf(folder / "model.gguf", quantization="Q4_0")
    write_safetensors(folder / "model", quantization="Q4_0")     # the same numbers, dequantised

About 100,000 parameters: hidden 64, 4 heads, 2 KV heads, head size 16, context 512. The tokenizer
is a real byte-level BPE: 3 special tokens, 256 bytes, up to 61 merges, ChatML template. The three
architectures differ where files differ: `llama` has its own output matrix, `qwen2` biases, `qwen3`
head norms. Two models of one seed, one of them with a little `jitter`, make a pair whose drafter is
often right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from localspec.errors import SettingError
from localspec.formats.conversion import Checkpoint, write_gguf_file

__all__ = [
    "NUM_MERGES",
    "SPECIAL_TOKENS",
    "TinyModel",
    "tiny_checkpoint",
    "write_folder",
    "write_gguf",
    "write_safetensors",
]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Tokens 0 (padding), 1 and 2 (end of answer)."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_MERGE_TABLE = (
    "Ġ t|h e|i n|r e|o n|Ġt he|e r|Ġ a|Ġ s|a t|Ġ w|o r|e n|Ġ o|i s|i t|e s|Ġ c|in g|a n|Ġo f|e d|Ġ b|a l|Ġ f|Ġ p|"
    "Ġ m|n d|Ġ in|o u|Ġa nd|a r|l e|Ġt o|i c|Ġ d|i on|r o|Ġ h|Ġ Ġ|e l|ĠĠ ĠĠ|Ġ re|Ġ n|ou n|s t|oun d|Ġ l|v e|Ġ e|"
    "Ġ g|l o|h el|hel lo|or l|Ġw orl|a s|i l|d e|de f|re t"
)
_MERGES = _MERGE_TABLE.split("|")

NUM_MERGES = len(_MERGES)
"""Merges of the full tokenizer; fewer make another vocabulary."""

_HIDDEN, _HEAD, _HEADS, _KV_HEADS, _FEED_FORWARD = 64, 16, 4, 2, 128


class TinyModel(TypedDict, total=False):
    """What may be chosen about a tiny model; the defaults are those of `tiny_checkpoint`."""

    architecture: str
    seed: int
    jitter: float
    num_layers: int
    num_merges: int
    padding_rows: int


def write_gguf(path: Path, *, quantization: str = "F16", **model: Unpack[TinyModel]) -> Path:
    """Write a tiny model as GGUF and return `path`."""
    checkpoint = tiny_checkpoint(**model)
    write_gguf_file(path, checkpoint, quantization, name=path.stem)
    return path


def write_safetensors(folder: Path, *, quantization: str = "F32", **model: Unpack[TinyModel]) -> Path:
    """Write the same model as a Hugging Face folder, in float32, and return `folder`.

    quantization: matrices hold the values that a GGUF file of that type would give back.
    """
    checkpoint = tiny_checkpoint(**model)
    weights = {name: _rounded(weight, quantization) for name, weight in checkpoint.weights.items()}
    write_folder(folder, checkpoint.config, weights)
    for name, content in (
        ("tokenizer.json", checkpoint.tokenizer),
        ("tokenizer_config.json", checkpoint.tokenizer_config),
    ):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    return folder


def write_folder(folder: Path, config: Mapping[str, Any], weights: Mapping[str, NDArray[Any]]) -> Path:
    """Write config.json and model.safetensors into `folder`, made where it is not there, and return it."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
    return folder


def tiny_checkpoint(
    *,
    architecture: str = "qwen3",
    seed: int = 0,
    jitter: float = 0.0,
    num_layers: int = 2,
    num_merges: int = NUM_MERGES,
    padding_rows: int = 0,
) -> Checkpoint:
    """The model behind both writers, in memory.

    seed: the weights.  jitter: standard deviation of noise added to them, relative to their own.
    num_merges: fewer make another vocabulary.  padding_rows: rows of logits beyond the vocabulary.
    """
    if architecture not in ("llama", "qwen2", "qwen3"):
        raise SettingError("unknown architecture", got=architecture, expected="llama, qwen2 or qwen3")
    if not 0 <= num_merges <= NUM_MERGES:
        raise SettingError("num_merges out of range", got=num_merges, expected=f"0 to {NUM_MERGES}")
    tokenizer = _tokenizer(num_merges)
    num_rows = len(tokenizer["model"]["vocab"]) + padding_rows
    config = {
        "architectures": [f"{architecture.capitalize()}ForCausalLM"],
        "model_type": architecture,
        "vocab_size": num_rows,
        "hidden_size": _HIDDEN,
        "intermediate_size": _FEED_FORWARD,
        "num_hidden_layers": num_layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": architecture != "llama",
        "bos_token_id": None,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    weights = _weights(_shapes(architecture, num_layers, num_rows), seed, jitter)
    return Checkpoint(config, weights, tokenizer, tokenizer_config)


def _shapes(architecture: str, num_layers: int, num_rows: int) -> dict[str, tuple[int, ...]]:
    queries, keys = _HEADS * _HEAD, _KV_HEADS * _HEAD
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (num_rows, _HIDDEN)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (_HIDDEN,)
        for name, num_outputs in (("q", queries), ("k", keys), ("v", keys)):
            shapes[prefix + f"self_attn.{name}_proj.weight"] = (num_outputs, _HIDDEN)
            if architecture == "qwen2":
                shapes[prefix + f"self_attn.{name}_proj.bias"] = (num_outputs,)
        if architecture == "qwen3":
            shapes[prefix + "self_attn.q_norm.weight"] = (_HEAD,)
            shapes[prefix + "self_attn.k_norm.weight"] = (_HEAD,)
        shapes[prefix + "self_attn.o_proj.weight"] = (_HIDDEN, queries)
        shapes[prefix + "post_attention_layernorm.weight"] = (_HIDDEN,)
        shapes[prefix + "mlp.gate_proj.weight"] = (_FEED_FORWARD, _HIDDEN)
        shapes[prefix + "mlp.up_proj.weight"] = (_FEED_FORWARD, _HIDDEN)
        shapes[prefix + "mlp.down_proj.weight"] = (_HIDDEN, _FEED_FORWARD)
    shapes["model.norm.weight"] = (_HIDDEN,)
    if architecture == "llama":
        shapes["lm_head.weight"] = (num_rows, _HIDDEN)
    return shapes


def _weights(shapes: dict[str, tuple[int, ...]], seed: int, jitter: float) -> dict[str, NDArray[np.float32]]:
    """Random weights whose logits have a standard deviation near 2: neither flat nor certain."""
    values, noise = np.random.default_rng((seed, 0)), np.random.default_rng((seed, 1))
    weights: dict[str, NDArray[np.float32]] = {}
    for name, shape in shapes.items():
        weight = values.standard_normal(shape, np.float32)
        weight += np.float32(jitter) * noise.standard_normal(shape, np.float32)
        if name.endswith("norm.weight"):
            weights[name] = np.float32(1) + weight / np.float32(10)  # not all one, so that a forgotten norm shows
        elif "embed_tokens" in name or "lm_head" in name:
            weights[name] = weight * np.float32(2 / _HIDDEN**0.5)
        else:
            weights[name] = weight * np.float32(shape[-1] ** -0.5)
    return weights


def _tokenizer(num_merges: int) -> dict[str, Any]:
    """`tokenizer.json` as the `tokenizers` library writes it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = [(merge.split()[0], merge.split()[1]) for merge in _MERGES[:num_merges]]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    vocab = {piece: index for index, piece in enumerate(pieces, start=len(SPECIAL_TOKENS))}
    vocab |= {text: index for index, text in enumerate(SPECIAL_TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    parsed: dict[str, Any] = json.loads(tokenizer.to_str())
    return parsed


def _rounded(weight: NDArray[np.float32], quantization: str) -> NDArray[np.float32]:
    """The values that a matrix has after being stored in `quantization`."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    if weight.ndim < 2:
        return weight
    kind = GGMLQuantizationType[quantization]
    rounded: NDArray[np.float32] = dequantize(quantize(weight, kind), kind).reshape(weight.shape)
    return rounded
