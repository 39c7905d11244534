"""Settings and tensor shapes of a head's files, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from localspec.errors import HeadFileError

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape."""

_MAX_SAID = 80
_BUFFERS = ("rotary_emb.inv_freq",)  # what trainers save along and nobody reads


class Fields:
    """Settings below one prefix of a config.json. Every method raises HeadFileError, naming the key."""

    def __init__(self, values: Mapping[str, Any], prefix: str) -> None:
        self._values = values
        self._prefix = prefix

    def get(self, key: str) -> Any:
        """As it stands; None where it is missing."""
        return self._values.get(key)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """Settings of their own; must be there."""
        value = self._values.get(key)
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return value

    def inner(self, key: str) -> Fields:
        """Settings of their own; empty where they are missing."""
        return Fields(self.mapping(key) if self.get(key) is not None else {}, f"{self._prefix}{key}.")

    def number(self, key: str, default: float | None = None) -> float:
        """A number; without a default it must be there."""
        value = default if self.get(key) is None else self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, "a number")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number below 2^31, above 0 unless it is the default."""
        value = self.number(key, default)
        if self.get(key) is not None and (value != int(value) or not 0 < value < 2**31):
            raise self._wrong(key, value, "a positive integer")
        return int(value)

    def flag(self, key: str) -> bool:
        """True or false; false where it is missing."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return bool(value)

    def integers(self, key: str) -> tuple[int, ...] | None:
        """A list of whole numbers, at least one; None where it is missing."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not value or not all(type(item) is int for item in value):
            raise self._wrong(key, value, "a list of layers")
        return tuple(value)

    def one_of(self, key: str, known: Iterable[str]) -> None:
        """The value, or each of a list, must be one of these, if it is there."""
        value = self.get(key)
        names = sorted(known)
        for item in value if isinstance(value, list) else [value]:
            if item is not None and item not in names:
                raise self._wrong(key, item, f"one of {', '.join(names)}")

    def refuse(self, key: str) -> None:
        """The setting must be missing, false or zero."""
        if self.get(key):
            raise HeadFileError(f"{self._prefix}{key} is not known", got=str(self.get(key))[:_MAX_SAID])

    def rope_base(self) -> float:
        """Base of the rotary embedding, wherever transformers of some version writes it."""
        if self.get("rope_theta") is None and isinstance(self.get("rope_parameters"), dict):
            return self.inner("rope_parameters").number("rope_theta", 10000.0)
        return self.number("rope_theta", 10000.0)

    def rope_scaling(self) -> Mapping[str, Any] | None:
        """How wavelengths are stretched: `rope_type` is linear, llama3 or yarn. None: not at all."""
        key = "rope_scaling" if self.get("rope_scaling") is not None else "rope_parameters"
        if self.get(key) is None:
            return None
        scaling = self.inner(key)
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind == "default":
            return None
        if kind not in ("linear", "llama3", "yarn"):  # others turn by more than differences of positions
            raise scaling._wrong("rope_type", kind, "linear, llama3 or yarn")
        scaling.number("factor")
        return {**scaling._values, "rope_type": kind, "type": kind}

    def _wrong(self, key: str, got: object, expected: str) -> HeadFileError:
        return HeadFileError(
            f"config.json: {self._prefix}{key} is wrong or missing", got=str(got)[:_MAX_SAID], expected=expected
        )


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
