"""What the terminal reads and shows, with models that are made up on the spot."""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner, Result
from prompt_toolkit.history import FileHistory, InMemoryHistory
from rich.console import Console

import cli
import localspec.loading
from localspec import terminal
from localspec.doctor import Report
from localspec.engine.answer import TARGET, Generation, Piece
from localspec.engine.session import Stream
from localspec.errors import PromptError
from localspec.highlight import Highlight
from localspec.pair import Pair
from localspec.protocols import BackendReport
from localspec.testing.reference import ReferenceModel

QUICK = ("--max-tokens", "4", "--seed", "1")


def run(*arguments: str, text: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli.main, list(arguments), input=text)


def assert_one_line(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    [line] = [line for line in result.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    for word in words:
        assert word in line


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """A pair that every command opens; both models were worked around, in one way alike."""
    pair = Pair(ReferenceModel(257), ReferenceModel(257, seed=1))
    for model, own in zip((pair.target, pair.draft), ("of the target", "of the draft"), strict=True):
        assert isinstance(model, ReferenceModel)
        model.info = replace(model.info, name="odd[/b]", notes=("common to both [b]", own))
    monkeypatch.setattr(localspec.loading, "open_pair", lambda *_, **__: pair)
    yield pair
    pair.close()


# ---------------------------------------------------------------- text as it is


def streamed(*pieces: Piece) -> Stream:
    def write(stream: Stream) -> Any:
        yield from pieces
        stream.finish(cast(Generation, object()))

    return Stream(write)


@pytest.mark.parametrize("show_drafts", [False, True])
def test_an_answer_is_printed_byte_for_byte(show_drafts: bool, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    texts = ["a\tb", "\r", "\f", "[b]x[/b]", ":smile:", "\x07\x0b", "é\n", " " * 200 + "end  "]
    terminal.print_stream(streamed(*(Piece(text, TARGET) for text in texts)), Highlight() if show_drafts else None)
    assert capfdbinary.readouterr().out == "".join(texts).encode() + b"\n"


def test_only_guessed_pieces_are_coloured(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    terminal.print_stream(streamed(Piece("a\t", "ngram"), Piece("b\r", TARGET)), Highlight())
    assert capfdbinary.readouterr().out == b"\x1b[1;32ma\t\x1b[0mb\r\n"


@pytest.mark.usefixtures("opened")
def test_chat_shows_what_looks_like_markup() -> None:
    result = run("chat", *QUICK, text="/a[/b]\n/seed [/b]\n")
    assert result.exit_code == 0, result.output
    for words in ("odd[/b] (", "unknown command /a[/b]", "got '[/b]'", "common to both [b]"):
        assert words in result.stdout


def test_doctor_shows_the_extra_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    backend = BackendReport("mlx", False, "", (), (), 'pip install "localspec[mlx-cpu]"')
    terminal.print_doctor(
        Report("0", "3", "here", "a processor", 2, 1.0, (backend,), "tiny", "nothing", ("ngram", "dspark"))
    )
    said = capsys.readouterr().out
    assert 'pip install "localspec[mlx-cpu]"' in said and "drafters: ngram\n" in said


# ---------------------------------------------------------------- reading


@pytest.mark.usefixtures("opened")
def test_a_message_that_is_not_utf8_is_refused_and_the_chat_goes_on() -> None:
    result = run("chat", *QUICK, text=b"caf\xe9\nHello\r\n")
    assert result.exit_code == 0, result.output
    assert "error: the message is not valid UTF-8 (got byte 0xe9 at offset 3)" in result.stdout
    assert result.stdout.count("tokens/s ·") == 1


@pytest.mark.parametrize("command", [["chat"], ["generate", "Hello"]])
def test_a_system_message_that_is_not_utf8_is_refused(command: list[str]) -> None:
    assert_one_line(run(*command, "--system", "caf\udce9"), 2, "--system", "0xe9 at offset 3")


def test_a_closed_standard_input_is_no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(PromptError, match="no prompt"):
        terminal.read_prompt(None, None)


# ---------------------------------------------------------------- signs of life


@pytest.mark.usefixtures("opened")
def test_notes_of_both_models_are_shown_once_each() -> None:
    answer, greeting = run("generate", "Hello", *QUICK), run("chat", *QUICK, text="")
    for text in (answer.stderr, greeting.stdout):
        for note in ("common to both", "of the target", "of the draft"):
            assert text.count(note) == 1, text
    data = run("generate", "Hello", "--json", *QUICK)
    assert "common" not in data.stderr and len(json.loads(data.stdout)["draft"]["notes"]) == 2


@pytest.mark.parametrize(
    ("num_tokens", "is_terminal", "shown"), [(1500, True, True), (500, True, False), (1500, False, False)]
)
def test_only_long_prompts_on_a_terminal_show_how_far_they_are(
    num_tokens: int, is_terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=io.StringIO(), force_terminal=is_terminal)
    monkeypatch.setattr(terminal, "_console", lambda **_: console)
    with terminal.prefill_line() as on_prefill:
        on_prefill(num_tokens // 2, num_tokens)
        on_prefill(num_tokens, num_tokens)
    assert isinstance(console.file, io.StringIO)
    assert (f"reading the prompt: {num_tokens // 2} of {num_tokens} tokens" in console.file.getvalue()) == shown


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("command", [["generate", "--raw", "-"], ["chat"]])
def test_commands_pass_the_progress_on(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    class Line:
        def __enter__(self) -> Any:
            return lambda *progress: seen.append(progress)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(terminal, "prefill_line", Line)
    assert run(*command, *QUICK, text="Hello there\n").exit_code == 0
    assert seen and seen[-1][0] == seen[-1][1]


def test_a_state_folder_that_cannot_be_written_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def history(folder: Path) -> tuple[object, str]:
        monkeypatch.setattr(terminal, "user_state_path", lambda *_, **__: folder)
        console = Console(file=io.StringIO(), width=300)
        found = terminal._history(console)
        assert isinstance(console.file, io.StringIO)
        return found, console.file.getvalue()

    (tmp_path / "file").touch()
    found, said = history(tmp_path / "file" / "localspec")
    assert isinstance(found, InMemoryHistory) and said.count("not kept") == 1
    found, said = history(tmp_path / "new" / "localspec")
    assert isinstance(found, FileHistory) and not said


# ---------------------------------------------------------------- errors, versions, logs


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("a\nb"), 1), (KeyError("x"), 1), (MemoryError(), 1)])
def test_whatever_goes_wrong_is_one_line(error: Exception, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(localspec.loading, "open_pair", fail)
    result = run("generate", "Hello")
    assert_one_line(result, code)
    if not isinstance(error, MemoryError):
        assert f"unexpected: {type(error).__name__}: " in result.stderr
        assert "`localspec --debug generate ...`" in result.stderr
    assert run("--debug", "generate", "Hello").exception is error


def test_clicks_own_errors_stay_clicks() -> None:
    result = run("generate", "Hello", "--no-such-option")
    assert result.exit_code == 2 and "No such option" in result.stderr and "unexpected" not in result.stderr


def test_the_version_needs_no_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert run("--version").stdout == f"localspec, version {localspec.__version__}\n"


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", b"a ? b"), ("utf-8", "a · b".encode())])
def test_what_a_terminal_cannot_show_becomes_a_question_mark(
    encoding: str, shown: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main.callback is not None
    cli.main.callback(debug=False)
    stream.write("a · b")
    stream.flush()
    assert stream.errors == ("strict" if encoding == "utf-8" else "replace")
    assert stream.buffer.getvalue() == shown


def test_warnings_of_localspec_are_shown_but_not_llama_cpps() -> None:
    run("bench", "core", "--rounds", "1", "--vocabulary", "1000")
    assert logging.getLogger("localspec.loading").isEnabledFor(logging.WARNING)
    assert not logging.getLogger("localspec.llamacpp").isEnabledFor(logging.WARNING)
    run("--debug", "bench", "core", "--rounds", "1", "--vocabulary", "1000")
    assert logging.getLogger("localspec.llamacpp").isEnabledFor(logging.DEBUG)
