"""Conversion: the result says what the source says, is whole or absent, and replaces nothing unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
from localspec.errors import ModelFileError, SettingError, UnsupportedModelError
from localspec.formats import summarize
from localspec.hub import convert as module
from localspec.hub.convert import agreement, convert
from localspec.testing.files import write_safetensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_safetensors(tmp_path_factory.mktemp("source") / "model")


@pytest.mark.parametrize("quantization", ["F16", "Q8_0"])
def test_a_folder_becomes_a_gguf_file_that_says_the_same(source: Path, tmp_path: Path, quantization: str) -> None:
    output = tmp_path / "m.gguf"
    report = convert(source, output, quantization=quantization)
    assert report.agreement is not None
    assert report.agreement.share >= (0.9 if quantization == "F16" else 0.2)
    assert summarize(output).quantization == quantization
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"], "nothing else is left behind"


def test_a_folder_becomes_an_mlx_folder_with_fewer_bits(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "m", quantization="8bit")
    assert report.agreement is not None and report.agreement.num_prompts == len(module.PROMPTS)
    assert summarize(tmp_path / "m").quantization == "8 bits in groups of 64"
    assert (tmp_path / "m" / "tokenizer.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_q4_is_made_by_llama_cpp(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "m.gguf", quantization="Q4_0", check=False)
    assert summarize(tmp_path / "m.gguf").weight_bytes.keys() >= {"Q4_0", "F32"}


def test_nothing_is_replaced_unasked(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.gguf"
    output.write_bytes(b"mine")
    with pytest.raises(SettingError, match="exists"):
        convert(source, output, quantization="F16", check=False)
    assert output.read_bytes() == b"mine"
    convert(source, output, quantization="F16", check=False, force=True)
    assert summarize(output).quantization == "F16"
    with pytest.raises(SettingError, match="replace the source"):
        convert(source, source, form="mlx", quantization="4bit", force=True)


def test_an_unknown_architecture_is_refused_with_those_known(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in source.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UnsupportedModelError, match=r"mamba.*llama, qwen2, qwen3"):
        convert(other, tmp_path / "m.gguf", quantization="F16", check=False)
    (other / "config.json").write_text(json.dumps(config | {"rope_scaling": {"rope_type": "yarn"}}))
    with pytest.raises(UnsupportedModelError, match="scaling of positions"):
        convert(other, tmp_path / "m.gguf", quantization="F16", check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_file_that_says_something_else_is_not_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([[[1, 2, 3]], [[1, 9, 3]]])
    monkeypatch.setattr(module, "continuations", lambda *_: next(answers))
    with pytest.raises(ModelFileError, match="33% of tokens"):
        convert(source, tmp_path / "m.gguf", quantization="F16")
    assert not list(tmp_path.iterdir())


def test_agreement_counts_up_to_the_first_difference() -> None:
    found = agreement([[1, 2, 3], [4, 5]], [[1, 9, 3], [4, 5]])
    assert (found.num_tokens, found.num_equal, found.num_prompts, found.num_same) == (5, 3, 2, 1)


def test_the_commands_print_what_they_found(source: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(cli.main, ["convert", str(source), str(tmp_path / "m.gguf"), "-q", "F16", "--no-check"])
    assert run.exit_code == 0 and "F16" in run.output
    run = CliRunner().invoke(cli.main, ["fit", str(tmp_path / "m.gguf"), "--backend", "llamacpp", "-c", "1k"])
    assert run.exit_code == 0 and "with 1024 tokens" in run.output and "together" in run.output
    run = CliRunner().invoke(cli.main, ["fit", str(tmp_path / "m.gguf"), "--backend", "llamacpp", "-c", "16m"])
    assert run.exit_code == 2
    for name in ("gguf", "mlx"):
        run = CliRunner().invoke(cli.main, ["convert", str(source), str(tmp_path / "x"), "--to", name, "-q", "Q9"])
        assert run.exit_code == 2 and "Q9" in run.output
