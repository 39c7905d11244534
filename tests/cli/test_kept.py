"""What is kept on this machine: only if asked for, told, listed, deleted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli import main
from localspec import copies
from localspec.history import store as history
from localspec.schedule import store as costs

QUICK = ["--max-tokens", "12", "--context", "256", "--backend", "llamacpp", "--drafter", "suffix", "--json"]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(history, "default_folder", lambda: tmp_path / "history")
    monkeypatch.setattr(costs, "default_folder", lambda: tmp_path / "tune")
    monkeypatch.setattr(copies, "default_folder", lambda: tmp_path / "copies")
    return tmp_path


def run(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, list(arguments), env=env)


def kept(*arguments: str) -> dict[str, Any]:
    result = run("kept", "--json", *arguments)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.real
def test_sessions_are_remembered_only_if_the_user_says_so(folders: Path) -> None:
    first = run("generate", "Hello there", *QUICK)
    assert first.exit_code == 0 and not (folders / "history").exists()
    assert kept() == {"deleted": {}, "kept": []}
    again = run("generate", "Hello there", *QUICK, env={"LOCALSPEC_REMEMBER": "1"})
    third = run("generate", "Hello there", *QUICK, "--remember")
    [sessions] = kept()["kept"]
    assert (sessions["kind"], sessions["num_things"]) == ("sessions", 2)
    answers = [json.loads(result.stdout) for result in (first, again, third)]
    assert answers[0]["tokens"] == answers[1]["tokens"] == answers[2]["tokens"]
    rounds = [answer["stats"]["num_rounds"] for answer in answers]
    assert rounds[2] < rounds[0], "the second time the answer is known"


@pytest.mark.real
def test_remembering_is_told(folders: Path) -> None:
    result = run("generate", "Hello there", *QUICK[:-1], "--remember")
    assert f"remembered in {folders / 'history'}" in " ".join(result.stderr.split())


def test_to_remember_with_a_drafter_that_does_not_guess_from_it_is_refused() -> None:
    result = run("generate", "Hello", "--plain", "--remember")
    assert result.exit_code == 2 and "expected auto or suffix" in result.stderr


@pytest.mark.real
def test_fit_says_that_a_copy_has_no_header_before_it_is_made() -> None:
    result = run("fit", "tiny", "--draft", "self")
    assert result.exit_code == 2 and "localspec kept" in result.stderr
    assert run("fit", "tiny", "--head", "early_exit:layers=4").exit_code == 0


def test_what_is_kept_is_listed_and_deleted_by_kind(folders: Path) -> None:
    (folders / "history" / "abc").mkdir(parents=True)
    (folders / "history" / "abc" / "one.session").write_bytes(b"x" * 40)
    (folders / "history" / "abc" / "about.json").write_text('{"name": "some model"}')
    (folders / "tune").mkdir()
    (folders / "tune" / "1-quick.json").write_text("{}")
    (folders / "copies" / "abc-2bit").mkdir(parents=True)
    (folders / "copies" / "abc-2bit" / "model.safetensors").write_bytes(b"x" * 2048)
    (folders / "copies" / "abc-Q2_K.gguf").write_bytes(b"x" * 1024)
    lines = run("kept").stdout.splitlines()
    assert (
        len(lines) == 3
        and lines[1] == f"2 copies, 3.0 KiB: {folders / 'copies'}"
        and lines[0].startswith("1 sessions of some model, 0.0 KiB: ")
    )
    assert kept("--delete", "sessions")["deleted"] == {"sessions": 1}
    assert [lot["kind"] for lot in kept()["kept"]] == ["copies", "measurements"]
    assert kept("--delete", "all")["deleted"] == {"sessions": 0, "copies": 2, "measurements": 1}
    assert run("kept").stdout == "nothing is kept\n"
