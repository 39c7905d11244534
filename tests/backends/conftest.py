"""Models that several files of this folder open."""

from __future__ import annotations

from pathlib import Path

import pytest

from localspec.testing.files import write_gguf


@pytest.fixture(scope="module")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target for heads: four layers in float32."""
    return write_gguf(tmp_path_factory.mktemp("target") / "target.gguf", quantization="F32", num_layers=4)
