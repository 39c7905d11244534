"""A trained head for an expanded target: what it reads became copies side by side, and it reads the first of each.

The expanded target's layers 0 .. L-1 hold copies of what the small one's hold, so a head taps the same layers and
guesses the same. On MLX it stays as small as it was: next to a target of that size a trained one would cost more.
llama.cpp has heads share the target's embedding and output matrices, so there its hidden state becomes copies, too.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localspec.bench.expand.shape import LAYER_PARTS, Part, Size
from localspec.errors import SettingError, UnsupportedModelError
from localspec.formats import safetensors, summarize
from localspec.formats.eagle3 import default_taps, is_eagle3
from localspec.formats.head_conversion import write_head_gguf
from localspec.formats.safetensors import StoredTensor

_FC, _CONFIDENCE = "fc.weight", "confidence_head.proj.weight"
_TAPS = "eagle_aux_hidden_state_layer_ids"
_KIND = "F16"  # as `localspec convert` writes heads: they are small, and what they lose is acceptance
_LAYER = re.compile(r"(layers\.\d+|midlayer)\.")
_PARTS = {
    **LAYER_PARTS,
    "embed_tokens.weight": Part.EMBEDDING,
    "lm_head.weight": Part.OUTPUT,
    "norm.weight": Part.HIDDEN_NORM,
    "hidden_norm.weight": Part.HIDDEN_NORM,
    _CONFIDENCE: Part.READER,
}
_UNCHANGED = re.compile(r"markov_head\.markov_w[12]\.weight|confidence_head\.proj\.bias|d2t|t2d")

Stored = NDArray[Any]
"""A tensor as it lies in the file: of whatever type, a number whose bytes are zeros is zero."""


def expand_head(head: Path, output: Path, target: Path, size: Size, expanded: Path) -> None:
    """Write a head that was trained for `target` to `output`, for that target expanded to `size`, which lies in
    `expanded`: a folder where that is one, else a GGUF file for llama.cpp.

    head: a safetensors folder with one input matrix for all taps (DSpark, DFlash, EAGLE-3, JetSpec). Raises
    UnsupportedModelError for any other, for a GGUF file also for what llama.cpp's graphs leave out, SettingError where
    `output` exists, ModelFileError.
    """
    if expanded.is_dir():
        _to_folder(head, output, target, size)
    else:
        _to_gguf(head, output, target, size, expanded)


def _to_folder(head: Path, output: Path, target: Path, size: Size) -> None:
    """It stays as small as it was."""
    small, copies = _copies(target, size)

    def changed(name: str, values: Stored) -> Stored:
        return _first_copies(values, small, copies) if name == _FC else values

    settings = {"target_hidden_size": copies * small}  # where the key is missing it is the head's own
    _expand(head, output, target, size, changed, settings)


def _to_gguf(head: Path, output: Path, target: Path, size: Size, expanded: Path) -> None:
    """As wide as the expanded target, whose tokenizer it takes. Matrices are stored as F16."""
    if output.exists():
        raise SettingError(f"{output} exists", fix="Name another output.")
    small, copies = _copies(target, size)

    def changed(name: str, values: Stored) -> Stored:
        return _widened(name, values, small, copies)

    config = safetensors.read_json(head / "config.json") if head.is_dir() else {}
    own, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if own != small or not heads:
        raise UnsupportedModelError(
            "llama.cpp runs no head with another hidden size than its target's", got=own, expected=small
        )
    settings = {
        "hidden_size": copies * small,
        "head_dim": config.get("head_dim") or small // heads,
        "target_hidden_size": copies * small,
    }
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.") as folder:
        wide, made = Path(folder) / head.resolve().name, Path(folder) / output.name
        _expand(head, wide, target, size, changed, settings)
        write_head_gguf(made, wide, expanded, _KIND)
        made.rename(output)


def _copies(target: Path, size: Size) -> tuple[int, int]:
    """(size of the target's hidden state, copies of it)."""
    small = summarize(target).hidden_size
    return small, -(-size.hidden // small)


def _expand(
    head: Path,
    output: Path,
    target: Path,
    size: Size,
    changed: Callable[[str, Stored], Stored],
    settings: Mapping[str, int],
) -> None:
    """Write the folder. changed: what becomes of a tensor, by its name without what some checkpoints put before every
    name.  settings: of `config.json`, besides how many layers the target has."""
    if output.exists():
        raise SettingError(f"{output} exists", fix="Name another output.")
    parts = safetensors.read_folder(head) if head.is_dir() else []
    found = [tensor for _, tensors in parts for name, tensor in tensors.items() if _plain(name) == _FC]
    if len(found) != 1 or found[0].shape[-1] % summarize(target).hidden_size:
        raise UnsupportedModelError(
            "only a folder whose head reads all taps through one matrix can be expanded", got=head.name, expected=_FC
        )
    partial = output.with_name(f"{output.name}.partial")
    partial.mkdir()
    try:
        for file, tensors in parts:
            _write(file, partial / file.name, tensors, changed)
        for file in head.glob("*.json"):
            shutil.copy(file, partial / file.name)
        config = {**safetensors.read_json(head / "config.json"), **settings}
        if "num_target_layers" in config:
            config["num_target_layers"] = size.num_layers
        shapes = {name: tensor.shape for _, tensors in parts for name, tensor in tensors.items()}
        if is_eagle3(shapes) and _TAPS not in {*config, *(config.get("eagle_config") or {})}:
            config[_TAPS] = default_taps(summarize(target).num_layers)  # of the expanded one they would be others
        (partial / "config.json").write_text(json.dumps(config, indent=1))
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _plain(name: str) -> str:
    return name.removeprefix("model.")


def _write(
    source: Path, output: Path, tensors: Mapping[str, StoredTensor], changed: Callable[[str, Stored], Stored]
) -> None:
    """The file with its tensors changed."""
    made: list[Stored] = []
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    with source.open("rb") as old:
        for tensor in tensors.values():
            old.seek(tensor.start)
            raw, count = old.read(tensor.num_bytes), math.prod(tensor.shape)
            values = np.frombuffer(raw, f"V{len(raw) // count if count else 1}").reshape(tensor.shape)
            made.append(changed(_plain(tensor.name), values))
            shape, length = list(made[-1].shape), made[-1].nbytes
            header[tensor.name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [end, end := end + length]}
    text = json.dumps(header).encode()
    with output.open("xb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        for values in made:
            new.write(values.tobytes())


def _first_copies(values: Stored, small: int, copies: int) -> Stored:
    """[E, n * small + r] as [E, n * copies * small + r]: of each of the n hidden states side by side the first copy is
    read. r, less than `small`: what stands behind them."""
    rows, (states, rest) = len(values), divmod(values.shape[1], small)
    inner = np.zeros((rows, states, copies, small), values.dtype)
    inner[:, :, 0] = values[:, : states * small].reshape(rows, states, small)
    return np.concatenate([inner.reshape(rows, -1), values[:, values.shape[1] - rest :]], axis=1)


def _widened(name: str, values: Stored, small: int, copies: int) -> Stored:
    """A tensor of a head whose own hidden state becomes copies: what `shape.py` says of the target's."""
    if name == _FC:
        return np.tile(_first_copies(values, small, copies), (copies, 1))
    if _UNCHANGED.fullmatch(name):
        return values
    part = _PARTS.get(_LAYER.sub("", name, count=1))
    if part is None:
        raise UnsupportedModelError("expansion does not know the head's tensor", got=name)
    if part in (Part.READER, Part.OUTPUT):
        return _first_copies(values, small, copies)
    if part is Part.EMBEDDING:
        return np.tile(values, (1, copies))
    if part is Part.WRITER:
        return np.tile(values, (copies, 1))
    return np.tile(values, copies) if part is Part.HIDDEN_NORM else values
