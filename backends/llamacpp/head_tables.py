"""Tables of a GGUF head that are applied here and not by llama.cpp: rows looked up by token, and small products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localspec.errors import HeadFileError, UnsupportedModelError
from localspec.formats.gguf import GgufHeader, TensorInfo

Matrix = NDArray[np.float32]


class Table:
    """A matrix that stays in the file; rows are read and dequantised when asked for."""

    def __init__(self, path: Path, tensor: TensorInfo) -> None:
        from gguf import GGMLQuantizationType

        if len(tensor.shape) != 2:
            raise HeadFileError(f"tensor {tensor.name} of the head is no matrix", got=tensor.shape)
        self.shape = tensor.shape
        self._kind = GGMLQuantizationType[tensor.kind]
        stored = np.memmap(path, np.uint8, "r", tensor.offset, (tensor.num_bytes,))
        self._stored = stored.reshape(tensor.shape[0], -1)
        self._name = tensor.name

    def rows(self, indices: Sequence[int]) -> Matrix:
        """[N, width] some of its rows."""
        return self._dequantised(self._stored[list(indices)])

    @cached_property
    def whole(self) -> Matrix:
        """[rows, width] all of it, kept from the first use on."""
        return self._dequantised(self._stored)

    def _dequantised(self, raw: NDArray[np.uint8]) -> Matrix:
        from gguf.quants import dequantize

        try:
            values: Matrix = dequantize(np.ascontiguousarray(raw), self._kind).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise UnsupportedModelError(f"tensor {self._name} of the head cannot be read", got=error) from error
        return values


def table(path: Path, header: GgufHeader, name: str) -> Table | None:
    """A matrix of the head, or None if it has none of that name."""
    tensor = header.tensors.get(name)
    return None if tensor is None else Table(path, tensor)


def vector(path: Path, header: GgufHeader, name: str) -> Matrix | None:
    """[N] a small tensor of any shape, laid flat, or None."""
    tensor = header.tensors.get(name)
    if tensor is None:
        return None
    if tensor.kind not in ("F32", "F16"):
        raise UnsupportedModelError(f"tensor {name} of the head has an unexpected type", got=tensor.kind)
    raw = np.fromfile(path, np.uint8, tensor.num_bytes, offset=tensor.offset)
    return raw.view("<f4" if tensor.kind == "F32" else "<f2").astype(np.float32)


def ids(path: Path, header: GgufHeader) -> NDArray[np.int64] | None:
    """[Vd] d2t: the target's id of each token that the head can guess; None: all."""
    tensor = header.tensors.get("d2t.weight") or header.tensors.get("d2t")
    if tensor is None:
        return None
    if tensor.kind != "I64" or len(tensor.shape) != 1:
        raise HeadFileError("tensor d2t of the head is not what llama.cpp reads", got=tensor.kind, expected="I64")
    return np.fromfile(path, np.uint8, tensor.num_bytes, offset=tensor.offset).view("<i8")
