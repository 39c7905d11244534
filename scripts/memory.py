"""Measures the peak resident memory of pairs on llama.cpp and compares it with what was planned.

    python scripts/memory.py FOLDER                  # the table of docs/fit.md, a few minutes
    python scripts/memory.py FOLDER --only half      # the expanded target only
    python scripts/memory.py FOLDER --prefill        # fills contexts with real passes, many minutes

FOLDER takes the expanded target, 0.5B parameters in Q4_0, written at the first run.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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


def write_half(path: Path) -> None:
    """The bundled target with the cost of 0.5B parameters, in Q4_0, as `localspec bench expand` makes it."""
    from localspec.bench.expand import Size, expand
    from localspec.loading import bundled_path

    path.parent.mkdir(parents=True, exist_ok=True)
    expand(bundled_path("tiny", "target"), path, Size.named("0.5b"), "gguf", "Q4_0")


if __name__ == "__main__":
    main()
