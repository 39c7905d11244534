"""Random JSON schemas of the kind that people write, each with answers of bounded length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

Schema: TypeAlias = dict[str, Any]

_NAMES = (
    "name", "title", "city", "street", "age", "year", "price", "count", "tags", "items", "owner", "email", "status",
    "kind", "color", "size", "score", "notes", "date", "active", "parent", "children", "key", "value", "größe", "a b",
)  # fmt: skip
_WORDS = ("red", "green", "blue", "small", "large", "open", "closed", "yes", "no", "new", "old", "unknown")
_PATTERNS = (r"^[A-Z]{2}-[0-9]{3}$", r"^[a-z]{1,8}$", r"^#[0-9a-f]{6}$", r"^(north|south) [0-9]{1,2}$")
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4")


def random_schemas(count: int, seed: int = 0) -> list[Schema]:
    """Objects of one to four properties, nested up to three deep: strings with lengths, patterns and formats, bounded
    numbers, enumerations, arrays, alternatives, references. The same for the same seed."""
    rng = np.random.default_rng(seed)
    return [_object(rng, 0, shared=True) for _ in range(count)]


def _pick(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _object(rng: np.random.Generator, depth: int, *, shared: bool = False) -> Schema:
    names = rng.permutation(np.array(_NAMES, object))[: int(rng.integers(1, 5 - depth))].tolist()
    properties = {name: _value(rng, depth + 1) for name in names}
    schema: Schema = {"type": "object", "properties": properties}
    if shared and rng.random() < 0.2:
        schema["$defs"] = {"shared": _value(rng, 2)}
        properties[names[-1]] = {"$ref": "#/$defs/shared"}
    required = [name for name in names if rng.random() < 0.8] or names[:1]
    return {**schema, "required": required, "additionalProperties": False}


def _value(rng: np.random.Generator, depth: int) -> Schema:
    makers: list[Callable[[np.random.Generator, int], Schema]] = [_string, _string, _number, _number, _choice, _simple]
    if depth < 3:
        makers += [_array, _alternatives, _object]
    return makers[int(rng.integers(len(makers)))](rng, depth)


def _string(rng: np.random.Generator, _: int) -> Schema:
    kind = rng.random()
    if kind < 0.2:
        return {"type": "string", "pattern": _pick(rng, _PATTERNS)}
    if kind < 0.35:
        return {"type": "string", "format": _pick(rng, _FORMATS)}
    least = int(rng.integers(0, 4))
    return {"type": "string", "minLength": least, "maxLength": least + int(rng.integers(1, 16))}


def _number(rng: np.random.Generator, _: int) -> Schema:
    low = int(rng.integers(-100, 1000))
    high = low + int(rng.integers(0, 5000))
    if rng.random() < 0.7:
        return {"type": "integer", "minimum": low, "maximum": high}
    return {"type": "integer", "exclusiveMinimum": low - 1, "exclusiveMaximum": high + 1}


def _choice(rng: np.random.Generator, _: int) -> Schema:
    if rng.random() < 0.3:
        return {"const": _pick(rng, (*_WORDS, 7, True, None))}
    count = int(rng.integers(1, 5))
    return {"enum": rng.permutation(np.array([*_WORDS, 1, 2.5], object))[:count].tolist()}


def _simple(rng: np.random.Generator, _: int) -> Schema:
    return {"type": _pick(rng, ("boolean", "null", ["boolean", "null"]))}


def _array(rng: np.random.Generator, depth: int) -> Schema:
    least = int(rng.integers(0, 3))
    most = least + int(rng.integers(0, 3))
    return {"type": "array", "items": _value(rng, depth + 1), "minItems": least, "maxItems": most}


def _alternatives(rng: np.random.Generator, depth: int) -> Schema:
    return {"anyOf": [_value(rng, depth + 1), _value(rng, depth + 1)]}
