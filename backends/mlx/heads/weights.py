"""Puts a file's tensors into a head's modules."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from localspec.errors import HeadFileError

_BUFFERS = ("rotary_emb.inv_freq",)


def take_weights(module: nn.Module, weights: dict[str, mx.array]) -> None:
    """Every parameter from a tensor of its name. Raises HeadFileError naming one that is missing, too much or
    misshapen."""
    weights = {name: value for name, value in weights.items() if not name.endswith(_BUFFERS)}
    wanted = dict(tree_flatten(module.parameters()))
    for name in sorted(wanted.keys() | weights):
        if name not in weights:
            raise HeadFileError(f"tensor {name} is missing", expected=wanted[name].shape)
        if name not in wanted:
            raise HeadFileError("the head has a tensor that has no place", got=name[:80])
        if wanted[name].shape != weights[name].shape:
            got, expected = weights[name].shape, wanted[name].shape
            raise HeadFileError(f"tensor {name} has the wrong shape", got=got, expected=expected)
    module.load_weights(list(weights.items()), strict=True)
    module.eval()
