"""Run as a program: do llama.cpp's extra buffers (AMX, repacking) survive on this machine?

usage: probe_child.py <folder that holds llama_cpp> <model written by `model_bytes`> <extra buffers: 0 or 1>

Runs a pass of width 1 and one of width 32 and prints the logits as JSON. A crash is an answer too: the
parent looks at the exit status. Imports nothing of localspec, for it must start fast and anywhere.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from typing import Any

import numpy as np

_WIDTH = 256  # K-quants come in blocks of 256
_NUM_LAYERS = 2
_HEAD = 64
_CONTEXT = 128
_ALIGNMENT = 32
_KINDS = {  # name: (number in GGUF, elements per block, bytes per block, offsets of the half-precision scales)
    "F32": (0, 1, 4, ()),
    "Q4_0": (2, 32, 18, (0,)),
    "Q8_0": (8, 32, 34, (0,)),
    "Q4_K": (12, 256, 144, (0, 2)),
    "Q6_K": (14, 256, 210, (208,)),
}

# The tokenizer: GPT-2's byte alphabet between three special tokens and a few merges. The matrix units
# want rows in 32s, hence the number of merges.
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_PLAIN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_LETTERS = [chr(byte) for byte in _PLAIN] + [chr(256 + place) for place in range(256 - len(_PLAIN))]
_MERGES = [
    "Ġ t", "h e", "i n", "r e", "o n", "Ġt he", "e r", "Ġ a", "Ġ s", "a t", "Ġ w", "o r", "e n", "Ġ o", "i s",
    "i t", "e s", "Ġ c", "in g", "a n", "Ġo f", "e d", "Ġ b", "a l", "Ġ f", "Ġ p", "Ġ m", "n d", "Ġ in",
]  # fmt: skip
_TOKENS = [*_SPECIAL, *_LETTERS, *(merge.replace(" ", "") for merge in _MERGES)]
_VOCABULARY = len(_TOKENS)
_NORMAL, _CONTROL = 1, 3

_LAYER = {  # name: (kind, rows, columns)
    "attn_norm": ("F32", 1, _WIDTH),
    "attn_q": ("Q4_0", _WIDTH, _WIDTH),
    "attn_k": ("Q4_0", _WIDTH, _WIDTH),
    "attn_v": ("Q8_0", _WIDTH, _WIDTH),
    "attn_output": ("Q8_0", _WIDTH, _WIDTH),
    "attn_q_norm": ("F32", 1, _HEAD),
    "attn_k_norm": ("F32", 1, _HEAD),
    "ffn_norm": ("F32", 1, _WIDTH),
    "ffn_gate": ("Q4_K", _WIDTH, _WIDTH),
    "ffn_up": ("Q4_0", _WIDTH, _WIDTH),
    "ffn_down": ("Q6_K", _WIDTH, _WIDTH),
}
_SHAPES = {
    "token_embd": ("Q8_0", _VOCABULARY, _WIDTH),
    **{f"blk.{layer}.{name}": shape for layer in range(_NUM_LAYERS) for name, shape in _LAYER.items()},
    "output_norm": ("F32", 1, _WIDTH),
    "output": ("Q6_K", _VOCABULARY, _WIDTH),
}
_METADATA: dict[str, object] = {  # all that a converter writes, so that no loader meets a case that it seldom sees
    "general.architecture": "qwen3",
    "general.type": "model",
    "general.name": "localspec probe",
    "general.file_type": 15,
    "general.quantization_version": 2,
    "general.alignment": _ALIGNMENT,
    "qwen3.vocab_size": _VOCABULARY,
    "qwen3.context_length": _CONTEXT,
    "qwen3.embedding_length": _WIDTH,
    "qwen3.block_count": _NUM_LAYERS,
    "qwen3.feed_forward_length": _WIDTH,
    "qwen3.attention.head_count": _WIDTH // _HEAD,
    "qwen3.attention.head_count_kv": _WIDTH // _HEAD,
    "qwen3.attention.key_length": _HEAD,
    "qwen3.attention.value_length": _HEAD,
    "qwen3.rope.dimension_count": _HEAD,
    "qwen3.rope.freq_base": 10000.0,
    "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": _TOKENS,
    "tokenizer.ggml.token_type": [_CONTROL] * len(_SPECIAL) + [_NORMAL] * (_VOCABULARY - len(_SPECIAL)),
    "tokenizer.ggml.merges": _MERGES,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.add_bos_token": False,
}


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: object) -> tuple[int, bytes]:
    """(its type's number in GGUF, its bytes)."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, _text(value)
    assert isinstance(value, list)
    parts = [(5, struct.pack("<i", item)) if isinstance(item, int) else _value(item) for item in value]
    return 9, struct.pack("<IQ", parts[0][0], len(parts)) + b"".join(raw for _, raw in parts)


def _entry(key: str, value: object) -> bytes:
    kind, raw = _value(value)
    return _text(key) + struct.pack("<I", kind) + raw


def _padded(content: bytes) -> bytes:
    return content + b"\0" * (-len(content) % _ALIGNMENT)


def _tensor(rng: np.random.Generator, kind: str, num_elements: int) -> bytes:
    """Random quants under a fixed small scale; norms of one."""
    _, per_block, num_bytes, scales = _KINDS[kind]
    if kind == "F32":
        return np.ones(num_elements, np.float32).tobytes()
    blocks = rng.integers(0, 256, (num_elements // per_block, num_bytes), dtype=np.uint8)
    for offset in scales:
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    return blocks.tobytes()


def model_bytes() -> bytes:
    """A whole GGUF file as a converter would write it: qwen3, two layers, a byte-level tokenizer."""
    rng = np.random.default_rng(0)
    head, data = b"", b""
    for name, (kind, rows, columns) in _SHAPES.items():
        sizes = (columns,) if rows == 1 else (columns, rows)
        head += _text(name + ".weight") + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        head += struct.pack("<IQ", _KINDS[kind][0], len(data))
        data += _padded(_tensor(rng, kind, rows * columns))
    meta = b"".join(_entry(key, value) for key, value in _METADATA.items())
    return _padded(b"GGUF" + struct.pack("<IQQ", 3, len(_SHAPES), len(_METADATA)) + meta + head) + data


def run(path: str, extra_buffers: bool) -> list[float]:
    """Logits of a pass of width 1, then of one of width 32."""
    import llama_cpp.llama_cpp as binding

    lib: Any = binding
    lib.llama_backend_init()
    model_params, params = lib.llama_model_default_params(), lib.llama_context_default_params()
    model_params.n_gpu_layers, model_params.use_extra_bufts = 0, extra_buffers
    params.n_ctx, params.n_threads, params.n_threads_batch, params.op_offload = _CONTEXT, 1, 1, False
    model = lib.llama_model_load_from_file(os.fsencode(path), model_params)
    context = lib.llama_init_from_model(model, params) if model else None
    if not context:
        raise SystemExit("the probe's model does not load")
    result: list[float] = []
    for width in (1, 32):
        tokens = (ctypes.c_int32 * width)(*range(1, width + 1))
        if lib.llama_decode(context, lib.llama_batch_get_one(tokens, width)):
            raise SystemExit("the probe's model does not run")
        row = lib.llama_get_logits_ith(context, -1)
        result += [float(row[token]) for token in range(_VOCABULARY)]
    return result


def main() -> None:
    """Run the model, print the logits."""
    folder, path, extra_buffers = sys.argv[1:]
    sys.path.insert(0, folder)
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is expected; leave no core file
    sys.stdout.write(json.dumps(run(path, extra_buffers == "1")))


if __name__ == "__main__":
    main()
