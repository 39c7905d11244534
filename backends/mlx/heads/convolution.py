"""DFlash 2's short convolution along the slots of a block, whose kernels depend on each slot (z-lab/dflash)."""

from __future__ import annotations

import mlx.core as mx

from .tensors import Weights


class Convolution:
    """Around a sublayer: both kernels of a slot follow from the sublayer's input there. `group` channels share what is
    added to the trained kernel."""

    def __init__(self, weights: Weights, name: str, group: int) -> None:
        self._base = weights.take(f"{name}.base_kernel")  # [2, taps, hidden]
        self._kernels = weights.linear(f"{name}.kernel_projection")
        self._group = group

    def prepare(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """([1, B, hidden] what the sublayer reads, the kernels for `finish`)."""
        _, taps, hidden = self._base.shape
        kernels = self._kernels(x).reshape(*x.shape[:-1], 2, taps, hidden // self._group)
        kernels = mx.repeat(kernels, self._group, axis=-1)
        return self._convolved(x, self._base[0] + kernels[..., 0, :, :]), self._base[1] + kernels[..., 1, :, :]

    def finish(self, x: mx.array, kernels: mx.array) -> mx.array:
        """[1, B, hidden] of what the sublayer gave, before it is added to the residual stream."""
        return self._convolved(x, kernels)

    def _convolved(self, x: mx.array, kernels: mx.array) -> mx.array:
        """Tap t reads t slots before; before the block there are zeros. kernels [1, B, taps, hidden]."""
        size, taps = x.shape[1], kernels.shape[-2]
        padded = mx.pad(x, [(0, 0), (taps - 1, 0), (0, 0)])
        parts = [kernels[..., t, :] * padded[:, taps - 1 - t : taps - 1 - t + size] for t in range(taps)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total
