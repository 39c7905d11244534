"""`--trace`, `--show-drafts` and `localspec trace` as a user types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import cli
import localspec.loading
from localspec.engine.answer import TARGET, Piece
from localspec.engine.stats import Stats
from localspec.highlight import Highlight
from localspec.pair import Pair
from localspec.testing.reference import ReferenceModel
from localspec.trace.file import read_trace

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--max-tokens", "12", "--seed", "1")
DRAFTED = ("--drafter", "draft_model")
REAL = (*QUICK, "--context", "256", "--backend", "llamacpp")


def run(*arguments: str, text: str | None = None, **environment: str) -> Result:
    return CliRunner().invoke(
        cli.main, list(arguments), input=text, env={"NO_COLOR": None, "TERM": None, **environment}
    )


def assert_one_line(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    [line] = [line for line in result.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    for word in words:
        assert word in line


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """A pair that every command opens; the draft model is right now and then."""
    target = ReferenceModel(257)
    pair = Pair(target, target.perturbed(0.1))
    monkeypatch.setattr(localspec.loading, "open_pair", lambda *_, **__: pair)
    yield pair
    pair.close()


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading is an error of its own, which a check that comes first prevents."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(localspec.loading, "open_pair", load)


# ---------------------------------------------------------------- writing


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("extra", [(), ("--raw",), ("--json",), ("--show-drafts",), ("--plain",)])
def test_generate_writes_every_round_and_says_the_same_as_without(tmp_path: Path, extra: tuple[str, ...]) -> None:
    path = tmp_path / "a.jsonl"
    if "--plain" not in extra:
        extra += DRAFTED  # a schedule may decide another way the second time
    plain, traced = run("generate", "Hi", *QUICK, *extra), run("generate", "Hi", *QUICK, *extra, "--trace", str(path))
    assert traced.exit_code == 0, traced.output
    trace = read_trace(path)
    assert not trace.note and trace.header.seed == 1 and trace.header.target == "reference"
    assert trace.answers[0].num_tokens == sum(len(entry.emitted) for entry in trace.rounds) == 12
    if "--json" in extra:
        one, other = json.loads(plain.stdout), json.loads(traced.stdout)
        assert one["tokens"] == other["tokens"]
        assert [token.token for entry in trace.rounds for token in entry.emitted] == other["tokens"]
        assert trace.stats().as_dict()["accepted_by_source"] == other["stats"]["accepted_by_source"]
    else:
        assert plain.stdout == traced.stdout


@pytest.mark.usefixtures("opened")
def test_a_traced_answer_without_a_seed_names_the_one_it_drew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    result = run("generate", "Hi", "--temperature", "0.8", "--max-tokens", "4", "--trace", str(path))
    assert f"seed {read_trace(path).header.seed}" in result.stderr


@pytest.mark.usefixtures("opened")
def test_a_chat_writes_all_its_answers_into_one_trace(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    result = run("chat", *QUICK, *DRAFTED, "--trace", str(path), text="Hello\n/drafts\nAgain\n/plain\nOnce more\n")
    assert result.exit_code == 0, result.output
    trace = read_trace(path)
    assert [answer.number for answer in trace.answers] == [1, 2, 3]
    assert {entry.answer for entry in trace.rounds} == {1, 2, 3}
    assert {entry.source for entry in trace.rounds if entry.answer == 3} == {"nothing"}
    assert result.stdout.count("green: guessed by draft_model") == 1, "only the second answer was to be coloured"


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize("command", [("generate", "Hi"), ("chat",)])
def test_a_trace_that_cannot_be_written_is_refused_before_models_are_loaded(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    assert_one_line(run(*command, "--trace", str(tmp_path / "no" / "a.jsonl")), 2, "--trace", "no such folder")
    (tmp_path / "b.txt").write_text("my notes", encoding="utf-8")
    assert_one_line(run(*command, "--trace", str(tmp_path / "b.txt")), 2, "is no trace", "another name")
    assert (tmp_path / "b.txt").read_text(encoding="utf-8") == "my notes"
    assert run(*command, "--trace", str(tmp_path)).exit_code == 2


def test_a_run_that_fails_to_load_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert_one_line(run("generate", "Hi", "--target", "no-such.gguf", "--trace", str(path)), 1, "no such file")
    assert not path.exists()


@pytest.mark.real
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a child process")
@pytest.mark.parametrize("extra", [(), ("--json",)])
def test_an_interrupted_run_keeps_its_rounds(tmp_path: Path, extra: tuple[str, ...]) -> None:
    path = tmp_path / "a.jsonl"
    command = [sys.executable, "cli.py", "generate", "Tell me a story.", "--ignore-eos", "--trace", str(path), *extra]
    child = subprocess.Popen(
        [*command, "--backend", "llamacpp"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    trace = read_trace(path)
    assert len(trace.rounds) >= 3 and "Traceback" not in err
    if extra:  # ends where it is: there is no answer to print
        assert child.returncode == 130 and "cut off before the end" in trace.note
    else:
        assert child.returncode == 0 and trace.answers[0].finish_reason == "cancelled"


# ---------------------------------------------------------------- drawing


@pytest.mark.real
def test_a_run_of_the_bundled_pair_is_drawn(tmp_path: Path) -> None:
    path, picture = tmp_path / "a.jsonl", tmp_path / "a.svg"
    assert run("generate", "What is 4 * 78?", *REAL, "--trace", str(path)).exit_code == 0
    overview = run("trace", str(path))
    assert overview.exit_code == 0, overview.output
    for words in ("localspec tiny target", "draft_model", "by depth", "the most telling one", "bonus"):
        assert words in overview.stdout
    trace = read_trace(path)
    for number, entry in enumerate(trace.rounds, start=1):
        result = run("trace", str(path), "--round", str(number), "--svg", str(picture))
        assert result.exit_code == 0 and f"round {number} of {len(trace.rounds)}" in result.stdout
        assert result.stdout.count('✓ "') == len(entry.path)
        text = picture.read_text(encoding="utf-8")
        assert text.count("data-node=") == len(entry.nodes) + 2 and ET.fromstring(text) is not None


@pytest.mark.usefixtures("opened")
def test_what_cannot_be_drawn_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    run("generate", "Hi", *QUICK, "--trace", str(path))
    count = len(read_trace(path).rounds)
    assert_one_line(run("trace", str(path), "--round", str(count + 1)), 2, "no such round", f"1 to {count}")
    assert_one_line(run("trace", str(tmp_path / "no.jsonl")), 1, "cannot read", "Check the path")
    picture = tmp_path / "no" / "a.svg"
    assert_one_line(run("trace", str(path), "--svg", str(picture)), 1, "cannot write", "a.svg")
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    assert_one_line(run("trace", str(tmp_path / "b.jsonl")), 1, "not a trace", "generate --trace")
    path.write_bytes(path.read_bytes()[:-30])
    result = run("trace", str(path))
    assert result.exit_code == 0 and "cut off and left out" in result.stdout


# ---------------------------------------------------------------- marks in the text


def stats(*ranks: int) -> Stats:
    return Stats(accepted_by_rank=list(ranks))


def test_every_source_has_its_colour_and_later_guesses_a_line_beneath() -> None:
    highlight = Highlight()
    pieces = [Piece("a", "ngram"), Piece("b", TARGET), Piece("c", "draft_model", 2), Piece("d", "ngram", 1)]
    assert "".join(map(highlight.mark, pieces)) == ("\x1b[1;32ma\x1b[0mb\x1b[1;4;36mc\x1b[0m\x1b[1;4;32md\x1b[0m")
    legend = highlight.legend(stats(1, 1, 1))
    assert legend == (
        "green: guessed by ngram · cyan: guessed by draft_model · underlined: not the first guess for its place (2)"
    )


def test_without_colour_guesses_stand_in_brackets() -> None:
    highlight = Highlight(colour=False)
    pieces = [Piece("a", "ngram"), Piece("b", TARGET), Piece("c", "ngram", 2)]
    assert "".join(map(highlight.mark, pieces)) == "[a]b[3:c]"
    legend = highlight.legend(stats(1, 0, 1))
    assert legend == "[in brackets]: guessed by ngram · [N: with a number]: not the first guess for its place (1)"


def test_where_nothing_was_marked_there_is_no_legend() -> None:
    highlight = Highlight()
    assert highlight.mark(Piece("a", TARGET)) == "a" and highlight.legend(stats()) == ""


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_escape_codes_where_they_mean_nothing(environment: dict[str, str]) -> None:
    result = run("generate", "Hi", *QUICK, *DRAFTED, "--show-drafts", **environment)
    assert "\x1b" not in result.output and "[" in result.stdout and "[in brackets]" in result.stderr
    coloured = run("generate", "Hi", *QUICK, *DRAFTED, "--show-drafts")
    assert "\x1b[1;32m" in coloured.stdout and "green: guessed by draft_model" in coloured.stderr
