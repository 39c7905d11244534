"""What MLX does not open, and in whose words it says so."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from localspec.errors import (
    BackendMissingError,
    LocalspecError,
    ModelFileError,
    ModelNotFoundError,
    SettingError,
    UnsupportedModelError,
)
from localspec.protocols import LoadSettings, Rewind
from localspec.testing.files import write_gguf, write_safetensors
from tests.backends.mlx_backend import BACKEND, ROOT, change_json, needs_mlx

# ---------------------------------------------------------------- loading errors


def test_importing_the_backend_imports_no_runtime() -> None:
    """`localspec --help` must not pay for mlx."""
    code = (
        "import sys; from localspec.loading import get_backend; get_backend('mlx').is_installed();"
        "bad = {'mlx.core', 'mlx_lm', 'transformers', 'tokenizers'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_report_never_raises() -> None:
    report = BACKEND.report()
    assert report.installed == BACKEND.is_installed() and report.install_command.startswith("pip install")
    assert report.devices if report.installed else report.notes


def test_a_missing_runtime_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(BACKEND), "is_installed", lambda self: False)
    with pytest.raises(BackendMissingError, match="pip install"):
        BACKEND.load(write_file(tmp_path / "m.gguf", b"GGUF"), LoadSettings())
    assert "pip install" in " ".join(BACKEND.report().notes)


@pytest.mark.parametrize(
    "settings",
    [
        {"threads": 2}, {"gpu_layers": 0}, {"flash_attention": True}, {"extra_buffers": False}, {"dtype": "int4"},
        {"context": 0}, {"num_sequences": 0},
    ],
)  # fmt: skip
def test_settings_that_it_does_not_have_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        BACKEND.load(tmp_path, LoadSettings(**settings))


def test_a_path_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        BACKEND.load(tmp_path / "nowhere.gguf", LoadSettings())
    assert not BACKEND.accepts(tmp_path / "nowhere.gguf") and not BACKEND.accepts(tmp_path)


def write_file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def tensor_header(path: Path, edit: Any) -> None:
    """Rewrite a safetensors file with its header changed."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def _truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _drop_tensor(path: Path) -> None:
    """A sound file that lacks one: a hole would be refused before."""
    import mlx.core as mx

    file = str(path / "model.safetensors")
    weights = cast(dict[str, mx.array], mx.load(file))
    mx.eval(weights)  # read before the file is written again
    del weights["model.layers.1.mlp.up_proj.weight"]
    mx.save_safetensors(file, weights)


def _reshape(path: Path) -> None:
    def edit(header: Any) -> None:
        header["model.norm.weight"]["shape"] = [32, 2]

    tensor_header(path / "model.safetensors", edit)


BAD_FOLDERS: dict[str, tuple[Any, type[LocalspecError], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), ModelFileError, "config.json"),
    "config no json": (lambda p: (p / "config.json").write_text("{"), ModelFileError, "config.json"),
    "config a list": (lambda p: (p / "config.json").write_text("[]"), ModelFileError, "config.json"),
    "no type": (lambda p: change_json(p / "config.json", model_type=None), ModelFileError, "model_type"),
    "unknown type": (lambda p: change_json(p / "config.json", model_type="zzz"), UnsupportedModelError, "zzz"),
    "no model": (lambda p: change_json(p / "config.json", model_type="base"), ModelFileError, "base"),
    "own code": (lambda p: change_json(p / "config.json", model_file="x.py"), UnsupportedModelError, "x.py"),
    "bad number": (lambda p: change_json(p / "config.json", hidden_size="many"), ModelFileError, "qwen3"),
    "many layers": (lambda p: change_json(p / "config.json", num_hidden_layers=10**9), ModelFileError, "layers"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), ModelFileError, "no weights"),
    "truncated": (_truncate, ModelFileError, "truncated"),
    "empty": (lambda p: (p / "model.safetensors").write_bytes(b""), ModelFileError, "truncated"),
    "bad header": (
        lambda p: (p / "model.safetensors").write_bytes(b"\4" + bytes(7) + b"{xx}"),
        ModelFileError,
        "header",
    ),
    "huge header": (lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 64), ModelFileError, "truncated"),
    "tensor missing": (_drop_tensor, ModelFileError, "model.layers.1.mlp.up_proj.weight"),
    "tensor reshaped": (_reshape, ModelFileError, "model.norm.weight"),
    "part missing": (
        lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
        ModelFileError,
        "model-2.safetensors",
    ),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), ModelFileError, "tokenizer.json"),
    "bad tokenizer": (lambda p: (p / "tokenizer.json").write_text("{}"), ModelFileError, "tokenizer.json"),
}


@needs_mlx
@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_faults_of_a_folder_are_named(tmp_path: Path, fault: str) -> None:
    damage, kind, words = BAD_FOLDERS[fault]
    path = write_safetensors(tmp_path / "model")
    damage(path)
    with pytest.raises(kind, match=words):
        BACKEND.load(path, LoadSettings())


@needs_mlx
def test_a_recurrent_model_in_a_folder_opens_and_says_that_it_replays(tmp_path: Path) -> None:
    """Told by the type of memory that the model asks for."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.mamba2 import Model, ModelArgs

    path = write_safetensors(tmp_path / "mamba")
    config = {
        "model_type": "mamba2", "num_heads": 4, "head_dim": 32, "vocab_size": 320, "hidden_size": 64,
        "intermediate_size": 128, "state_size": 16, "num_hidden_layers": 1, "layer_norm_epsilon": 1e-5, "n_groups": 1,
        "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "tie_word_embeddings": True,
        "time_step_limit": [0.001, 0.1], "time_step_rank": "auto",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    model = BACKEND.load(path, LoadSettings())
    assert model.capabilities.rewind is Rewind.REPLAY and not model.capabilities.trees
    assert "ArraysCache" in model.capabilities.limits[0] and any("replayed" in note for note in model.info.notes)


# ---------------------------------------------------------------- GGUF models that are refused


def text(value: str) -> bytes:
    """As GGUF writes it."""
    return struct.pack("<Q", len(value)) + value.encode()


def patched(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert content.count(old) and len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    return path


@needs_mlx
def test_gguf_models_of_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    path = patched(write_gguf(tmp_path / "a.gguf"), text("qwen3"), text("mambo"))
    with pytest.raises(UnsupportedModelError, match="mambo"):
        BACKEND.load(path, LoadSettings())
    path = patched(write_gguf(tmp_path / "b.gguf"), text("gpt-2"), text("gpt-9"))
    with pytest.raises(UnsupportedModelError, match="gpt-9"):
        BACKEND.load(path, LoadSettings())
    path = patched(write_gguf(tmp_path / "c.gguf"), text("blk.0.ffn_up.weight"), text("blk.0.ffn_xx.weight"))
    with pytest.raises(UnsupportedModelError, match="ffn_xx"):
        BACKEND.load(path, LoadSettings())


@needs_mlx
def test_gguf_tensor_types_that_are_not_read_are_named(tmp_path: Path) -> None:
    """F16 tensors relabelled as I16, which has the same size."""
    name = text("blk.0.ffn_up.weight")
    content = write_gguf(tmp_path / "k.gguf").read_bytes()
    at = content.index(name) + len(name) + 4 + 16
    path = write_file(tmp_path / "k.gguf", content[:at] + struct.pack("<I", 25) + content[at + 4 :])
    with pytest.raises(UnsupportedModelError, match="I16"):
        BACKEND.load(path, LoadSettings())
