"""A loopback Hub, its repositories, and localspec as a program that knows no other Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from localspec.hub.client import Hub, Patience
from localspec.testing.files import write_safetensors
from tests.hub.loopback import LoopbackHub

ROOT = Path(__file__).resolve().parent.parent.parent
IMPATIENT = Patience(num_retries=2, first_wait_s=0.02, longest_wait_s=5.0)

CATALOG = """
schema = 1
family = "tiny"

[[pair]]
name = "loopback"
target = "Tiny"
parameters = 0.055
drafter = "draft_model"
draft = "Tiny draft"
draft_parameters = 0.005
tokenizer = "same"
tested = false
source = "test"

[[pair.choice]]
backend = "llamacpp"
target = "tiny/pair-GGUF:Q4_0"
draft = "tiny/pair-GGUF:Q8_0"
"""
"""A user's catalog with one pair of the loopback Hub: `tiny/pair-GGUF`, Q4_0 and Q8_0."""


@dataclass
class Program:
    """localspec in child processes, with a home folder and a Hub cache of its own."""

    hub: LoopbackHub
    home: Path

    @property
    def cache(self) -> Path:
        return self.home / "hf" / "hub"

    def environment(self, **more: str) -> dict[str, str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return env | {
            "HOME": str(self.home),
            "HF_HOME": str(self.home / "hf"),
            "HF_ENDPOINT": self.hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(ROOT),
            **more,
        }

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "cli.py"), *arguments],
            env=self.environment(**environment),
            cwd=self.home,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def blobs(self) -> list[Path]:
        return sorted(path for path in self.cache.glob("models--*/blobs/*") if path.is_file())


@pytest.fixture
def loopback() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def program(loopback: LoopbackHub, tmp_path: Path) -> Program:
    home = tmp_path / "home"
    home.mkdir()
    return Program(loopback, home)


@pytest.fixture
def hub(loopback: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """For calls in this process. What the client library reads from the environment when it is imported is set here."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return Hub(loopback.url, tmp_path / "hub", IMPATIENT)


@pytest.fixture(scope="session")
def mlx_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository with safetensors in two files and an index, and things that nobody should fetch."""
    from safetensors.numpy import load_file, save

    folder = write_safetensors(tmp_path_factory.mktemp("mlx") / "model")
    weights = sorted(load_file(folder / "model.safetensors").items())
    halves = {
        "model-00001-of-00002.safetensors": dict(weights[: len(weights) // 2]),
        "model-00002-of-00002.safetensors": dict(weights[len(weights) // 2 :]),
    }
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".json"}
    files |= {name: save(part, metadata={"format": "pt"}) for name, part in halves.items()}
    index: dict[str, Any] = {"metadata": {}, "weight_map": {key: n for n, part in halves.items() for key in part}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    return files | {
        "README.md": b"# tiny",
        "modeling_tiny.py": b"raise SystemExit",
        "pytorch_model.bin": b"\x80\x04pickle",
        "adapters/adapter.safetensors": b"nobody asked",
    }


@pytest.fixture(scope="session")
def split_files(tmp_path_factory: pytest.TempPathFactory, root: Path) -> dict[str, Path]:
    """The bundled draft model in several parts, as people split large GGUF files."""
    import gguf

    reader = gguf.GGUFReader(root / "models" / "tiny" / "draft.gguf")
    fields = {name: value for name, value in reader.fields.items() if not name.startswith("GGUF.")}
    folder = tmp_path_factory.mktemp("split")
    architecture = str(fields.pop("general.architecture").contents())
    writer = gguf.GGUFWriter(folder / "draft-Q8_0.gguf", architecture, split_max_tensors=len(reader.tensors) // 3 + 1)
    for name, value in fields.items():
        inner = value.types[-1] if value.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value.contents(), value.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {path.name: path for path in sorted(folder.iterdir())}
