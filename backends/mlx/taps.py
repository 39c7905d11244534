"""Hidden states of a network's layers, read without copying its model file.

A tap j >= 0 is the output of layer j, before any final norm; EMBEDDING is what enters layer 0, FINAL the last hidden
state behind the final norm: what the target's own output matrix reads. A pass fills a `Record` where one is asked for;
otherwise, and where no head is loaded, nothing is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from localspec.errors import UnsupportedModelError

from .cache import Pass
from .grafts import FINAL, inner_attribute

__all__ = ["EMBEDDING", "FINAL", "Record", "Tap", "Taps"]

EMBEDDING = -1

Record: TypeAlias = dict[int, mx.array]
"""Tap -> [B, T, hidden] of one pass, or [T, hidden] of one sequence's part of it."""


class Tap(nn.Module):
    """A layer whose output is recorded; of layer 0 the input, too."""

    def __init__(self, inner: nn.Module, index: int, current: Pass) -> None:
        super().__init__()
        self.inner = inner
        self._index, self._current = index, current

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives."""
        out = self["inner"](*args, **kwargs)
        record = self._current.record
        if record is not None:
            record[self._index] = out[0] if isinstance(out, tuple) else out
            if self._index == 0:
                record[EMBEDDING] = args[0] if args else next(iter(kwargs.values()))
        return out

    def __getattr__(self, name: str) -> Any:
        """Models read settings of their layers."""
        return inner_attribute(self, name)


class Taps:
    """Which layers of a module are recorded; several heads may want the same."""

    def __init__(self, module: nn.Module, current: Pass) -> None:
        self._module: Any = module
        self._current = current
        self._wanted: Counter[int] = Counter()

    @property
    def num_layers(self) -> int:
        """Layers that can be named."""
        return len(self._module.layers)

    def add(self, taps: Iterable[int]) -> None:
        """Record these from now on. Raises UnsupportedModelError where a model's layers cannot be wrapped."""
        taps = list(taps)
        for tap in taps:
            if not self._wanted[tap] and tap != FINAL:
                self._wrap(max(tap, 0))
        self._wanted.update(taps)

    def remove(self, taps: Iterable[int]) -> None:
        """The opposite of `add`, once for each time."""
        self._wanted.subtract(taps)
        self._wanted = +self._wanted
        needed = {max(tap, 0) for tap in self._wanted if tap != FINAL}
        for index in range(self.num_layers):
            layer = self._module.layers[index]
            if isinstance(layer, Tap) and index not in needed:
                self._put(layer, layer.inner)

    def of(self, record: Record, rows: Any) -> Record:
        """What is wanted of a pass, for one sequence: `rows` picks its part of [B, T, hidden]."""
        return {tap: record[tap][rows] for tap in self._wanted}

    def _wrap(self, index: int) -> None:
        layers = getattr(self._module, "layers", None)
        if layers is None or not 0 <= index < len(layers):
            raise UnsupportedModelError("the target has no such layer to read", got=index)
        if not isinstance(layers[index], Tap):
            self._put(layers[index], Tap(layers[index], index, self._current))

    def _put(self, old: nn.Module, new: nn.Module) -> None:
        """`model.layers` may be made anew for whoever asks, so the list that holds the layer is looked for."""
        found = False
        for module in self._module.modules():
            for children in list(module.values()):
                if isinstance(children, list):
                    for place, child in enumerate(children):
                        if child is old:
                            children[place] = new
                            found = True
        if not found:
            raise UnsupportedModelError("the target's layers are not in a list, so their outputs cannot be read")
