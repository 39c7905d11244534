"""Reads a GGUF header with every count checked against the file's size, so that no file can crash us."""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from localspec.errors import ModelFileError, UnsupportedModelError

Value: TypeAlias = "int | float | bool | str | list[str] | NDArray[np.generic]"

_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MAX_HEADER = 128 * 2**20  # bytes; the largest known tokenizers need 20 MB
_MAX_TEXTS = 4 * 2**20
_MAX_KEY = 2**16 - 1  # bytes, as the format says
_MAX_NAME = 512  # bytes of a tensor's name; llama.cpp takes 64
_MAX_PARTS = 1024
_MAX_SAID = 200  # characters of a message, which may quote the file
_CHUNK = 64 * 2**10
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)

# type number: (name, weights in a block, bytes of a block), as in ggml.h
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """shape: as numpy would have it (rows first).  offset: from the file's start."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Everything in the file but the weights."""

    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> GgufHeader:
    """Raises ModelFileError for a file that is truncated, corrupt or not GGUF, UnsupportedModelError for
    versions and tensor types that are not known."""
    try:
        with path.open("rb") as file:
            return _Reader(file, os.fstat(file.fileno()).st_size, path.name).header()
    except OSError as error:
        raise ModelFileError(f"{path.name} cannot be read", got=error.strerror or error) from error


def read_architecture(path: Path) -> str:
    """`general.architecture`, empty where there is none; of what stands behind it nothing is read. Raises as
    `read_header`."""
    try:
        with path.open("rb") as file:
            return _Reader(file, os.fstat(file.fileno()).st_size, path.name).architecture()
    except OSError as error:
        raise ModelFileError(f"{path.name} cannot be read", got=error.strerror or error) from error


def read_parts(path: Path) -> list[tuple[Path, GgufHeader]]:
    """The headers of a model that is split into files, the first one first; of a whole file, just its own.

    Any part may be named. Raises ModelFileError where one is missing or belongs to another model.
    """
    header = read_header(path)
    count = header.metadata.get("split.count", 0)
    if not isinstance(count, int) or not 0 <= count <= _MAX_PARTS:
        raise ModelFileError(f"{path.name}: split.count out of range", got=count, expected=f"at most {_MAX_PARTS}")
    if count < 2:
        return [(path, header)]
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise ModelFileError(
            "the GGUF file is one part of several and is not named as one",
            got=path.name,
            expected=f"NAME-00001-of-{count:05}.gguf",
        )
    parts, names = [], set[str]()
    for number in range(count):
        part = path.with_name(f"{match[1]}-{number + 1:05}-of-{count:05}.gguf")
        if not part.is_file():
            raise ModelFileError("a part of the model is missing", got=part.name, fix="Download it.")
        found = header if part == path else read_header(part)
        if found.metadata.get("split.no") != number or found.metadata.get("split.count") != count:
            raise ModelFileError(f"{part.name} is not the part that its name says", got=found.metadata.get("split.no"))
        twice = names & found.tensors.keys()
        if twice:
            raise ModelFileError(f"{part.name} repeats a tensor of another part", got=min(twice))
        names |= found.tensors.keys()
        parts.append((part, found))
    return parts


