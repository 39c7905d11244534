"""A head's tensors on the device, and the type that it computes in."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from localspec.errors import HeadFileError
from localspec.formats import safetensors
from localspec.formats.head import HeadHeader

from ..device import on_cpu


class Weights:
    """The tensors of a head's folder by name, without the header's prefix."""

    def __init__(self, header: HeadHeader) -> None:
        self._prefix = header.prefix
        self._arrays: dict[str, mx.array] = {}
        for file, _ in safetensors.read_folder(header.path):
            self._arrays.update(mx.load(str(file)))  # type: ignore[arg-type] # a dict for this format
        self.dtype = _compute_type({array.dtype for array in self._arrays.values()})
        self._taken: list[mx.array] = []

    def take(self, name: str) -> mx.array:
        """A tensor, in the type to compute in where it holds fractions. Raises HeadFileError where it is not there."""
        array = self._arrays.get(self._prefix + name)
        if array is None:
            raise HeadFileError(f"the head lacks the tensor {self._prefix}{name}")
        taken = array.astype(self.dtype) if mx.issubdtype(array.dtype, mx.floating) else array
        self._taken.append(taken)
        return taken

    def take_or_share(self, name: str, others: Sequence[mx.array]) -> mx.array:
        """The same, but one of `others` where that holds the same numbers: heads carry copies of the target's ends."""
        taken = self.take(name)
        for other in others:
            if other.shape == taken.shape and other.dtype == taken.dtype and bool(mx.array_equal(other, taken)):
                self._taken.pop()
                return other
        return taken

    def read(self) -> None:
        """Read from disk whatever was taken."""
        mx.eval(*self._taken)
        self._arrays, self._taken = {}, []

    def linear(self, name: str) -> Linear:
        """`name`.weight, and its bias if there is one."""
        bias = self.take(f"{name}.bias") if f"{self._prefix}{name}.bias" in self._arrays else None
        return Linear(self.take(f"{name}.weight"), bias)

    def norm(self, name: str, eps: float) -> Norm:
        """`name`.weight."""
        return Norm(self.take(f"{name}.weight"), eps)

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._arrays


class Linear:
    """y = x Wᵀ + b."""

    def __init__(self, weight: mx.array, bias: mx.array | None = None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: mx.array) -> mx.array:
        """[..., out] of [..., in]."""
        y = x @ self._weight.T
        return y if self._bias is None else y + self._bias


class Norm:
    """RMSNorm; without a weight, none is applied."""

    def __init__(self, weight: mx.array | None, eps: float) -> None:
        self._weight, self._eps = weight, eps

    def __call__(self, x: mx.array) -> mx.array:
        """The same shape."""
        return mx.fast.rms_norm(x, self._weight, self._eps)


def _compute_type(stored: set[mx.Dtype]) -> mx.Dtype:
    """As stored on a GPU, but never in float16, which the residual streams of large models overflow. A CPU computes
    bfloat16 slowly."""
    if on_cpu() or mx.bfloat16 not in stored:
        return mx.float32
    return mx.bfloat16


def silu_gated(gate: mx.array, up: mx.array) -> mx.array:
    """SwiGLU's product."""
    return nn.silu(gate) * up  # type: ignore[no-any-return]


def gelu_gated(gate: mx.array, up: mx.array) -> mx.array:
    """Gemma's product, with the tanh form of GELU."""
    return nn.gelu_approx(gate) * up  # type: ignore[no-any-return]
