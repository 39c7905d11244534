"""A trained head for an expanded target: what it reads became copies side by side, and it reads the first of each.

The expanded target's layers 0 .. L-1 hold copies of what the small one's hold, so a head taps the same layers and
guesses the same. It stays as small as it was: next to a target of that size a trained one would cost more.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from localspec.bench.expand.shape import Size
from localspec.errors import SettingError, UnsupportedModelError
from localspec.formats import safetensors, summarize
from localspec.formats.safetensors import StoredTensor

_FC = ("fc.weight", "model.fc.weight")


def expand_head(head: Path, output: Path, target: Path, size: Size) -> None:
    """Write a head that was trained for `target` to the folder `output`, for that target expanded to `size`.

    head: a safetensors folder with one input matrix for all taps (DSpark, DFlash, EAGLE-3, JetSpec). Raises
    UnsupportedModelError for any other, SettingError where `output` exists, ModelFileError.
    """
    small = summarize(target)
    copies = -(-size.hidden // small.hidden_size)
    if output.exists():
        raise SettingError(f"{output} exists", fix="Name another output.")
    parts = safetensors.read_folder(head) if head.is_dir() else []
    found = [(file, tensor) for file, tensors in parts for tensor in tensors.values() if tensor.name in _FC]
    if len(found) != 1 or found[0][1].shape[1] % small.hidden_size:
        raise UnsupportedModelError(
            "only a folder whose head reads all taps through one matrix can be expanded", got=head.name, expected=_FC[0]
        )
    partial = output.with_name(f"{output.name}.partial")
    partial.mkdir()
    try:
        for file, tensors in parts:
            _write(file, partial / file.name, tensors, small.hidden_size, copies)
        for file in head.glob("*.json"):
            shutil.copy(file, partial / file.name)
        config = json.loads((head / "config.json").read_text())
        config["target_hidden_size"] = copies * small.hidden_size  # where the key is missing it is the head's own
        if "num_target_layers" in config:
            config["num_target_layers"] = size.num_layers
        (partial / "config.json").write_text(json.dumps(config, indent=1))
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(source: Path, output: Path, tensors: Mapping[str, StoredTensor], hidden: int, copies: int) -> None:
    """The file with its input matrix widened, all else byte for byte."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors.values():
        times = copies if tensor.name in _FC else 1
        shape = [*tensor.shape[:-1], tensor.shape[-1] * times] if tensor.shape else []
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": shape,
            "data_offsets": [end, end := end + tensor.num_bytes * times],
        }
    raw = json.dumps(header).encode()
    with source.open("rb") as old, output.open("xb") as new:
        new.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors.values():
            old.seek(tensor.start)
            data = old.read(tensor.num_bytes)
            new.write(_widened(data, tensor, hidden, copies) if tensor.name in _FC else data)


def _widened(data: bytes, tensor: StoredTensor, hidden: int, copies: int) -> bytes:
    """[E, taps * hidden] as [E, taps * copies * hidden]: of each tap the first copy is read."""
    width = hidden * len(data) // (tensor.shape[0] * tensor.shape[1])  # bytes of one tap in one row
    zeros = bytes(width * (copies - 1))
    return b"".join(data[start : start + width] + zeros for start in range(0, len(data), width))
