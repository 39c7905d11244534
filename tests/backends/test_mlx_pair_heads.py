"""Networks of heads on MLX against numpy: every layout, chains and trees, and whatever is done to their memory."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from localspec.formats.eagle3 import eagle3_config
from localspec.formats.head import read_head_header
from localspec.loading import get_backend
from localspec.testing import mtp
from localspec.testing.eagle3 import LAYOUTS, Eagle3Reference, write_eagle3
from localspec.testing.medusa import medusa_rows, write_medusa
from localspec.testing.pair_heads import PairReference, TargetEnds, guess_row
from localspec.testing.reference import random_tree

BACKEND = get_backend("mlx")
pytestmark = pytest.mark.skipif(not BACKEND.is_installed(), reason='needs MLX: pip install "localspec[mlx-cpu]"')

WIDTH, NUM_LAYERS, VOCAB = 64, 8, 90
TOLERANCE = 1e-4


def module(name: str) -> Any:
    """A module of the backend, which is loaded under a name of the core's choosing."""
    return import_module(f"{type(BACKEND).__module__.rpartition('.')[0]}.{name}")


class Ends:
    """`heads.borrowed.Borrowed` of random matrices."""

    hidden_size, vocab_size = WIDTH, VOCAB

    def __init__(self, seed: int) -> None:
        import mlx.core as mx

        rng = np.random.default_rng(seed)
        parts = [rng.standard_normal((VOCAB, WIDTH)).astype(np.float32) * 0.2 for _ in range(2)]
        self._embedding, self._output = (mx.array(part) for part in parts)
        self.reference = TargetEnds(*(part.astype(np.float64) for part in parts))

    def embed(self, ids: Any) -> Any:
        return self._embedding[ids]

    def score(self, hidden: Any) -> Any:
        return hidden @ self._output.T


