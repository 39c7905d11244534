"""What becomes of a head's memory on llama.cpp when its sequence is cut, copied, shortened, or shares a pass with
others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localspec.protocols import HostTokens, LoadSettings, Step, chain_parents
from localspec.testing.gguf_architectures import write_architecture
from localspec.testing.gguf_heads import write_block_head, write_eagle3_head
from localspec.types import Logits
from tests.backends.llamacpp_backend import BACKEND, module
from tests.backends.llamacpp_heads import (
    SETTINGS,
    assert_close,
    chain_behind,
    commit,
    features_of,
    forward,
    ids,
    listen,
    loaded,
    write_head,
)
from tests.backends.numpy_heads import BlockReference, StepReference

pytestmark = pytest.mark.skipif(not BACKEND.is_installed(), reason="needs llama.cpp: pip install llama-cpp-python")


# ---------------------------------------------------------------- what a head is told


def test_a_head_hears_what_is_kept_and_no_more(target_path: Path, tmp_path: Path) -> None:
    """A pass cut into several, a chain, a branch of a tree, nothing, a truncation."""
    path = write_block_head(tmp_path / "head.gguf", target_path)
    settings = LoadSettings(context=256, num_sequences=3, threads=1, extra_buffers=False, trees=True)
    with loaded(target_path, path, settings) as (model, head):
        state = model.open()
        heard = listen(model, state, head)
        text = ids(150)
        commit(model, state, text[:140])  # flash attention cuts after 63
        forward(model, state, [text[140], 7, text[141], 9, text[142]], [-1, 0, 0, 1, 2])
        state.keep([0, 2, 4])
        forward(model, state, [9, 9, 9])
        state.keep(())
        commit(model, state, text[143:145])
        state.truncate(142)
        commit(model, state, text[142:])
        want = features_of(model, head, text)
        assert [token for token, _ in heard] == text
        assert np.abs(np.array([row for _, row in heard]) - want).max() < 1e-3 * want.std()


def test_lanes_of_one_pass_each_hear_their_own(target_path: Path, tmp_path: Path) -> None:
    path = write_block_head(tmp_path / "head.gguf", target_path)
    settings = LoadSettings(context=256, num_sequences=3, threads=1, extra_buffers=False, batch=True)
    with loaded(target_path, path, settings) as (model, head):
        assert model.capabilities.batches
        texts = [ids(7), ids(4, 50), ids(9, 90)]
        states = [model.open() for _ in texts]
        heard = [listen(model, states[index], head) if index != 1 else [] for index in range(3)]
        steps = [
            Step(state, (HostTokens(np.array(text, np.int32)),), chain_parents(state, len(text)), ())
            for state, text in zip(states, texts, strict=True)
        ]
        model.forward([steps[2], steps[0], steps[1]])
        for state, text in zip(states, texts, strict=True):
            state.keep(range(len(text)))
        for state in states:
            state.close()
        assert not heard[1]
        for index in (0, 2):
            want = features_of(model, head, texts[index])
            assert [token for token, _ in heard[index]] == texts[index]
            assert np.allclose([row for _, row in heard[index]], want, atol=1e-4)


def test_hidden_states_are_read_when_rows_are(
    target_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once it would wait for the device. Whose rows nobody reads are heard all the same, in time."""
    path = write_block_head(tmp_path / "head.gguf", target_path)
    with loaded(target_path, path) as (model, head):
        text = ids(12)
        want = features_of(model, head, text)
        taps = type(model.memory.taps)  # type: ignore[attr-defined]
        read, count = taps.read, [0]

        def counted(self: Any, *args: Any) -> None:
            count[0] += 1
            read(self, *args)

        monkeypatch.setattr(taps, "read", counted)
        state = model.open()
        heard = listen(model, state, head)
        for start in range(0, 12, 4):
            parents = chain_parents(state, 4)
            [scores] = model.forward([Step(state, (HostTokens(np.array(text[start : start + 4], np.int32)),), parents)])
            assert count[0] == start // 4, "nobody needs them yet"
            if start:
                scores.rows((0,))
                assert count[0] == start // 4 + 1
            state.keep(range(4))
        assert count[0] == 3, "each once"
        assert [token for token, _ in heard] == text
        assert np.abs(np.array([row for _, row in heard]) - want).max() < 1e-3 * want.std()
        model.forward([Step(state, (HostTokens(np.array([7], np.int32)),), chain_parents(state, 1))])
        state.close()
        again = model.open()
        commit(model, again, text)
        again.close()


