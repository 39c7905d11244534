"""Medusa heads: tiny ones on disk in released layouts, and their pass in slow numpy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localspec.testing.files import write_folder
from localspec.testing.pair_heads import Array, TargetEnds, random_weights, silu

__all__ = ["medusa_rows", "write_medusa"]


def write_medusa(
    folder: Path,
    *,
    target: tuple[int, int, int],
    num_heads: int = 4,
    num_blocks: int = 1,
    own_head: bool = True,
    prefix: str = "",
) -> dict[str, NDArray[Any]]:
    """Write config.json and model.safetensors with random weights; returns the weights.

    target: (hidden size, layers, V) of the target.  own_head: False for the older form, which uses the target's.
    prefix: `medusa_head.` where the heads stand among a model's other tensors. The configuration counts the heads
    wrongly, as those released with the first heads do.
    """
    hidden, _, vocab = target
    shapes: dict[str, tuple[int, ...]] = {}
    for head in range(num_heads):
        for block in range(num_blocks):
            shapes[f"{prefix}{head}.{block}.linear.weight"] = (hidden, hidden)
            shapes[f"{prefix}{head}.{block}.linear.bias"] = (hidden,)
        if own_head:
            shapes[f"{prefix}{head}.{num_blocks}.weight"] = (vocab, hidden)
    weights = random_weights(shapes, seed=0)
    others = {"model.norm.weight": np.ones(hidden, np.float32)} if prefix else {}
    config = {"medusa_num_heads": 2, "medusa_num_layers": num_blocks, "base_model_name_or_path": "somewhere"}
    write_folder(folder, config, weights | others)
    return weights


def medusa_rows(weights: Mapping[str, NDArray[Any]], ends: TargetEnds, hidden: Array) -> Array:
    """[heads, V] of a last hidden state [hidden] behind the target's final norm."""
    plain = {name.removeprefix("medusa_head."): value.astype(np.float64) for name, value in weights.items()}
    rows = []
    head = 0
    while f"{head}.0.linear.weight" in plain:
        x, block = hidden, 0
        while f"{head}.{block}.linear.weight" in plain:
            x = x + silu(plain[f"{head}.{block}.linear.weight"] @ x + plain[f"{head}.{block}.linear.bias"])
            block += 1
        rows.append(plain.get(f"{head}.{block}.weight", ends.output) @ x)
        head += 1
    return np.stack(rows)
