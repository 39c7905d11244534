"""What a model remembers of a sequence: rows that can be dropped, and states that can only be put back.

Told apart by the caches' types. Keys and values become `TreeCache`, whatever mlx-lm keeps them in; anything
else depends on the path by which it was reached, stays mlx-lm's own object, and is rewound by a snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList, ChunkedKVCache, KVCache, QuantizedKVCache, RotatingKVCache

from localspec.errors import UnsupportedModelError

from .cache import Pass, TreeCache

Snapshot = list[dict[str, Any]]
"""Everything that path-dependent caches hold, in the order of `states_in`."""


def planned(cache: Any, current: Pass) -> Any:
    """What stands in for one of the caches that a model asks for. Raises UnsupportedModelError."""
    kind = type(cache)
    if kind is KVCache or kind is ChunkedKVCache:
        return TreeCache(current)
    if kind is RotatingKVCache and cache.keep == 0:
        return TreeCache(current, cache.max_size)
    if kind is CacheList:
        return CacheList(*(planned(part, current) for part in cache.caches))
    if issubclass(kind, (KVCache, RotatingKVCache, QuantizedKVCache)):
        raise UnsupportedModelError(
            "the mlx backend cannot rewind this model's memory",
            got=kind.__name__,
            expected="plain, sliding or chunked keys and values, or recurrent states",
            fix="Try the llamacpp backend.",
        )
    return cache


def copied(cache: Any) -> Any:
    """An independent cache that holds the same; shares memory until either is written to."""
    if isinstance(cache, TreeCache):
        return cache.copy()
    if isinstance(cache, CacheList):
        return CacheList(*(copied(part) for part in cache.caches))
    other = object.__new__(type(cache))
    vars(other).update(_frozen(vars(cache)))
    return other


def rows_in(caches: Iterable[Any]) -> Iterator[TreeCache]:
    """The caches that can drop rows."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from rows_in(cache.caches)
        elif isinstance(cache, TreeCache):
            yield cache


def states_in(caches: Iterable[Any]) -> Iterator[Any]:
    """The caches that depend on the path."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from states_in(cache.caches)
        elif not isinstance(cache, TreeCache):
            yield cache


def snapshot(states: Iterable[Any]) -> Snapshot:
    """What path-dependent caches hold now. Costs nothing: arrays are values in MLX."""
    return [_frozen(vars(state)) for state in states]


def restore(states: Iterable[Any], taken: Snapshot) -> None:
    """Put a snapshot back; it can be put back again."""
    for state, held in zip(states, taken, strict=True):
        vars(state).clear()
        vars(state).update(_frozen(held))


def arrays_in(value: Any) -> Iterator[mx.array]:
    """All arrays inside."""
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from arrays_in(item)
    elif isinstance(value, dict):
        yield from arrays_in(list(value.values()))


def _frozen(value: Any) -> Any:
    """The same, in containers and array handles of its own: `a[...] = b` writes to a handle."""
    if isinstance(value, mx.array):
        return mx.array(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_frozen(item) for item in value)
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return value
