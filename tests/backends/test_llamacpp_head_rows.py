"""Trained heads on llama.cpp: rows against plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from backends.llamacpp.block_rows import Confidence, Markov, Selector, SelectorRows
from localspec.formats.head_conversion import write_head_gguf
from localspec.protocols import HostTokens
from localspec.testing.gguf_architectures import write_architecture
from localspec.testing.gguf_heads import BLOCK_KINDS, write_block_head, write_eagle3_head
from tests.backends.llamacpp_backend import BACKEND
from tests.backends.llamacpp_heads import (
    LOOSE,
    Features,
    assert_close,
    chain_behind,
    commit,
    features_of,
    forward,
    ids,
    loaded,
)
from tests.backends.numpy_heads import BlockReference, StepReference

pytestmark = pytest.mark.skipif(not BACKEND.is_installed(), reason="needs llama.cpp: pip install llama-cpp-python")


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("kind", BLOCK_KINDS)
@pytest.mark.parametrize("own_embedding", [True, False])
def test_rows_are_those_of_plain_numpy(kind: str, own_embedding: bool, target_path: Path, tmp_path: Path) -> None:
    """The greedy path, whose bias llama.cpp adds, and a tree of other guesses, whose bias we exchange."""
    path = write_block_head(tmp_path / "head.gguf", target_path, kind=kind, own_embedding=own_embedding)
    reference, text, anchor = BlockReference(path, target_path), ids(21), 40
    with loaded(target_path, path) as (model, head):
        state = model.open()
        guesses = head.open(state)
        commit(model, state, text[:9])
        commit(model, state, text[9:])
        base, hidden = reference.base(features_of(model, head, text), anchor)
        row = guesses.start(anchor).rows([0])
        assert_close(row[0], reference.row(base, hidden, 0, anchor))
        greedy = int(row[0].argmax())
        tree = [(greedy, -1), (77, -1), (greedy, 1), (13, 0), (99, 1)]
        scores = guesses.extend(HostTokens(np.array([t for t, _ in tree[:2]], np.int32)), [-1, -1])
        first = scores.rows([0, 1]).copy()
        for number, (token, _) in enumerate(tree[:2]):
            assert_close(first[number], reference.row(base, hidden, 1, token))
        later = guesses.extend(HostTokens(np.array([t for t, _ in tree[2:]], np.int32)), [p for _, p in tree[2:]])
        for row, (token, _) in zip(later.rows([0, 1, 2]), tree[2:], strict=True):
            assert_close(row, reference.row(base, hidden, 2, token))
        sure = guesses.confidence()
        assert head.info.confident == kind.startswith("dspark") == (sure is not None)
        if sure is not None:
            want = [reference.confidence(hidden, 2, token) for token, _ in tree[2:]]
            assert np.allclose(sure, want, atol=1e-4) and np.ptp(want) > 0.01
        assert head.info.levels == 5 - reference.first
        deepest = list(range(2, head.info.levels - 1))
        for node in deepest:
            guesses.extend(HostTokens(np.array([5], np.int32)), [2 if node == 2 else node + 2])
        with pytest.raises(ValueError, match="levels"):
            guesses.extend(HostTokens(np.array([5], np.int32)), [4 + len(deepest)])


def test_a_block_that_begins_at_the_anchor_without_a_markov_part(target_path: Path, tmp_path: Path) -> None:
    """DeepSpec's own DFlash heads: as many guesses as slots."""
    path = write_block_head(tmp_path / "head.gguf", target_path, kind="dflash", change={"sample_from_anchor": True})
    reference, text = BlockReference(path, target_path), ids(12)
    with loaded(target_path, path) as (model, head):
        assert head.info.kind == "dflash" and head.info.levels == 5
        state = model.open()
        guesses = head.open(state)
        commit(model, state, text)
        base, hidden = reference.base(features_of(model, head, text), 9)
        want = [reference.row(base, hidden, slot, 0) for slot in range(3)]
        assert_close(chain_behind(guesses, 9, [4, 5]), np.array(want))


