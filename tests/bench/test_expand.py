"""Expanded targets: larger in every way, and what they say is what the small model says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cli import main
from localspec.bench.expand import SIZES, Size, encoding, expand, files, read_source
from localspec.bench.expand.check import check
from localspec.bench.expand.encoding import Encoding, Noise
from localspec.bench.prompts import load_prompts
from localspec.errors import DiskError, LocalspecError, SettingError, UnsupportedModelError
from localspec.formats.conversion import Checkpoint
from localspec.loading import get_backend, load_model
from localspec.protocols import HostTokens, LanguageModel, LoadSettings, Step, chain_parents
from localspec.testing.files import write_gguf, write_safetensors
from localspec.types import Logits
from tests.conftest import Pair

LARGER = Size(num_parameters=1_000_000, num_layers=4, hidden=100)
ARCHITECTURES = ["llama", "qwen2", "qwen3"]


@pytest.fixture(autouse=True)
def _a_small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of random weights: these models need no more."""
    monkeypatch.setattr(encoding, "_POOL", 1 << 18)


def opened(path: Path, backend: str, **settings: object) -> LanguageModel:
    if not get_backend(backend).is_installed():
        pytest.skip(f"needs {backend}: {get_backend(backend).report().install_command}")
    return load_model(path, backend, LoadSettings(**settings))  # type: ignore[arg-type]


def rows(path: Path, backend: str, ids: list[int], **settings: object) -> Logits:
    """[T, V] in passes of four tokens."""
    model = opened(path, backend, **settings)
    try:
        state, found = model.open(), []
        for start in range(0, len(ids), 4):
            tokens = np.array(ids[start : start + 4], np.int32)
            [scores] = model.forward([Step(state, (HostTokens(tokens),), chain_parents(state, 4))])
            found.append(np.array(scores.rows(range(4))))
            state.keep(range(4))
        return np.concatenate(found)
    finally:
        model.close()


