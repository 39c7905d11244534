"""What decoding would be like at another machine's prices: the bundled pair, real texts, real decisions, another clock.

    python scripts/at_prices.py COSTS.json                             # auto and the chain of three against plain
    python scripts/at_prices.py COSTS.json --widths 3:4 --host 2 --config auto --config draft_model:num=2

COSTS.json holds what passes take there, as `localspec tune` keeps it (`*-tuned.json` or `*-quick.json` in its folder,
see docs/tune.md), or the same by hand:

    {"target": {"widths": [1, 4, 16], "contexts": [64], "ms": [[10, 14, 35]]},
     "draft": {"widths": [1, 4], "contexts": [64], "ms": [[0.5, 0.6]]}, "overhead_ms": 0.2, "measured": "", "notes": []}

Each pass of either model takes as long as the table says, whatever it takes here; what the host does between passes
takes as long as here, times --host. With --launch passes run on a device, and the host may work until it needs them.
So what `auto` decides can be judged for a machine that is not at hand, without
its noise: as far as its passes depend on width and context alone, and wait for nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from localspec import Pair
from localspec.bench import speed as bench
from localspec.bench.contenders import Contender, Kind, Own, plain_contenders
from localspec.bench.runs import RunLog
from localspec.bench.summary import summarize
from localspec.bench.workloads import load_workloads
from localspec.errors import UsageError
from localspec.host_scores import HostScores
from localspec.loading import bundled_path, load_model
from localspec.protocols import LanguageModel, LoadSettings, Scores, Step, WidthClass
from localspec.schedule.cost import Costs, Curve
from localspec.types import Logits

_PROMPT = 32  # tokens; llama.cpp starts such passes elsewhere, so what it recorded of narrow ones stays


class Clock:
    """Seconds, of which those in passes are what the table says."""

    def __init__(self, host: float, launch_ms: float | None = None) -> None:
        """launch_ms: passes run on a device, launching one keeps the host so long, and it waits where it reads."""
        self._host, self._launch = host, None if launch_ms is None else launch_ms * 1e-3
        self._inside = self._priced = 0.0
        self._busy = 0.0  # until then the device is

    def __call__(self) -> float:
        """As `time.perf_counter`."""
        return (perf_counter() - self._inside) * self._host + self._priced

    def charge(self, model: LanguageModel, curve: Curve, change_ms: Sequence[float] = ()) -> None:
        """Have that model's passes take what the curve says, and the first ones of another width in a sequence more;
        the later ones of them only where the last passes but for prompts had another one."""
        forward: Callable[[Sequence[Step]], list[Scores]] = model.forward
        # by sequence: last width, passes of it in a row before, width of the last row, 0 behind one that was cut short
        rows: dict[int, tuple[int, int, int]] = {}

        def changed_ms(state: Any, width: int) -> float:
            last, alike, row = rows.get(id(state.cache), (0, 0, 0))
            alike = alike + 1 if width == last else 0
            again = alike > 0 and width == row
            ms = change_ms[alike] if alike < len(change_ms) and not again else 0.0
            if width != row and width < _PROMPT:
                row = width if alike >= len(change_ms) - 1 else 0
            rows[id(state.cache)] = width, alike, row
            return ms

        def priced(steps: Sequence[Step]) -> list[Scores]:
            started = perf_counter()
            scores = forward(steps)
            for one in scores:
                if one.num_rows:
                    one.rows((0,))  # a pass that runs on would be waited for later
            self._inside += perf_counter() - started
            ms = sum(curve.at(step.num_tokens, step.state.length) for step in steps)
            seconds = (ms + sum(changed_ms(step.state, step.num_tokens) for step in steps)) * 1e-3
            end = self._busy = max(self(), self._busy) + seconds
            if self._launch is None or not any(one.num_rows for one in scores):  # who reads a prompt waits for it
                self._priced += end - self()
                return scores
            self._priced += self._launch
            return [self._awaited(one, end) if one.num_rows else one for one in scores]

        model.forward = priced  # type: ignore[method-assign]

    def _awaited(self, scores: Scores, end: float) -> Scores:
        """The same, at hand once the clock has come to `end`."""
        started = perf_counter()
        rows, generation = scores.rows(range(scores.num_rows)), scores._generation  # type: ignore[attr-defined]
        self._inside += perf_counter() - started

        def fetch() -> Logits:
            self._priced += max(end - self(), 0.0)
            return rows

        return HostScores(fetch, generation, num_rows=scores.num_rows)

    def install(self) -> None:
        """Have everybody look at this clock."""
        for name, module in list(sys.modules.items()):
            if name.startswith("localspec.") and getattr(module, "perf_counter", None) is perf_counter:
                module.perf_counter = self  # type: ignore[attr-defined]


def main() -> None:
    """Run everybody, print shares of the best fixed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("costs", type=Path)
    parser.add_argument("--widths", default="1:", metavar="MIN:MAX", help="of the width class there")
    parser.add_argument(
        "--change",
        type=float,
        action="append",
        default=[],
        metavar="MS",
        help="that the first target pass behind one of another width takes longer; again: the second one, ...",
    )
    parser.add_argument("--chains", action="store_true", help="the target verifies no trees, as on GPUs")
    parser.add_argument(
        "--launch", type=float, metavar="MS", help="passes run on a device: keeps the host so long, which then is free"
    )
    parser.add_argument("--host", type=float, default=1.0, help="how many times as slow its processor is")
    parser.add_argument("--config", action="append", help="as in bench speed [default: auto, draft_model:num=3]")
    parser.add_argument(
        "--workload", action="append", help="as in bench speed [default: chat, code, prose, copy, json]"
    )
    parser.add_argument("--at", type=float, action="append", help="temperatures [default: 0, 0.8]")
    parser.add_argument("--per-workload", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--output", type=Path, metavar="RUNS.jsonl", help="the answers with their rounds, as bench speed"
    )
    options = parser.parse_args()
    names = options.config or ["auto", "draft_model:num=3"]
    summary = measure(options, names)
    print(f"{'T':>4} {'workload':9}" + "".join(f"{name:>26}" for name in ["plain", *names]))
    for temperature in summary.temperatures:
        for work in summary.workloads:
            rows = {row.contender: row for row in summary.find(work, temperature)}
            best = max(row.tokens_per_second.value for name, row in rows.items() if name != "auto")
            cells = []
            for row in (rows[name] for name in ["plain", *names]):
                speed = row.tokens_per_second.value
                cells.append(f"{speed:9.1f} {row.accepted_length or 0:5.2f} {speed / best:8.1%}")
            print(f"{temperature:4} {work:9}" + "".join(f"{cell:>26}" for cell in cells))
    print("tokens per second, tokens per round, share of the best one but auto")


