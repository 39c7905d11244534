"""The llama.cpp backend against the contract, its own promises about bits, bad files and bad builds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from localspec.errors import (
    BackendError,
    ContextFullError,
    LocalspecError,
    SettingError,
    StaleScoresError,
)
from localspec.protocols import HostTokens, LanguageModel, LoadSettings, SequenceState, Step
from localspec.testing.conformance import BackendConformance
from localspec.testing.files import write_gguf
from localspec.types import Logits
from tests.backends.llamacpp_backend import BACKEND, SMALL, step

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not BACKEND.is_installed(), reason="needs llama.cpp: pip install llama-cpp-python")


@cache
def opened(
    name: str, flash_attention: bool = False, cache_type: str | None = None, *, batch: bool = False
) -> LanguageModel:
    path = ROOT / "models" / "tiny" / f"{name}.gguf"
    settings = LoadSettings(
        context=768,
        flash_attention=flash_attention,
        cache_type=cache_type,
        batch=batch,
        num_sequences=6 if batch else 4,
    )
    return BACKEND.load(path, settings)


def rows_after(model: LanguageModel, prefix: list[int], ids: list[int], width: int) -> Logits:
    """[T, V] rows of `ids` behind `prefix`, `width` at a time, narrower rests padded to 2."""
    state, rows = model.open(), []
    try:
        model.forward([step(state, prefix, ())])
        state.keep(range(len(prefix)))
        for start in range(0, len(ids), width):
            part = ids[start : start + width]
            wanted = tuple(range(len(part)))
            [scores] = model.forward([step(state, part + [0] * (2 - len(part)), wanted)])
            rows.append(scores.rows(wanted).copy())
            state.keep(wanted)
    finally:
        state.close()
    return np.concatenate(rows)


# ---------------------------------------------------------------- the contract


class TestTarget(BackendConformance):
    def model(self) -> LanguageModel:
        return opened("target")


class TestDraft(BackendConformance):
    def model(self) -> LanguageModel:
        return opened("draft")


class TestTargetWithFlashAttention(BackendConformance):
    """Trees, too: with flash attention rows do not depend on gaps between a path's cells."""

    def model(self) -> LanguageModel:
        return opened("target", flash_attention=True)


class TestDraftWithFlashAttention(BackendConformance):
    def model(self) -> LanguageModel:
        return opened("draft", flash_attention=True)


@pytest.mark.parametrize("flash_attention", [False, True], scope="class")
class TestManyInOnePass(BackendConformance):
    """Sequences as streams of one context: chains only, and all of them in one pass."""

    flash_attention: ClassVar[bool]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _variant(cls, flash_attention: bool) -> None:
        TestManyInOnePass.flash_attention = flash_attention

    def model(self) -> LanguageModel:
        return opened("target", self.flash_attention, batch=True)

    def test_it_runs_them_together(self) -> None:
        assert self.model().capabilities.batches


def test_what_one_pass_excludes_is_refused() -> None:
    path = ROOT / "models" / "tiny" / "target.gguf"
    with pytest.raises(SettingError, match="exclude each other"):
        BACKEND.load(path, LoadSettings(context=256, batch=True, trees=True))
    model = opened("target", batch=True)
    state = model.open()
    try:
        bush = Step(state, (HostTokens(np.array([1, 2], np.int32)),), np.array([-1, -1], np.int32))
        with pytest.raises(ValueError, match="chains only"):
            model.forward([bush])
        assert state.num_pending == 0
    finally:
        state.close()


# ---------------------------------------------------------------- bits


@pytest.mark.slow
@pytest.mark.parametrize("flash_attention", [False, True])
@pytest.mark.parametrize("length", [20, 300, 701])
@pytest.mark.parametrize("name", ["target", "draft"])
def test_chains_of_every_width_from_two_up_have_the_same_rows(name: str, length: int, flash_attention: bool) -> None:
    """The width class, with plain decoding padded to width 2."""
    model = opened(name, flash_attention)
    rng = np.random.default_rng(length)
    prefix, ids = rng.integers(16, 8192, length).tolist(), rng.integers(16, 8192, 16).tolist()
    plain = rows_after(model, prefix, ids, 1)
    for width in (2, 3, 4, 5, 8, 16):
        assert np.array_equal(rows_after(model, prefix, ids, width), plain), f"width {width}"


