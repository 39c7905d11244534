"""Heads over pairs of hidden states and tokens in slow numpy, one pair at a time and nothing kept between rows.

    row = guess_row(Eagle3Reference(config, weights, ends), taps, tokens, [anchor, 17, 4])

The definition that a backend's networks are compared with: `Eagle3Reference` and `MtpReference` say what one pair
does, `guess_row` in which order pairs come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TargetEnds:
    """A target's embedding [V, hidden] and output matrix [V, hidden]."""

    embedding: Array
    output: Array


@dataclass(slots=True)
class Seen:
    """Keys and values [heads, head size] of the pairs so far, in the one layer of such heads."""

    keys: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)


class PairReference(Protocol):
    """What one pair does."""

    def feature(self, taps: Array) -> Array:
        """[E] of the target's hidden states side by side [W]."""
        ...

    def step(self, hidden: Array, token: int, position: int, seen: Seen) -> Array:
        """[E] output of a pair, whose keys and values are added to what was seen."""
        ...

    def fed_back(self, output: Array) -> Array:
        """[E] what stands for the hidden state of the pair behind."""
        ...

    def logits(self, output: Array) -> Array:
        """[V]; -inf for a token that the head cannot guess."""
        ...


def guess_row(head: PairReference, taps: Array, tokens: Sequence[int], path: Sequence[int]) -> Array:
    """[V] what may follow a path that begins with the anchor, behind committed tokens [n] with taps [n, W]."""
    seen = Seen()
    output = np.zeros(0)
    for position, token in enumerate([*tokens[1:], path[0]]):
        output = head.step(head.feature(taps[position]), token, position, seen)
    for position, token in enumerate(path[1:], start=len(tokens)):
        output = head.step(head.fed_back(output), token, position, seen)
    return head.logits(output)


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, NDArray[Any]]:
    """Random weights of these shapes; norms are near 1, embeddings and projections keep sizes as they are."""
    rng = np.random.default_rng((seed, 0))
    weights: dict[str, NDArray[Any]] = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            weights[name] = values * np.float32(0.1) if name.endswith("bias") else 1 + values * np.float32(0.1)
        else:
            weights[name] = values * np.float32(2.0 if "lm_head" in name else 1.0) / np.float32(shape[-1] ** 0.5)
    return weights


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x over its root mean square, times the weight."""
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight)


def silu(x: Array) -> Array:
    """x times its logistic function."""
    return np.asarray(x / (1.0 + np.exp(-x)))


def softmax(x: Array) -> Array:
    """Over the last axis."""
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def rotated(x: Array, position: int, frequencies: Array) -> Array:
    """[heads, size] with dimension i turned together with i + half, half the number of frequencies' doubles; whatever
    is behind them stays."""
    half = len(frequencies)
    cos, sin = np.cos(position * frequencies), np.sin(position * frequencies)
    first, second, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos, rest], axis=1)


def frequencies_of(size: int, base: float, scaling: dict[str, Any] | None) -> Array:
    """[size / 2] turns per position; scaling linear, or llama3 as Llama 3.1 defines it."""
    plain = base ** (-np.arange(0, size, 2) / size)
    if scaling is None:
        return plain
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return np.asarray(plain / factor)
    assert scaling["rope_type"] == "llama3"
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * np.pi)  # within the context trained first
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(plain * (smooth + (1.0 - smooth) / factor))


def attended(query: Array, keys: Sequence[Array], values: Sequence[Array]) -> Array:
    """[heads, size] of queries [heads, size] over what was seen; heads share keys in equal groups."""
    group = len(query) // len(keys[0])
    stacked_keys = np.repeat(np.stack(keys), group, axis=1)  # [pairs, heads, size]
    stacked_values = np.repeat(np.stack(values), group, axis=1)
    weights = softmax(np.einsum("hd,phd->hp", query, stacked_keys) / np.sqrt(query.shape[1]))
    return np.asarray(np.einsum("hp,phd->hd", weights, stacked_values))
