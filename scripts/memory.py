"""Measures the peak resident memory of pairs on llama.cpp and compares it with what was planned.

    python scripts/memory.py FOLDER                  # the table of docs/fit.md, a few minutes
    python scripts/memory.py FOLDER --only half      # the expanded target only
    python scripts/memory.py FOLDER --prefill        # fills contexts with real passes, many minutes

FOLDER takes the expanded target, 0.5B parameters with random weights in Q8_0, written at the first run.
Each row is a child process that opens the pair, fills both caches to the last cell, and runs a pass of
the largest batch and one of the widest verify. Its peak is VmHWM: mapped pages of the model file that
were touched count, as they do for `top`. Without --prefill a block of cells is computed once and copied into
the others, which uses the same memory in a fraction of the time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from localspec.protocols import LanguageModel

_BLOCK = 512
_ROWS = (("tiny", 2048), ("tiny", 16384), ("half", 2048), ("half", 16384))


def main() -> None:
    """Print the table, or with --child measure one row and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=("tiny", "half"), help="one family")
    parser.add_argument("--prefill", action="store_true", help="fill the contexts with real passes")
    parser.add_argument("--child", metavar="TARGET", help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_peak(options.child, options.context, options.prefill)))
        return
    from localspec.hub.fit import plan

    half = options.folder / "half.gguf"
    rows = [row for row in _ROWS if options.only in (None, row[0])]
    if any(family == "half" for family, _ in rows) and not half.exists():
        write_half(half)
    print("| target | context | planned MiB | measured peak MiB | planned / measured |")
    print("|---|---|---|---|---|")
    for family, context in rows:
        target = "tiny" if family == "tiny" else str(half)
        planned = plan(target, "tiny", context=context, backend="llamacpp").total
        command = [sys.executable, __file__, str(options.folder), "--child", target, "--context", str(context)]
        output = subprocess.run(
            command + ["--prefill"] * options.prefill, stdout=subprocess.PIPE, check=True, text=True
        ).stdout
        peak = json.loads(output)
        print(
            f"| {family} | {context} | {planned / 2**20:.0f} | {peak / 2**20:.0f} | {planned / peak:.3f} |", flush=True
        )


def _peak(target: str, context: int, prefill: bool) -> int:
    """Peak resident bytes of this process after the largest passes that the pair will see."""
    from localspec.loading import open_pair
    from localspec.protocols import LoadSettings

    settings = LoadSettings(context=context, num_sequences=1)
    with open_pair(target, "tiny", backend="llamacpp", settings=settings) as pair:
        for model in (pair.target, pair.draft):
            assert model is not None
            _fill(model, context, prefill)
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _fill(model: LanguageModel, context: int, prefill: bool) -> None:
    """Use every cell: a block of tokens, its copies, a last pass as large as a batch may be, a wide verify."""
    from localspec.protocols import HostTokens, Step, chain_parents

    state: Any = model.open()
    width = model.capabilities.max_width
    tokens = np.array([(index * 7919 + 13) % model.tokenizer.num_tokens for index in range(_BLOCK)], np.int32)

    def run(count: int, num_scored: int) -> None:
        rows = tuple(range(count - num_scored, count))
        model.forward([Step(state, (HostTokens(tokens[:count]),), chain_parents(state, count), rows)])
        state.keep(range(count))

    run(_BLOCK, 0)
    if prefill:
        for _ in range(context // _BLOCK - 2):
            run(_BLOCK, 0)
    else:
        pieces = state.cache.copied(0, _BLOCK)
        for _ in range(context // _BLOCK - 2):
            state.cache.insert(state.cache.take(), pieces)
    run(_BLOCK, 0)
    state.truncate(2 * _BLOCK - width if not prefill else context - width)
    run(width, width)


class _Random(Mapping[str, NDArray[np.float32]]):
    """Weights made when asked for: two gigabytes of them need not be held at once."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        shape = self._shapes[name]
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        values = np.random.default_rng(list(name.encode())).standard_normal(shape, np.float32)
        return values * np.float32(shape[-1] ** -0.5)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def write_half(path: Path) -> None:
    """A Qwen3 of 0.5B parameters with random weights and the bundled pair's tokenizer, in Q8_0."""
    from localspec.formats.conversion import write_gguf_like
    from localspec.loading import bundled_path

    hidden, ffn, layers, heads, kv, size, vocab = 896, 7040, 24, 14, 2, 64, 8192
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        one = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_norm": (size,),
            "self_attn.k_norm": (size,),
            "self_attn.q_proj": (heads * size, hidden),
            "self_attn.k_proj": (kv * size, hidden),
            "self_attn.v_proj": (kv * size, hidden),
            "self_attn.o_proj": (hidden, heads * size),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in one.items()}
    config = {
        "model_type": "qwen3",
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": size,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf_like(path, bundled_path("tiny", "target"), config, _Random(shapes), "Q8_0", name="half")


if __name__ == "__main__":
    main()