def ids(num: int, vocabulary: int = 300) -> list[int]:
    return [int(token) for token in np.random.default_rng(5).integers(3, vocabulary, num)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_rows_on_llamacpp_are_the_same_bits_in_every_type(tmp_path: Path, architecture: str, kind: str) -> None:
    folder = write_safetensors(tmp_path / "small", architecture=architecture)
    small = write_gguf(tmp_path / "small.gguf", architecture=architecture, quantization=kind)
    done = expand(folder, tmp_path / "large.gguf", LARGER, "gguf", kind)
    assert (done.num_layers, done.hidden, done.num_heads, done.num_kv_heads) == (4, 128, 8, 4)
    assert 0.85e6 < done.num_parameters < 1.15e6
    np.testing.assert_array_equal(
        rows(tmp_path / "large.gguf", "llamacpp", ids(40), threads=1), rows(small, "llamacpp", ids(40), threads=1)
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_for_mlx_has_the_same_rows_up_to_the_order_of_sums(tmp_path: Path, architecture: str) -> None:
    folder = write_safetensors(tmp_path / "small", architecture=architecture)
    done = expand(folder, tmp_path / "large", LARGER, "safetensors", "float32")
    assert done.exact and done.num_rounded == 0
    small, large = rows(folder, "mlx", ids(24)), rows(tmp_path / "large", "mlx", ids(24))
    assert small.std() > 1.0
    np.testing.assert_allclose(large, small, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(large.argmax(axis=1), small.argmax(axis=1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_quantised_file_is_a_source_and_loses_nothing_in_its_own_type(tmp_path: Path, architecture: str) -> None:
    small = write_gguf(tmp_path / "small.gguf", architecture=architecture, quantization="Q4_0")
    done = expand(small, tmp_path / "large.gguf", LARGER, "gguf", "Q4_0")
    assert done.exact, done.worst
    np.testing.assert_array_equal(
        rows(tmp_path / "large.gguf", "llamacpp", ids(16), threads=1), rows(small, "llamacpp", ids(16), threads=1)
    )


def test_rounding_is_counted_and_said(tmp_path: Path) -> None:
    folder = write_safetensors(tmp_path / "small")
    done = expand(folder, tmp_path / "large.gguf", LARGER, "gguf", "Q4_0")
    assert not done.exact and 0 < done.num_rounded <= done.num_kept and 0.0 < done.worst < 0.2
    assert "stored as Q4_0" in done.lines()[-1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gguf_file_reads_back_as_the_checkpoint_it_was_made_from(tmp_path: Path, architecture: str) -> None:
    folder = write_safetensors(tmp_path / "small", architecture=architecture)
    want = Checkpoint.from_folder(folder)
    found = read_source(write_gguf(tmp_path / "small.gguf", architecture=architecture, quantization="F32"))
    tied = want.config["tie_word_embeddings"]
    assert set(found.weights) == set(want.weights) - ({"lm_head.weight"} if tied else set())
    for name, weight in found.weights.items():
        np.testing.assert_array_equal(weight, want.weights[name], err_msg=name)
    for key in ("hidden_size", "num_key_value_heads", "rope_theta", "tie_word_embeddings", "vocab_size"):
        assert found.config[key] == want.config[key], key
    assert found.config["rms_norm_eps"] == pytest.approx(want.config["rms_norm_eps"])


def test_a_folder_made_from_a_file_tokenises_as_the_file_does(tmp_path: Path, tiny_pair: Pair) -> None:
    """The bundled draft model, because its tokenizer is a real one."""
    source = tiny_pair.draft
    expand(source, tmp_path / "large", Size(20_000_000, 5, 512), "safetensors", "float16")
    backend = get_backend("mlx")
    if not backend.is_installed():
        pytest.skip("needs mlx")
    theirs, ours = backend.open_tokenizer(source), backend.open_tokenizer(tmp_path / "large")
    assert ours.stop_tokens == theirs.stop_tokens and ours.chat_template == theirs.chat_template
    for prompt in load_prompts():
        assert prompt.encode(ours).tolist() == prompt.encode(theirs).tolist(), prompt.id


def test_the_safetensors_library_reads_the_parts_and_new_weights_are_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import load_file

    monkeypatch.setattr(files, "_SHARD", 1_000_000)
    done = expand(write_safetensors(tmp_path / "small"), tmp_path / "large", LARGER, "safetensors", "float32")
    index = json.loads((tmp_path / "large" / "model.safetensors.index.json").read_text())
    parts = sorted(set(index["weight_map"].values()))
    assert len(parts) > 2
    tensors = {name: value for part in parts for name, value in load_file(tmp_path / "large" / part).items()}
    assert set(tensors) == set(index["weight_map"])
    assert sum(tensor.nbytes for tensor in tensors.values()) == done.num_bytes
    for name in ("layers.0.self_attn.q_proj", "layers.3.mlp.up_proj"):
        new = tensors[f"model.{name}.weight"][128 if "mlp" in name else 64 :]
        assert np.count_nonzero(new) == new.size and 0.015 < new.std() < 0.025
    assert not tensors["model.layers.3.mlp.down_proj.weight"].any()
    assert np.isfinite(np.concatenate([tensor.ravel() for tensor in tensors.values()])).all()


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "small.gguf")
    contents = []
    for seed in (0, 0, 1):
        expand(source, tmp_path / "large.gguf", LARGER, "gguf", "Q8_0", seed=seed, force=True)
        contents.append((tmp_path / "large.gguf").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_random_blocks_go_on_at_the_pools_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_POOL", 96)
    noise = Noise(Encoding("Q8_0"), 0)
    blocks = noise.matrix("name", 5, 64).reshape(10, -1)
    np.testing.assert_array_equal(blocks[3:6], blocks[:3])
    assert len({block.tobytes() for block in blocks}) == 3


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    source = write_gguf(tmp_path / "small.gguf")
    done = expand(
        source, tmp_path / "large.gguf", LARGER, "gguf", "F16", on_bytes=lambda now, total: told.append((now, total))
    )
    assert told[-1] == (done.num_bytes, done.num_bytes) and told == sorted(told)
    assert 0 <= (tmp_path / "large.gguf").stat().st_size - done.num_bytes < 30_000


@pytest.mark.parametrize(
    ("size", "form", "kind", "error", "words"),
    [
        (LARGER, "gguf", "Q5_K", SettingError, "Q4_0"),
        (LARGER, "onnx", "F16", SettingError, "safetensors: float32"),
        (Size(1_000_000, 1, 100), "gguf", "F16", SettingError, "larger than the size"),
        (Size(1_000_000, 4, 32), "gguf", "F16", SettingError, "larger than the size"),
        (Size(100_000, 4, 128), "gguf", "F16", SettingError, "larger than the size"),
        (Size(10**15, 4, 128), "gguf", "F16", DiskError, "no room"),
    ],
)
def test_what_cannot_be_is_refused_before_a_byte_is_written(
    tmp_path: Path, size: Size, form: str, kind: str, error: type[LocalspecError], words: str
) -> None:
    source = write_gguf(tmp_path / "small.gguf")
    with pytest.raises(error, match=words):
        expand(source, tmp_path / "large.gguf", size, form, kind)
    assert list(tmp_path.iterdir()) == [source]


def test_a_failure_on_the_way_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "small.gguf")
    output = tmp_path / "large.gguf"
    output.write_bytes(b"precious")
    with pytest.raises(SettingError, match="exists"):
        expand(source, output, LARGER, "gguf", "F16")

    def stop(now: int, total: int) -> None:
        if now > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        expand(source, output, LARGER, "gguf", "F16", force=True, on_bytes=stop)
    assert output.read_bytes() == b"precious"
    assert sorted(tmp_path.iterdir()) == [output, source]


def test_a_tensor_nobody_knows_is_named(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = write_safetensors(tmp_path / "small")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.gate.weight"] = np.zeros((4, 64), np.float32)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"mlp\.gate\.weight"):
        expand(folder, tmp_path / "large.gguf", LARGER, "gguf", "F16")


def test_the_command_says_what_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "0.5b", LARGER)
    source = write_gguf(tmp_path / "small.gguf", quantization="Q8_0")
    arguments = ["bench", "expand", str(source), str(tmp_path / "large.gguf"), "--size"]
    result = CliRunner().invoke(main, [*arguments, "0.5b", "--type", "Q8_0"])
    assert result.exit_code == 0, result.output
    assert "4 layers of 128" in result.stdout and "exactly the source's function" in result.stdout
    assert "greedy answers" not in result.stdout
    checked = CliRunner().invoke(main, [*arguments, "0.5b", "--type", "Q8_0", "--force", "--check", "1"])
    assert checked.exit_code == 0, checked.output
    assert "3 of 3 greedy answers" in checked.stdout and "another best token in 0" in checked.stdout
    wrong = CliRunner().invoke(main, [*arguments, "0.6b"])
    assert wrong.exit_code == 2 and "0.5b" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_the_check_notices_a_model_with_another_function(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "small.gguf", quantization="F32")
    done = expand(source, tmp_path / "large.gguf", LARGER, "gguf", "F32")
    prompts = load_prompts(per_domain=1)[1:]
    settings = LoadSettings(context=512)
    if not get_backend("llamacpp").is_installed():
        pytest.skip("needs llamacpp")
    found = check(source, done, prompts, 8, "llamacpp", settings)
    assert found.num_equal == found.num_prompts == len(prompts) and found.num_other_best == 0
    assert found.num_equal_rows == found.num_rows
    stranger = write_gguf(tmp_path / "stranger.gguf", quantization="F32", seed=3)
    found = check(stranger, done, prompts, 8, "llamacpp", settings)
    assert found.num_equal == 0 and found.num_equal_rows == 0 and found.difference > 1.0


@pytest.mark.slow
@pytest.mark.real
def test_the_bundled_target_as_half_a_billion_says_the_same(tmp_path: Path, tiny_pair: Pair) -> None:
    source = tiny_pair.target
    done = expand(source, tmp_path / "large.gguf", Size.named("0.5b"), "gguf", "Q4_0")
    assert done.exact and 0.45e9 < done.num_parameters < 0.55e9
    tokens = ids(64, 8000)
    np.testing.assert_array_equal(
        rows(tmp_path / "large.gguf", "llamacpp", tokens, threads=1), rows(source, "llamacpp", tokens, threads=1)
    )
