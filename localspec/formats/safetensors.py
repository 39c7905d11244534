"""Reads the header of a safetensors file, and of all files behind an index, checked as strictly as the
format's own library does: types, sizes, no overlap, no hole."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localspec.errors import ModelFileError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_MAX_HEADER = 32 * 2**20  # bytes; 200,000 tensors
_MAX_CONFIG = 4 * 2**20
_MAX_PARTS = 1024
_MAX_DIMENSIONS = 8
_MAX_SAID = 200
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip
_PLAIN_NAME = re.compile(r"[\w. +-]+\.safetensors")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """dtype: as the format writes it, e.g. BF16.  start: from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name. Raises ModelFileError."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ModelFileError(f"{path.name} is truncated or no safetensors file", got=f"{size} bytes")
            if length > _MAX_HEADER:
                raise ModelFileError(f"the header of {path.name} is too long", got=length, expected=f"<= {_MAX_HEADER}")
            raw = file.read(length)
    except OSError as error:
        raise ModelFileError(f"{path.name} cannot be read", got=error.strerror or error) from error
    header = parse_object(raw, f"the header of {path.name}")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(name, entry, path.name) for name, entry in header.items()}
    ordered = sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.num_bytes))
    end = 0
    for tensor in ordered:
        if tensor.start != end:
            what = "overlaps another" if tensor.start < end else "leaves a hole before it"
            raise ModelFileError(f"the header of {path.name} is corrupt", got=f"tensor {tensor.name[:80]} {what}")
        end += tensor.num_bytes
    if size != 8 + length + end:
        what = "truncated" if size < 8 + length + end else "longer than its header says"
        raise ModelFileError(f"{path.name} is {what}", got=f"{size} bytes", expected=8 + length + end)
    return {
        tensor.name: StoredTensor(tensor.name, tensor.dtype, tensor.shape, 8 + length + tensor.start, tensor.num_bytes)
        for tensor in ordered
    }


def read_folder(folder: Path) -> list[tuple[Path, dict[str, StoredTensor]]]:
    """The weight files of a folder with their tensors: the single file, those of the index, or all
    `model*.safetensors`. Raises ModelFileError where parts are missing, repeat or lack a tensor."""
    index = folder / INDEX
    wanted: dict[str, str] = {}
    if index.is_file():
        mapping = read_json(index, _MAX_HEADER).get("weight_map")
        if not isinstance(mapping, dict):
            raise ModelFileError(f"{INDEX} has no weight_map", got=type(mapping).__name__)
        for name, part in mapping.items():
            if not isinstance(part, str) or not _PLAIN_NAME.fullmatch(part):
                raise ModelFileError(f"{INDEX} names no file of the folder", got=str(part)[:_MAX_SAID])
            wanted[name] = part
        files = [folder / part for part in sorted(set(wanted.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelFileError("parts of the model are missing", got=", ".join(missing[:5]), fix="Download them.")
    else:
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelFileError("no weights in the folder", got=folder, expected=f"{SINGLE} or its parts")
    if len(files) > _MAX_PARTS:
        raise ModelFileError("too many weight files", got=len(files), expected=f"at most {_MAX_PARTS}")
    parts = [(file, read_header(file)) for file in files]
    seen: dict[str, str] = {}
    for file, tensors in parts:
        for name in tensors:
            if name in seen:
                raise ModelFileError(f"{file.name} repeats a tensor of {seen[name]}", got=name[:_MAX_SAID])
            seen[name] = file.name
    for name, part in wanted.items():
        if seen.get(name) != part:
            raise ModelFileError(f"{part} lacks a tensor that {INDEX} puts there", got=name[:_MAX_SAID])
    return parts


def read_json(path: Path, limit: int = _MAX_CONFIG) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes. Raises ModelFileError where the file is missing or not that."""
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except FileNotFoundError as error:
        raise ModelFileError(
            f"{path.name} is missing", got=path.parent, fix="Download the whole model folder."
        ) from error
    except OSError as error:
        raise ModelFileError(f"{path.name} cannot be read", got=error.strerror or error) from error
    if len(raw) > limit:
        raise ModelFileError(f"{path.name} is too long", expected=f"at most {limit} bytes")
    return parse_object(raw, path.name)


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object without repeated keys. Raises ModelFileError, also for one that is all brackets: each
    would cost many times its own size."""
    if raw.count(b"[") + raw.count(b"{") > 64 + len(raw) // 12:
        raise ModelFileError(f"{what} is corrupt", got="brackets without content")
    try:
        content = json.loads(raw, object_pairs_hook=_without_repeats, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{what} is corrupt", got=str(error)[:_MAX_SAID], expected="a JSON object") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{what} is corrupt", got=type(content).__name__, expected="a JSON object")
    return content


def _integer(digits: str) -> int:
    if len(digits) > 20:  # longer than any 64-bit number
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _tensor(name: str, entry: Any, file: str) -> StoredTensor:
    def corrupt(what: str, got: object) -> ModelFileError:
        return ModelFileError(f"the header of {file} is corrupt: {what} of {name[:80]}", got=str(got)[:_MAX_SAID])

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise corrupt("the entry", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise corrupt("the type", dtype)
    if not _is_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise corrupt("the shape", shape)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise corrupt("the place", offsets)
    num_bits = math.prod(shape) * _BITS[dtype]
    if num_bits != 8 * (offsets[1] - offsets[0]):
        raise corrupt("the size", f"{offsets[1] - offsets[0]} bytes for {dtype} {shape}")
    return StoredTensor(name, dtype, tuple(shape), offsets[0], num_bits // 8)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_DIMENSIONS and all(map(_is_size, value))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
