"""Scores and tokens on the device, and the count of how often the host waited for it."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

import mlx.core as mx
import numpy as np

from localspec import noise
from localspec.types import Logits, NoiseKeys, TokenIds

from .border import translated
from .device import is_cuda


class Ledger:
    """The tokens that are still on the device, in the order in which they were made.

    Work on the device runs in order, so whoever waits for one token can have all earlier ones for
    nothing: one wait fetches them together. `num_syncs` counts the waits.
    """

    def __init__(self) -> None:
        self.num_syncs = 0
        self._num_made = 0
        self._pending: WeakSet[DeviceTokens] = WeakSet()

    def tokens(self, array: mx.array) -> DeviceTokens:
        """[T] tokens from an array of ids."""
        self._num_made += 1
        made = DeviceTokens(array.astype(mx.int32), self, self._num_made)
        self._pending.add(made)
        return made

    def fetch(self, *arrays: mx.array, order: int | None = None) -> None:
        """Wait once, for `arrays` and all tokens made up to `order` (None: up to now)."""
        limit = self._num_made if order is None else order
        earlier = [token for token in self._pending if token.order <= limit]
        self.num_syncs += 1
        with translated("computing"):
            mx.eval(*arrays, *(token.array for token in earlier))
        for token in earlier:
            token.settle()
            self._pending.discard(token)


class DeviceTokens:
    """[T] token ids on the device; `numpy` waits for them unless an earlier wait brought them along."""

    __slots__ = ("__weakref__", "_ids", "_ledger", "array", "order")

    def __init__(self, array: mx.array, ledger: Ledger, order: int) -> None:
        self.array = array
        self.order = order
        self._ledger = ledger
        self._ids: TokenIds | None = None

    def __len__(self) -> int:
        return int(self.array.shape[0])

    def settle(self) -> None:
        """Copy the computed ids to the host."""
        self._ids = np.array(self.array, np.int32)

    def numpy(self) -> TokenIds:
        """[T] the ids."""
        if self._ids is None:
            self._ledger.fetch(self.array, order=self.order)
        if self._ids is None:
            self.settle()
        assert self._ids is not None
        return self._ids


class DeviceTop:
    """The best tokens of N rows on the device."""

    def __init__(self, ids: mx.array, values: mx.array, ledger: Ledger) -> None:
        self.tokens = ledger.tokens(ids.reshape(-1))
        self._values, self._ledger = values, ledger

    def numpy(self) -> tuple[TokenIds, Logits]:
        """([N, k] ids, [N, k] what they were ranked by). Waits once for both."""
        self._ledger.fetch(self._values)
        values = np.array(self._values)
        return self.tokens.numpy().reshape(values.shape), values


class DeviceScores:
    """Logits [N, V] on the device. Never stale: arrays are values in MLX, so a later pass makes new ones."""

    def __init__(self, logits: mx.array, ledger: Ledger) -> None:
        self._logits = logits
        self._ledger = ledger

    @property
    def num_rows(self) -> int:
        """N."""
        return int(self._logits.shape[0])

    def _float32(self) -> mx.array:
        return self._logits.astype(mx.float32)

    def argmax(self) -> DeviceTokens:
        """[N] best token of each row. Does not wait."""
        if not self.num_rows:
            return self._ledger.tokens(mx.zeros(0, mx.int32))
        return self._ledger.tokens(mx.argmax(self._logits, axis=-1))

    def winners(self, temperature: float, keys: NoiseKeys) -> DeviceTokens:
        """[N] sampled token of each row. Does not wait. Raises ValueError unless temperature > 0."""
        if not temperature > 0.0:
            raise ValueError(f"winners needs a temperature above 0, not {temperature}")
        if len(keys) != self.num_rows:
            raise ValueError(f"{len(keys)} keys for {self.num_rows} rows")
        if not self.num_rows:
            return self.argmax()
        inverse = mx.array(1.0 / temperature, mx.float32)
        best = _noisy_best if is_cuda() else _fused_noisy_best
        return self._ledger.tokens(best(self._logits, mx.array(np.ascontiguousarray(keys, np.uint32)), inverse))

    def top(self, k: int, temperature: float = 0.0, keys: NoiseKeys | None = None) -> DeviceTop:
        """The k best tokens of each row, by logit or by logit over temperature plus noise. Does not wait."""
        ranked = self._float32()
        if temperature > 0.0:
            ranked = ranked * mx.array(1.0 / temperature, mx.float32)
        if temperature > 0.0:
            if keys is None or len(keys) != self.num_rows:
                raise ValueError(f"top needs keys for {self.num_rows} rows")
            ranked = ranked + gumbel(mx.array(np.ascontiguousarray(keys, np.uint32)), ranked.shape[-1])
        ids = _best(ranked, min(k, ranked.shape[-1]))
        return DeviceTop(ids, mx.take_along_axis(ranked, ids, axis=-1), self._ledger)

    def rows(self, indices: Sequence[int]) -> Logits:
        """[len(indices), V] on the host. Waits."""
        wanted = list(indices)
        if not wanted:
            return np.zeros((0, self._logits.shape[-1]), np.float32)
        whole = wanted == list(range(self.num_rows))
        logits = self._float32() if whole else mx.take(self._logits, mx.array(wanted), axis=0).astype(mx.float32)
        self._ledger.fetch(logits)
        return np.asarray(logits)


def _best(ranked: mx.array, k: int) -> mx.array:
    """[N, k] indices of the k largest of each row, best first; ties in any order."""
    num_rows, size = ranked.shape
    if not num_rows or not k:
        return mx.zeros((num_rows, k), mx.int32)
    ids = (
        mx.argpartition(-ranked, kth=k - 1, axis=-1)[:, :k]
        if k < size
        else mx.broadcast_to(mx.arange(size), ranked.shape)
    )
    order = mx.argsort(-mx.take_along_axis(ranked, ids, axis=-1), axis=-1)
    return mx.take_along_axis(ids, order, axis=-1).astype(mx.int32)


# ---------------------------------------------------------------- noise, as `localspec.noise` defines it


def _mix(x: mx.array) -> mx.array:
    """32-bit arithmetic wraps on the device as it does in numpy."""
    x = x ^ (x >> _U16)
    x = x * _MIX_1
    x = x ^ (x >> _U15)
    x = x * _MIX_2
    return x ^ (x >> _U16)


def noise_bits(keys: mx.array, numbers: mx.array) -> mx.array:
    """[N, K] uint32: `noise.bits` of each key [N, 2] and every number [K] (uint32)."""
    spread = numbers * _GOLDEN
    low, high = keys[:, 0:1], keys[:, 1:2]
    return _mix(_mix(spread[None] ^ low) + high)


def _exponential(words: mx.array) -> mx.array:
    """Exp(1) draws."""
    return -mx.log1p(-mx.minimum(words.astype(mx.float32) * 2.0**-32 + 2.0**-33, 1.0 - 2.0**-24))


def gumbel(keys: mx.array, num_tokens: int) -> mx.array:
    """[N, V] float32 Gumbel noise of each key [N, 2] and every token."""
    rows = keys.shape[0]
    blocks = -(-num_tokens // noise.BLOCK)
    tokens = mx.arange(blocks * noise.BLOCK, dtype=mx.uint32)
    groups = mx.arange(blocks * noise.STRIDE, dtype=mx.uint32)
    least = _exponential(noise_bits(keys, groups | _LEAST)) * (1.0 / noise.GROUP)
    holder = noise_bits(keys, groups | _HOLDER) >> _u32(26)
    shape = (rows, blocks, 1, noise.STRIDE)
    members = mx.arange(noise.GROUP, dtype=mx.uint32).reshape(1, 1, noise.GROUP, 1)
    rest = _exponential(noise_bits(keys, tokens)).reshape(rows, blocks, noise.GROUP, noise.STRIDE)
    draws = least.reshape(shape) + mx.where(holder.reshape(shape) == members, 0.0, rest)
    return -mx.log(draws.reshape(rows, -1)[:, :num_tokens])


def _noisy_best(logits: mx.array, keys: mx.array, inverse: mx.array) -> mx.array:
    """[N] argmax of logits * inverse + noise."""
    return mx.argmax(logits.astype(mx.float32) * inverse + gumbel(keys, logits.shape[-1]), axis=-1)


_fused_noisy_best = mx.compile(_noisy_best)
"""The same as a few fused kernels. Not on CUDA, where building them takes 47 s at first use, and 10 s for another
number of rows, to save 0.3 ms (mlx 0.32.4 on an H100)."""


def _u32(value: int) -> mx.array:
    return mx.array(value, mx.uint32)


_U15, _U16, _GOLDEN, _MIX_1, _MIX_2 = (_u32(v) for v in (15, 16, 0x9E3779B9, 0x7FEB352D, 0x846CA68B))
_LEAST, _HOLDER = _u32(noise.LEAST), _u32(noise.HOLDER)