@pytest.mark.parametrize("kind", ["dspark", "dflash"])
def test_a_smaller_vocabulary_is_scattered(kind: str, target_path: Path, tmp_path: Path) -> None:
    own = [*range(5, 60, 3), 200, 210]
    path = write_block_head(tmp_path / "head.gguf", target_path, kind=kind, own_tokens=own)
    reference, text = BlockReference(path, target_path), ids(12)
    with loaded(target_path, path) as (model, head):
        state = model.open()
        guesses = head.open(state)
        commit(model, state, text)
        base, hidden = reference.base(features_of(model, head, text), 9)
        row = guesses.start(9).rows([0])[0]
        assert np.flatnonzero(np.isfinite(row)).tolist() == sorted(own)
        assert_close(row, reference.row(base, hidden, 0, 9))
        behind = guesses.extend(HostTokens(np.array([own[3], 7], np.int32)), [-1, -1]).rows([0, 1])
        for found, token in zip(behind, [own[3], 7], strict=True):
            assert_close(found, reference.row(base, hidden, 1, token))


class Watched(np.ndarray[Any, Any]):
    """A matrix that notes how many threads its products may use."""

    threads: ClassVar[list[int]] = []

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **more: Any) -> Any:
        if ufunc is np.matmul:
            libraries = ThreadpoolController().select(user_api="blas").lib_controllers  # scipy has one of its own
            self.threads.append(max(one.num_threads for one in libraries))
        return getattr(ufunc, method)(*(np.asarray(one) for one in inputs), **more)


class Watchable:
    """Stands where a table in a file does."""

    def __init__(self, numbers: np.random.Generator, num_rows: int = 12) -> None:
        self.whole = numbers.random((num_rows, 6), np.float32).view(Watched)

    def rows(self, indices: Sequence[int]) -> Any:
        return np.asarray(self.whole)[list(indices)]


def test_products_on_the_host_leave_no_threads_awake() -> None:
    """BLAS's threads stay awake behind a product, and llama.cpp's would have to wait for them."""
    numbers = np.random.default_rng(3)
    tables: Any = Watchable(numbers)
    gate: Any = Watchable(numbers, 6)
    hidden = numbers.random((2, 6), np.float32)
    weight: Any = numbers.random(12, np.float32).view(Watched)
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        Watched.threads.clear()
        markov = Markov(tables, tables, None)
        for count in (1, 3):
            assert markov.differences([1] * count, [2] * count).shape == (count, 12)
        assert Watched.threads == [1, 1]
        SelectorRows(numbers.random((2, 12), np.float32), hidden, Selector(tables, tables, gate, 3)).at([(1, 4)])
        assert Watched.threads == [1, 1, 1]
        assert Confidence(weight, 0.5, tables).of(hidden, [(0, 1), (1, 2)]).shape == (2,)
        assert Watched.threads == [1] * 5
        assert (tables.whole @ hidden.T).shape == (12, 2) and Watched.threads[-1] == 2, "given back"


EAGLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "normed": {"norm_before_residual": True, "norm_before_fc": True},
    "own tokens": {"own_tokens": [*range(3, 200, 3), 210]},
}


@pytest.mark.parametrize("variant", EAGLES)
def test_eagle3_rows_are_those_of_plain_numpy(variant: str, target_path: Path, tmp_path: Path) -> None:
    """A chain, then a tree level by level, each node against a chain of numpy's."""
    path = write_eagle3_head(tmp_path / "head.gguf", target_path, **EAGLES[variant])
    reference, text, anchor = StepReference(path, target_path), ids(80), 40
    with loaded(target_path, path) as (model, head):
        assert head.info.kind == "eagle3" and head.info.levels is None and not head.info.one_pass and head.info.trees
        state = model.open()
        guesses = head.open(state)
        commit(model, state, text[:67])
        commit(model, state, text[67:])
        features = features_of(model, head, text)
        assert_close(chain_behind(guesses, anchor, [9, 33]), reference.rows(features, [*text, anchor], [9, 33]))
        assert_tree_is_right(guesses, reference, features, [*text, anchor])
        assert guesses.confidence() is None


def test_mtp_rows_are_those_of_plain_numpy(tmp_path: Path) -> None:
    path = write_architecture(tmp_path / "target.gguf", "qwen35", mtp=True)
    reference, text, anchor = StepReference(path, path), ids(70), 40
    with loaded(path, path) as (model, head):
        assert head.info.kind == "mtp" and head.info.taps == (-2,) and head.info.num_parameters > 0
        state = model.open()
        guesses = head.open(state)
        commit(model, state, text[:11])
        commit(model, state, text[11:])
        features = features_of(model, head, text)
        want = reference.rows(features, [*text, anchor], [9, 33])
        assert_close(chain_behind(guesses, anchor, [9, 33]), want, LOOSE)
        assert_tree_is_right(guesses, reference, features, [*text, anchor])


