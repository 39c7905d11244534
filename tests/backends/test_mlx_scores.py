"""Noise and scores on MLX's device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from localspec import noise
from localspec.noise import Purpose
from tests.backends.mlx_backend import module, needs_mlx


@needs_mlx
def test_the_device_draws_the_bits_that_noise_defines() -> None:
    """32-bit arithmetic wraps alike, for 10,000 tokens under keys with every bit in use."""
    import mlx.core as mx

    keys = np.concatenate(
        [noise.keys(2**64 - 1, Purpose.TOKEN, np.arange(6)), np.array([[0, 0], [2**32 - 1, 2**32 - 1]], np.uint32)]
    )
    got = np.array(module("scores").noise_bits(mx.array(keys), mx.arange(10_000, dtype=mx.uint32)))
    tokens = np.arange(10_000)
    want = np.array([noise.bits((int(low), int(high)), tokens) for low, high in keys])
    assert got.dtype == np.uint32 and np.array_equal(got, want)


@needs_mlx
def test_the_device_noise_is_gumbel_to_the_last_bits() -> None:
    """Logarithms may round differently; nothing else may."""
    import mlx.core as mx

    keys = noise.keys(11, Purpose.TOKEN, np.arange(2))
    for num_tokens in (10_000, 270_000):  # less than a block of groups, and more
        got = np.array(module("scores").gumbel(mx.array(keys), num_tokens))
        for row, (low, high) in zip(got, keys, strict=True):
            want = noise.gumbel((int(low), int(high)), np.arange(num_tokens))
            np.testing.assert_allclose(row, want, rtol=2e-6, atol=2e-6)


def device_scores(rows: NDArray[np.float32], dtype: str = "float32") -> Any:
    import mlx.core as mx

    return module("scores").DeviceScores(mx.array(rows).astype(getattr(mx, dtype)), module("scores").Ledger())


@needs_mlx
@pytest.mark.parametrize("num_values", [2, 40, 100_000])
def test_argmax_takes_the_lower_id_and_top_the_largest_values(num_values: int) -> None:
    """With 2 values ties reach far beyond the candidates that are fetched first; with 40 they crowd the edge."""
    rng = np.random.default_rng(num_values)
    rows = rng.integers(0, num_values, (3, 5000)).astype(np.float32)
    scores = device_scores(rows)
    assert scores.argmax().numpy().tolist() == rows.argmax(axis=1).tolist()
    for k in (1, 7, 64):
        ids, values = scores.top(k).numpy()
        assert ids.dtype == np.int32 and all(len(set(row)) == k for row in ids.tolist())
        assert np.array_equal(values, -np.sort(-rows, axis=1)[:, :k])
        assert np.array_equal(values, np.take_along_axis(rows, ids, axis=1))


@needs_mlx
def test_scores_of_nothing_are_empty() -> None:
    scores = device_scores(np.zeros((0, 9), np.float32))
    assert (scores.num_rows, len(scores.argmax()), scores.rows(()).shape) == (0, 0, (0, 9))
    assert len(scores.winners(1.0, np.zeros((0, 2), np.uint32)).numpy()) == 0
    assert [part.shape for part in scores.top(3).numpy()] == [(0, 3), (0, 3)]


@needs_mlx
def test_sixteen_bit_logits_are_widened_exactly() -> None:
    rows = np.array([[1.0, 1.0078125, -3.0]], np.float32)
    scores = device_scores(rows, "bfloat16")
    assert np.array_equal(scores.rows((0,)), rows) and scores.argmax().numpy().tolist() == [1]
