"""Tells trained heads from other models, and reads their headers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from localspec.errors import HeadFileError, ModelFileError, ModelNotFoundError

from . import gguf, safetensors
from .block_heads import read_block_head
from .eagle3 import read_eagle3_head
from .gemma_assistant import read_gemma_assistant
from .head_header import Backbone, HeadFiles, HeadHeader
from .medusa import read_medusa_head
from .mtp import read_mtp_head

__all__ = ["Backbone", "HeadFiles", "HeadHeader", "read_head_files", "read_head_header"]

_PICKLED = (".pt", ".pth", ".bin", ".pkl")

_READERS: tuple[Callable[[HeadFiles], HeadHeader | None], ...] = (
    read_block_head,
    read_eagle3_head,
    read_gemma_assistant,
    read_medusa_head,
    read_mtp_head,
)
"""Of each family of heads one, which answers None for what is not of its kind, judged by tensors before names."""


def read_head_header(path: Path) -> HeadHeader | None:
    """What the head at `path` is: a folder with config.json and safetensors, or a GGUF file. None: not a head at all.

    Raises HeadFileError for a head whose header is not known or does not agree with itself, naming the key or tensor;
    ModelNotFoundError, and ModelFileError for files that cannot be read.
    """
    files = read_head_files(path)
    for reader in _READERS:
        header = reader(files)
        if header is not None:
            return header
    said = files.config.get("speculators_model_type")
    if said is not None:
        raise HeadFileError("config.json: speculators_model_type is not known", got=str(said)[:80])
    return None


def read_head_files(path: Path) -> HeadFiles:
    """All headers, nothing interpreted. Raises ModelNotFoundError and ModelFileError."""
    if not path.exists():
        raise ModelNotFoundError(f"no such file or folder: {path}", fix="Check the path.")
    _refuse_pickles(path)
    if path.is_dir():
        config = safetensors.read_json(path / "config.json")
        shapes = {
            name: tensor.shape for _, tensors in safetensors.read_folder(path) for name, tensor in tensors.items()
        }
        return HeadFiles(path, "safetensors", config, shapes)
    if path.suffix == ".safetensors":
        raise ModelFileError("a head is a folder with its config.json", got=path.name, fix="Give the folder.")
    parts = gguf.read_parts(path)
    tensors_of = {name: tensor.shape for _, header in parts for name, tensor in header.tensors.items()}
    return HeadFiles(path, "gguf", parts[0][1].metadata, tensors_of)


def _refuse_pickles(path: Path) -> None:
    """Raise HeadFileError where there is nothing to read but what PyTorch pickled."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    pickled = [file.name for file in files if file.suffix in _PICKLED]
    if pickled and not any(file.suffix == ".safetensors" for file in files):
        raise HeadFileError(
            "the head's tensors are pickled, and reading such a file could run code from it",
            got=pickled[0],
            expected="a folder with config.json and safetensors",
            fix="Convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors').",
        )
