"""Files that say the same to MLX: GGUF and safetensors, whole and quantised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localspec.testing.files import write_gguf, write_safetensors
from tests.backends.mlx_backend import ROOT, module, needs_mlx, opened, rows_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlx")


@needs_mlx
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("quantization", ["F32", "F16", "Q4_0", "Q8_0"])
def test_gguf_and_safetensors_give_the_same_rows(folder: Path, architecture: str, quantization: str) -> None:
    """The same numbers in either file: same bits, llama's interleaved heads put back included."""
    name = f"{architecture}-{quantization}"
    gguf = write_gguf(folder / f"{name}.gguf", architecture=architecture, quantization=quantization)
    plain = write_safetensors(folder / name, architecture=architecture, quantization=quantization)
    ids = [5, 80, 3, 200, 41, 41, 7]
    first, second = opened(gguf), opened(plain)
    assert np.array_equal(rows_of(first, ids), rows_of(second, ids))
    assert (first.info.quantization, first.info.num_parameters) == (quantization, second.info.num_parameters)
    for text in ("hello world", "  the\n\tend<|im_end|>", "naïve 🙂"):
        for special in (False, True):
            got, want = (model.tokenizer.encode(text, special=special) for model in (first, second))
            assert got.tolist() == want.tolist()
    assert first.tokenizer.stop_tokens == second.tokenizer.stop_tokens == {0, 2}
    assert first.tokenizer.chat_template == second.tokenizer.chat_template


@needs_mlx
@pytest.mark.parametrize("dtype", ["file", "bfloat16"])
def test_quantised_layers_can_be_kept(folder: Path, dtype: str) -> None:
    """Near the expanded ones, and said to be what they are."""
    path = write_gguf(folder / "kept.gguf", quantization="Q8_0")
    ids = [5, 80, 3, 200]
    expanded, kept = opened(path), opened(path, dtype=dtype)
    assert any("expanded" in note for note in expanded.info.notes) and not kept.info.notes
    assert np.abs(rows_of(expanded, ids) - rows_of(kept, ids)).max() < 0.5
    assert kept.capabilities.trees


@needs_mlx
def test_llama3_rope_factors_in_a_gguf_file_equal_the_configuration(folder: Path) -> None:
    """`rope_freqs.weight` stretches wavelengths as rope_type llama3 does."""
    import mlx.core as mx
    from mlx_lm.models.rope_utils import Llama3RoPE

    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    want = Llama3RoPE(16, 512, False, 1e4, scaling)
    base = 1e4 ** (mx.arange(0, 16, 2) / 16)
    ours = module("gguf_model").FactorRope(16, 1e4, want._freqs / base)
    x = mx.random.normal((1, 2, 5, 16))
    assert float(mx.abs(ours(x, offset=37) - want(x, offset=37)).max()) < 1e-5


@needs_mlx
@pytest.mark.shared
def test_rows_of_the_development_model_equal_its_gguf_twin(shared_models: Path) -> None:
    """Q8_0 of real weights is close to the bfloat16 they were made from."""
    folder_model, gguf_model = opened(shared_models / "draft"), opened(ROOT / "models" / "tiny" / "draft.gguf")
    ids = [int(t) for t in folder_model.tokenizer.encode("def add(a, b):\n    return a", special=False)]
    first, second = rows_of(folder_model, ids), rows_of(gguf_model, ids)
    assert np.abs(first - second).max() < 1.0 and (first.argmax(1) == second.argmax(1)).mean() > 0.8
