"""Small modules set into mlx-lm's own, so that its model files stay as they are."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .cache import Pass

_ROPE_NAMES = ("rope", "rotary_emb")
_TABLE_NAMES = ("wpe",)
_BODY_PATHS = (("model",), ("language_model", "model"), ("backbone",), ("transformer",))
FINAL = -2  # in a record: the last hidden state of every row, behind the final norm


class PlacedRope(nn.Module):
    """A rotary embedding that turns each row of a tree by the row's own position.

    mx.fast.rope takes one offset per batch row, so rows are moved to the batch axis for it.
    """

    def __init__(self, inner: Any, current: Pass) -> None:
        super().__init__()
        self.inner = inner
        self._current = current

    def __call__(self, x: mx.array, offset: Any = 0, *args: Any, **kwargs: Any) -> mx.array:
        """[B, H, T, D] turned; `offset` stands where the rows are a chain."""
        positions = self._current.positions
        if positions is None:
            return self["inner"](x, offset, *args, **kwargs)  # type: ignore[no-any-return]
        if positions.ndim == 2:
            return self._turned_together(x, positions, *args, **kwargs)
        if x.ndim != 4 or x.shape[2] != positions.shape[0]:
            raise ValueError(f"cannot place {x.shape} at {positions.shape[0]} positions")
        turned = self["inner"](x.transpose(2, 1, 0, 3), *args, offset=positions, **kwargs)
        return turned.transpose(2, 1, 0, 3)  # type: ignore[no-any-return]

    def _turned_together(self, x: mx.array, positions: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """[B, H, T, D] turned; positions [B, T] of several sequences."""
        if x.ndim != 4 or (x.shape[0], x.shape[2]) != positions.shape:
            raise ValueError(f"cannot place {x.shape} at {positions.shape} positions")
        num, heads, width, size = x.shape
        rows = x.transpose(0, 2, 1, 3).reshape(num * width, heads, 1, size)
        turned = self["inner"](rows, *args, offset=positions.reshape(-1), **kwargs)
        return turned.reshape(num, width, heads, size).transpose(0, 2, 1, 3)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        """Models read settings of the embedding: those of the inner one."""
        return inner_attribute(self, name)


class PlacedTable(nn.Module):
    """A table of learned positions that gives each row of a tree the entry of the row's own position."""

    def __init__(self, inner: Any, current: Pass) -> None:
        super().__init__()
        self.inner = inner
        self._current = current

    def __call__(self, places: mx.array) -> mx.array:
        """[..., T, hidden]; `places` are right where the rows are a chain."""
        positions = self._current.positions
        if positions is not None:
            places = positions if positions.ndim == 2 else mx.broadcast_to(positions, places.shape)
        return self["inner"](places)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        """Models read settings of the table: those of the inner one."""
        return inner_attribute(self, name)


class Body(nn.Module):
    """A model without its output matrix, that hands on only the rows whose logits are wanted."""

    def __init__(self, inner: Any, current: Pass) -> None:
        super().__init__()
        self.inner = inner
        self._current = current

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """[B, R, hidden]."""
        if self._current.hidden is not None:  # only the head's work on it is wanted
            return self._current.hidden
        hidden = self["inner"](*args, **kwargs)
        if self._current.record is not None:
            self._current.record[FINAL] = hidden
        rows = self._current.rows
        return hidden if rows is None else mx.take(hidden, rows, axis=1)

    def __getattr__(self, name: str) -> Any:
        """Heads reach into the body, for tied embeddings."""
        return inner_attribute(self, name)


def inner_attribute(module: nn.Module, name: str) -> Any:
    """An attribute of a module, or of the one that it wraps."""
    try:
        return nn.Module.__getattr__(module, name)
    except AttributeError:
        return getattr(nn.Module.__getattr__(module, "inner"), name)


def place_positions(model: nn.Module, current: Pass) -> None:
    """Wrap every rotary embedding, and every table of positions, that a module calls as a child of its own."""
    for module in model.modules():
        for names, wrapper in ((_ROPE_NAMES, PlacedRope), (_TABLE_NAMES, PlacedTable)):
            for name in names:
                child = module.get(name)
                if isinstance(child, nn.Module) and not isinstance(child, wrapper):
                    module[name] = wrapper(child, current)


def wrap_body(model: nn.Module, current: Pass) -> tuple[nn.Module, str] | None:
    """Wrap the part before the head; (owner, name) to undo it with, or None if it was not found."""
    for *above, name in _BODY_PATHS:
        owner: Any = model
        for step in above:
            owner = owner.get(step) if isinstance(owner, nn.Module) else None
        if isinstance(owner, nn.Module) and isinstance(owner.get(name), nn.Module):
            owner[name] = Body(owner[name], current)
            return owner, name
    return None
