"""A draft model that was trained on something else, made from one that was not.

The rows of its vocabulary are shuffled, ordinary tokens among themselves: what comes out is, weight for weight, the
model that training on texts in a secret alphabet would have given. It costs what the original costs, it is sure
of itself, and what it guesses has nothing to do with the text.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localspec.errors import ModelFileError, UsageError
from localspec.protocols import Tokenizer
from localspec.types import TokenIds

_GGUF_TENSORS = ("token_embd.weight", "output.weight", "output.bias")
_PARTS = ("weight", "scales", "biases", "bias")
_FOLDER_TENSORS = tuple(
    f"{place}.{part}"
    for place in ("model.embed_tokens", "language_model.model.embed_tokens", "lm_head", "language_model.lm_head")
    for part in _PARTS
)


def shuffle(tokenizer: Tokenizer, num_rows: int, seed: int = 0) -> TokenIds:
    """[num_rows] which row stands in each row's place: special tokens and padding stay where they are."""
    order = np.arange(num_rows, dtype=np.int32)
    ordinary = [token for token in range(tokenizer.num_tokens) if not tokenizer.is_special(token)]
    order[ordinary] = np.random.default_rng(seed).permutation(ordinary)
    return order


def write_stranger(source: Path, folder: Path, tokenizer: Tokenizer) -> Path:
    """Write the stranger of a GGUF file or safetensors folder into `folder`; its path.

    Raises ModelFileError where no vocabulary is found in the file, UsageError without the package it takes.
    """
    target = folder / source.name
    if source.is_dir():
        shutil.copytree(source, target)
        changed = sum(_shuffle_safetensors(path, tokenizer) for path in sorted(target.glob("*.safetensors")))
    else:
        shutil.copyfile(source, target)
        changed = _shuffle_gguf(target, tokenizer)
    if not changed:
        raise ModelFileError(
            f"found no rows of a vocabulary in {source.name}", fix="Leave the workload `stranger` out with --workload."
        )
    return target


def _shuffle_gguf(path: Path, tokenizer: Tokenizer) -> int:
    """Shuffle in place; the number of tensors changed."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UsageError(
            "the workload `stranger` rewrites a GGUF file, and the package gguf is not installed",
            fix='Install it with `pip install "localspec[bench]"`, or leave the workload out with --workload.',
        ) from None
    reader = GGUFReader(path, "r+")
    rows = [tensor.data for tensor in reader.tensors if tensor.name in _GGUF_TENSORS]
    for data in rows:  # [V, bytes or numbers]: quantised rows are whole rows, too
        data[:] = data[shuffle(tokenizer, len(data))]
    reader.data.flush()
    return len(rows)


def _shuffle_safetensors(path: Path, tokenizer: Tokenizer) -> int:
    """Shuffle in place; the number of tensors changed."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    found: Sequence[str] = [name for name in _FOLDER_TENSORS if name in header]
    for name in found:
        begin, end = header[name]["data_offsets"]
        num_rows = header[name]["shape"][0]
        data: NDArray[np.uint8] = np.memmap(
            path, np.uint8, "r+", offset=8 + length + begin, shape=(num_rows, (end - begin) // num_rows)
        )
        data[:] = data[shuffle(tokenizer, num_rows)]
    return len(found)