@pytest.mark.slow
def test_keys_and_values_in_bfloat16_keep_the_width_class_and_change_the_rows() -> None:
    """Flash attention takes no lone token apart then, so passes need not be cut, and tune may widen the class."""
    rng = np.random.default_rng(0)
    prefix, ids = rng.integers(16, 8192, 600).tolist(), rng.integers(16, 8192, 16).tolist()
    rows = {}
    for cache_type in ("f16", "bf16"):
        model = opened("target", True, cache_type)
        assert dict(model.info.options)["cache_type"] == cache_type
        rows[cache_type] = rows_after(model, prefix, ids, 2)
        for width in (4, 16):
            assert np.array_equal(rows_after(model, prefix, ids, width), rows[cache_type])
    difference = np.abs(rows["f16"] - rows["bf16"])
    assert 0.0 < float(difference.max()) < 3.0 and float((rows["f16"].argmax(1) == rows["bf16"].argmax(1)).mean()) > 0.8
    with pytest.raises(SettingError, match="unknown cache_type"):
        opened("draft", True, "q3")


def test_one_scored_row_of_many_stays_in_the_width_class() -> None:
    """The last layer sees scored tokens only, so a lone row would run another kernel there."""
    model = opened("target")
    state, ids = model.open(), list(range(100, 109))
    for row in (0, 4, 8):
        [everything] = model.forward([step(state, ids)])
        want = everything.rows([row]).copy()
        state.keep(())
        [scores] = model.forward([step(state, ids, (row,))])
        assert scores.num_rows == 1 and np.array_equal(scores.rows([0]), want)
        state.keep(())
    state.close()


def test_other_sequences_do_not_move_a_sequence_to_other_cells() -> None:
    """Old bug: in a shared cache the second sequence's rows differed in the last bits from the first's."""
    model = opened("target")
    prefix, ids = list(range(200, 275)), list(range(300, 304))
    alone = rows_after(model, prefix, ids, 4)
    other = model.open()
    model.forward([step(other, list(range(400, 433)), ())])
    assert np.array_equal(rows_after(model, prefix, ids, 4), alone)
    other.close()


def test_more_rows_than_one_pass_holds() -> None:
    """Passes longer than a batch are cut; their rows are the same."""
    model = opened("draft")
    ids = np.random.default_rng(0).integers(16, 8192, 301).tolist()
    state = model.open()
    [scores] = model.forward([step(state, ids)])
    rows = scores.rows(range(301)).copy()
    state.close()
    assert np.array_equal(rows[1:], rows_after(model, ids[:1], ids[1:], 100))


# ---------------------------------------------------------------- scores and states


def test_scores_refuse_to_answer_after_the_next_pass(tmp_path: Path) -> None:
    """The buffer behind them is llama.cpp's."""
    model = BACKEND.load(write_gguf(tmp_path / "m.gguf"), SMALL)
    state = model.open()
    [scores] = model.forward([step(state, [5, 6])])
    model.forward([step(state, [7, 8])])
    for read in (scores.argmax, lambda: scores.rows([0]), lambda: scores.top(2)):
        with pytest.raises(StaleScoresError):
            read()
    [scores] = model.forward([step(state, [7, 8])])
    model.close()
    model.close()
    with pytest.raises(StaleScoresError):
        scores.argmax()
    for use in (lambda: state.keep(()), lambda: model.forward([step(state, [1])]), model.open):
        with pytest.raises(ValueError, match="closed"):
            use()
    state.close()


