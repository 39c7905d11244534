"""Settings of a head's config.json, each checked when it is asked for and named when it is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from localspec.errors import HeadFileError

_MAX_SIZE = 2**31 - 1
_MAX_SAID = 80


class HeadSettings:
    """Looks a key up in several objects of the configuration, the first that has it first. None counts as absent."""

    def __init__(self, config: Mapping[str, Any], *nested: str) -> None:
        inner = {name: config.get(name) for name in nested}
        wrong = next((name for name, value in inner.items() if value is not None and not isinstance(value, dict)), None)
        if wrong is not None:
            raise HeadFileError(f"config.json: {wrong} is wrong", got=_said(inner[wrong]), expected="an object")
        self._places: list[tuple[str, Mapping[str, Any]]] = [("", config)]
        self._places += [(f"{name}.", value) for name, value in inner.items() if value is not None]

    def inside(self, name: str) -> HeadSettings:
        """Settings of one nested object alone. Raises HeadFileError where there is none."""
        for where, place in self._places:
            value = place.get(name)
            if isinstance(value, dict):
                other = HeadSettings({})
                other._places = [(f"{where}{name}.", value)]
                return other
        raise HeadFileError(f"config.json: {name} is missing", expected="an object")

    def find(self, key: str) -> tuple[str, Any]:
        """(the key with where it stands, its value); the value None where it is nowhere."""
        for where, place in self._places:
            if place.get(key) is not None:
                return where + key, place[key]
        return key, None

    def get(self, key: str) -> Any:
        """The value as it is, None where it is nowhere."""
        return self.find(key)[1]

    def size(self, key: str, default: int | None = None, *, least: int = 0, most: int = _MAX_SIZE) -> int:
        """An integer from `least` to `most`."""
        name, value = self.find(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value <= most:
            raise _wrong(name, value, f"{least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        name, value = self.find(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value):
            raise _wrong(name, value, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        name, value = self.find(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise _wrong(name, value, "true or false")
        return value

    def word(self, key: str, known: Sequence[str], default: str | None = None) -> str:
        """One of several words."""
        name, value = self.find(key)
        if value is None and default is not None:
            return default
        if value not in known:
            raise _wrong(name, value, f"one of {', '.join(known)}")
        return str(value)

    def integers(self, key: str) -> tuple[int, ...] | None:
        """A list of integers, None where it is nowhere."""
        name, value = self.find(key)
        if value is None:
            return None
        if (
            not isinstance(value, list)
            or not value
            or len(value) > 1024
            or any(type(item) is not int for item in value)
        ):
            raise _wrong(name, value, "a list of integers")
        return tuple(value)


def check_architecture(config: Mapping[str, Any], known: Sequence[str]) -> str:
    """The one entry of `architectures`. Raises HeadFileError naming one that is not known."""
    said = config.get("architectures")
    first = said[0] if isinstance(said, list) and len(said) == 1 else said
    if first not in known:
        raise _wrong("architectures", said, f"one of {', '.join(known)}")
    return str(first)


def _wrong(name: str, value: object, expected: str) -> HeadFileError:
    if value is None:
        return HeadFileError(f"config.json: {name} is missing", expected=expected)
    return HeadFileError(f"config.json: {name} is not known or out of range", got=_said(value), expected=expected)


def _said(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MAX_SAID else text[:_MAX_SAID] + "..."
