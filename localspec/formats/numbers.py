"""Numbers of metadata or a configuration, checked: files may claim anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from localspec.errors import ModelFileError

MAX_LAYERS = 4096
_MAX_SIZE = 2**31 - 1


class Numbers:
    """Positive integers below a prefix, checked; `most` bounds what hostile files may claim."""

    def __init__(self, values: Mapping[str, Any], prefix: str, where: str) -> None:
        self._values, self._prefix, self.where = values, prefix, where

    def size(self, key: str, default: int | None = None, *, most: int = _MAX_SIZE) -> int:
        """One number; of a list, the largest. Without a default it must be there."""
        return max(self.sizes(key, default, most=most), default=0)

    def sizes(self, key: str, default: int | None = None, *, most: int = _MAX_SIZE) -> list[int]:
        """A number, or one for each layer."""
        value = self._values.get(self._prefix + key)
        if value is None and default is not None:
            return [default]
        if isinstance(value, np.ndarray):
            value = value.tolist() if value.size <= MAX_LAYERS else None
        items: list[Any] = value if isinstance(value, list) else [value]
        if len(items) > MAX_LAYERS or not items or not all(type(item) is int and 0 <= item <= most for item in items):
            raise ModelFileError(
                f"{self.where}: {self._prefix}{key} is missing or out of range",
                got=str(value)[:60],
                expected=f"0 to {most}",
            )
        return [int(item) for item in items]
