"""The tiny models that other tests stand on, and the converter that made the bundled pair."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from localspec.errors import SettingError, UnsupportedModelError
from localspec.formats.conversion import Checkpoint, read_safetensors, write_gguf_file
from localspec.testing.files import SPECIAL_TOKENS, tiny_checkpoint, write_gguf, write_safetensors


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "model.gguf", quantization="Q4_0")
    content = first.read_bytes()
    assert write_gguf(first, quantization="Q4_0").read_bytes() == content
    assert write_gguf(first, quantization="Q4_0", seed=1).read_bytes() != content


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_folder_converts_to_the_file_written_directly(tmp_path: Path, architecture: str) -> None:
    folder = write_safetensors(tmp_path / "model", architecture=architecture)
    write_gguf_file(tmp_path / "converted.gguf", Checkpoint.from_folder(folder), "Q8_0", name="model")
    direct = write_gguf(tmp_path / "model.gguf", architecture=architecture, quantization="Q8_0")
    assert (tmp_path / "converted.gguf").read_bytes() == direct.read_bytes()


def test_bfloat16_is_read_as_its_float32(tmp_path: Path) -> None:
    stored = np.array([0x3F80, 0xC000, 0x0000], np.uint16)  # 1, -2, 0
    header = b'{"x":{"dtype":"BF16","shape":[3],"data_offsets":[0,6]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + stored.tobytes())
    assert read_safetensors(tmp_path / "model.safetensors")["x"].tolist() == [1, -2, 0]


def test_a_quantised_folder_holds_what_the_gguf_file_gives_back(tmp_path: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    file = write_gguf(tmp_path / "model.gguf", quantization="Q4_0")
    weights = read_safetensors(write_safetensors(tmp_path / "model", quantization="Q4_0") / "model.safetensors")
    embedding = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == "token_embd.weight")
    np.testing.assert_array_equal(
        dequantize(embedding.data, embedding.tensor_type), weights["model.embed_tokens.weight"]
    )


def test_jitter_disturbs_weights_by_its_own_size() -> None:
    plain, disturbed = tiny_checkpoint(), tiny_checkpoint(jitter=0.1)
    name = "model.layers.0.mlp.up_proj.weight"
    difference = plain.weights[name] - disturbed.weights[name]
    assert difference.std() == pytest.approx(0.1 * plain.weights[name].std(), rel=0.05)


def test_the_tokenizer_round_trips_any_text_and_knows_its_special_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(write_safetensors(tmp_path) / "tokenizer.json"))
    text = "hello world, ünï 日本\n\t x"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("hello world").ids) < len("hello world")
    assert tokenizer.encode("".join(SPECIAL_TOKENS)).ids == [0, 1, 2]


def test_unknown_choices_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="Q5_K"):
        write_gguf(tmp_path / "x.gguf", quantization="Q5_K")
    with pytest.raises(SettingError, match="mamba"):
        write_gguf(tmp_path / "x.gguf", architecture="mamba")
    checkpoint = tiny_checkpoint()
    foreign = Checkpoint({**checkpoint.config, "model_type": "mamba"}, {}, checkpoint.tokenizer, {})
    with pytest.raises(UnsupportedModelError, match="mamba"):
        write_gguf_file(tmp_path / "x.gguf", foreign, "F16", name="x")


@pytest.mark.real
def test_the_bundled_files_are_the_ones_their_readme_describes(root: Path) -> None:
    readme = (root / "models" / "tiny" / "README.md").read_text(encoding="utf-8")
    for path in sorted((root / "models" / "tiny").glob("*.gguf")):
        content = path.read_bytes()
        assert f"{len(content):,}" in readme
        assert hashlib.sha256(content).hexdigest() in readme


@pytest.mark.real
@pytest.mark.shared
@pytest.mark.parametrize(("name", "quantization"), [("target", "Q4_0"), ("draft", "Q8_0")])
def test_the_bundled_files_can_be_made_again(
    root: Path, shared_models: Path, tmp_path: Path, name: str, quantization: str
) -> None:
    """The script as its help says."""
    output = tmp_path / f"{name}.gguf"
    command = [sys.executable, "scripts/make_tiny_pair.py", str(shared_models / name), str(output), quantization]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, timeout=120)
    assert output.read_bytes() == (root / "models" / "tiny" / f"{name}.gguf").read_bytes()