def test_replayed_tokens_are_heard_once(tmp_path: Path) -> None:
    """Recurrent layers: what was kept behind a rejected guess is run again, and its features are known already."""
    target = write_architecture(tmp_path / "target.gguf", "qwen3next")
    path = write_block_head(tmp_path / "head.gguf", target)
    with loaded(target, path) as (model, head):
        state = model.open()
        heard, text = listen(model, state, head), ids(30)
        commit(model, state, text[:10])
        for start in range(10, 26, 2):
            forward(model, state, [*text[start : start + 2], 9, 8])
            state.keep([0, 1])
        assert state.num_replayed > 0
        state.truncate(20)
        commit(model, state, text[20:])
        want = features_of(model, head, text)
        assert [token for token, _ in heard] == text
        assert np.abs(np.array([row for _, row in heard]) - want).max() < 5e-3 * want.std()


# ---------------------------------------------------------------- a head's memory


def behind(guesses: Any, anchor: int = 40) -> Logits:
    """[3, V] the rows of a short chain that leaves the greedy path."""
    return chain_behind(guesses, anchor, (17, 80))


@pytest.mark.parametrize("kind", ["dspark", "dflash-window", "jetspec", "eagle3"])
def test_memory_follows_the_sequence(kind: str, target_path: Path, tmp_path: Path) -> None:
    """Kept branches, truncation, forks and saved states: each time as if the text had been read in one go."""
    path = write_head(tmp_path / "head.gguf", target_path, kind)
    with loaded(target_path, path) as (model, head):
        text = ids(100)

        def fresh(tokens: Sequence[int]) -> Logits:
            state = model.open()
            guesses = head.open(state)
            commit(model, state, tokens)
            rows = behind(guesses)
            state.close()
            return rows

        state = model.open()
        guesses = head.open(state)
        commit(model, state, text[:80])
        behind(guesses)
        forward(model, state, [text[80], 7, text[81], 9, text[82]], [-1, 0, 0, 1, 2])
        state.keep([0, 2, 4])
        whole = fresh(text[:83])
        assert_close(behind(guesses), whole)
        assert np.abs(behind(guesses) - fresh(text[:82])).max() > 0.05 * whole.std()
        copy = state.fork()
        saved = state.save()
        commit(model, state, ids(5, 500))
        state.truncate(83)
        assert_close(behind(guesses), whole)
        state.truncate(60)
        assert_close(behind(guesses), fresh(text[:60]))
        copied = head.open(copy)
        assert np.array_equal(behind(copied), behind(copied))
        assert_close(behind(copied), whole)
        commit(model, copy, text[83:90])
        assert_close(behind(copied), fresh(text[:90]))
        copy.close()
        back = saved.open()
        assert saved.num_bytes > 0
        assert_close(behind(head.open(back)), whole)
        back.close()


@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_a_copy_is_the_same_to_the_last_bit(kind: str, target_path: Path, tmp_path: Path) -> None:
    path = write_head(tmp_path / "head.gguf", target_path, kind)
    with loaded(target_path, path) as (model, head):
        state = model.open()
        guesses = head.open(state)
        commit(model, state, ids(70))
        want = behind(guesses)
        state.truncate(70)
        assert np.array_equal(behind(guesses), want)
        copy = state.fork()
        assert np.array_equal(behind(head.open(copy)), want)
        saved = state.save()
        state.close()
        assert np.array_equal(behind(head.open(saved.open())), want)


