"""Where a configuration's time went, by kinds of rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from localspec.bench.contenders import PLAIN
from localspec.bench.rounds import Part, pace_table, paces, parts, table
from localspec.bench.runs import Answer, Run, RunLog, read_runs
from localspec.errors import SettingError

PLAIN_ROUND = [0, 0, 1, 0.0, 9.5, 0.5]


def run(contender: str, rounds: Sequence[Sequence[float]] | None, prompt: str = "a", temperature: float = 0.0) -> Run:
    tokens = sum(1 + int(one[1]) for one in rounds or ())
    answer = Answer(tokens, tokens, 1.0, "", rounds=rounds)
    return Run("chat", prompt, temperature, contender, 0, answer)


def by_kind(found: Sequence[Part], contender: str) -> dict[str, Part]:
    return {part.kind: part for part in found if part.contender == contender}


def test_rounds_are_told_apart_and_their_costs_add_up() -> None:
    """Plain decoding takes 10 ms a token. Of ours a guess wins 25 ms, the two rounds behind it lose 5 each, and one in
    which somebody was asked for nothing loses 30."""
    own = [
        PLAIN_ROUND,
        [0, 0, 1, 0.0, 11.5, 0.5],
        PLAIN_ROUND,
        [3, 3, 4, 2.0, 12.5, 0.5],
        [0, 0, 1, 0.0, 14.5, 0.5],
        [0, 0, 1, 0.0, 14.5, 0.5],
        PLAIN_ROUND,
        [0, 0, 1, 30.0, 9.5, 0.5],
        PLAIN_ROUND,
    ]
    found = parts([run(PLAIN, [PLAIN_ROUND] * 12), run("auto", own), run("peer", None)])
    assert [part.kind for part in found if part.contender == PLAIN] == ["first", "others"]
    assert all(part.cost == pytest.approx(0.0) for part in found if part.contender == PLAIN)
    mine = by_kind(found, "auto")
    whole = 137.0
    assert sum(part.num_rounds for part in mine.values()) == 9
    assert {kind: (part.num_rounds, part.num_tokens) for kind, part in mine.items()} == {
        "guessed": (1, 4),
        "first": (3, 3),
        "behind": (2, 2),
        "asked": (1, 1),
        "others": (2, 2),
    }
    costs = {"guessed": -25.0, "first": 2.0, "behind": 10.0, "asked": 30.0, "others": 0.0}
    assert {kind: part.cost * whole for kind, part in mine.items()} == pytest.approx(costs)
    assert (mine["first"].ms, mine["first"].longest) == (10.0, 12.0)
    assert "| 0 | chat | auto | asked | 1 | 1.00 | 40.0 | 40.0 | +21.9% |" in table(found)


def test_each_configuration_is_compared_on_the_prompts_that_it_answered() -> None:
    slow = [[0, 0, 1, 0.0, 20.0, 0.0]] * 5
    found = parts(
        [run(PLAIN, [PLAIN_ROUND] * 5), run(PLAIN, slow, "b"), run("auto", slow, "b"), run("auto", slow, "a", 0.8)]
    )
    assert all(part.cost == pytest.approx(0.0) for part in by_kind(found, "auto").values())
    assert {part.temperature for part in found} == {0.0}  # nothing to compare with at the other


def test_an_answer_is_compared_with_its_own_plain_rounds() -> None:
    """Plain decoding took place in a quick minute, ours in a slow one: hardly faster by the clock, yet it won. Its own
    first round, which takes ten times as long as others, is part of plain decoding there, too."""
    slow, guess = [0, 0, 1, 0.0, 19.0, 1.0], [3, 3, 4, 2.0, 19.0, 1.0]
    own, other = [slow] * 6 + [guess], [guess] * 3
    first = [0, 0, 1, 0.0, 99.5, 0.5]
    runs = [run(PLAIN, [first] + [PLAIN_ROUND] * 9), run("auto", own), run("auto", other), run(PLAIN, [first], "b")]
    [pace] = paces(runs)
    tokens, ms = 6 + 4 + 12, 6 * 20 + 4 * 22
    assert (pace.num_answers, pace.num_judged) == (2, 1)
    assert pace.times_plain == pytest.approx(19 * tokens / ms)
    assert pace.times_own == pytest.approx(1.9 * 20 * 10 / (6 * 20 + 22))
    assert "| 0 | chat | auto | 2.01 | 2.68 | 1 of 2 |" in pace_table([pace])
    [unjudged] = paces([runs[0], runs[2]])
    assert unjudged.times_own is None


def test_runs_are_read_again_from_a_folder_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    with RunLog({"notes": []}, path) as log:
        log.add(run("auto", [PLAIN_ROUND]))
    assert read_runs(path) == log.runs
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 0'))
    with pytest.raises(SettingError, match="another version"):
        read_runs(path)
    path.write_text("no benchmark\n")
    with pytest.raises(SettingError, match="no runs of a benchmark"):
        read_runs(path)
    with pytest.raises(SettingError, match="no runs of a benchmark"):
        read_runs(tmp_path / "missing")
