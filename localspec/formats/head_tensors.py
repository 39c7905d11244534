"""Shapes of a head's tensors, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from localspec.errors import HeadFileError

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape."""

_MAX_SAID = 80
_BUFFERS = ("rotary_emb.inv_freq",)  # what trainers save along and nobody reads


def require_shapes(tensors: Shapes, must: Shapes, may: Shapes) -> None:
    """Raise HeadFileError unless exactly these tensors are there; a size of -1 may be any."""
    missing = [name for name in must if name not in tensors]
    if missing:
        raise HeadFileError(f"tensor {missing[0]} is missing", expected=_shown(must[missing[0]]))
    known = {**must, **may}
    for name, shape in tensors.items():
        if name.endswith(_BUFFERS):
            continue
        if name not in known:
            raise HeadFileError("the head has a tensor that nothing here knows", got=name[:_MAX_SAID])
        wanted = known[name]
        if len(shape) != len(wanted) or any(w not in (-1, s) for s, w in zip(shape, wanted, strict=True)):
            raise HeadFileError(f"tensor {name} has the wrong shape", got=_shown(shape), expected=_shown(wanted))


def _shown(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join("any" if size < 0 else str(size) for size in shape) + ")"
