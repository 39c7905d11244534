"""`localspec serve` as a user types it; what it then does is in tests/server."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli import main
from localspec.commands import serve as command


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["serve", "--port", "0", *arguments])


def test_help_loads_neither_the_server_nor_a_runtime(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCALSPEC_MEASURE")  # heeding it loads the schedule
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "cli.py", "serve", "--help"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in process.stderr.splitlines() if "|" in line}
    assert "click" in loaded
    heavy = {"numpy", "starlette", "uvicorn", "pydantic", "llguidance", "prometheus_client", "mlx", "llama_cpp"}
    assert heavy & loaded == set()
    assert "--parallel" in process.stdout


def test_without_its_extras_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else object())
    result = run()
    assert result.exit_code == 1
    assert "the server needs uvicorn" in result.stderr
    assert 'pip install "localspec[server]"' in result.stderr


def test_a_port_that_is_taken_is_said_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("--port", str(taken.getsockname()[1]))
    assert result.exit_code == 2
    assert "cannot listen on 127.0.0.1" in result.stderr and "--port" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "no.such.host.invalid"), "cannot listen on no.such.host.invalid"),
        (("--api-key", ""), "API key is empty"),
        (("--api-key", "k\u00e9y"), "not ASCII"),
        (("--drafter", "clairvoyance"), "unknown drafter"),
        (("--temperature", "-1"), "temperature out of range"),
        (("--acceptance", "blind"), "unknown acceptance"),
        (("--exact", "guarded"), "are not re-checked where requests share passes"),
    ],
)
def test_what_is_wrong_is_said_at_once(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_file_of_keys_must_hold_some(tmp_path: Path) -> None:
    empty = tmp_path / "keys"
    empty.write_text("\n")
    assert "holds no key" in run("--api-key-file", str(empty)).stderr
    assert "cannot be read" in run("--api-key-file", str(tmp_path / "none")).stderr


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"pair": None, "target": None}, "tiny"),
        ({"pair": None, "target": "/models/big-Q4_K_M.gguf"}, "big-Q4_K_M"),
        ({"pair": None, "target": "org/model:Q4_K_M"}, "org/model:Q4_K_M"),
        ({"pair": "qwen3-8b", "target": None}, "qwen3-8b"),
    ],
)
def test_the_model_is_called_what_the_user_called_it(given: dict[str, str | None], name: str) -> None:
    assert command._own_name(given) == name
