"""`generate` with grammars, as a user types it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli import main
from localspec.bench.grammar import is_valid

SCHEMA = {
    "type": "object",
    "properties": {"title": {"type": "string", "maxLength": 12}, "year": {"type": "integer", "maximum": 9999}},
    "required": ["title", "year"],
    "additionalProperties": False,
}
QUICK = ["--context", "256", "--backend", "llamacpp", "--seed", "1", "--drafter", "draft_model"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["generate", "A book, in JSON.", *QUICK, *arguments])


@pytest.mark.real
def test_a_schema_from_a_file_or_as_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "book.json"
    file.write_text(json.dumps(SCHEMA), encoding="utf-8")
    results = [run("--json-schema", str(file)), run("-j", json.dumps(SCHEMA)), run("-jf", str(file), "--plain")]
    for result in results[:2]:
        assert result.exit_code == 0, result.output
        assert is_valid(result.stdout, SCHEMA)
    assert results[2].exit_code == 2, "--plain and --drafter contradict each other"
    assert results[0].stdout == results[1].stdout


@pytest.mark.real
@pytest.mark.parametrize("grammar", ['root ::= [0-9]{1,3} " + " [0-9]{1,3}', 'start: /[0-9]{1,3}/ " + " /[0-9]{1,3}/'])
def test_gbnf_and_lark(grammar: str, tmp_path: Path) -> None:
    file = tmp_path / "sum.gbnf"
    file.write_text(grammar, encoding="utf-8")
    for given in (grammar, str(file)):
        result = run("--grammar", given)
        assert result.exit_code == 0 and re.fullmatch(r"[0-9]{1,3} \+ [0-9]{1,3}", result.stdout.strip()), result.output


@pytest.mark.real
def test_an_answer_that_was_cut_off_fails_and_says_why() -> None:
    result = run("--regex", "[a-z ]{40}", "-n", "3")
    assert result.exit_code == 1
    assert "cut off before its grammar was satisfied" in result.stderr
    report = run("--regex", "[a-z ]{40}", "-n", "3", "--json")
    assert report.exit_code == 1
    assert json.loads(report.stdout)["complete"] is False
    whole = run("--regex", "(yes|no)", "--json")
    assert whole.exit_code == 0 and json.loads(whole.stdout)["complete"] is True


@pytest.mark.real
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--regex", "a", "--json-schema", "{}"], "--json-schema and --regex"),
        (["--json-schema", "nowhere.json"], "no such file: nowhere.json"),
        (["--json-schema", '{"type": 3}'], "JSON schema cannot be followed"),
        (["--json-schema", "{not json"], "not JSON"),
        (["--grammar", "nowhere"], "no such file"),
        (["--regex", "(a"], "regular expression cannot be followed"),
        (["--regex", "a", "--ignore-eos"], "ignore_eos"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    [line] = [line for line in result.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ") and words in line
