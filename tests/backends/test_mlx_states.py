"""Every kind of state on MLX: a sample of mlx-lm's model files, tiny, and speculation over those that replay.

All of them: python scripts/architectures.py --backend mlx
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from localspec.drafters import DraftModel, Ngram, Nothing
from localspec.engine.session import Session
from localspec.errors import BackendError, UnsupportedModelError
from localspec.loading import get_backend
from localspec.protocols import Drafter, HostTokens, LanguageModel, Rewind, SequenceState, Step, chain_parents
from localspec.sampling import SamplingParams
from localspec.testing.architectures import examine
from localspec.testing.conformance import BackendConformance
from localspec.types import Logits

BACKEND = get_backend("mlx")
pytestmark = pytest.mark.skipif(not BACKEND.is_installed(), reason='needs MLX: pip install "localspec[mlx-cpu]"')

HYBRID = "qwen3_next"  # every second layer a gated delta rule, the others plain attention


def tiny() -> Any:
    """The builder of tiny models, which imports MLX."""
    return import_module("scripts.tiny_mlx")


@cache
def opened(name: str, jitter: float = 0.0) -> LanguageModel:
    model: LanguageModel = tiny().open_model(name, jitter=jitter)
    return model


@pytest.mark.parametrize(
    ("name", "kind", "rewind"),
    [
        ("qwen3", "tree", Rewind.FREE),
        ("gemma3_text", "tree", Rewind.FREE),  # sliding windows
        ("deepseek_v3", "tree", Rewind.FREE),  # latent attention and experts
        ("gpt2", "tree", Rewind.FREE),  # learned positions
        ("llama4", "chain", Rewind.FREE),  # chunks, whose mask the model makes itself
        ("qwen3_next", "chain", Rewind.REPLAY),  # gated delta rule
        ("mamba2", "chain", Rewind.REPLAY),
        ("rwkv7", "chain", Rewind.REPLAY),
        ("baichuan_m1", "chain", Rewind.REPLAY),  # short convolutions and windows in one layer
        ("deepseek_v41", "chain", Rewind.REPLAY),  # a cache class of its own
    ],
)
def test_an_architecture_is_what_it_is_declared_to_be(name: str, kind: str, rewind: Rewind) -> None:
    """Rows and states are right, also against mlx-lm's own caches; replays happen where and only where declared."""
    declared: list[Rewind] = []

    def open_model() -> LanguageModel:
        model: LanguageModel = tiny().open_model(name)
        declared.append(model.capabilities.rewind)
        return model

    found = examine(name, open_model, num_rounds=20, own_rows=lambda ids: tiny().native_rows(name, ids))
    assert found.kind == kind, found
    assert declared == [rewind]
    assert (found.num_replayed > 0) == (rewind is Rewind.REPLAY), found


class TestWholeBlocks(BackendConformance):
    """What CUDA is given, where attention's kernel is built for one number of cells: whole blocks, and a mask."""

    @pytest.fixture(autouse=True)
    def _as_on_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module("network"), "builds_attention", lambda: True)

    def model(self) -> LanguageModel:
        return opened_in_blocks()


@cache
def opened_in_blocks() -> LanguageModel:
    model: LanguageModel = tiny().open_model("qwen3")
    return model


def module(name: str) -> Any:
    """A module of the backend, which is loaded under a name of the core's choosing."""
    return import_module(f"{type(BACKEND).__module__.rpartition('.')[0]}.{name}")


