"""The llama.cpp backend against the contract, its own promises about bits, bad files and bad builds."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from localspec.errors import (
    BackendError,
    ContextFullError,
    LocalspecError,
    ModelFileError,
    ModelNotFoundError,
    OutOfMemoryError,
    SettingError,
    StaleScoresError,
    UnsupportedModelError,
)
from localspec.loading import get_backend
from localspec.protocols import HostTokens, LanguageModel, LoadSettings, SequenceState, Step, chain_parents
from localspec.testing.conformance import BackendConformance
from localspec.testing.files import write_gguf
from localspec.types import Logits

BACKEND = get_backend("llamacpp")
ROOT = Path(__file__).resolve().parents[2]
SMALL = LoadSettings(context=256, num_sequences=2)
pytestmark = pytest.mark.skipif(not BACKEND.is_installed(), reason="needs llama.cpp: pip install llama-cpp-python")


def module(name: str) -> Any:
    """A module of the backend, which is loaded under a name of the core's choosing."""
    return import_module(f"{type(BACKEND).__module__}.{name}")


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


def step(state: SequenceState, ids: list[int], rows: tuple[int, ...] | None = None) -> Step:
    """A chain below what is pending."""
    return Step(state, (HostTokens(np.array(ids, np.int32)),), chain_parents(state, len(ids)), rows)


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


# ---------------------------------------------------------------- files and settings


def test_missing_and_foreign_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        BACKEND.load(tmp_path / "none.gguf", SMALL)
    with pytest.raises(ModelFileError, match="folder"):
        BACKEND.load(tmp_path, SMALL)
    text = tmp_path / "text.gguf"
    text.write_text("hello")
    with pytest.raises(ModelFileError, match="not a GGUF file"):
        BACKEND.load(text, SMALL)
    assert not BACKEND.accepts(tmp_path) and not BACKEND.accepts(tmp_path / "none.gguf")
    unnamed = write_gguf(tmp_path / "model.gguf").rename(tmp_path / "blob")
    assert BACKEND.accepts(unnamed)


@pytest.mark.parametrize("kept", [4, 10, 24, 100, 3000, 60_000, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    """Header, metadata and tensor data."""
    path = write_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelFileError, match=r"failed to read|not within the file bounds|truncated"):
        BACKEND.load(path, SMALL)


def test_an_unknown_architecture_is_unsupported(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", architecture="qwen3")
    path.write_bytes(path.read_bytes().replace(b"qwen3", b"qwenX"))
    with pytest.raises(UnsupportedModelError, match="qwenX"):
        BACKEND.load(path, SMALL)


@pytest.mark.parametrize("name", ["dflash", "eagle3", "dspark", "medusa"])
def test_draft_heads_are_refused_by_name_before_llama_cpp_sees_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    old, new = (len(text).to_bytes(8, "little") + text.encode() for text in ("qwen3", name))
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    monkeypatch.setattr(module("loading"), "Weights", lambda *_, **__: pytest.fail("llama.cpp was asked"))
    with pytest.raises(UnsupportedModelError, match=f"draft head.*{name}"):
        BACKEND.load(path, SMALL)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such names")
def test_a_path_may_be_any_bytes(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf").rename(tmp_path / os.fsdecode(b"m\xff.gguf"))
    BACKEND.load(path, SMALL).close()


@pytest.mark.parametrize("fact", ["has_encoder", "is_diffusion"])
def test_models_that_do_not_write_from_left_to_right_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fact: str
) -> None:
    weights = module("weights").Weights
    number = weights.number
    monkeypatch.setattr(weights, "number", lambda self, name: 1 if name == fact else number(self, name))
    with pytest.raises(UnsupportedModelError, match="cannot be used yet"):
        BACKEND.load(write_gguf(tmp_path / "m.gguf"), SMALL)


def test_a_cache_that_does_not_fit_is_out_of_memory() -> None:
    """16 million tokens of the draft model would take 34 GB; twice as many sequences are not allocated."""
    model = module("loading").context_error(Path("m.gguf"), ("failed to allocate buffer",), BackendError("no context"))
    assert isinstance(model, OutOfMemoryError)
    lines = ("f: error loading model: unable to allocate CUDA0 buffer", "g: failed to load model")
    error = module("weights").load_error(Path("m"), lines)
    assert isinstance(error, OutOfMemoryError)
    assert "unable to allocate CUDA0 buffer" in str(error) and "failed to load" not in str(error)


@pytest.mark.slow
def test_a_real_shortage_is_told_in_one_line(tmp_path: Path) -> None:
    """Old bug: four lines of llama.cpp's log were quoted, which said the same thing."""
    path = write_gguf(tmp_path / "m.gguf")
    settings = LoadSettings(context=1 << 24, num_sequences=1, extra_buffers=False, threads=1)
    with pytest.raises(OutOfMemoryError) as caught:
        BACKEND.load(path, settings)
    assert len(str(caught.value)) < 200 and "/" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        LoadSettings(dtype="float16"),
        LoadSettings(threads=0),
        LoadSettings(context=1),
        LoadSettings(num_sequences=0),
        LoadSettings(gpu_layers=-1),
    ],
)
def test_settings_out_of_range_or_foreign_are_refused(tmp_path: Path, settings: LoadSettings) -> None:
    with pytest.raises(SettingError):
        BACKEND.load(write_gguf(tmp_path / "m.gguf"), settings)


