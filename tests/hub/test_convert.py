"""Conversion: the result says what the source says, is whole or absent, and replaces nothing unasked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
from localspec.errors import ModelFileError, SettingError, UnsupportedModelError
from localspec.formats import summarize
from localspec.hub import convert as module
from localspec.hub.convert import agreement, continuations, convert
from localspec.memory import Machine
from localspec.testing.files import write_safetensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_safetensors(tmp_path_factory.mktemp("source") / "model")


@pytest.mark.parametrize("quantization", ["F16", "Q8_0"])
def test_a_folder_becomes_a_gguf_file_that_says_the_same(source: Path, tmp_path: Path, quantization: str) -> None:
    output = tmp_path / "m.gguf"
    report = convert(source, output, quantization=quantization)
    assert report.agreement is not None
    assert report.agreement.share >= (0.97 if quantization == "F16" else 0.8)
    assert summarize(output).quantization == quantization
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"], "nothing else is left behind"


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_every_family_of_the_writer_says_the_same(tmp_path: Path, architecture: str) -> None:
    folder = write_safetensors(tmp_path / "model", architecture=architecture)
    report = convert(folder, tmp_path / "m.gguf", quantization="F32")
    assert report.agreement is not None and report.agreement.share >= 0.97


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
    said = continuations(source)[0]
    other = replace(said, answer=(said.answer[0], (said.answer[1] + 1) % 100, *said.answer[2:]))
    monkeypatch.setattr(module, "continuations", lambda *_: [said, other])
    with pytest.raises(ModelFileError, match="of tokens equal"):
        convert(source, tmp_path / "m.gguf", quantization="F16")
    assert not list(tmp_path.iterdir())


def test_agreement_is_counted_token_by_token_behind_the_same_text(source: Path, tmp_path: Path) -> None:
    """The source agrees with itself on everything, with a changed text on all but that token and what follows from
    it, and with a text whose prompt is read in other tokens on nothing."""
    said = continuations(source)[0]
    num = len(said.answer)
    whole = agreement(source, "mlx", [said])
    assert (whole.num_tokens, whole.num_same, whole.num_prompts, whole.num_alike) == (num, num, 1, 1)
    last = replace(said, answer=(*said.answer[:-1], (said.answer[-1] + 1) % 100))
    found = agreement(source, "mlx", [said, last])
    assert (found.num_tokens, found.num_same, found.num_alike) == (2 * num, 2 * num - 1, 1)
    assert agreement(source, "mlx", [replace(said, ids=said.ids[1:])]).num_same == 0


def test_a_source_too_large_to_be_asked_is_said(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "look", lambda: Machine(2**16, 2**16))
    report = convert(source, tmp_path / "m.gguf", quantization="F16")
    assert report.agreement is None and "in float32" in list(report.lines())[1]


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
