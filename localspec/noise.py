"""Randomness as a function of (seed, purpose, position, token): no state, no order, no generator.

Two draws are equal exactly when the four are equal, so a token sampled at a position is the same
whether it was reached by plain decoding, by a chain or by a tree, and a drafter can guess with the
target's own noise. The integer part is defined here bit by bit, so that a device may compute it:

    key(seed, purpose, position)  64 bits: SplitMix64's finaliser over the three, in turn
    bits(key, v)                  32 bits: mix(mix(v * 0x9E3779B9 ^ low) + high), all modulo 2^32
    mix(x)                        x ^= x>>16; x *= 0x7FEB352D; x ^= x>>15; x *= 0x846CA68B; x ^= x>>16
    w(word)                       (word + 1/2) / 2^32, in (0, 1), at most 1 - 2^-24
    exp(word)                     -log1p(-w(word)), Exp(1): small values, the ones that win, keep full precision

Tokens stand in groups of 64 (those of a block of 262,144 whose ids agree modulo 4096), and the least draw
of a group is known without the others:

    group(v)   = (v >> 18) * 4096 + (v & 4095)        member(v) = (v >> 12) & 63
    least(c)   = exp(bits(key, 2^31 + c)) / 64        Exp(64), as the least of 64 Exp(1) is
    holder(c)  = bits(key, 2^31 + 2^30 + c) >> 26     whose it is: any of the 64 alike
    E(v)       = least(group(v)) + (0 if member(v) is the holder else exp(bits(key, v)))
    g(v)       = -log(E(v))                           Gumbel(0, 1)

The draws of a group are independent Exp(1) all the same: the rest of an exponential draw that is known to
exceed the least one is Exp(1) again. argmax_v [log p(v) + g(v)] is a draw from p (the Gumbel-max trick),
and whoever looks for it need only open groups whose best logit and best noise together could win.
Source of the grouping: ours (top-down sampling of maxima, made a fixed function of the key).
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from localspec.types import NoiseKeys

_MASK = (1 << 64) - 1
# arrays without dimensions: numpy takes them faster than scalars, and most arrays here are short
_SPREAD, _MIX_1, _MIX_2, _15, _16 = (np.array(v, np.uint32) for v in (0x9E3779B9, 0x7FEB352D, 0x846CA68B, 15, 16))
_12, _18, _26, _LOW_6 = (np.array(v, np.uint32) for v in (12, 18, 26, 63))
_UNIT, _HALF, _LARGEST_W, _SHARE = (np.array(v, np.float32) for v in (2.0**-32, 2.0**-33, 1.0 - 2.0**-24, 2.0**-6))

GROUP = 64
"""Tokens in a group."""
STRIDE = 4096
"""Distance of neighbours in a group; `GROUP * STRIDE` ids are a block with `STRIDE` groups."""
BLOCK = GROUP * STRIDE

MAX_GUMBEL = 27.04
"""No draw exceeds this: g <= -log(2^-33 / 64) = 27.03..., rounded up."""

LEAST = 1 << 31
"""Group numbers above this give the words of least draws ..."""
HOLDER = LEAST + (1 << 30)
"""... and above this those that say whose they are."""
# numbers of a token's own word and of its group's two, below each other: bits kept of its id, and bits added
_WORD_MASK = np.array([[(1 << 32) - 1], [STRIDE - 1], [STRIDE - 1]], np.uint32)
_WORD_START = np.array([[0], [LEAST], [HOLDER]], np.uint32)


def _spread_groups(groups: int) -> NDArray[np.uint32]:
    return (np.arange(groups, dtype=np.uint32) | np.uint32(LEAST)) * _SPREAD


_SPREAD_GROUPS = _spread_groups(4096)
_LOG_GROUP = np.float32(np.log(GROUP))


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


@lru_cache(maxsize=256)
def _stream(seed: int, purpose: Purpose) -> int:
    """What the keys of one seed and purpose have in common."""
    return _finalise(_finalise(seed & _MASK) ^ int(purpose))


def key(seed: int, purpose: Purpose, position: int) -> tuple[int, int]:
    """(low, high) halves of the key of one position."""
    value = _finalise(_stream(seed, purpose) ^ position)
    return value & 0xFFFFFFFF, value >> 32


def keys(seed: int, purpose: Purpose, positions: NDArray[np.integer]) -> NoiseKeys:
    """[N, 2] keys of N positions."""
    return np.array([key(seed, purpose, int(p)) for p in positions], np.uint32).reshape(-1, 2)


def _mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """In place: a bijection of 32-bit integers with low bias."""
    x ^= x >> _16
    x *= _MIX_1
    x ^= x >> _15
    x *= _MIX_2
    x ^= x >> _16
    return x


def bits(low_high: tuple[int, int], tokens: NDArray[np.integer]) -> NDArray[np.uint32]:
    """[...] the 32 random bits of each token (or group number, above 2^31) under one key."""
    return _keyed(low_high, tokens.astype(np.uint32) * _SPREAD)


def _keyed(low_high: tuple[int, int], x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """In place: tokens times _SPREAD to bits."""
    x ^= np.array(low_high[0], np.uint32)
    _mix(x)
    x += np.array(low_high[1], np.uint32)
    return _mix(x)


def _scaled(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """w in (0, 1)."""
    w = words.astype(np.float32)
    w *= _UNIT
    w += _HALF
    return np.minimum(w, _LARGEST_W, out=w)


def _exponential(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Exp(1)."""
    draws = _scaled(words)
    np.negative(draws, out=draws)
    np.log1p(draws, out=draws)
    return np.negative(draws, out=draws)


