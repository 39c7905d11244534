"""A head beside an expanded target reads the first copy of what it read before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from localspec.bench.expand import SIZES, Size, expand, expand_head
from localspec.errors import SettingError, UnsupportedModelError
from localspec.formats import summarize
from localspec.testing.block_heads import BlockSpec, write_block_head
from localspec.testing.block_reference import BlockReference
from localspec.testing.files import write_gguf, write_safetensors

HIDDEN, TAPS = 64, 3
SIZE = Size(1_000_000, 6, 2 * HIDDEN + 1)  # three copies


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a target, and a head that reads three of its layers."""
    write_safetensors(tmp_path / "target")
    head = tmp_path / "head"
    head.mkdir()
    rng = np.random.default_rng(0)
    tensors = {
        "fc.weight": rng.normal(size=(8, TAPS * HIDDEN)).astype(np.float16),
        "hidden_norm.weight": rng.normal(size=8).astype(np.float16),
    }
    save_file(tensors, head / "model.safetensors")
    (head / "config.json").write_text(json.dumps({"num_target_layers": 2, "target_layer_ids": [0, 1, 1]}))
    return tmp_path


def test_what_it_reads_of_copies_is_what_it_read(folder: Path) -> None:
    expand_head(folder / "head", folder / "wide", folder / "target", SIZE, folder)
    old, new = (load_file(folder / name / "model.safetensors") for name in ("head", "wide"))
    assert new["fc.weight"].shape == (8, TAPS * 3 * HIDDEN)
    features = np.random.default_rng(1).normal(size=(TAPS, HIDDEN))
    copies = np.tile(features, (1, 3)).reshape(-1)
    assert np.allclose(
        new["fc.weight"].astype(np.float64) @ copies, old["fc.weight"].astype(np.float64) @ features.reshape(-1)
    )
    assert np.array_equal(new["hidden_norm.weight"], old["hidden_norm.weight"])
    config = json.loads((folder / "wide" / "config.json").read_text())
    assert config == {"num_target_layers": 6, "target_layer_ids": [0, 1, 1], "target_hidden_size": 3 * HIDDEN}


def test_a_head_that_becomes_as_wide_as_its_target_guesses_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = BlockSpec(markov="vanilla", confidence="markov", target=(HIDDEN, 2, 320), taps=(-1, 0, 1))
    write_block_head(tmp_path / "head", spec)
    write_safetensors(tmp_path / "target")

    def keep(output: Path, folder: Path, expanded: Path, kind: str) -> None:
        shutil.copytree(folder, tmp_path / "wide")
        output.touch()

    monkeypatch.setattr("localspec.bench.expand.head.write_head_gguf", keep)
    expand_head(tmp_path / "head", tmp_path / "wide.gguf", tmp_path / "target", SIZE, tmp_path / "any.gguf")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert config["hidden_size"] == config["target_hidden_size"] == 3 * HIDDEN and config["head_dim"] == spec.head_size
    rng = np.random.default_rng(2)
    features, none = rng.normal(size=(5, len(spec.taps), HIDDEN)), np.zeros((0, 0))
    said = []
    for name, copies in (("head", 1), ("wide", 3)):
        tensors = load_file(tmp_path / name / "model.safetensors")
        plain = {key.removeprefix("model."): value for key, value in tensors.items()}
        read = np.tile(features, (1, 1, copies)).reshape(5, -1)
        said.append(BlockReference(spec, plain, none, none).rows(read, range(5), 9, [4, 8, 15]))
    for small, wide in zip(said[0], said[1], strict=True):
        assert small is not None and wide is not None and np.allclose(small, wide, atol=1e-9)


def test_a_gguf_head_fits_the_gguf_target(tmp_path: Path) -> None:
    spec = BlockSpec(markov="vanilla", confidence="markov", target=(HIDDEN, 2, 320), taps=(-1, 0, 1))
    target = write_gguf(tmp_path / "target.gguf")
    write_block_head(tmp_path / "head", spec)
    large_size = Size(3_000_000, 6, 2 * HIDDEN + 1)
    expand(target, tmp_path / "large.gguf", large_size, "gguf", "F32")
    expand_head(tmp_path / "head", tmp_path / "wide.gguf", target, SIZE, tmp_path / "large.gguf")
    head, large = summarize(tmp_path / "wide.gguf"), summarize(tmp_path / "large.gguf")
    assert head.drafter_kind == "dflash" and head.hidden_size == large.hidden_size == 3 * HIDDEN
    with pytest.raises(SettingError, match="exists"):
        expand_head(tmp_path / "head", tmp_path / "wide.gguf", target, SIZE, tmp_path / "large.gguf")
    other = write_block_head(tmp_path / "other", BlockSpec(target=(48, 2, 320)))
    with pytest.raises(UnsupportedModelError, match="another hidden size"):
        expand_head(other, tmp_path / "no.gguf", target, SIZE, tmp_path / "large.gguf")
    strange = load_file(tmp_path / "head" / "model.safetensors") | {"strange.weight": np.ones((2, 2), np.float32)}
    save_file(strange, tmp_path / "head" / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="strange"):
        expand_head(tmp_path / "head", tmp_path / "no.gguf", target, SIZE, tmp_path / "large.gguf")
    assert not (tmp_path / "no.gguf").exists() and not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("no*"))


def test_what_cannot_be_expanded_is_refused(folder: Path) -> None:
    with pytest.raises(SettingError, match="exists"):
        expand_head(folder / "head", folder / "target", folder / "target", SIZE, folder)
    with pytest.raises(UnsupportedModelError, match="one matrix"):
        expand_head(folder / "target", folder / "wide", folder / "target", SIZES["8b"], folder)
    assert not (folder / "wide").exists() and not (folder / "wide.partial").exists()