@pytest.mark.parametrize(("name", "blocks"), [("qwen3", True), ("gemma3_text", True), ("llama4", False)])
def test_whole_blocks_are_for_models_that_take_their_masks_as_they_are(
    name: str, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama4 makes chunks of its own, as long as the rows are, so it gets the rows and no more."""
    monkeypatch.setattr(module("network"), "builds_attention", lambda: True)
    model = tiny().open_model(name)
    try:
        assert model._network.current.blocks is blocks
    finally:
        model.close()


def test_attention_is_given_one_number_of_cells_throughout_a_block() -> None:
    """A kernel is built for each number; before, that was once a pass. Rows stay where they were put."""
    mx, layout = import_module("mlx.core"), module("layout")
    current = module("cache").Pass(blocks=True)
    cache, put, shown = module("cache").TreeCache(current), [], []
    keys = values = mx.zeros(0)
    for width in (20, 2, 3, 1000, 3, 1):
        rows = mx.random.normal((1, 2, width, 4))
        current.begin(layout.Layout(cache.num_rows, layout.chain(width), width), None)
        keys, values = cache.update_and_fetch(rows, rows + 1)
        put.append(rows)
        shown.append((width, keys.shape[2], values.shape[2]))
    one, two = module("cache").BLOCK, 2 * module("cache").BLOCK
    assert shown == [(20, one, one), (2, one, one), (3, one, one), (1000, two, two), (3, two, two), (1, 1029, 1029)]
    assert mx.array_equal(keys, mx.concatenate(put, axis=2))
    assert mx.array_equal(values, keys + 1)


@pytest.mark.parametrize(("blocks", "expected"), [(True, [1024, 2048]), (False, [1024, 1280])])
def test_room_grows_by_whole_steps_for_lone_rows_too(blocks: bool, expected: list[int]) -> None:
    """Else every token of plain decoding behind the first step copies all keys and values."""
    mx, layout = import_module("mlx.core"), module("layout")
    current = module("cache").Pass(blocks=blocks)
    cache, sizes = module("cache").TreeCache(current), []
    for width in (1000, *[1] * 200):
        current.begin(layout.Layout(cache.num_rows, layout.chain(width), width), None)
        cache.update_and_fetch(*[mx.zeros((1, 2, width, 4))] * 2)
        sizes.append(cache.keys.shape[2])
    assert sorted(set(sizes)) == expected


@pytest.mark.parametrize(("name", "reason"), [("phi3small", "corrupts"), ("olmo", "does not run")])
def test_what_mlx_lm_itself_gets_wrong_is_refused_with_a_reason(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        tiny().open_model(name)


class TestConformanceOfAHybrid(BackendConformance):
    """The suite that any backend passes, over a state that replays."""

    num_random_rounds = 15

    def model(self) -> LanguageModel:
        return opened(HYBRID)


# ---------------------------------------------------------------- speculation


def drafters(name: str) -> list[Drafter]:
    """A draft model that replays itself, and lookup, which guesses often and wrongly."""
    return [DraftModel(opened(name, jitter=0.02), num=4), Ngram(num=5, min=1)]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", [HYBRID, "falcon_h1"])
def test_speculation_over_a_recurrent_model_changes_no_token(name: str, temperature: float) -> None:
    """Three turns, the second longer than the first and the third cut back to its beginning."""
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=24, ignore_eos=True)
    prompts: list[list[int]] = [[3, 1, 4, 1, 5, 9, 2, 6], [], [3, 1, 4, 1, 5, 8]]

    def answers(drafter: Drafter) -> tuple[list[tuple[int, ...]], int]:
        told, accepted = [], 0
        with Session(opened(name), drafter) as session:
            for prompt in prompts:
                ids = prompt or [*session.tokens.tolist(), 7, 7, 3]
                answer = session.generate(ids, params)
                told.append(answer.tokens)
                accepted += answer.stats.num_accepted
        return told, accepted

    plain, _ = answers(Nothing())
    for drafter in drafters(name):
        told, accepted = answers(drafter)
        assert told == plain, drafter.name
        assert accepted > 0 or drafter.name == "ngram", "nothing was accepted, so nothing was tried"


# ---------------------------------------------------------------- what a replay does


def forward(model: LanguageModel, state: SequenceState, ids: Sequence[int]) -> Logits:
    step = Step(state, (HostTokens(np.array(ids, np.int32)),), chain_parents(state, len(ids)))
    [scores] = model.forward([step])
    return scores.rows(range(len(ids))).copy()


def test_only_what_was_kept_of_a_dropped_pass_is_replayed() -> None:
    """A chain that grew token by token has a snapshot at each, so a draft model never replays."""
    model = opened(HYBRID)
    state = model.open()
    forward(model, state, [1, 2, 3, 4, 5])
    state.keep((0, 1, 2))
    assert state.num_replayed == 3
    for token in (6, 7, 8):
        forward(model, state, [token])
    state.keep((0, 1))
    assert (state.length, state.num_replayed) == (5, 3)
    forward(model, state, [9, 9])
    state.keep((0, 1))
    state.truncate(state.length)
    assert state.num_replayed == 3, "nothing was dropped"
    state.truncate(5)
    assert state.num_replayed == 3, "there is a snapshot at 5"
    fresh = model.open()
    forward(model, fresh, [1, 2, 3, 6, 7])
    fresh.keep(range(5))
    assert np.array_equal(forward(model, state, [4]), forward(model, fresh, [4]))
    state.close()
    fresh.close()


def test_siblings_are_refused_where_only_chains_are_right() -> None:
    model = opened(HYBRID)
    state = model.open()
    with pytest.raises(ValueError, match="chains only"):
        model.forward([Step(state, (HostTokens(np.array([1, 2], np.int32)),), np.array([-1, -1], np.int32))])
    assert state.num_pending == 0
    state.close()


def test_a_failed_replay_says_how_many_tokens_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """BackendError; the state is shorter, is what its length says, and goes on working."""
    model = opened(HYBRID)
    state = model.open()
    forward(model, state, [1, 2])
    state.keep((0, 1))
    forward(model, state, [3, 4, 5])

    def fall_over(*_: object) -> None:
        raise RuntimeError("the device fell over")

    monkeypatch.setattr(state, "_run", fall_over)
    with pytest.raises(BackendError, match="fell over"):
        state.keep((0,))
    monkeypatch.undo()
    assert (state.length, state.num_pending) == (2, 0)
    fresh = model.open()
    assert np.array_equal(forward(model, state, [6])[0], forward(model, fresh, [1, 2, 6])[2])
    state.close()
    fresh.close()


# ---------------------------------------------------------------- the self-check can fail


def part(name: str) -> Any:
    """A module of the backend, which is loaded under a name of the core's choosing."""
    return import_module(f"{type(BACKEND).__module__.rpartition('.')[0]}.{name}")


def test_sparse_attention_is_judged_beyond_its_budget() -> None:
    """With real sizes a few tokens stay inside it, where any tree looks right; the sizes are put back."""
    built = tiny().build("minimax_m3_vl")
    sparse = [child for child in built.modules() if "index_block_size" in vars(child)]
    for child in sparse:
        child.index_block_size, child.index_topk_blocks = 128, 16
    network = part("network").Network(built)
    assert sparse and not network.trees
    assert {(child.index_block_size, child.index_topk_blocks) for child in sparse} == {(128, 16)}


def test_a_state_that_is_not_put_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be where a cache hides something from the snapshot."""
    monkeypatch.setattr(part("selfcheck"), "restore", lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="run again from a snapshot"):
        part("network").Network(tiny().build("mamba"))


def test_a_cache_that_overwrites_its_rows_is_refused() -> None:
    """A ring buffer that keeps its first rows cannot be laid out at full length."""
    built = tiny().build("qwen3")
    ring = part("memory").RotatingKVCache(max_size=8, keep=2)
    type(built).make_cache = lambda _: [ring]
    try:
        with pytest.raises(UnsupportedModelError, match="RotatingKVCache"):
            part("network").Network(built)
    finally:
        del type(built).make_cache
