"""`localspec pairs` and `--pair` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli import main
from localspec.loading import bundled_path

ENTRY = """\
schema = 1
family = "mine"

[[pair]]
name = "NAME"
target = "the bundled target"
parameters = 0.055
drafter = "draft_model"
draft = "the bundled draft model"
draft_parameters = 0.005
tokenizer = "same"
source = "this test"
tested = true

  [[pair.choice]]
  backend = "llamacpp"
  target = "TARGET"
  quantization = "Q4_0"
  draft = "DRAFT"
  draft_quantization = "Q8_0"
"""


@pytest.fixture(autouse=True)
def _no_catalogs_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localspec.hub.catalog.user_folder", lambda: tmp_path / "none")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    text = ENTRY.replace("TARGET", str(bundled_path("tiny", "target")))
    text = text.replace("DRAFT", str(bundled_path("tiny", "draft")))
    path.write_text(text.replace("NAME", "qwen3-4b"))
    return path


def run(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(main, list(arguments), input=text)


def test_pairs_lists_what_runs_here_first() -> None:
    result = run("pairs", "--memory", "16G", "--backend", "llamacpp")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[1].startswith("qwen2.5-14b") and "yes" in lines[1]
    assert max(map(len, lines)) <= 80


def test_json_says_what_was_worked_out() -> None:
    found = json.loads(run("pairs", "--json", "--memory", "64G").stdout)
    assert len(found) >= 40
    entry = next(entry for entry in found if entry["name"] == "qwen3-8b-dspark")
    assert entry["supported"] is True
    unknown = next(entry for entry in found if entry["name"] == "qwen3-8b-dfly")
    assert unknown["supported"] is False and "dfly" in unknown["unsupported_because"]
    assert entry["fits"] is True and entry["memory_estimated"] is True and entry["tested"] is False
    found = json.loads(run("pairs", "search", "qwen3 dspark", "--json", "--memory", "64G").stdout)
    assert {entry["drafter"] for entry in found} == {"dspark"}
    shown = json.loads(run("pairs", "show", "qwen3-4b", "--json", "--memory", "64G").stdout)
    assert shown["name"] == "qwen3-4b" and shown["supported"] is True


def test_a_catalog_of_ones_own_is_checked_shown_and_says_what_it_replaces(mine: Path) -> None:
    result = run("pairs", "check", str(mine))
    assert result.exit_code == 0
    assert "1 pair, valid" in result.stdout and "qwen3-4b replaces that of localspec (qwen3.toml)" in result.stdout
    shown = " ".join(run("pairs", "show", "qwen3-4b", "--catalog", str(mine)).stdout.split())
    assert mine.name in "".join(shown.split()) and "tested here yes" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["pairs", "show", "qwen3"], 2, ["unknown pair 'qwen3'", "Did you mean"]),
        (["pairs", "--memory", "much"], 2, ["--memory", "16G"]),
        (["pairs", "--backend", "lamacpp"], 2, ["backend", "Did you mean 'llamacpp'"]),
        (["pairs", "--drafter", "dsprak"], 2, ["drafter", "Did you mean 'dspark'"]),
        (["pairs", "--json", "search", "x"], 2, ["options", "search"]),
        (["pairs", "check", "no-such-file"], 1, ["no-such-file", "cannot be read"]),
        (["pairs", "--catalog", "no-such-file"], 1, ["no-such-file", "cannot be read"]),
        (["generate", "x", "--pair", "qwen3-4b", "--target", "tiny"], 2, ["--pair", "--target"]),
        (["generate", "x", "--catalog", "some"], 2, ["--catalog", "--pair"]),
        (["generate", "x", "--pair", "qwen3-8b-dfly"], 2, ["no drafter dfly"]),
        (
            ["generate", "x", "--pair", "qwen3-4b", "--backend", "llamacpp"],
            1,
            ["`localspec pull Qwen/Qwen3-4B-GGUF:Q4_K_M`", "`localspec pull Qwen/Qwen3-0.6B-GGUF:Q8_0`"],
        ),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, list) else str(value),
)
def test_wrong_options_are_one_line_and_the_right_exit_code(arguments: list[str], code: int, words: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    [line] = [line for line in result.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line


@pytest.mark.real
def test_a_pair_from_a_catalog_answers(mine: Path) -> None:
    quick = ["--max-tokens", "4", "--context", "128", "--seed", "1", "--json"]
    result = run("generate", "Hi", "--pair", "qwen3-4b:q4_0", "--catalog", str(mine), *quick)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["target"]["backend"] == "llamacpp" and report["draft"]["path"].endswith("draft.gguf")


@pytest.mark.real
def test_chat_suggests_a_pair_once_and_only_to_those_who_named_none(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localspec.doctor.memory_bytes", lambda: 16 * 2**30)
    quick = ["--max-tokens", "2", "--context", "128", "--backend", "llamacpp"]
    plain = run("chat", *quick, text="Hi\nHi\n").stdout
    assert plain.count("localspec pairs show qwen2.5-14b") == 1
    assert "pairs show" not in run("chat", *quick, "--target", "tiny", text="").stdout
    assert "pairs show" not in run("chat", *quick, "--pair", "qwen3-4b", "--catalog", str(mine), text="").stdout
