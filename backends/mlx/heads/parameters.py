"""From a head's files to its modules' parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from localspec.errors import HeadFileError
from localspec.formats import safetensors
from localspec.formats.head import HeadHeader
from localspec.protocols import HeadInfo, Tokens

from ..loader import compute_in
from ..scores import DeviceTokens

_BUFFERS = ("rotary_emb.inv_freq",)


def read_tensors(header: HeadHeader, names: Iterable[str] | None = None) -> dict[str, mx.array]:
    """Tensors of a head's folder by stored name, not read from disk yet; `names` None: all."""
    wanted = None if names is None else set(names)
    found: dict[str, mx.array] = {}
    for path, tensors in safetensors.read_folder(header.path):
        if wanted is None or not wanted.isdisjoint(tensors):
            arrays: Any = mx.load(str(path))
            found |= {name: value for name, value in arrays.items() if wanted is None or name in wanted}
    return found


def take_weights(
    module: nn.Module, weights: dict[str, mx.array], stored: Callable[[str], str] = lambda name: name
) -> None:
    """Every parameter from a tensor of its name, in the type to compute in, quantised where the tensors are.

    stored: the name in the file of a parameter. Raises HeadFileError naming one that is missing, too much or misshapen.
    """
    weights = {name: value for name, value in weights.items() if not name.endswith(_BUFFERS)}
    _quantize(module, weights)
    wanted: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    for name in sorted(wanted.keys() | weights):
        if name not in weights:
            raise HeadFileError(f"tensor {stored(name)} is missing", expected=wanted[name].shape)
        if name not in wanted:
            raise HeadFileError("the head has a tensor that has no place", got=stored(name)[:80])
        if wanted[name].shape != weights[name].shape:
            got, expected = weights[name].shape, wanted[name].shape
            raise HeadFileError(f"tensor {stored(name)} has the wrong shape", got=got, expected=expected)
    module.load_weights(list(weights.items()), strict=True)
    module.eval()
    narrow = any(value.dtype == mx.float16 for value in weights.values())
    compute_in(module, None, mx.float32 if narrow else None)  # a target's hidden states overflow float16
    mx.eval(module.parameters())


def share(module: nn.Module, others: Sequence[mx.array]) -> None:
    """Let go of an embedding and an output matrix that are copies of the target's."""
    for name in ("embed_tokens", "lm_head"):
        own = module.get(name)
        if own is None:
            continue
        for other in others:
            alike = own.weight.shape == other.shape and own.weight.dtype == other.dtype
            if alike and bool(mx.array_equal(own.weight, other)):
                own.weight = other


def _quantize(module: nn.Module, weights: Mapping[str, mx.array]) -> None:
    """Make those modules quantised whose weights are, in the groups and bits that the shapes say."""

    def quantized(path: str, child: nn.Module) -> bool | dict[str, int]:
        scales, packed = weights.get(f"{path}.scales"), weights.get(f"{path}.weight")
        if scales is None or packed is None or "weight" not in child:
            return False
        size = child["weight"].shape[-1]
        return {"group_size": size // scales.shape[-1], "bits": packed.shape[-1] * 32 // size}

    if any(name.endswith(".scales") for name in weights):
        nn.quantize(module, class_predicate=quantized)


def head_info(
    header: HeadHeader,
    module: nn.Module,
    taps: tuple[int, ...],
    levels: int | None = None,
    notes: Sequence[str] = (),
) -> HeadInfo:
    """levels: as `HeadInfo.levels`; a head that has them guesses all in one pass."""
    parameters: list[tuple[str, mx.array]] = tree_flatten(module.parameters())  # type: ignore[assignment]
    return HeadInfo(
        name=header.path.resolve().name,
        path=header.path,
        kind=header.kind,
        num_parameters=sum(value.size for _, value in parameters),
        taps=taps,
        levels=levels,
        one_pass=levels is not None,
        notes=tuple(notes),
    )


def device_ids(tokens: Tokens) -> mx.array:
    """[T] ids on the device; those that are there already stay there."""
    return tokens.array if isinstance(tokens, DeviceTokens) else mx.array(np.asarray(tokens.numpy(), np.int32))
