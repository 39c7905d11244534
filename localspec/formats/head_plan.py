"""What is written of a head, as `head_conversion.py` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

Value: TypeAlias = "bool | int | float | list[int] | list[bool]"


@dataclass(frozen=True, slots=True)
class Plan:
    """architecture: llama.cpp's.  metadata: its keys, without the architecture before them.  tensors: llama.cpp's name
    of each stored one.  heads: (of queries, of keys) where their rows are reordered."""

    architecture: str
    metadata: Mapping[str, Value]
    tensors: Mapping[str, str]
    mask_token: int | None = None
    heads: tuple[int, int] | None = None