# ---------------------------------------------------------------- the log


def test_the_log_callback_survives_and_goes_to_logging(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Old bug of such bindings: a collected callback crashes the process."""
    gc.collect()
    with caplog.at_level(logging.DEBUG, "localspec.llamacpp"):
        BACKEND.load(write_gguf(tmp_path / "m.gguf"), SMALL).close()
    assert any("kv" in record.message for record in caplog.records)
    assert all(record.levelno <= logging.INFO for record in caplog.records)


def test_importing_the_backend_imports_no_runtime_and_exit_is_quiet(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    code = (
        "import sys; from pathlib import Path; from localspec.loading import get_backend;"
        "from localspec.protocols import LoadSettings; b = get_backend('llamacpp');"
        f"assert 'llama_cpp' not in sys.modules; m = b.load(Path({str(path)!r}), LoadSettings(context=64));"
        "s = m.open()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---------------------------------------------------------------- extra buffers


def test_the_verdict_is_asked_once_and_asked_again_when_unreadable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Kept per machine and build; a corrupt file or another build asks again."""
    probe = module("probe")
    asked: list[int] = []
    finding = probe.Finding(probe.Verdict.CRASH, "SIGILL")

    def ask() -> Any:
        asked.append(1)
        return finding

    monkeypatch.setattr(probe, "_ask", ask)
    assert probe.find(tmp_path) == finding == probe.find(tmp_path)
    assert len(asked) == 1
    [file] = tmp_path.iterdir()
    for broken in ("", "{", "[]", '{"verdict": "maybe", "detail": ""}'):
        file.write_text(broken)
        assert probe.find(tmp_path) == finding
    assert len(asked) == 5
    monkeypatch.setattr(probe, "identity", lambda: "f" * 64)
    probe.find(tmp_path)
    assert len(asked) == 6
    finding = probe.Finding(probe.Verdict.UNKNOWN, "timeout")
    file.unlink()
    monkeypatch.setattr(probe, "identity", lambda: "e" * 64)
    assert probe.find(tmp_path) == finding == probe.find(tmp_path)
    assert len(asked) == 8  # what could not be found out is not remembered


def test_the_real_probe_answers_here(tmp_path: Path) -> None:
    """Whatever the machine, the question is answered and this process survives it."""
    probe = module("probe")
    found = probe.find(tmp_path)
    assert found.verdict in (probe.Verdict.WORK, probe.Verdict.CRASH)
    assert bool(found.note) == (found.verdict is probe.Verdict.CRASH)


def test_a_crashing_build_runs_without_extra_buffers_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    probe = module("probe")
    monkeypatch.setattr(probe, "examine", lambda: probe.Finding(probe.Verdict.CRASH, "SIGSEGV"))
    path = write_gguf(tmp_path / "m.gguf", quantization="Q4_0")
    model = BACKEND.load(path, SMALL)
    model.forward([step(model.open(), list(range(32)))])
    assert any("SIGSEGV" in note and "clang" in note for note in model.info.notes)
    assert any("SIGSEGV" in note for note in BACKEND.report().notes)
    model.close()
    with pytest.raises(SettingError, match="extra_buffers"):
        BACKEND.load(path, replace(SMALL, extra_buffers=True))
    off = BACKEND.load(path, replace(SMALL, extra_buffers=False))
    assert not any("extra" in note for note in off.info.notes)
    off.close()


@pytest.mark.parametrize("words", ["SIGSEGV", "the probe's model does not load"])
def test_a_self_test_that_fails_keeps_no_model_from_loading(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str
) -> None:
    """Old bug: on a CUDA build the generated model crashed where real ones ran, and all were refused."""
    probe = module("probe")
    monkeypatch.setattr(probe, "_child", lambda *_, **__: (None, words))
    finding = probe.find(tmp_path / "cache")
    assert finding.verdict is probe.Verdict.UNKNOWN
    monkeypatch.setattr(probe, "examine", lambda: finding)
    model = BACKEND.load(write_gguf(tmp_path / "m.gguf", quantization="Q4_0"), SMALL)
    model.forward([step(model.open(), list(range(32)))])
    [note] = [note for note in model.info.notes if "self-test itself failed" in note]
    assert words in note and "GCC" not in note
    model.close()


def test_the_verdict_is_asked_for_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = module("probe")
    folders: list[Path] = []

    def find(folder: Path) -> Any:
        folders.append(folder)
        return probe.Finding(probe.Verdict.UNKNOWN, "x")

    monkeypatch.setattr(probe, "find", find)
    probe.examine.cache_clear()
    assert probe.examine() is probe.examine() and len(folders) == 1
    probe.examine.cache_clear()


def test_the_self_tests_model_is_an_ordinary_file(tmp_path: Path) -> None:
    """Read back by the gguf package: every tensor whole, aligned and inside the file, every key there."""
    from gguf import GGUFReader

    path = tmp_path / "probe.gguf"
    path.write_bytes(import_module(f"{type(BACKEND).__module__}.probe_child").model_bytes())
    reader, twin = GGUFReader(path), GGUFReader(write_gguf(tmp_path / "twin.gguf"))
    last = max(reader.tensors, key=lambda tensor: tensor.data_offset)
    end = int(last.data_offset + last.n_bytes)
    assert path.stat().st_size == end + -end % 32
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)
    assert {tensor.name for tensor in reader.tensors} == {tensor.name for tensor in twin.tensors} | {"output.weight"}
    unneeded = {"general.description", "general.license", "tokenizer.chat_template"}
    assert twin.fields.keys() - unneeded <= reader.fields.keys()
    for key in twin.fields.keys() - unneeded:
        assert reader.fields[key].types == twin.fields[key].types, key
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == len(set(tokens)) == 288


def test_wrong_numbers_are_as_bad_as_a_crash() -> None:
    probe = module("probe")
    plain = np.random.default_rng(0).normal(size=256)
    assert probe.judge(plain.tolist(), (plain * 1.001).tolist()).verdict is probe.Verdict.WORK
    for wrong in (plain[::-1], plain * np.nan, plain[:5]):
        assert probe.judge(plain.tolist(), wrong.tolist()).verdict is probe.Verdict.WRONG