def num_groups(num_tokens: int) -> int:
    """Groups that hold at least one of the tokens 0 to num_tokens - 1, or lie before one that does."""
    blocks, rest = divmod(num_tokens, BLOCK)
    return blocks * STRIDE + min(rest, STRIDE)


def first_of(groups: NDArray[np.intp]) -> NDArray[np.intp]:
    """The lowest token of each group (ascending); the others follow `STRIDE` apart."""
    if not len(groups) or groups[-1] < STRIDE:
        return groups
    return (groups >> 12 << 18) | (groups & 4095)


@lru_cache(maxsize=256)
def ceilings(low_high: tuple[int, int], groups: int) -> NDArray[np.float32]:
    """[groups] what no draw of the group exceeds: at least -log(least), without the costlier logarithm.

    Kept for the last positions: the nodes of a level, a drafter and its target ask for the same ones."""
    x = _SPREAD_GROUPS[:groups] if groups <= len(_SPREAD_GROUPS) else _spread_groups(groups)
    w = _scaled(_keyed(low_high, x.copy()))
    np.log(w, out=w)
    np.subtract(_LOG_GROUP, w, out=w)  # -log1p(-w) >= w
    w.flags.writeable = False
    return w


def gumbel(low_high: tuple[int, int], tokens: NDArray[np.integer]) -> NDArray[np.float32]:
    """[K] Gumbel(0, 1) draws."""
    ids = tokens.astype(np.uint32)
    words = ids & _WORD_MASK
    if len(ids) and ids[ids.argmax()] >= BLOCK:
        words[1:] |= ids >> _18 << _12
    words |= _WORD_START
    words *= _SPREAD
    _keyed(low_high, words)
    draws = _exponential(words[:2])
    others, least = draws
    members = ids >> _12
    members &= _LOW_6
    others[(words[2] >> _26 == members).nonzero()] = 0.0  # the group's least draw is theirs
    least *= _SHARE
    least += others
    np.log(least, out=least)
    result: NDArray[np.float32] = np.negative(least, out=least)
    return result


def uniform(seed: int, purpose: Purpose, position: int, index: int = 0) -> float:
    """One draw from (0, 1) with 53 bits; `index` tells several draws at one position apart."""
    low, high = key(seed, purpose, position)
    word = _finalise(((high << 32) | low) ^ _finalise(index))
    return ((word >> 11) + 0.5) * 2.0**-53
