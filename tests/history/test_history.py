"""Earlier sessions on disk: what is found in them, who may read them, and what breaking them costs."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from localspec.errors import SettingError
from localspec.history import Found, History, SuffixArray
from localspec.history.store import forget, listing, vocabulary_key
from localspec.protocols import Tokenizer
from localspec.testing.reference import ReferenceModel
from localspec.types import TokenIds


def ids(*tokens: int) -> TokenIds:
    return np.array(tokens, np.int32)


def tokenizer(size: int = 48) -> Tokenizer:
    return ReferenceModel(size).tokenizer


def history(folder: Path, **settings: int) -> History:
    return History(tokenizer(), about="reference", folder=folder, **settings)


def texts(one: History) -> list[list[int]]:
    return [text.tolist() for text in one._texts()]


def sessions(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.session"))


# ---------------------------------------------------------------- the array


def occurrences(where: Sequence[Sequence[int]], words: Sequence[int]) -> list[tuple[int, int]]:
    size = len(words)
    return [
        (number, end)
        for number, text in enumerate(where)
        for end in range(size, len(text) + 1)
        if list(text[end - size : end]) == list(words)
    ]


@pytest.mark.parametrize("seed", range(30))
def test_the_array_finds_what_looking_everywhere_finds(seed: int) -> None:
    """Counts, followers, and the longest suffix; never across the seam of two texts."""
    rng = np.random.default_rng(seed)
    words, depth = int(rng.choice([1, 2, 3, 5])), int(rng.choice([1, 2, 4, 64]))
    where = [rng.integers(0, words, int(rng.integers(0, 15))).tolist() for _ in range(int(rng.integers(0, 5)))]
    array = SuffixArray([ids(*text) for text in where], depth)
    assert len(array) == sum(map(len, where))
    for _ in range(20):
        wanted = rng.integers(0, words, int(rng.integers(1, min(depth, 6) + 1))).tolist()
        expected = occurrences(where, wanted)
        found = array.find(ids(*wanted))
        assert len(found) == len(expected) and found.length == len(wanted)
        if expected and len(wanted) < depth:
            after = Counter(where[number][end] for number, end in expected if end < len(where[number]))
            assert array.followers(found) == (dict(after), len(expected))
            for token in range(words):
                followed = array.follow(found, token)
                assert (0 if followed is None else len(followed)) == after[token]
        query = rng.integers(0, words, 12).tolist()
        best = max((size for size in range(1, min(depth, 12) + 1) if occurrences(where, query[-size:])), default=0)
        longest = array.longest(ids(*query))
        assert (0 if longest is None else longest.length) == best
        assert array.longest(ids(*query), best + 1) is None


def test_very_frequent_words_are_judged_by_a_sample() -> None:
    """Shares stay right; of 20,000 occurrences a quarter goes on with 5."""
    array = SuffixArray([ids(*[1, 5, 1, 6, 1, 6, 1, 6] * 5000)])
    followers, total = array.followers(array.find(ids(1)))
    assert 250 <= total <= 600
    assert followers[5] / total == pytest.approx(0.25, abs=0.01) and next(iter(followers)) == 6


def test_an_empty_array_finds_nothing() -> None:
    array = SuffixArray([])
    assert array.longest(ids(1, 2)) is None and array.find(ids(1)) == Found(0, 0, 1)


# ---------------------------------------------------------------- files


def test_sessions_come_back_in_the_order_in_which_they_were_last_written(tmp_path: Path) -> None:
    one = history(tmp_path)
    first, second = one.entry(), one.entry()
    first.write(ids(1, 2))
    second.write(ids(3))
    first.write(ids(1, 2, 4))
    assert texts(history(tmp_path)) == [[3], [1, 2, 4]]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_only_the_owner_can_read_what_is_kept(tmp_path: Path) -> None:
    os.umask(0o000)
    try:
        history(tmp_path).entry().write(ids(1, 2))
    finally:
        os.umask(0o022)
    [file] = sessions(tmp_path)
    for path in (file, file.parent / "about.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_the_oldest_sessions_make_room(tmp_path: Path) -> None:
    one = history(tmp_path, max_bytes=2048)
    for number in range(8):
        one.entry().write(np.full(100, number, np.int32))
    left = texts(one)
    assert [text[0] for text in left] == [4, 5, 6, 7] and all(len(text) == 100 for text in left)
    assert sum(file.stat().st_size for file in sessions(tmp_path)) <= 2048
    one.entry().write(np.arange(5000, dtype=np.int32))
    [only] = texts(one)
    assert only[-1] == 4999 and len(only) < 512, "of one that is too long its end is kept"


def test_vocabularies_are_kept_apart_and_equal_ones_together(tmp_path: Path) -> None:
    history(tmp_path).entry().write(ids(1, 2))
    other = History(tokenizer(50), folder=tmp_path)
    assert texts(other) == []
    assert vocabulary_key(tokenizer(48)) == vocabulary_key(ReferenceModel(48, seed=9).tokenizer)
    assert texts(History(ReferenceModel(48, seed=9).tokenizer, folder=tmp_path)) == [[1, 2]]


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "foreign"])
def test_a_damaged_session_is_deleted_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    one = history(tmp_path)
    for tokens in (ids(1, 2, 3, 4), ids(1, 2, 3, 5), ids(7, 8)):
        one.entry().write(tokens)
    broken = [file for file in sessions(tmp_path) if file.stat().st_size > 34]
    for file in broken:
        raw = file.read_bytes()
        changed = {"empty": b"", "cut": raw[:-3], "changed": raw[:-1] + b"\x01", "foreign": b"{}"}[damage]
        file.write_bytes(changed)
    with caplog.at_level(logging.WARNING, "localspec.history"):
        assert texts(history(tmp_path)) == [[7, 8]]
    assert len(caplog.records) == 1 and "damaged" in caplog.text
    assert len(sessions(tmp_path)) == 1
    caplog.clear()
    assert texts(history(tmp_path)) == [[7, 8]] and not caplog.records


def test_numbers_that_are_no_tokens_are_damage(tmp_path: Path) -> None:
    one = history(tmp_path)
    one.write("x.session", np.array([1, -1], np.int32))
    assert texts(one) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_disk_that_cannot_be_written_costs_the_memory_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    history(tmp_path).entry().write(ids(1))
    tmp_path.chmod(0o700)


def test_a_folder_that_cannot_be_made_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    one = history(blocked)
    with caplog.at_level(logging.WARNING, "localspec.history"):
        one.entry().write(ids(1))
        one.entry().write(ids(2))
        assert len(one.index()) == 0
    assert len(caplog.records) == 1


WRITER = """
import sys
from pathlib import Path
import numpy as np
from localspec.history import History
from localspec.testing.reference import ReferenceModel
one = History(ReferenceModel(48).tokenizer, folder=Path(sys.argv[1]), max_bytes=4096)
for turn in range(30):
    entry = one.entry()
    for size in (50, 100):
        entry.write(np.full(size, int(sys.argv[2]), np.int32))
    assert all(len(set(text.tolist())) == 1 for text in one._texts())