def test_a_head_that_comes_late_sees_less(target_path: Path, tmp_path: Path) -> None:
    """As if the text had begun where it came: rotation knows distances only."""
    path = write_block_head(tmp_path / "head.gguf", target_path)
    reference, text = BlockReference(path, target_path), ids(30)
    with loaded(target_path, path) as (model, head):
        state = model.open()
        commit(model, state, text[:10])
        guesses = head.open(state)
        assert guesses.start(40).num_rows == 1  # nothing seen yet is no fault
        commit(model, state, text[10:])
        features = features_of(model, head, text)
        base, hidden = reference.base(features[10:], 40)
        assert_close(guesses.start(40).rows([0])[0], reference.row(base, hidden, 0, 40))
        state.truncate(5)
        commit(model, state, text[5:30])
        base, hidden = reference.base(features[5:], 40)
        assert_close(guesses.start(40).rows([0])[0], reference.row(base, hidden, 0, 40))


def test_a_late_eagle3_head_and_one_that_is_cut_far_back(
    monkeypatch: pytest.MonkeyPatch, target_path: Path, tmp_path: Path
) -> None:
    """Of the pair at a cut beyond what is remembered the token is the old one; everything else is exact."""
    monkeypatch.setattr(module("step_head"), "_NUM_RECENT", 64)
    path = write_eagle3_head(tmp_path / "head.gguf", target_path)
    reference, text = StepReference(path, target_path), ids(120)
    with loaded(target_path, path) as (model, head):
        state = model.open()
        commit(model, state, text[:10])
        guesses = head.open(state)
        assert guesses.start(40).num_rows == 1
        commit(model, state, text[10:])
        features = features_of(model, head, text)
        want = reference.rows(features[10:], [*text[10:], 40], [9])
        assert_close(chain_behind(guesses, 40, [9]), want)
        state.truncate(100)
        assert_close(chain_behind(guesses, 40, [9]), reference.rows(features[10:100], [*text[10:100], 40], [9]))
        state.truncate(20)
        commit(model, state, [5, 6, 7])
        other = features_of(model, head, [*text[:20], 5, 6, 7])
        got, kept = chain_behind(guesses, 40, [9]), [*text[10:21], 6, 7, 40]  # text[20] where 5 is
        assert_close(got, reference.rows(other[10:], kept, [9]))
        state.truncate(0)
        commit(model, state, text[:4])
        assert_close(chain_behind(guesses, 40, [9]), reference.rows(features[:4], [*text[:4], 40], [9]))


@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_closing_ends_the_feeding(kind: str, target_path: Path, tmp_path: Path) -> None:
    path = write_head(tmp_path / "head.gguf", target_path, kind)
    with loaded(target_path, path) as (model, head):
        states = [model.open() for _ in range(3)]
        for state in states:
            head.open(state).close()
        opened = [head.open(state) for state in states]  # their places were given back
        for state in states:
            assert state.recording is not None  # type: ignore[attr-defined]
        opened[0].close()
        opened[0].close()
        with pytest.raises(ValueError, match="closed"):
            opened[0].start(3)
        commit(model, states[0], ids(4))
        states[1].close()
        forward(model, states[2], ids(3))
        again = head.open(states[2])  # a second view of the same memory
        assert again.room == opened[2].room > 0
        other = BACKEND.load(target_path, SETTINGS)
        foreign = other.open()
        with pytest.raises(ValueError, match="another model"):
            head.open(foreign)
        other.close()


# ---------------------------------------------------------------- what waits for a head


@given(st.lists(st.tuples(st.sampled_from(["add", "drop", "cut"]), st.integers(0, 9)), max_size=40))
def test_what_waits_is_what_came_and_did_not_leave(steps: list[tuple[str, int]]) -> None:
    waiting, rows, next_row = module("companion").Waiting(3), np.zeros((0, 3), np.float32), 0
    for what, count in steps:
        if what == "add":
            new = np.arange(next_row, next_row + 3 * count, dtype=np.float32).reshape(count, 3)
            waiting.add(new)
            rows, next_row = np.concatenate([rows, new]), next_row + 3 * count
        elif what == "drop":
            waiting.drop(min(count, len(rows)))
            rows = rows[count:]
        else:
            waiting.cut(len(rows) - count)
            rows = rows[: max(len(rows) - count, 0)]
        assert len(waiting) == len(rows) and np.array_equal(waiting.first(len(rows)), rows)
