"""Randomness as a function of (seed, purpose, position, token): no state, no order, no generator.

Two draws are equal exactly when the four are equal, so a token sampled at a position is the same
whether it was reached by plain decoding, by a chain or by a tree, and a drafter can guess with the
target's own noise. The integer part is defined here bit by bit, so that a device may compute it:

    key(seed, purpose, position)  64 bits: SplitMix64's finaliser over the three, in turn
    bits(key, v)                  32 bits: mix(mix(v * 0x9E3779B9 ^ low) + high), all modulo 2^32
    mix(x)                        x ^= x>>16; x *= 0x7FEB352D; x ^= x>>15; x *= 0x846CA68B; x ^= x>>16
    w  = (bits + 1/2) / 2^32      in (0, 1), at most 1 - 2^-24
    E  = -log1p(-w)               Exp(1): small values, the ones that win, keep full precision
    g  = -log(E)                  Gumbel(0, 1)

argmax_v [log p(v) + g(v)] is a draw from p (the Gumbel-max trick).
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from localspec.types import NoiseKeys

_MASK = (1 << 64) - 1
_SPREAD = np.uint32(0x9E3779B9)
CHUNK = 32768
_SPREAD_CHUNK = np.arange(CHUNK, dtype=np.uint32) * _SPREAD
_LARGEST_W = np.float32(1.0 - 2.0**-24)


MAX_GUMBEL = 22.875
"""No draw exceeds this: g <= -log(2^-33) = 22.8738..., rounded up."""


class Purpose(IntEnum):
    """What a draw is for; draws for different purposes are independent."""

    TOKEN = 0  # the walk's token, and coupled guesses of it
    DRAFT = 1  # a drafter's own draw (rejection)
    ACCEPT = 2  # the coin of the ratio test
    RESIDUAL = 3  # the token emitted after a rejection, or after all was accepted


def _finalise(value: int) -> int:
    """SplitMix64's output function."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key(seed: int, purpose: Purpose, position: int) -> tuple[int, int]:
    """(low, high) halves of the key of one position."""
    value = _finalise(_finalise(_finalise(seed & _MASK) ^ int(purpose)) ^ position)
    return value & 0xFFFFFFFF, value >> 32


def keys(seed: int, purpose: Purpose, positions: NDArray[np.integer]) -> NoiseKeys:
    """[N, 2] keys of N positions."""
    return np.array([key(seed, purpose, int(p)) for p in positions], np.uint32).reshape(-1, 2)


def _mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """In place: a bijection of 32-bit integers with low bias."""
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x


def bits(low_high: tuple[int, int], tokens: NDArray[np.integer]) -> NDArray[np.uint32]:
    """[K] the 32 random bits of each token under one key."""
    return _keyed(low_high, tokens.astype(np.uint32) * _SPREAD)


def _keyed(low_high: tuple[int, int], x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """In place: tokens times _SPREAD to bits."""
    x ^= np.uint32(low_high[0])
    _mix(x)
    x += np.uint32(low_high[1])
    return _mix(x)


def _scaled(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """[K] w in (0, 1)."""
    w = words.astype(np.float32)
    w *= np.float32(2.0**-32)
    w += np.float32(2.0**-33)
    return np.minimum(w, _LARGEST_W, out=w)


def small_uniform(low_high: tuple[int, int], start: int, count: int) -> NDArray[np.float32]:
    """[count <= CHUNK] w of the tokens from `start` on: at most their Exp(1) draws, and much cheaper."""
    offset = np.uint32((start * int(_SPREAD)) & 0xFFFFFFFF)
    return _scaled(_keyed(low_high, _SPREAD_CHUNK[:count] + offset))


def gumbel(low_high: tuple[int, int], tokens: NDArray[np.integer]) -> NDArray[np.float32]:
    """[K] Gumbel(0, 1) draws."""
    draws = _scaled(bits(low_high, tokens))
    np.negative(draws, out=draws)
    np.log1p(draws, out=draws)
    np.negative(draws, out=draws)
    np.log(draws, out=draws)
    return np.negative(draws, out=draws)


def uniform(seed: int, purpose: Purpose, position: int, index: int = 0) -> float:
    """One draw from (0, 1) with 53 bits; `index` tells several draws at one position apart."""
    low, high = key(seed, purpose, position)
    word = _finalise(((high << 32) | low) ^ _finalise(index))
    return ((word >> 11) + 0.5) * 2.0**-53