def test_a_failed_pass_has_not_happened(tmp_path: Path) -> None:
    """A token that does not exist makes llama.cpp refuse; what was pending still is."""
    model = BACKEND.load(write_gguf(tmp_path / "m.gguf"), SMALL)
    state, other = model.open(), model.open()
    model.forward([step(state, [5, 6], ()), step(other, [9, 9], ())])
    tree = replace(step(state, [7, 10**6, 8]), parents=np.array([0, 0, 1], np.int32))
    with pytest.raises(ValueError, match="token"):
        model.forward([step(other, [3, 3], ()), tree])
    assert (state.num_pending, other.num_pending) == (2, 2)
    [after] = model.forward([step(state, [7, 8])])
    got = after.rows(range(2)).copy()
    fresh_rows = rows_after_close(model, other, [5, 6], [7, 8])
    assert np.array_equal(got, fresh_rows)
    for wrong in (np.array([9], np.int32), np.array([-2], np.int32)):
        with pytest.raises(ValueError, match="parent"):
            model.forward([replace(step(state, [1]), parents=wrong)])
    for rows in ((1, 0), (0, 0), (2,), (-1,)):
        with pytest.raises(ValueError, match="rows"):
            model.forward([step(state, [1, 2], rows)])
    with pytest.raises(ValueError, match="one step"):
        model.forward([step(state, [1]), step(state, [2])])
    model.close()


def rows_after_close(model: LanguageModel, state: SequenceState, prefix: list[int], ids: list[int]) -> Logits:
    state.close()
    return rows_after(model, prefix, ids, len(ids))


def test_a_tree_may_have_as_many_leaves_as_a_pass_has_tokens() -> None:
    """Every leaf needs a sequence id."""
    model = opened("draft")
    state, count = model.open(), model.capabilities.max_width
    star = Step(state, (HostTokens(np.arange(16, 16 + count, dtype=np.int32)),), np.full(count, -1, np.int32))
    model.forward([star])
    with pytest.raises(BackendError, match="fewer leaves"):
        model.forward([Step(state, star.tokens * 2, np.full(2 * count, -1, np.int32))])
    state.keep((count - 1,))
    assert state.length == 1
    model.forward([star])  # all ids came back
    state.close()


def test_the_last_token_of_the_context_can_be_used(tmp_path: Path) -> None:
    """`context` tokens fit, for as many sequences as were promised."""
    model = BACKEND.load(write_gguf(tmp_path / "m.gguf"), SMALL)
    for state in (model.open(), model.open()):
        model.forward([step(state, [5] * 256, ())])
        state.keep(range(256))
        with pytest.raises(ContextFullError, match="larger context"):
            model.forward([step(state, [5])])
    with pytest.raises(BackendError, match="num_sequences"):
        model.open()
    model.close()


# ---------------------------------------------------------------- the tokenizer


def test_every_token_has_bytes_and_text_comes_back() -> None:
    """Bytes of any character survive; special texts become tokens only when asked."""
    tokenizer = opened("target").tokenizer
    for text in ("".join(map(chr, range(1, 0xD800, 7))), "🙂👩‍👩‍👧\U0010ffff", "\0 a", "", " " * 300):
        ids = tokenizer.encode(text, special=False)
        assert b"".join(tokenizer.token_bytes(int(t)) for t in ids) == text.encode()
    assert tokenizer.encode("<|im_end|>", special=True).tolist() == [2]
    assert len(tokenizer.encode("<|im_end|>", special=False)) > 1
    assert tokenizer.is_special(2) and not tokenizer.is_special(300)
    assert 2 in tokenizer.stop_tokens and tokenizer.bos is None
    assert tokenizer.template_tokens["eos_token"] == "<|im_end|>" and "bos_token" not in tokenizer.template_tokens
    assert "im_start" in (tokenizer.chat_template or "")
    assert tokenizer.token_bytes(8192) == b""
    with pytest.raises(LocalspecError, match="Unicode"):
        tokenizer.encode("\ud800", special=False)
