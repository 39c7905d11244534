"""Run as a program: do llama.cpp's extra buffers (AMX, repacking) survive on this machine?

usage: probe_child.py <folder that holds llama_cpp> <model written by `model_bytes`> <extra buffers: 0 or 1>

Runs a pass of width 1 and one of width 32 and prints the logits as JSON. A crash is an answer too: the
parent looks at the exit status. Imports nothing of localspec, for it must start fast and anywhere.
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys
from typing import Any

import numpy as np

_WIDTH = 256  # K-quants come in blocks of 256
_VOCABULARY = 128
_ALIGNMENT = 32
_KINDS = {  # name: (number in GGUF, elements per block, bytes per block, offsets of the half-precision scales)
    "F32": (0, 1, 4, ()),
    "Q4_0": (2, 32, 18, (0,)),
    "Q8_0": (8, 32, 34, (0,)),
    "Q4_K": (12, 256, 144, (0, 2)),
    "Q6_K": (14, 256, 210, (208,)),
}
_SHAPES = {  # name: (kind, rows, columns)
    "token_embd": ("Q8_0", _VOCABULARY, _WIDTH),
    "output_norm": ("F32", 1, _WIDTH),
    "output": ("Q6_K", _VOCABULARY, _WIDTH),
    "blk.0.attn_norm": ("F32", 1, _WIDTH),
    "blk.0.attn_q": ("Q4_0", _WIDTH, _WIDTH),
    "blk.0.attn_k": ("Q4_0", _WIDTH, _WIDTH),
    "blk.0.attn_v": ("Q8_0", _WIDTH, _WIDTH),
    "blk.0.attn_output": ("Q8_0", _WIDTH, _WIDTH),
    "blk.0.ffn_norm": ("F32", 1, _WIDTH),
    "blk.0.ffn_gate": ("Q4_K", _WIDTH, _WIDTH),
    "blk.0.ffn_up": ("Q4_0", _WIDTH, _WIDTH),
    "blk.0.ffn_down": ("Q6_K", _WIDTH, _WIDTH),
}
_NUMBERS = {
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": _WIDTH,
    "llama.feed_forward_length": _WIDTH,
    "llama.attention.head_count": 4,
    "llama.rope.dimension_count": _WIDTH // 4,
    "llama.vocab_size": _VOCABULARY,
}


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


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
    """A whole GGUF file: llama architecture, one layer, no vocabulary."""
    rng = np.random.default_rng(0)
    head, data = b"", b""
    for name, (kind, rows, columns) in _SHAPES.items():
        sizes = (columns,) if rows == 1 else (columns, rows)
        data += b"\0" * (-len(data) % _ALIGNMENT)
        head += _text(name + ".weight") + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        head += struct.pack("<IQ", _KINDS[kind][0], len(data))
        data += _tensor(rng, kind, rows * columns)
    meta = [_text("general.architecture") + struct.pack("<I", 8) + _text("llama")]
    meta.append(_text("tokenizer.ggml.model") + struct.pack("<I", 8) + _text("no_vocab"))
    meta += [_text(key) + struct.pack("<II", 4, value) for key, value in _NUMBERS.items()]
    meta.append(_text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5))
    whole = b"GGUF" + struct.pack("<IQQ", 3, len(_SHAPES), len(meta)) + b"".join(meta) + head
    return whole + b"\0" * (-len(whole) % _ALIGNMENT) + data


def run(path: str, extra_buffers: bool) -> list[float]:
    """Logits of a pass of width 1, then of one of width 32."""
    import llama_cpp.llama_cpp as binding

    lib: Any = binding
    model_params, params = lib.llama_model_default_params(), lib.llama_context_default_params()
    model_params.n_gpu_layers, model_params.use_extra_bufts = 0, extra_buffers
    params.n_ctx, params.n_threads, params.n_threads_batch, params.op_offload = 128, 1, 1, False
    model = lib.llama_model_load_from_file(path.encode(), model_params)
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
