"""scripts/at_prices.py: decoding at the prices of a machine that is not at hand."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from localspec.schedule.cost import Curve


@pytest.mark.real
@pytest.mark.parametrize(
    ("wide_ms", "faster", "device"), [(10.5, True, ()), (40.0, False, ()), (10.5, True, ("--launch", "1"))]
)
def test_speeds_are_those_of_the_table(
    root: Path, tmp_path: Path, wide_ms: float, faster: bool, device: tuple[str, ...]
) -> None:
    """Where the host takes no time plain decoding takes what its width costs, whatever it takes here; a chain of three
    wins where passes over four tokens cost hardly more, and loses where they cost four times as much. On a device, too,
    where the first pass of an answer takes more."""
    prices = {
        "target": {"widths": [1, 4, 16], "contexts": [64], "ms": [[10.0, wide_ms, 4 * wide_ms]]},
        "draft": {"widths": [1, 16], "contexts": [64], "ms": [[0.2, 0.4]]},
        "overhead_ms": 0.2,
        "measured": "",
        "notes": [],
    }
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(prices))
    command = [sys.executable, "scripts/at_prices.py", str(path), "--config", "draft_model:num=3", "--at", "0"]
    command += ["--host", "0", *device, *(["--change", "4", "--change", "2"] if device else [])]
    command += ["--output", str(tmp_path / "runs.jsonl")]
    command += ["--workload", "prose", "--per-workload", "1", "--repeats", "1", "--tokens", "32"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    run = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True, timeout=300)
    [row] = [line.split() for line in run.stdout.splitlines() if "prose" in line]
    plain, chain = float(row[2]), float(row[5])
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()[1:]]
    [rounds] = [one["rounds"] for one in runs if one["contender"] == "plain"]
    assert [pytest.approx(one[4], abs=0.01) for one in rounds[:3]] == ([14.0, 10.0, 10.0] if device else [10.0] * 3)
    assert plain == pytest.approx(len(rounds) / (len(rounds) * 0.01 + (0.004 if device else 0.0)), abs=0.1)
    assert (chain > 1.5 * plain) if faster else (chain < plain)


def test_the_second_pass_of_a_row_costs_more_where_the_last_row_had_another_width(root: Path) -> None:
    """Whatever prompt came between, and by sequence."""
    spec = importlib.util.spec_from_file_location("at_prices", root / "scripts" / "at_prices.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    clock, caches = script.Clock(0.0), [object(), object()]
    scores = SimpleNamespace(num_rows=1, rows=lambda rows: None)
    model = SimpleNamespace(forward=lambda steps: [scores] * len(steps))
    clock.charge(model, Curve((1, 64), (0,), ((10.0, 10.0),)), (4.0, 2.0))

    def passes(*widths: int, sequence: int = 0) -> list[float]:
        took = []
        for width in widths:
            before = clock()
            model.forward([SimpleNamespace(num_tokens=width, state=SimpleNamespace(cache=caches[sequence], length=0))])
            took.append(round((clock() - before) * 1e3, 6))
        return took

    assert passes(60, 3, 3, 3) == [14.0, 14.0, 12.0, 10.0]
    assert passes(60, 3, 3, 3) == [14.0, 14.0, 10.0, 10.0]
    assert passes(4, 3, 3) == [14.0, 14.0, 12.0], "one pass of it is enough"
    assert passes(4, 4, 4, 60, 3, 3) == [14.0, 12.0, 10.0, 14.0, 14.0, 12.0]
    assert passes(3, 3, sequence=1) == [14.0, 12.0]
