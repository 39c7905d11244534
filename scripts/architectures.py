"""Examine every architecture of a runtime, built tiny with random weights: tree, chain or refused?

    python scripts/architectures.py --backend mlx [--only NAME ...] [--sample N] [--output docs/architectures.md]

Prints a table and, with --output, writes it into that file between the backend's markers. The work runs in a
child process: where a model kills it, that model has failed and another child takes the rest.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from localspec.testing.architectures import Finding, table

SUITES = {"llamacpp": "tiny_llamacpp", "mlx": "tiny_mlx"}
"""Modules beside this one, with names(), versions(), examined(name, rounds, weights) and remarks()."""

HEADING = """# Architectures

Every architecture of a runtime, built tiny with random float32 weights and examined by
`localspec/testing/architectures.py`: rows of chains, and of trees where the backend allows them, against rows
decoded one by one and against the runtime's own rows; then random rounds of propose, keep, truncate and fork, the
state compared with a fresh prefill. *tree*: any token tree is exact. *chain*: chains are; tokens replayed are those
that were run again because others were dropped, none where the memory forgets freely. *refused*: not opened, with the
reason. `python scripts/architectures.py --backend NAME --output docs/architectures.md` writes a section.
"""


def main() -> int:
    """Exit code 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=sorted(SUITES), required=True)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures")
    parser.add_argument("--sample", type=int, metavar="N", help="N of them, the same ones each time")
    parser.add_argument("--rounds", type=int, default=200, help="random rounds each (200)")
    parser.add_argument("--weights", metavar="TYPE", help="llama.cpp: F32, F16, Q8_0 or Q4_0 (F32)")
    parser.add_argument("--output", type=Path, help="the page whose section is replaced")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    suite: Any = import_module(SUITES[options.backend])
    names: list[str] = options.only or suite.names()
    if options.sample:
        names = sorted(random.Random(0).sample(names, min(options.sample, len(names))))
    if options.worker:
        for name in names:
            print(json.dumps(asdict(suite.examined(name, options.rounds, options.weights))), flush=True)
        return 0
    started = time.monotonic()
    findings = []
    for found in _in_children(options, names):
        findings.append(found)
        print(f"{found.name:24} {found.kind:8} {found.reason[:100]}", file=sys.stderr, flush=True)
    text = _section(options.backend, suite, findings, options.rounds)
    print(text)
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    if options.output is not None:
        write_section(options.output, options.backend, text)
    return int(any(found.kind == "failed" for found in findings))


def _in_children(options: argparse.Namespace, names: Sequence[str]) -> Iterator[Finding]:
    """One finding per name, whatever happens to the process that makes it."""
    left = list(names)
    while left:
        command = [sys.executable, __file__, "--backend", options.backend, "--rounds", str(options.rounds), "--worker"]
        command += [*(["--weights", options.weights] if options.weights else []), "--only"]
        with subprocess.Popen([*command, *left], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("{"):
                    left.pop(0)
                    yield Finding(**json.loads(line))
        if left and child.returncode:
            yield Finding(left.pop(0), "failed", f"the process died (exit code {child.returncode})")


def _section(backend: str, suite: Any, findings: Sequence[Finding], num_rounds: int) -> str:
    kinds = Counter(found.kind for found in findings)
    counts = ", ".join(f"{kinds[kind]} {kind}" for kind in ("tree", "chain", "refused", "failed") if kinds[kind])
    return (
        f"## {backend}\n\n{suite.versions()}; {num_rounds} rounds each. {len(findings)} models: {counts}.\n\n"
        f"{table(findings)}\n{suite.remarks()}"
    )


def write_section(path: Path, backend: str, section: str) -> None:
    """Replace what is between the backend's markers, or add a section."""
    text = path.read_text() if path.exists() else HEADING
    begin, end = f"<!-- {backend} -->\n", f"<!-- /{backend} -->\n"
    if begin not in text:
        text += f"\n{begin}{end}"
    before, _, rest = text.partition(begin)
    path.write_text(before + begin + section + end + rest.partition(end)[2])


if __name__ == "__main__":
    sys.exit(main())