@pytest.mark.parametrize("name", ["qwen3next", "qwen35moe"])
def test_mtp_layers_of_experts_run(name: str, tmp_path: Path) -> None:
    """Without a reference of their experts: what they guess depends on the text and on the path, and only on them."""
    path = write_architecture(tmp_path / "target.gguf", name, mtp=True)
    with loaded(path, path) as (model, head):
        found = []
        for text, guess in ((ids(20), 9), (ids(20), 9), (ids(20), 10), ([5, *ids(19)], 9)):
            state = model.open()
            guesses = head.open(state)
            commit(model, state, text)
            found.append(chain_behind(guesses, 40, [guess]))
            state.close()
    assert np.array_equal(found[0], found[1]) and np.isfinite(found[0]).all()
    assert np.array_equal(found[0][0], found[2][0]) and not np.allclose(found[0][1], found[2][1], atol=0.1)
    assert not np.allclose(found[0][0], found[3][0], atol=0.1)


def assert_tree_is_right(guesses: Any, reference: StepReference, features: Features, tokens: Sequence[int]) -> None:
    first = guesses.start(tokens[-1]).rows([0]).copy()
    level = guesses.extend(HostTokens(np.array([7, 50, 90], np.int32)), [-1, -1, -1]).rows([0, 1, 2]).copy()
    below = guesses.extend(HostTokens(np.array([8, 9, 60, 61], np.int32)), [1, 1, 0, 2]).rows([0, 1, 2, 3]).copy()
    deepest = guesses.extend(HostTokens(np.array([30], np.int32)), [4]).rows([0]).copy()
    for got, path in (
        (first[0], []),
        (level[1], [50]),
        (below[0], [50, 8]),
        (below[2], [7, 60]),
        (below[3], [90, 61]),
        (deepest[0], [50, 9, 30]),
    ):
        assert_close(got, reference.rows(features, tokens, path)[-1], LOOSE)


# ---------------------------------------------------------------- a trained head


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shared_models: Path, root: Path) -> Path:
    """The development head in float32, for the bundled target, which was quantised from the one it was trained for."""
    path = tmp_path_factory.mktemp("trained") / "dspark.gguf"
    write_head_gguf(path, shared_models / "dspark", root / "models" / "tiny" / "target.gguf", "F32")
    return path


@pytest.mark.shared
def test_a_trained_head_says_what_numpy_says(trained: Path, tiny_pair: Any) -> None:
    reference = BlockReference(trained, tiny_pair.target)
    with loaded(tiny_pair.target, trained) as (model, head):
        assert head.info.kind == "dspark" and head.info.taps == (1, 7, 12) and head.info.levels == 7
        text = model.tokenizer.encode("def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n", special=True).tolist()
        state = model.open()
        guesses = head.open(state)
        commit(model, state, text[:-1])
        base, hidden = reference.base(features_of(model, head, text[:-1]), text[-1])
        scores, previous = guesses.start(text[-1]), text[-1]
        for slot in range(7):
            row = scores.rows([0])[0].copy()
            assert_close(row, reference.row(base, hidden, slot, previous))
            sure = guesses.confidence()
            assert sure is not None and abs(sure[0] - reference.confidence(hidden, slot, previous)) < 1e-3
            previous = int(np.argsort(row)[-1 if slot != 2 else -2])  # once not the likeliest
            if slot < 6:
                scores = guesses.extend(HostTokens(np.array([previous], np.int32)), [slot - 1])


@pytest.mark.shared
def test_a_trained_head_guesses_well(trained: Path, tiny_pair: Any) -> None:
    """Taps off by one, or slots, would still give the right text, and next to no accepted guesses."""
    prompt = "def fibonacci(n):\n    if n < 2:\n        return n\n    return "
    with loaded(tiny_pair.target, trained) as (model, head):
        text = model.tokenizer.encode(prompt, special=True).tolist()
        state = model.open()
        guesses = head.open(state)
        commit(model, state, text[:-1])
        anchor, num_rounds, num_tokens = text[-1], 12, 0
        for _ in range(num_rounds):
            chain, scores = [anchor], guesses.start(anchor)
            for level in range(7):
                chain.append(int(scores.argmax().numpy()[0]))
                if level < 6:
                    scores = guesses.extend(HostTokens(np.array(chain[-1:], np.int32)), [level - 1])
            best = forward(model, state, chain).argmax(axis=1)
            accepted = next((index for index in range(7) if best[index] != chain[index + 1]), 7)
            state.keep(range(accepted + 1))
            num_tokens, anchor = num_tokens + accepted + 1, int(best[accepted])
    assert num_tokens > 2 * num_rounds
