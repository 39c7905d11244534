"""Numbers as a file stores them, and random ones in any amount without computing each."""

from __future__ import annotations

import zlib
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from localspec.errors import UnsupportedModelError

Values: TypeAlias = NDArray[np.float32]
Blocks: TypeAlias = NDArray[np.uint8]
"""[..., blocks, bytes]: rows of values as they are stored."""

_POOL = 1 << 24
_SCALE = np.float32(0.02)
"""Standard deviation of random weights: that of a fresh model, small enough for half precision everywhere."""


class Encoding:
    """One type of a file. name: ggml's.  block: values per block, each stored by itself."""

    def __init__(self, name: str) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        self.name = name
        self.kind = GGMLQuantizationType[name]
        self.block, self.num_bytes = GGML_QUANT_SIZES[self.kind]
        self._zero = self.encode(np.zeros((1, self.block), np.float32))[0, 0]

    def check(self, name: str, num_columns: int) -> None:
        """Raise UnsupportedModelError where the small model's columns do not end with a block."""
        if num_columns % self.block:
            raise UnsupportedModelError(
                f"{self.name} stores blocks of {self.block}, and {name} has no whole number of them", got=num_columns
            )

    def encode(self, values: Values) -> Blocks:
        """[..., columns] -> [..., blocks, bytes]."""
        from gguf.quants import quantize

        stored = quantize(np.ascontiguousarray(values), self.kind)
        return stored.view(np.uint8).reshape(*values.shape[:-1], values.shape[-1] // self.block, self.num_bytes)

    def decode(self, blocks: Blocks) -> Values:
        """The values that stored ones stand for."""
        from gguf.quants import dequantize

        rows = np.ascontiguousarray(blocks).reshape(*blocks.shape[:-2], -1)
        values: Values = dequantize(rows, self.kind)
        return values.reshape(*blocks.shape[:-2], blocks.shape[-2] * self.block)

    def zeros(self, num_rows: int, num_columns: int) -> Blocks:
        """[rows, blocks, bytes]."""
        blocks = np.empty((num_rows, num_columns // self.block, self.num_bytes), np.uint8)
        blocks[:] = self._zero
        return blocks


class Noise:
    """Random values of one encoding: a pool of sixteen million, read from another place for each tensor.

    No kernel can profit from the repetition, and eight billion normal numbers would take minutes.
    """

    def __init__(self, encoding: Encoding, seed: int) -> None:
        values = np.random.default_rng(seed).standard_normal(_POOL, np.float32) * _SCALE
        self._encoding = encoding
        self._pool = encoding.encode(values.reshape(1, -1))[0]

    def matrix(self, name: str, num_rows: int, num_columns: int) -> Blocks:
        """[rows, blocks, bytes]; the same name, the same values."""
        num_blocks = num_columns // self._encoding.block
        blocks = np.empty((num_rows * num_blocks, self._encoding.num_bytes), np.uint8)
        start = zlib.crc32(name.encode()) % len(self._pool)
        done = 0
        while done < len(blocks):
            piece = self._pool[start : start + len(blocks) - done]
            blocks[done : done + len(piece)] = piece
            done, start = done + len(piece), 0
        return blocks.reshape(num_rows, num_blocks, self._encoding.num_bytes)
