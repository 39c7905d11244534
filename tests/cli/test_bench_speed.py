"""`localspec bench speed`: a whole run, an interrupted one, and everything that is refused before it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import localspec.loading
from cli import main
from localspec.bench.workloads import WORKLOADS
from localspec.testing.files import write_safetensors

QUICK = ["--backend", "llamacpp", "--threads", "1", "--context", "512", "--tokens", "6", "--repeats", "1", "--at", "0"]
SMALL = [*QUICK, "--workload", "code", "--workload", "stranger", "--per-workload", "1"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments])


def refused(words: str, *arguments: str) -> None:
    result = run("speed", *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


# ---------------------------------------------------------------- whole runs


@pytest.mark.slow
@pytest.mark.real
def test_a_run_prints_a_row_per_contender_and_writes_everything(tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run("speed", *SMALL, "--against", "llama-cpp-python:num=4", "--output", str(output))
    assert result.exit_code == 0, result.output
    for name in ("plain", "plain, width 1", "auto", "draft_model", "ngram", "llama-cpp-python plain"):
        assert f"| code | {name} |" in result.stdout
    assert "| stranger | draft_model |" in result.stdout and "| stranger | llama" not in result.stdout
    assert "exactly 6 tokens each" in result.stdout, "all write as many tokens where libraries are compared"
    data = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert data["complete"] and len(data["runs"]) == 7 + 5
    assert {run["num_tokens"] for run in data["runs"]} == {6}
    assert {"llamacpp", "llama-cpp-python"} == set(data["conditions"]["runtime"])
    lines = (output / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + len(data["runs"])
    assert {path.name for path in output.iterdir()} >= {"report.md", "speed.png", "time.png", "depth.png"}
    assert "![speed](speed.png)" in (output / "report.md").read_text(encoding="utf-8")
    same = {row["contender"]: row["num_same_text"] for row in data["rows"] if row["workload"] == "code"}
    assert same["auto"] == same["draft_model"] == same["ngram"] == 1


def test_mlx_runs_beside_mlx_lm_on_the_same_folders(tmp_path: Path) -> None:
    target, draft = write_safetensors(tmp_path / "target"), write_safetensors(tmp_path / "draft", jitter=0.2)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "one.txt").write_text("def add(a, b):", encoding="utf-8")
    models = [
        "--backend",
        "mlx",
        "--target",
        str(target),
        "--draft",
        str(draft),
        "--prompts",
        str(tmp_path / "prompts"),
    ]
    short = ["--tokens", "6", "--repeats", "1", "--config", "draft_model", "--output", str(tmp_path / "out")]
    result = run(
        "speed", *models, *short, "--workload", "prompts", "--workload", "stranger", "--against", "mlx-lm:num=2"
    )
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert data["complete"] and {run["num_tokens"] for run in data["runs"]} == {6}
    greedy = {
        row["contender"]: row for row in data["rows"] if row["temperature"] == 0.0 and row["workload"] == "prompts"
    }
    assert list(greedy)[-2:] == ["mlx-lm plain", "mlx-lm draft_model:num=2"]
    assert greedy["draft_model"]["num_same_text"] == greedy["mlx-lm plain"]["num_same_text"] == 1
    assert greedy["mlx-lm draft_model:num=2"]["accepted_length"] >= 1.0
    said = run("rounds", str(tmp_path / "out"))
    assert said.exit_code == 0, said.output
    assert "| 0 | prompts | draft_model | guessed |" in said.stdout and "mlx-lm" not in said.stdout
    own = [row for row in data["runs"] if row["contender"] == "draft_model" and row["rounds"]]
    assert f"| 0 of {sum(row['temperature'] == 0.0 and row['workload'] == 'prompts' for row in own)} |" in said.stdout


def test_the_rounds_of_no_benchmark_are_refused(tmp_path: Path) -> None:
    result = run("rounds", str(tmp_path))
    assert result.exit_code == 2 and "holds no runs of a benchmark" in result.stderr
    assert run("rounds", str(tmp_path / "none")).exit_code == 2


@pytest.mark.real
@pytest.mark.slow
def test_a_grid_names_the_best_and_compares_what_was_named(tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = [*QUICK, "--workload", "copy", "--per-workload", "1", "--grid", "--config", "auto", "--no-plots"]
    result = run("speed", *arguments, "--output", str(output))
    assert result.exit_code == 0, result.output
    assert "Best static configuration of the grid:" in result.stdout and "auto, share of the best" in result.stdout
    data = json.loads((output / "report.json").read_text(encoding="utf-8"))
    [oracle] = data["oracles"]
    kinds = {row["contender"]: row["kind"] for row in data["rows"]}
    assert kinds[oracle["contender"]] in ("grid", "plain") and kinds["auto"] == "config"
    assert "trees left out of the grid" in result.stdout
    assert not list(output.glob("*.png"))


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a child process")
def test_ctrl_c_keeps_the_runs_and_resume_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [
        sys.executable, "cli.py", "bench", "speed", *QUICK, "--workload", "code", "--per-workload", "3",
        "--repeats", "2", "--no-plots", "--output", str(output),
    ]  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    child = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    runs = output / "runs.jsonl"
    deadline = time.monotonic() + 120
    while not (runs.exists() and runs.read_text().count("\n") > 4):
        assert time.monotonic() < deadline and child.poll() is None, child.communicate()
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == 130 and "stopped" in stderr
    assert "**Interrupted" in stdout
    kept = runs.read_text().splitlines()
    data = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert not data["complete"] and len(data["runs"]) == len(kept) - 1 < 30
    resumed = subprocess.run([*command, "--resume"], cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert runs.read_text().splitlines()[: len(kept)] == kept
    assert len(json.loads((output / "report.json").read_text(encoding="utf-8"))["runs"]) == 30


# ---------------------------------------------------------------- refusals


@pytest.fixture
def _nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was opened before the request was checked")

    monkeypatch.setattr(localspec.loading, "open_pair", fail)


@pytest.mark.usefixtures("_nothing_is_opened")
def test_wrong_names_are_refused_before_anything_is_opened() -> None:
    refused("Did you mean 'code'", "--domain", "cod")
    refused("Did you mean 'ngram'", "--config", "ngrm")
    refused("Did you mean 'mlx-lm'", "--against", "mlx_lm")
    refused("name=number", "--against", "llama-cpp-python:num=x")


@pytest.mark.usefixtures("_nothing_is_opened")
def test_outputs_are_checked_before_anything_is_opened(tmp_path: Path) -> None:
    refused("no such folder", "--output", str(tmp_path / "none" / "out"))
    refused("--resume needs --output", "--resume")
    refused("--plots needs --output", "--plots")
    refused("no benchmark to go on with", "--resume", "--output", str(tmp_path / "out"))
    (tmp_path / "runs.jsonl").write_text("x", encoding="utf-8")
    refused("holds a benchmark already", "--output", str(tmp_path))
    assert (tmp_path / "runs.jsonl").read_text(encoding="utf-8") == "x"


@pytest.mark.real
def test_files_that_a_library_cannot_open_are_refused_with_what_it_reads() -> None:
    refused("mlx-lm cannot open target.gguf", *SMALL, "--against", "mlx-lm")


@pytest.mark.real
def test_a_draft_model_that_is_not_there_is_missed_by_name_only(tiny_target: Path) -> None:
    alone = [*QUICK, "--target", str(tiny_target), "--per-workload", "1"]
    refused("needs a draft model", *alone, "--workload", "code", "--config", "draft_model")
    result = run("speed", *alone, "--workload", "code")
    assert result.exit_code == 0 and "| code | ngram |" in result.stdout and "draft_model" not in result.stdout


@pytest.mark.real
@pytest.mark.slow
def test_without_the_package_that_shuffles_the_stranger_is_left_out_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # importing it now fails as if it were not installed
    refused("the package gguf is not installed", *QUICK, "--per-workload", "1", "--workload", "stranger")
    result = run("speed", *QUICK, "--per-workload", "1", "--config", "ngram", "--tokens", "2")
    assert result.exit_code == 0 and "Note: the workload stranger was left out" in result.stdout
    assert "| stranger |" not in result.stdout and "| words | ngram |" in result.stdout


@pytest.mark.real
def test_without_matplotlib_pictures_are_left_out_or_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused("pictures need the package matplotlib", *SMALL, "--plots", "--output", str(tmp_path / "out"))
    result = run("speed", *QUICK, "--workload", "code", "--per-workload", "1", "--output", str(tmp_path / "out"))
    assert result.exit_code == 0 and "no pictures: " in result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "report.md", "runs.jsonl"]


@pytest.fixture
def tiny_target(root: Path) -> Path:
    return root / "models" / "tiny" / "target.gguf"


def test_the_list_has_a_line_per_workload() -> None:
    result = run("--list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == [work.name for work in WORKLOADS]


def test_an_unknown_size_to_expand_to_is_refused_before_anything_is_written() -> None:
    refused("0.5b", "--expand", "3b")


@pytest.mark.real
@pytest.mark.slow
def test_a_target_can_be_expanded_for_the_run() -> None:
    result = run(
        "speed",
        *("--expand", "0.5b", "--backend", "llamacpp", "--context", "512", "--workload", "code"),
        *("--per-workload", "1", "--tokens", "4", "--at", "0", "--repeats", "1", "--config", "draft_model"),
    )
    assert result.exit_code == 0, result.output
    assert "expanded to 0.5B" in result.stdout and "| code | draft_model |" in result.stdout
