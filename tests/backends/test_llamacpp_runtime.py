"""Builds of llama.cpp with a C++ library of their own are told apart from sound ones, and refused."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localspec.errors import BackendError, StaleScoresError
from localspec.testing.gguf_architectures import write_architecture
from tests.backends.llamacpp_backend import BACKEND, SMALL, module, step

_SOURCE = """
#include <locale>
#include <sstream>
extern "C" int length(long number) {
    std::stringstream text;
    text << number << std::locale::classic().name();
    return text.str().size();
}
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only there do libraries share symbols so")


def built(folder: Path, *flags: str) -> ctypes.CDLL:
    """A small library that prints a number, linked with these flags."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    source, library = folder / "number.cpp", folder / "libnumber.so"
    source.write_text(_SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def test_a_library_with_libstdcpp_inside_is_found(tmp_path: Path) -> None:
    found = module("runtime").private_runtime(built(tmp_path, "-static-libstdc++"))
    assert found == tmp_path / "libnumber.so"


def test_a_library_that_shares_libstdcpp_is_sound(tmp_path: Path) -> None:
    library = built(tmp_path)
    assert module("runtime").private_runtime(library) is None
    assert module("runtime").is_shared_runtime_loaded()


@pytest.mark.skipif(not BACKEND.is_installed(), reason="needs llama.cpp: pip install llama-cpp-python")
def test_a_build_with_libstdcpp_inside_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to end the process with SIGSEGV as soon as a model was opened."""
    native = module("native")
    native.library()
    monkeypatch.setattr(import_module("llama_cpp._ggml"), "libggml", built(tmp_path, "-static-libstdc++"))
    native.library.cache_clear()
    with pytest.raises(BackendError, match=r"C\+\+ library of its own") as caught:
        native.library()
    assert "libnumber.so" in str(caught.value)
    assert "CMAKE_SHARED_LINKER_FLAGS" in str(caught.value)
    monkeypatch.undo()
    native.library.cache_clear()
    native.library()


@pytest.mark.skipif(not BACKEND.is_installed(), reason="needs llama.cpp: pip install llama-cpp-python")
def test_the_installed_build_is_sound() -> None:
    assert module("runtime").private_runtime(import_module("llama_cpp._ggml").libggml) is None


_INTERRUPTED = """
import logging, time
from importlib import import_module
from localspec.loading import get_backend

class Interrupted(logging.Filter):
    def filter(self, record):
        raise KeyboardInterrupt

get_backend("llamacpp")
native = import_module("localspec_backend_llamacpp.native")
native.library()
logger = logging.getLogger("localspec.llamacpp")
logger.addFilter(Interrupted())
logger.setLevel(logging.DEBUG)
try:
    native._callback(4, b"a line\\n", None)
    time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_within_the_log_is_not_lost() -> None:
    """Python drops what is raised in a callback from C. In a process of its own: pytest takes what is dropped, too."""
    done = subprocess.run([sys.executable, "-c", _INTERRUPTED], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "interrupted", done.stderr


@pytest.mark.skipif(not BACKEND.is_installed(), reason="needs llama.cpp: pip install llama-cpp-python")
def test_a_gpu_scores_all_rows_of_a_narrow_pass_and_gives_those_that_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the last layer's bits change with the number of rows, so padding is scored, too. Rows are the same here."""
    model: Any = BACKEND.load(write_architecture(tmp_path / "m.gguf", "llama"), SMALL)
    scored: list[int] = []
    logits = module("native").Context.logits

    def counted(context: Any, count: int) -> Any:
        scored.append(count)
        return logits(context, count)

    monkeypatch.setattr(module("native").Context, "logits", counted)
    found = []
    for on_gpu in (False, True):
        model._scores_all = on_gpu
        state = model.open()
        rows = []
        some = ([5, 6, 7, 8], (0, 1)), ([9, 3, 4], (0, 2)), ([6, 4], ()), ([8], ())
        for ids, wanted in (*some, ([2], None), ([7, 7, 2], None)):
            [scores] = model.forward([step(state, ids, wanted)])
            assert scores.num_rows == len(ids if wanted is None else wanted)
            rows.append(scores.rows(range(scores.num_rows)).copy() if scores.num_rows else None)
            state.keep(range(len(ids)))
        found.append(rows)
        state.close()
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other)
    assert scored == [2, 2, 1, 3, 4, 3, 1, 3]  # what nobody reads is not fetched
    model.close()


def test_rows_are_fetched_when_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetching waits for the device; until then the host has time for other things."""
    model: Any = BACKEND.load(write_architecture(tmp_path / "m.gguf", "llama"), SMALL)
    fetched: list[int] = []
    logits = module("native").Context.logits

    def counted(context: Any, count: int) -> Any:
        fetched.append(count)
        return logits(context, count)

    monkeypatch.setattr(module("native").Context, "logits", counted)
    state = model.open()
    [scores] = model.forward([step(state, [5, 6, 7], None)])
    assert scores.num_rows == 3 and not fetched
    first = scores.rows((0,)).copy()
    assert np.array_equal(first, scores.rows(range(3))[:1]) and fetched == [3]
    [_] = model.forward([step(state, [8], None)])
    with pytest.raises(StaleScoresError):
        scores.rows((1,))
    model.close()
