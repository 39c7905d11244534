"""A head beside an expanded target reads the first copy of what it read before."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from localspec.bench.expand import SIZES, Size, expand_head
from localspec.errors import SettingError, UnsupportedModelError
from localspec.testing.files import write_safetensors

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
    expand_head(folder / "head", folder / "wide", folder / "target", SIZE)
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


def test_what_cannot_be_expanded_is_refused(folder: Path) -> None:
    with pytest.raises(SettingError, match="exists"):
        expand_head(folder / "head", folder / "target", folder / "target", SIZE)
    with pytest.raises(UnsupportedModelError, match="one matrix"):
        expand_head(folder / "target", folder / "wide", folder / "target", SIZES["8b"])
    assert not (folder / "wide").exists() and not (folder / "wide.partial").exists()