class _Reader:
    """A cursor that never leaves the file, nor reads more of it than a header may have."""

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self._file = file
        self._name = name
        self._size = size
        self._end = min(size, _MAX_HEADER)
        self._window = b""  # what was read and is not used up
        self._start = 0  # where in the window the cursor stands
        self._at = 0
        self._num_texts = 0

    def architecture(self) -> str:
        """The value of one key, or an empty string."""
        _, num_values = self._counts()
        for _ in range(self._count(num_values, 13)):
            key = self._string(_MAX_KEY)
            value = self._value(key)
            if key == "general.architecture":
                return value if isinstance(value, str) else ""
        return ""

    def _counts(self) -> tuple[int, int]:
        """(tensors, values), behind magic and version."""
        magic = self._bytes(min(4, self._size))
        if magic != b"GGUF":
            raise ModelFileError(f"{self._name} is no GGUF file", got=magic, expected=b"GGUF")
        version = self._integer("<I")
        if version not in (2, 3):
            raise UnsupportedModelError(f"{self._name} has an unknown GGUF version", got=version, expected="2 or 3")
        return self._integer("<Q"), self._integer("<Q")

    def header(self) -> GgufHeader:
        """Everything."""
        num_tensors, num_values = self._counts()
        metadata: dict[str, Value] = {}
        for _ in range(self._count(num_values, 13)):
            key = self._string(_MAX_KEY)
            if key in metadata:
                raise self._corrupt(f"{key} occurs twice")
            metadata[key] = self._value(key)
        tensors = [self._tensor() for _ in range(self._count(num_tensors, 24))]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise self._corrupt(f"alignment {alignment}")
        for t in tensors:
            if t.offset % alignment:
                raise self._corrupt(f"tensor {t.name} begins at {t.offset}, not at a multiple of {alignment}")
        return GgufHeader(metadata, self._placed(tensors, -(-self._at // alignment) * alignment))

    def _placed(self, tensors: list[TensorInfo], start: int) -> dict[str, TensorInfo]:
        """Tensors by name, with offsets from the file's start, all inside the file and none over another."""
        placed: dict[str, TensorInfo] = {}
        for t in tensors:
            if t.name in placed:
                raise self._corrupt(f"tensor {t.name} occurs twice")
            end = start + t.offset + t.num_bytes
            if end > self._size:
                raise ModelFileError(
                    f"{self._name} is truncated: tensor {t.name} lies beyond its end",
                    got=f"{self._size} bytes",
                    expected=end,
                )
            placed[t.name] = TensorInfo(t.name, t.kind, t.shape, start + t.offset, t.num_bytes)
        for first, second in pairwise(sorted(placed.values(), key=lambda t: t.offset)):
            if first.offset + first.num_bytes > second.offset:
                raise self._corrupt(f"tensors {first.name} and {second.name} overlap")
        return placed

    def _tensor(self) -> TensorInfo:
        name = self._string(_MAX_NAME)
        num_dimensions = self._integer("<I")
        if not 0 < num_dimensions <= _MAX_DIMENSIONS:
            raise self._corrupt(f"tensor {name} has {num_dimensions} dimensions")
        sizes = [self._integer("<Q") for _ in range(num_dimensions)]
        number, offset = self._integer("<I"), self._integer("<Q")
        if number not in TENSOR_TYPES:
            raise UnsupportedModelError(f"tensor {name} has an unknown type", got=number)
        kind, block, num_bytes = TENSOR_TYPES[number]
        if 0 in sizes or sizes[0] % block:
            raise self._corrupt(f"tensor {name} of type {kind} has sizes {sizes}")
        return TensorInfo(name, kind, tuple(reversed(sizes)), offset, math.prod(sizes) // block * num_bytes)

    def _value(self, key: str) -> Value:
        kind = self._integer("<I")
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise self._corrupt(f"{key} has type {kind}")
        return self._numbers(kind, 1)[0].item()  # type: ignore[no-any-return]

    def _array(self, key: str) -> Value:
        kind, count = self._integer("<I"), self._integer("<Q")
        if kind == _STRING:
            return self._texts(self._count(count, 8))
        if kind not in _SCALARS:
            raise self._corrupt(f"{key} is an array of type {kind}")
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> NDArray[np.generic]:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._bytes(self._count(count, dtype.itemsize) * dtype.itemsize), dtype)

    def _texts(self, count: int) -> list[str]:
        self._num_texts += count
        if self._num_texts > _MAX_TEXTS:
            raise self._corrupt(f"more than {_MAX_TEXTS} texts")
        return [self._string(self._end) for _ in range(count)]

    def _string(self, limit: int = _MAX_HEADER) -> str:
        length = self._integer("<Q")
        if length > limit:
            raise self._corrupt(f"a name of {length} bytes")
        raw = self._bytes(length)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self._corrupt(f"a text is not UTF-8: {raw[:40]!r}") from error

    def _integer(self, form: str) -> int:
        value: int = struct.unpack(form, self._bytes(8 if form == "<Q" else 4))[0]
        return value

    def _count(self, count: int, min_bytes: int) -> int:
        """`count` items of at least `min_bytes` each must fit into what is left."""
        if count * min_bytes > self._end - self._at:
            raise self._corrupt(f"{count} items do not fit into the file, or into a header of {_MAX_HEADER} bytes")
        return count

    def _bytes(self, count: int) -> bytes:
        """The next bytes; read from the file in chunks, since most are asked for by the dozen."""
        end = self._start + count
        if end > len(self._window):
            self._count(count, 1)
            rest = self._window[self._start :]
            self._window = rest + self._file.read(max(count - len(rest), min(_CHUNK, self._end - self._at)))
            self._start, end = 0, count
            if end > len(self._window):
                raise self._corrupt("the file became shorter while it was read")
        raw = self._window[self._start : end]
        self._start = end
        self._at += count
        return raw

    def _corrupt(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._name} is truncated or corrupt", got=what[:_MAX_SAID])