"""


def test_several_processes_may_write_and_make_room_at_once(tmp_path: Path) -> None:
    """Each reads whole sessions only, and the bound holds in the end."""
    command = [sys.executable, "-W", "error", "-c", WRITER, str(tmp_path)]
    running = [subprocess.Popen([*command, str(number)], stderr=subprocess.PIPE) for number in range(3)]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0 and not said, said.decode()
    assert {file.suffix for file in tmp_path.glob("*/*")} == {".json", ".session"}
    history(tmp_path, max_bytes=4096).entry().write(ids(1))
    assert sum(file.stat().st_size for file in sessions(tmp_path)) <= 4096


def test_the_index_takes_in_sessions_that_ended_meanwhile(tmp_path: Path) -> None:
    one = history(tmp_path)
    assert one.index().longest(ids(1, 2)) is None
    entry = one.entry()
    entry.write(ids(1, 2, 3))
    assert one.index().longest(ids(1, 2)) is None, "a session is no history to itself"
    entry.end()
    assert one.index().longest(ids(1, 2)) is not None


def test_the_index_is_not_made_anew_for_every_session(tmp_path: Path) -> None:
    one = history(tmp_path)
    for number in range(40):
        entry = one.entry()
        entry.write(np.full(50, number % 40, np.int32))
        entry.end()
        one.index()
    index, made = one.index(), 0
    for number in range(8):
        entry = one.entry()
        entry.write(np.full(50, number, np.int32))
        entry.end()
        made += one.index() is not index
        index = one.index()
    assert made <= 1


# ---------------------------------------------------------------- for people


def test_what_is_kept_can_be_listed_and_deleted(tmp_path: Path) -> None:
    assert listing(tmp_path / "nowhere") == [] and forget(tmp_path / "nowhere") == 0
    history(tmp_path).entry().write(ids(1, 2))
    History(tokenizer(50), about="other", folder=tmp_path).entry().write(ids(1))
    found = {kept.name: (kept.num_sessions, kept.num_bytes) for kept in listing(tmp_path)}
    assert set(found) == {"reference", "other"} and found["reference"][0] == 1
    assert found["reference"][1] == sum(f.stat().st_size for f in history(tmp_path).folder.glob("*.session"))
    assert forget(tmp_path) == 2
    assert list(tmp_path.iterdir()) == [] and listing(tmp_path) == []


def test_a_bound_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="1024"):
        history(tmp_path, max_bytes=10)
