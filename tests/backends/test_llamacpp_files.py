"""Files and settings that llama.cpp refuses, in whose words, and where its log goes."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from localspec.errors import (
    BackendError,
    ModelFileError,
    ModelNotFoundError,
    OutOfMemoryError,
    SettingError,
    UnsupportedModelError,
)
from localspec.protocols import LoadSettings
from localspec.testing.files import write_gguf
from tests.backends.llamacpp_backend import BACKEND, SMALL, module

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not BACKEND.is_installed(), reason="needs llama.cpp: pip install llama-cpp-python")


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
