"""Every kind of memory that llama.cpp's models have: trees where cells may be shared, replay where layers are
recurrent. Tiny random-weight files; rows are compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from localspec.drafters import DraftModel, Ngram, Nothing
from localspec.engine.session import Session
from localspec.errors import BackendError, ModelFileError, SettingError, UnsupportedModelError
from localspec.protocols import (
    Drafter,
    HostTokens,
    LanguageModel,
    LoadSettings,
    Rewind,
    SequenceState,
    Step,
    chain_parents,
)
from localspec.sampling import SamplingParams
from localspec.testing.architectures import examine
from localspec.testing.conformance import BackendConformance
from localspec.testing.gguf_architectures import ARCHITECTURES, write_architecture
from localspec.testing.reference import random_tree
from localspec.tree.token_tree import TokenTree
from localspec.types import Logits, NodeIndices
from tests.backends.llamacpp_backend import BACKEND, module
from tests.folders import kept_folder

PLAIN = LoadSettings(context=448, num_sequences=3, threads=1)
TREES = replace(PLAIN, trees=True)
RECURRENT = [name for name, found in ARCHITECTURES.items() if "recurrent" in found.kind or "hybrid" in found.kind]
pytestmark = pytest.mark.skipif(not BACKEND.is_installed(), reason="needs llama.cpp: pip install llama-cpp-python")


@pytest.fixture(scope="module", autouse=True)
def closed_in_the_end() -> Iterator[None]:
    yield
    opened.cache_clear()


@cache
def file(name: str, jitter: float = 0.0) -> Path:
    return write_architecture(kept_folder() / f"{name}.gguf", name, jitter=jitter)


@cache
def opened(name: str, settings: LoadSettings = PLAIN, jitter: float = 0.0) -> LanguageModel:
    return BACKEND.load(file(name, jitter), settings)


def forward(
    model: LanguageModel, state: SequenceState, ids: Sequence[int], parents: NodeIndices | None = None
) -> Logits:
    """[T, V] all rows of one step, copied."""
    below = chain_parents(state, len(ids)) if parents is None else parents
    [scores] = model.forward([Step(state, (HostTokens(np.array(ids, np.int32)),), below)])
    return scores.rows(range(len(ids))).copy()


# ---------------------------------------------------------------- the contract


class TestRecurrent(BackendConformance):
    def model(self) -> LanguageModel:
        return opened("mamba2")


class TestHybrid(BackendConformance):
    def model(self) -> LanguageModel:
        return opened("qwen35")


class TestTrees(BackendConformance):
    def model(self) -> LanguageModel:
        return opened("gemma3", TREES)


class TestTreesWithoutFlashAttention(BackendConformance):
    """Right, but not to the bit: attention sums over a branch's cells in another order. float32 weights, but
    keys and values are kept in float16."""

    tolerance = 0.05

    def model(self) -> LanguageModel:
        return opened("llama")


# ---------------------------------------------------------------- architectures


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_chains_and_memory_are_exact_in_every_architecture(name: str) -> None:
    """As loaded by default: rows of any chain and the future after any rewind, bit for bit."""

    def chains_only() -> LanguageModel:
        model = BACKEND.load(file(name), PLAIN)
        assert model.capabilities.rewind is (Rewind.REPLAY if name in RECURRENT else Rewind.FREE)
        assert model.capabilities.trees is (name not in RECURRENT)
        assert not model.capabilities.exact_trees and model.capabilities.limits
        model.capabilities = replace(model.capabilities, trees=False)
        return model

    finding = examine(name, chains_only, num_rounds=40, tolerance=0.0)
    assert (finding.kind, finding.num_rounds) == ("chain", 40), finding
    assert (finding.num_replayed > 0) is (name in RECURRENT)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in RECURRENT])
def test_trees_are_exact_where_they_are_asked_for(name: str) -> None:
    finding = examine(name, lambda: BACKEND.load(file(name), TREES), num_rounds=40, tolerance=0.0)
    assert (finding.kind, finding.num_rounds, finding.reason) == ("tree", 40, ""), finding


# ---------------------------------------------------------------- wide trees


def path_rows(model: LanguageModel, state: SequenceState, ids: Sequence[int]) -> Logits:
    """[T, V] rows of `ids` behind what the state holds, one token and one of padding at a time."""
    start, rows = state.length, []
    for token in ids:
        rows.append(forward(model, state, [token, 0])[0])
        state.keep((0,))
    state.truncate(start)
    return np.array(rows)


def check_tree(parents: NodeIndices, seed: int, *, num_kept: int = 4, name: str = "qwen3") -> None:
    """Every row of the tree, and the rows behind `num_kept` of its paths, equal one-by-one decoding's."""
    model, rng = opened(name, TREES), np.random.default_rng(seed)
    ids = rng.integers(3, 300, len(parents)).tolist()
    tree = TokenTree.from_parents(np.array(ids, np.int32), parents)
    state, other, prefix = model.open(), model.open(), rng.integers(3, 300, 40).tolist()
    for one in (state, other):
        forward(model, one, prefix)
        one.keep(range(len(prefix)))
    rows = forward(model, state, ids, parents)
    state.keep(())
    for leaf in range(len(tree)):
        if not tree.children(leaf):
            path = tree.path(leaf)
            assert np.array_equal(rows[path], path_rows(model, other, [ids[node] for node in path])), path
    for node in [len(tree) - 1, *rng.integers(0, len(tree), num_kept).tolist()]:
        assert np.array_equal(forward(model, state, ids, parents), rows)
        path = tree.path(node)
        state.keep(path)
        after = forward(model, state, [5, 6, 7])
        half = len(prefix) + len(path) // 2
        state.truncate(half)
        earlier = forward(model, state, [5, 6, 7])
        state.truncate(len(prefix))
        want = path_rows(model, other, [*(ids[node] for node in path[: len(path) // 2]), 5, 6, 7])[-3:]
        assert np.array_equal(earlier, want), path
        want = path_rows(model, other, [*(ids[node] for node in path), 5, 6, 7])[-3:]
        assert np.array_equal(after, want), path
    state.close()
    other.close()


def test_a_tree_may_have_254_leaves() -> None:
    assert opened("qwen3", TREES).capabilities.max_width == 254
    check_tree(np.full(254, -1, np.int32), 0)


def test_a_tree_may_be_254_deep() -> None:
    check_tree(np.arange(-1, 253, dtype=np.int32), 1, num_kept=2)


@pytest.mark.parametrize("size", [64, 254])
def test_random_trees_of_any_size_are_exact(size: int) -> None:
    rng = np.random.default_rng(size)
    check_tree(random_tree(rng, size), size)
    check_tree(np.array([int(rng.integers(-1, node)) for node in range(size)], np.int32), size + 1)  # bushy


@pytest.mark.parametrize("name", ["gemma3", "gpt-oss", "deepseek2"])
def test_kept_branches_may_be_longer_than_a_window(name: str) -> None:
    """llama.cpp leaves what the last token does not see out of a copy, so copies are made in pieces."""
    trunk = np.array([-1, -1, *range(1, 49)], np.int32)  # a sibling before it, so that keeping it moves cells
    check_tree(trunk, 5, name=name)


def test_a_fork_may_be_cut_back_beyond_the_window() -> None:
    """Old bug: a fork had only the sliding layers' cells that its last token saw, and answered wrongly after a
    truncate."""
    model = opened("gemma2")
    tokens = np.random.default_rng(6).integers(3, 300, 80).tolist()
    state, fresh = model.open(), model.open()
    forward(model, state, tokens)
    state.keep(range(80))
    fork = state.fork()
    state.close()
    forward(model, fresh, tokens[:40])
    fresh.keep(range(40))
    fork.truncate(40)
    assert np.array_equal(forward(model, fork, [5, 6]), forward(model, fresh, [5, 6]))
    fork.close()
    fresh.close()


def test_long_passes_with_flash_attention_stay_in_the_width_class() -> None:
    """Old bug: from 64 tokens on it works in tiles, and a prefill of 64 left other bits than one of 63."""
    model = opened("llama", replace(PLAIN, flash_attention=True))
    tokens = np.random.default_rng(7).integers(3, 300, 200).tolist()
    rows = []
    for width in (200, 64, 8):
        state = model.open()
        for start in range(0, 200, width):
            part = forward(model, state, tokens[start : start + width])
            state.keep(range(len(part)))
        rows.append(forward(model, state, [5, 6]))
        state.close()
    assert np.array_equal(rows[0], rows[1]) and np.array_equal(rows[0], rows[2])


@pytest.mark.parametrize(("settings", "most"), [(TREES, 255), (PLAIN, 129)])
def test_more_leaves_than_ids_are_refused_and_nothing_is_lost(settings: LoadSettings, most: int) -> None:
    model = opened("qwen3", settings)
    state = model.open()
    forward(model, state, [5, 6, 7])
    star = np.full(most + 1, 1, np.int32)
    with pytest.raises(BackendError, match=f"expected at most {most}.*fewer leaves"):
        forward(model, state, [9] * len(star), star)
    with pytest.raises(BackendError, match="trees=True" if settings is PLAIN else "fewer leaves"):
        model.forward([Step(state, (HostTokens(np.array([9] * len(star), np.int32)),), star, ())])
    assert state.num_pending == 3
    forward(model, state, [9] * (most - 1), star[: most - 1])  # node 2 is a leaf, too
    state.keep((0, 1, most + 1))
    fresh = model.open()
    forward(model, fresh, [5, 6, 9])
    fresh.keep((0, 1, 2))
    difference = np.abs(forward(model, state, [8, 9]) - forward(model, fresh, [8, 9])).max()
    assert difference <= (0.0 if settings is TREES else 0.05)
    state.close()
    fresh.close()


def test_trees_switch_flash_attention_on_and_say_so() -> None:
    model = opened("llama", TREES)
    assert model.capabilities.exact_trees and not model.capabilities.limits
    assert any("flash attention" in note and "slower" in note for note in model.info.notes)
    asked = BACKEND.load(file("llama"), replace(PLAIN, flash_attention=True))
    assert asked.capabilities.exact_trees and not any("flash" in note for note in asked.info.notes)
    asked.close()
    [limit] = opened("llama").capabilities.limits
    assert "--flash-attention" in limit and opened("llama").capabilities.trees
    with pytest.raises(SettingError, match="exclude each other"):
        BACKEND.load(file("llama"), replace(TREES, flash_attention=False))
    with pytest.raises(SettingError, match="32 or more"):
        BACKEND.load(file("llama"), replace(TREES, context=16))


def test_a_model_whose_tree_rows_are_not_exact_promises_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that breaks the rule (llama.cpp leaves flash attention out for some models) is noticed at load."""
    monkeypatch.setattr(module("loading"), "_FLASH_ON", module("loading")._FLASH_OFF)
    with pytest.raises(UnsupportedModelError, match="standard deviations away"):
        BACKEND.load(file("llama"), TREES)
    model = BACKEND.load(file("llama"), replace(PLAIN, flash_attention=True))
    assert model.capabilities.trees and not model.capabilities.exact_trees
    assert "standard deviations away" in model.capabilities.limits[0]
    model.close()


# ---------------------------------------------------------------- replay

PROMPT = [40, 41, 42, 43, 40, 41, 42, 50, 51, 40, 41, 42]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", ["mamba2", "jamba", "qwen3next", "lfm2"])
def test_text_under_speculation_equals_plain_decoding(name: str, temperature: float) -> None:
    """Prompt lookup and a draft model of the same kind; a second, shorter turn and a third that goes on."""
    model, draft = opened(name), opened(name, jitter=0.05)
    params = SamplingParams(temperature=temperature, seed=4, max_tokens=60, ignore_eos=True)

    def texts(drafter: Drafter) -> list[tuple[int, ...]]:
        with Session(model, drafter) as session:
            first = session.generate(PROMPT, params)
            second = session.generate(PROMPT[:7], params)
            third = session.generate([*PROMPT[:7], *second.tokens[:20], 60, 61], params)
            if isinstance(drafter, DraftModel):
                accepted = sum(
                    len(answer.sources) - answer.sources.count("target") for answer in (first, second, third)
                )
                assert accepted > 0
            return [first.tokens, second.tokens, third.tokens]

    plain = texts(Nothing())
    assert texts(Ngram(num=5, min=1)) == plain
    assert texts(DraftModel(draft, num=4)) == plain


@pytest.mark.parametrize("name", ["rwkv7", "granitehybrid"])
def test_plain_decoding_replays_every_second_token_only(name: str) -> None:
    """What padding costs: taken back, and its token run once more in the next pass, which needs none."""
    model = opened(name)
    state = model.open()
    forward(model, state, PROMPT)
    state.keep(range(len(PROMPT)))
    for token in range(60, 80):
        model.forward([Step(state, (HostTokens(np.array([token, 0], np.int32)),), chain_parents(state, 2), (0,))])
        state.keep((0,))
    assert (state.length, state.num_replayed) == (len(PROMPT) + 20, 10)
    state.close()


def test_going_far_back_replays_from_a_snapshot() -> None:
    """Not from the beginning, as long as one of the snapshots lies before."""
    model, rng = opened("mamba2"), np.random.default_rng(0)
    state, tokens = model.open(), []
    for _ in range(30):
        part = rng.integers(3, 300, 10).tolist()
        forward(model, state, part)
        state.keep(range(10))
        tokens += part
    before = state.num_replayed
    assert before == 0
    state.truncate(290)
    rows = forward(model, state, [5, 6])
    assert state.num_replayed - before <= 20
    fresh = model.open()
    forward(model, fresh, tokens[:290])
    fresh.keep(range(290))
    assert np.array_equal(rows, forward(model, fresh, [5, 6]))
    state.close()
    fresh.close()


def test_any_pending_node_may_be_gone_on_from() -> None:
    """Chains only, but a drafter may drop its newest guesses and go on from an older one."""
    model = opened("qwen35")
    state, fresh = model.open(), model.open()
    forward(model, state, [5, 6, 7, 8])
    forward(model, state, [9, 10], np.array([1, 4], np.int32))
    rows = forward(model, state, [11, 12], np.array([4, 6], np.int32))
    want = forward(model, fresh, [5, 6, 9, 11, 12])[3:]
    assert np.array_equal(rows, want)
    state.keep((0, 1, 4, 6))
    fresh.keep((0, 1, 2, 3))
    assert np.array_equal(forward(model, state, [13, 14]), forward(model, fresh, [13, 14]))
    with pytest.raises(ValueError, match="chains only"):
        forward(model, state, [1, 2], np.array([-1, -1], np.int32))
    with pytest.raises(ValueError, match="parent"):
        forward(model, state, [1], np.array([9], np.int32))
    assert len(forward(model, state, [])) == 0
    state.close()
    fresh.close()


def test_a_failed_pass_leaves_a_recurrent_state_as_it_was() -> None:
    """A token that does not exist; the snapshots still hold."""
    model = opened("mamba2")
    state, fresh = model.open(), model.open()
    for one in (state, fresh):
        forward(model, one, [5, 6, 7])
        one.keep((0, 1))
    with pytest.raises(ValueError, match="token"):
        forward(model, state, [8, 10**6])
    assert (state.length, state.num_pending) == (2, 0)
    assert np.array_equal(forward(model, state, [8, 9]), forward(model, fresh, [8, 9]))
    state.close()
    fresh.close()


def test_trees_of_a_recurrent_model_are_refused_when_asked_for() -> None:
    for name in ("mamba", "falcon-h1"):
        with pytest.raises(UnsupportedModelError, match=r"one chain at a time.*without trees"):
            BACKEND.load(file(name), TREES)
    limits = opened("mamba2").capabilities.limits
    assert any("chain" in limit for limit in limits) and any("run again" in limit for limit in limits)


def test_a_model_that_replays_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: of what waits, the first token is another. Rounding alone is told, not refused."""
    state = module("recurrent").RecurrentState
    waiting = state._waiting
    monkeypatch.setattr(
        state, "_waiting", lambda self, back: np.where(np.arange(len(w := waiting(self, back))) == 0, 3, w)
    )
    with pytest.raises(UnsupportedModelError, match="after tokens were taken back"):
        BACKEND.load(file("mamba2"), PLAIN)
    monkeypatch.undo()
    monkeypatch.setattr(module("selfcheck"), "replay_difference", lambda model: 1e-5)
    model = BACKEND.load(file("mamba2"), PLAIN)
    assert not model.capabilities.width_class.measured and "near-ties" in model.capabilities.limits[-1]
    model.close()


def test_a_short_context_is_usable_but_promises_nothing() -> None:
    model = BACKEND.load(file("mamba2"), replace(PLAIN, context=16))
    assert not model.capabilities.width_class.measured
    with Session(model, Nothing()) as session:
        answer = session.generate([5, 6, 7], SamplingParams(temperature=0.0, ignore_eos=True))
        assert answer.finish_reason == "context"
    model.close()


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kept", [200, 9_000, 30_000, -1])
@pytest.mark.parametrize("name", ["deepseek2", "qwen3next", "rwkv7"])
def test_truncated_files_of_any_architecture_are_refused(tmp_path: Path, name: str, kept: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(file(name).read_bytes()[:kept])
    with pytest.raises(ModelFileError):
        BACKEND.load(path, PLAIN)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(file("mamba2").read_bytes().replace(b"blk.1.ssm_conv1d.bias", b"blk.1.ssm_convXd.bias"))
    with pytest.raises(ModelFileError, match=r"ssm_conv1d\.bias"):
        BACKEND.load(path, PLAIN)


def test_a_cache_without_snapshots_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = module("weights").Weights
    read = weights.text
    monkeypatch.setattr(weights, "text", lambda w, key: "deepseek4" if key == "general.architecture" else read(w, key))
    with pytest.raises(UnsupportedModelError, match="compressed cache"):
        BACKEND.load(file("llama"), PLAIN)


# ---------------------------------------------------------------- anything at all


@pytest.mark.parametrize("name", ["mamba2", "lfm2", "qwen3next", "gpt-oss"])
def test_any_order_of_passes_gives_the_rows_of_plain_decoding(name: str) -> None:
    """Random steps: few rows scored, tokens behind the last scored one, several passes before a keep, chains below
    any pending node, half a path kept. Every row read is compared with one-by-one decoding of its path."""
    model = opened(name, PLAIN if name in RECURRENT else TREES)
    rng = np.random.default_rng(11)
    state, other, held = model.open(), model.open(), list[int]()
    for _ in range(40):
        ids, parents, tree = (
            list[int](),
            list[int](),
            TokenTree.from_parents(np.zeros(0, np.int32), np.zeros(0, np.int32)),
        )
        for _ in range(int(rng.integers(1, 4))):
            size, first = int(rng.integers(2, 7)), len(ids)
            above = int(rng.integers(-1, first)) if rng.integers(0, 3) == 0 else first - 1
            below = np.arange(first - 1, first + size - 1, dtype=np.int32)
            below[0] = above
            rows = tuple(sorted({int(row) for row in rng.integers(0, size, int(rng.integers(0, 4)))}))
            ids += rng.integers(3, 300, size).tolist()
            parents += below.tolist()
            tokens = HostTokens(np.array(ids[first:], np.int32))
            [scores] = model.forward([Step(state, (tokens,), below, rows)])
            got = scores.rows(range(len(rows))).copy()
            tree = TokenTree.from_parents(np.array(ids, np.int32), np.array(parents, np.int32))
            for row, values in zip(rows, got, strict=True):
                path = tree.path(first + row)
                assert np.array_equal(values, path_rows(model, other, [ids[node] for node in path])[-1]), (rows, path)
        path = tree.path(int(rng.integers(-1, len(ids))))
        state.keep(path)
        held += [ids[node] for node in path]
        if len(held) > 150 or rng.integers(0, 6) == 0:
            held = held[: int(rng.integers(0, len(held) + 1))]
            state.truncate(len(held))
        other.truncate(0)
        forward(model, other, [*held, 0, 0])
        other.keep(range(len(held)))
    state.close()
    other.close()
