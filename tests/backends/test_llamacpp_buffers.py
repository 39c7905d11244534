"""The self-test that says whether a build of llama.cpp can use its extra buffers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localspec.errors import SettingError
from localspec.testing.files import write_gguf
from tests.backends.llamacpp_backend import BACKEND, SMALL, module, step

pytestmark = pytest.mark.skipif(not BACKEND.is_installed(), reason="needs llama.cpp: pip install llama-cpp-python")


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
    path.write_bytes(module("probe_child").model_bytes())
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