class Beside:
    """A state on MLX and what it should hold, driven alike."""

    def __init__(self, network: Any, reference: PairReference, num_taps: int, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.reference = reference
        self.width = num_taps * WIDTH
        self.state = module("heads.pairs").PairMemory(None, range(num_taps), network)
        self.tokens: list[int] = []
        self.taps: NDArray[np.float64] = np.zeros((0, self.width))

    def use_blocks(self) -> None:
        self.state._network.current.blocks = True

    def copy(self) -> Beside:
        other = object.__new__(Beside)
        vars(other).update(vars(self))
        other.state, other.tokens = self.state.copy(), list(self.tokens)
        return other

    def feed(self, count: int) -> None:
        import mlx.core as mx

        tokens = self.rng.integers(0, VOCAB, count)
        taps = self.rng.standard_normal((count, self.width)).astype(np.float32)
        self.state.feed(mx.array(tokens.astype(np.int32)), mx.array(taps), len(self.tokens))
        self.tokens += tokens.tolist()
        self.taps = np.concatenate([self.taps, taps.astype(np.float64)])

    def truncate(self, length: int) -> None:
        self.state.truncate(length)
        self.tokens, self.taps = self.tokens[:length], self.taps[:length]

    def check(self, parents: Sequence[int], level: int = 3) -> None:
        """Guess a tree, `level` nodes at a time, and compare every row."""
        import mlx.core as mx

        anchor, *guesses = self.rng.integers(0, VOCAB, len(parents) + 1).tolist()
        self._compare(self.state.start(anchor)[0], [anchor])
        for first in range(0, len(parents), level):
            chosen = guesses[first : first + level]
            rows = self.state.extend(mx.array(chosen, mx.int32), parents[first : first + level])
            for row, node in zip(rows, range(first, len(parents)), strict=False):
                path = [node]
                while parents[path[0]] >= 0:
                    path.insert(0, parents[path[0]])
                self._compare(row, [anchor, *(guesses[step] for step in path)])

    def _compare(self, row: Any, path: list[int]) -> None:
        expected = guess_row(self.reference, self.taps, self.tokens, path)
        np.testing.assert_allclose(np.array(row, np.float64), expected, rtol=0, atol=TOLERANCE)


def levels_of(rng: np.random.Generator, num_nodes: int) -> list[int]:
    """Parents of a random tree whose nodes may be fed three at a time: none is the parent of another of its three."""
    parents = random_tree(rng, num_nodes).tolist()
    return [min(parent, node - node % 3 - 1) for node, parent in enumerate(parents)]


def loaded(folder: Path) -> dict[str, Any]:
    import mlx.core as mx

    return cast("dict[str, Any]", mx.load(str(folder / "model.safetensors")))


def eagle3(folder: Path, layout: str, seed: int = 0, **options: Any) -> Beside:
    written, weights = write_eagle3(folder, layout, target=(WIDTH, NUM_LAYERS, VOCAB), seed=seed, **options)
    config = eagle3_config(written, {name: value.shape for name, value in weights.items()})
    ends = Ends(seed)
    network = module("heads.eagle3").Eagle3(config, loaded(folder), ends)
    return Beside(network, Eagle3Reference(written, weights, ends.reference), config.num_taps, seed)


def mtp_layer(folder: Path, layout: str) -> Beside:
    _, weights = mtp.write_mtp(folder, layout, target=(WIDTH, NUM_LAYERS, VOCAB))
    return read_mtp_layer(folder, layout, weights)


def read_mtp_layer(folder: Path, layout: str, weights: dict[str, Any]) -> Beside:
    """The layer in a folder beside the numpy form of its weights."""
    header = read_head_header(folder)
    assert header is not None and header.kind == "mtp" and header.taps == (-2,)
    ends = Ends(3)
    config: Any = header.details
    tensors = {name: value for name, value in loaded(folder).items() if name in config.tensors}
    network = module("heads.mtp").Mtp(config, tensors, ends)
    assert len(network.notes) == layout.startswith("qwen")
    return Beside(network, mtp.MtpReference(layout, NUM_LAYERS, weights, ends.reference), 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("draft_vocab", [0, 40])
def test_eagle3_rows_are_those_of_numpy(tmp_path: Path, layout: str, draft_vocab: int) -> None:
    """Over rounds: chains, trees, accepted tokens, tokens taken back, and copies that go their own way."""
    check_rounds(eagle3(tmp_path, layout, draft_vocab=draft_vocab))


@pytest.mark.parametrize("layout", mtp.LAYOUTS)
def test_mtp_rows_are_those_of_numpy(tmp_path: Path, layout: str) -> None:
    """The same of multi-token prediction."""
    check_rounds(mtp_layer(tmp_path, layout))


@pytest.mark.parametrize(
    "options", [{}, {"num_blocks": 2}, {"own_head": False}, {"prefix": "medusa_head.", "num_heads": 5}], ids=str
)
def test_medusa_rows_are_those_of_numpy(tmp_path: Path, options: dict[str, Any]) -> None:
    import mlx.core as mx

    weights = write_medusa(tmp_path, target=(WIDTH, NUM_LAYERS, VOCAB), **options)
    header = read_head_header(tmp_path)
    assert header is not None and header.kind == "medusa"
    config: Any = header.details
    assert config.num_heads == options.get("num_heads", 4)
    ends = Ends(4)
    tensors = {name: value for name, value in loaded(tmp_path).items() if name in config.tensors}
    network = module("heads.medusa").MedusaNetwork(config, tensors, ends)
    hidden = np.random.default_rng(1).standard_normal((1, WIDTH)).astype(np.float32)
    expected = medusa_rows(weights, ends.reference, hidden[0].astype(np.float64))
    np.testing.assert_allclose(np.array(network.rows(mx.array(hidden)), np.float64), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layout", ["eagle3", "qwen3_5", "deepseek_v3"])
def test_rows_are_the_same_where_attention_is_given_whole_blocks(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where a kernel is built for a number of cells, or attention is done in separate operations."""
    monkeypatch.setattr(module("heads.attention"), "builds_attention", lambda: True)
    beside = eagle3(tmp_path, "eagle") if layout == "eagle3" else mtp_layer(tmp_path, layout)
    beside.use_blocks()
    check_rounds(beside)


def test_quantised_layers_are_read(tmp_path: Path) -> None:
    """As mlx-lm packs them, some tensors and not others."""
    import mlx.core as mx

    _, weights = mtp.write_mtp(tmp_path, "qwen3_5", target=(WIDTH, NUM_LAYERS, VOCAB))
    stored: dict[str, Any] = {}
    for name, value in weights.items():
        stored[name] = mx.array(value)
        if value.ndim == 2 and value.shape[1] % 32 == 0 and "fc" not in name:
            packed, scales, biases = mx.quantize(stored[name], group_size=32, bits=4)
            stem = name.removesuffix("weight")
            stored |= {name: packed, f"{stem}scales": scales, f"{stem}biases": biases}
            weights[name] = np.array(mx.dequantize(packed, scales, biases, group_size=32, bits=4))
    assert "mtp.layers.0.self_attn.q_proj.scales" in stored
    mx.save_safetensors(str(tmp_path / "model.safetensors"), stored)
    check_rounds(read_mtp_layer(tmp_path, "qwen3_5", weights))


def check_rounds(beside: Beside) -> None:
    beside.feed(21)
    beside.check([-1, 0, 1, 2], level=1)
    beside.feed(3)
    beside.check(levels_of(beside.rng, 9))
    other = beside.copy()
    other.truncate(7)
    other.check([-1, -1, -1])
    other.feed(40)
    other.check([-1, 0], level=1)
    beside.truncate(23)
    beside.check([-1, 0], level=1)
    beside.feed(1)
    beside.check([-1, -1, -1, 0, 2, 1])
