"""What a benchmark writes: as it comes, to be read again, to be gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from localspec.bench.runs import SCHEMA, Answer, Run, RunLog
from localspec.errors import DiskError, SettingError

CONDITIONS: dict[str, Any] = {"started": "now", "max_tokens": 8, "notes": []}


def run(repeat: int) -> Run:
    answer = Answer(8, 7, 100.5, "0badcafe", num_rounds=3, drafted_by_depth=[3, 2], accepted_by_depth=[2, 1])
    return Run("code", "code-01", 0.8, "ngram", repeat, answer)


def test_a_run_comes_back_from_json() -> None:
    assert Run.from_dict(json.loads(json.dumps(run(1).as_dict()))) == run(1)


def test_runs_are_in_the_file_before_the_benchmark_ends(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    with RunLog(CONDITIONS, path) as log:
        log.add(run(0))
        lines = path.read_text(encoding="utf-8").splitlines()
        assert json.loads(lines[0]) == {"schema": SCHEMA, "conditions": CONDITIONS}
        assert Run.from_dict(json.loads(lines[1])) == run(0)


def test_a_benchmark_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    with RunLog(CONDITIONS, path) as log:
        log.add(run(0))
        log.add(run(1))
    content = path.read_bytes()
    path.write_bytes(content[:-20])  # the machine died in the middle of a line
    with RunLog(CONDITIONS | {"started": "later"}, path, resume=True) as log:
        assert log.has(run(0).key) and not log.has(run(1).key)
        assert log.conditions["started"] == "now"
        log.add(run(1))
    assert path.read_bytes() == content


def test_a_file_is_not_overwritten_or_continued_under_other_conditions(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    RunLog(CONDITIONS, path).__exit__(None, None, None)
    before = path.read_bytes()
    with pytest.raises(SettingError, match=r"exists already.*--resume"):
        RunLog(CONDITIONS, path)
    with pytest.raises(SettingError, match=r"other conditions.*max_tokens"):
        RunLog(CONDITIONS | {"max_tokens": 9}, path, resume=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"\n", b"{}\n", b"\xff\n", b'{"schema": 1, "conditions": {}}\n{"x": 1}\n'])
def test_a_file_of_something_else_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_bytes(content)
    with pytest.raises(SettingError, match="no benchmark"):
        RunLog(CONDITIONS, path, resume=True)
    assert path.read_bytes() == content


def test_an_unwritable_place_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot write"):
        RunLog(CONDITIONS, tmp_path / "none" / "runs.jsonl")
