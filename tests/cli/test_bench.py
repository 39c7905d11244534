"""What the bench commands refuse before they measure, and what they say beside the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import localspec.loading
from cli import main
from localspec.bench import core_time, equality
from localspec.bench.prompts import load_prompts
from localspec.errors import PromptError, SettingError
from localspec.pair import Pair
from localspec.protocols import WidthClass
from localspec.testing.reference import ReferenceModel


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture(autouse=True)
def _nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was opened before the request was checked")

    monkeypatch.setattr(localspec.loading, "open_pair", fail)


@pytest.mark.parametrize("command", ["speed", "equality"])
@pytest.mark.parametrize(
    "option",
    [["--plain"], ["--acceptance", "walk"], ["--drafter", "ngram"], ["--num-draft", "2"], ["--draft-min-prob", "0.5"]],
)
def test_options_that_bench_would_ignore_are_refused(command: str, option: list[str]) -> None:
    result = run("bench", command, *option)
    assert result.exit_code == 2 and "No such option" in result.stderr and option[0] in result.stderr


@pytest.mark.parametrize("command", ["speed", "equality"])
def test_an_output_in_no_folder_is_refused_before_measuring(command: str, tmp_path: Path) -> None:
    result = run("bench", command, "--output", str(tmp_path / "none" / "runs.json"))
    assert result.exit_code == 2 and "no such folder" in result.stderr


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "no prompts"), (b"\n \n", "no prompts"), (b"\xff\n", "UTF-8"), (b"7\n", "line 1")]
)
def test_prompt_files_without_prompts_are_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    result = run("bench", "equality", "--prompts", str(path))
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_a_folder_without_prompts_is_refused(tmp_path: Path) -> None:
    result = run("bench", "equality", "--prompts", str(tmp_path))
    assert result.exit_code == 2 and "no prompts" in result.stderr
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(PromptError, match="empty"):
        load_prompts(tmp_path)


def test_line_separators_inside_a_prompt_do_not_split_it(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "a", "domain": "b", "text": "x\u2028y"}\n', encoding="utf-8")
    assert [prompt.text for prompt in load_prompts(path)] == ["x\u2028y"]


def test_nothing_compared_is_not_equality() -> None:
    assert not equality.Report("target", "1 to 8").all_equal


def test_an_equality_run_that_was_cut_off_is_gone_on_with() -> None:
    prompts = load_prompts(domains=["chat"], per_domain=3)
    with Pair(ReferenceModel(257, context_length=2048), None) as pair:

        def compare(begun: equality.Report | None = None) -> tuple[equality.Report, list[dict[str, Any]]]:
            saved: list[dict[str, Any]] = []
            report = equality.compare(
                pair,
                prompts,
                ["ngram"],
                [0.0, 0.8],
                2,
                lambda report: saved.append(json.loads(json.dumps(report.as_dict()))),
                begun,
            )
            return report, saved

        whole, saved = compare()
        assert [part["num_done"] for part in saved] == [1, 2, 3]
        rest, more = compare(equality.Report.from_dict(saved[0]))
        assert rest.as_dict() == whole.as_dict() and len(more) == 2
        with pytest.raises(SettingError, match="another one"):
            equality.compare(pair, prompts, ["ngram"], [0.0], 2, begun=rest)


def test_equality_says_how_the_width_class_was_found() -> None:
    target = ReferenceModel(257, width_class=WidthClass(2, 8, "widths 1 to 9 were compared"))
    with Pair(target, None) as pair:
        report = equality.compare(pair, load_prompts(per_domain=1)[:1], ["nothing"], [0.0], 1)
    assert "\nevidence for the width class: widths 1 to 9 were compared\n" in equality.table(report)


def test_bench_core_says_what_it_does_not_count() -> None:
    text = core_time.table(core_time.measure(1000, 2, 1))
    assert "not counted: detokenising, stop strings and the drafters' own work" in text
