"""What llama.cpp refuses as a head, and when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from localspec.errors import BackendError, FailureError, HeadFileError, PairMismatchError, UnsupportedModelError
from localspec.testing.files import write_gguf
from localspec.testing.gguf_heads import write_block_head, write_eagle3_head
from tests.backends.llamacpp_backend import BACKEND, module
from tests.backends.llamacpp_heads import SETTINGS

pytestmark = pytest.mark.skipif(not BACKEND.is_installed(), reason="needs llama.cpp: pip install llama-cpp-python")
Spoil = Callable[[Path, Path], Path]
WRONG: dict[str, tuple[type[FailureError] | type[PairMismatchError], str, Spoil]] = {
    "taps beyond the target": (
        UnsupportedModelError,
        "output of layer 3",
        lambda path, target: write_block_head(path, target, taps=[1, 4]),
    ),
    "no block size": (
        HeadFileError,
        "block_size",
        lambda path, target: write_block_head(path, target, change={"block_size": 1}),
    ),
    "another vocabulary": (
        PairMismatchError,
        "vocabulary",
        lambda path, target: write_block_head(path, write_gguf(path.with_name("o.gguf"), num_merges=20, num_layers=4)),
    ),
    "another number of tokens that it can guess": (
        HeadFileError,
        "beyond the vocabulary",
        lambda path, target: write_block_head(path, target, own_tokens=[3, 4, 5000]),
    ),
    "another hidden size": (
        PairMismatchError,
        "hidden size",
        lambda path, target: write_block_head(path, target, change={"embedding_length": 32}),
    ),
    "other taps than its matrix is made for": (
        PairMismatchError,
        "fc.weight",
        lambda path, target: write_block_head(path, target, change={"target_layers": [1, 2, 3]}),
    ),
    "EAGLE-3 with four taps": (
        UnsupportedModelError,
        "three taps",
        lambda path, target: write_eagle3_head(path, target, taps=[0, 1, 2, 3]),
    ),
    "EAGLE-3 for another target": (
        PairMismatchError,
        "hidden size",
        lambda path, target: write_eagle3_head(path, target, change={"target_hidden_size": 32}),
    ),
    "a target without an MTP layer": (UnsupportedModelError, "no MTP layer", lambda path, target: target),
    "a whole model": (UnsupportedModelError, "such a head", lambda path, target: write_gguf(path)),
    "no file": (FailureError, "no such file", lambda path, target: target.with_name("nothing")),
    "a folder": (HeadFileError, "localspec convert", lambda path, target: path.parent),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused(what: str, target_path: Path, tmp_path: Path) -> None:
    error, words, spoil = WRONG[what]
    path = spoil(tmp_path / "head.gguf", target_path)
    model = BACKEND.load(target_path, SETTINGS)
    try:
        with pytest.raises(error, match=words):
            BACKEND.load_head(path, model)
        head = BACKEND.load_head(write_block_head(tmp_path / "right.gguf", target_path), model)  # nothing was left
        head.close()
    finally:
        model.close()


def test_targets_that_hide_their_states_are_refused(tmp_path: Path) -> None:
    """llama.cpp would end the process."""
    target = write_gguf(tmp_path / "target.gguf", architecture="qwen2", num_layers=4)
    model = BACKEND.load(target, SETTINGS)
    try:
        with pytest.raises(UnsupportedModelError, match="hidden states of qwen2"):
            BACKEND.load_head(write_block_head(tmp_path / "head.gguf", target), model)
    finally:
        model.close()


def test_a_build_without_the_functions_is_told(
    monkeypatch: pytest.MonkeyPatch, target_path: Path, tmp_path: Path
) -> None:
    taps = module("taps")
    missing = {**taps._FUNCTIONS, "get_layer": (("_Z7nothing", "?nothing"), [], None)}
    monkeypatch.setattr(taps, "_FUNCTIONS", missing)
    taps.functions.cache_clear()
    model = BACKEND.load(target_path, SETTINGS)
    try:
        with pytest.raises(UnsupportedModelError, match="_Z7nothing"):
            BACKEND.load_head(write_block_head(tmp_path / "head.gguf", target_path), model)
    finally:
        taps.functions.cache_clear()
        model.close()


def test_a_head_is_loaded_before_its_target_has_open_sequences(target_path: Path, tmp_path: Path) -> None:
    path = write_block_head(tmp_path / "head.gguf", target_path)
    model = BACKEND.load(target_path, SETTINGS)
    try:
        state = model.open()
        with pytest.raises(BackendError, match="before its target has open sequences"):
            BACKEND.load_head(path, model)
        state.close()
        head = BACKEND.load_head(path, model)
        head.close()
        head.close()
    finally:
        model.close()