def measure(options: argparse.Namespace, names: Sequence[str]) -> Any:
    """A summary of all runs."""
    costs = read_costs(options.costs)
    least, _, most = options.widths.partition(":")
    settings = LoadSettings(context=1024, num_sequences=6 + 2 * len(names), flash_attention=True, cache_type="bf16")
    target, draft = (load_model(bundled_path("tiny", role), "llamacpp", settings) for role in ("target", "draft"))
    given = WidthClass(int(least), int(most) if most else None, "given", measured=True)
    trees = target.capabilities.exact_trees and not options.chains
    on_device = options.launch is not None
    target.capabilities = replace(target.capabilities, width_class=given, exact_trees=trees, runs_ahead=on_device)
    draft.capabilities = replace(draft.capabilities, runs_ahead=on_device)
    clock = Clock(options.host, options.launch)
    clock.charge(target, costs.target, options.change)
    if costs.draft is None:
        raise UsageError(f"{options.costs} was measured without a draft model")
    clock.charge(draft, costs.draft)
    with Pair(target, draft) as pair:
        pair.remembers_speed = False
        vars(pair)["costs"] = costs

        def nobody() -> Pair:
            raise AssertionError("no workload is a stranger's")

        workloads = load_workloads(
            None, options.workload or ["chat", "code", "prose", "copy", "json"], options.per_workload, has_draft=True
        )
        contenders: list[Contender] = plain_contenders(pair)
        contenders += (Own(name, Kind.CONFIG, name, pair, nobody) for name in names)
        conditions = bench.describe(
            pair,
            workloads,
            contenders,
            runtime={},
            max_tokens=options.tokens,
            ignore_eos=False,
            repeats=options.repeats,
            temperatures=options.at or [0.0, 0.8],
            grid=[],
            notes=[],
            experience=0,
            exact="auto",
        )
        clock.install()
        with RunLog(conditions, options.output) as log:
            bench.measure(log, pair, workloads, contenders)
        for contender in contenders:
            contender.close()
        return summarize(log, complete=True)


def read_costs(path: Path) -> Costs:
    """Those that tune kept, or written by hand."""
    data = json.loads(path.read_text())
    return Costs.from_dict(data.get("found", data))


if __name__ == "__main__":
    main()
