"""Reads the headers of block heads in GGUF form: architecture `dflash`, with Markov tensors a DSpark head."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from localspec.errors import HeadFileError

from .block_tensors import BlockDetails
from .head_header import Backbone, HeadFiles, HeadHeader
from .numbers import MAX_LAYERS, Numbers

_ARCHITECTURES = ("dflash", "dspark")
_SELECTOR = "selector_predecessor.weight"
_MASK_TOKEN = "tokenizer.ggml.mask_token_id"


def read_gguf_block_head(files: HeadFiles) -> HeadHeader | None:
    """The header of a block head, None for anything else. Raises HeadFileError naming a key or tensor."""
    architecture = files.config.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        return None
    fields = Numbers(files.config, f"{architecture}.", files.path.name)
    hidden, num_heads = fields.size("embedding_length"), fields.size("attention.head_count")
    layers = files.config.get(f"{architecture}.target_layers")
    if not isinstance(layers, np.ndarray) or not layers.size or layers.size > MAX_LAYERS:
        raise HeadFileError(
            f"{files.path.name}: {architecture}.target_layers is missing", expected="the layers to read"
        )
    taps = tuple(int(layer) - 1 for layer in layers)  # inputs of layers, as llama.cpp counts
    fc = files.shape("fc.weight")
    if fc[0] != hidden or fc[1] % len(taps):
        raise HeadFileError("tensor fc.weight has the wrong shape", got=fc, expected=f"({hidden}, {len(taps)} taps)")
    vocab = _vocabulary(files)
    draft = files.shape("output.weight")[0] if "output.weight" in files.shapes else vocab
    return HeadHeader(
        kind=_kind(files, str(architecture)),
        layout="gguf",
        files=files,
        taps=taps,
        target_hidden=fc[1] // len(taps),
        num_parameters=sum(math.prod(shape) for name, shape in files.shapes.items() if name != "d2t"),
        backbone=Backbone(
            family="qwen3",
            num_layers=fields.size("block_count", most=MAX_LAYERS),
            hidden_size=hidden,
            num_heads=num_heads,
            num_kv_heads=fields.size("attention.head_count_kv", num_heads),
            head_size=fields.size("attention.key_length", max(1, hidden // max(1, num_heads))),
            feed_forward=fields.size("feed_forward_length"),
            norm_eps=float(files.config.get(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)),
            rope_theta=float(files.config.get(f"{architecture}.rope.freq_base", 10000.0)),
            max_positions=fields.size("context_length", 0) or None,
        ),
        vocab_size=vocab,
        draft_vocab=draft if "d2t" in files.shapes and draft < vocab else None,
        details=_details(files, fields, str(architecture)),
    )


def _kind(files: HeadFiles, architecture: str) -> str:
    if "markov_w1.weight" in files.shapes or "conf_proj.weight" in files.shapes:
        return "dspark"
    if _SELECTOR in files.shapes:
        return "dflash2"
    return "jetspec" if files.config.get(f"{architecture}.attention.causal") else "dflash"


def _vocabulary(files: HeadFiles) -> int:
    for name in ("token_embd.weight", "markov_w1.weight"):
        if name in files.shapes:
            return files.shape(name)[0]
    tokens = files.config.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise HeadFileError(f"{files.path.name}: tokenizer.ggml.tokens is missing")
    return len(tokens)


def _details(files: HeadFiles, fields: Numbers, architecture: str) -> BlockDetails:
    num_layers, shapes = fields.size("block_count", most=MAX_LAYERS), files.shapes
    window = fields.size("attention.sliding_window", 0) or None
    pattern: Any = files.config.get(f"{architecture}.attention.sliding_window_pattern")
    sliding = [bool(item) for item in np.ravel(pattern)] if pattern is not None else [window is not None] * num_layers
    causal = files.config.get(f"{architecture}.attention.causal")
    anchored = files.config.get(f"{architecture}.sample_from_anchor", "markov_w1.weight" in shapes)
    block = fields.size("block_size")
    if block < 2 or len(sliding) != num_layers:
        raise HeadFileError(f"{files.path.name}: {architecture}.block_size or the window's pattern is wrong", got=block)
    return BlockDetails(
        block_size=block,
        mask_token=Numbers(files.config, "", files.path.name).size(_MASK_TOKEN),
        in_place=not anchored,
        causal=(bool(causal),) * num_layers,
        windows=tuple(window if slides else None for slides in sliding),
        markov="vanilla" if "markov_w1.weight" in shapes else "",
        markov_rank=files.shape("markov_w1.weight")[1] if "markov_w1.weight" in shapes else 0,
        confidence="conf_proj.weight" in shapes,
        confidence_sees_markov="conf_proj.weight" in shapes and "markov_w1.weight" in shapes,
        own_embedding="token_embd.weight" in shapes,
        own_output="output.weight" in shapes,
        convolution=_pair(fields, "conv_kernel_size", "conv_group_size") if _SELECTOR in shapes else None,
        selector=_pair(fields, "selector_rank", "selector_top_k") if _SELECTOR in shapes else None,
    )


def _pair(fields: Numbers, first: str, second: str) -> tuple[int, int]:
    return fields.size(first), fields.size(second)
