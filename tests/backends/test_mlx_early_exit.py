"""The target's first layers as its drafter: they read its memory and leave it as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from localspec.errors import SettingError, UnsupportedModelError
from localspec.loading import bundled_path, exit_layers, get_backend, is_early_exit, open_pair
from localspec.protocols import DraftHead, HostTokens, LanguageModel, LoadSettings, Step, chain_parents
from localspec.sampling import SamplingParams
from localspec.schedule.machine import describe_head
from localspec.testing.files import write_safetensors
from localspec.testing.heads import HeadConformance
from tests.folders import kept_folder

BACKEND = get_backend("mlx")
pytestmark = pytest.mark.skipif(not BACKEND.is_installed(), reason='needs MLX: pip install "localspec[mlx-cpu]"')
LAYERS = 2


@cache
def folder() -> Path:
    return write_safetensors(kept_folder() / "three", num_layers=3)


@cache
def target() -> LanguageModel:
    return BACKEND.load(folder(), LoadSettings(num_sequences=8, context=256))


@cache
def head() -> DraftHead:
    return BACKEND.early_exit(target(), LAYERS)


@pytest.fixture(scope="module", autouse=True)
def _clean() -> Iterator[None]:
    yield
    if target.cache_info().currsize:
        target().close()
        shutil.rmtree(folder().parent)


class TestEarlyExit(HeadConformance):
    tolerance = 1e-4  # kernels of MLX round by the number of rows

    def target(self) -> LanguageModel:
        return target()

    def head(self) -> DraftHead:
        return head()

    def test_a_head_that_comes_late_says_what_it_missed(self) -> None:
        """Nothing: what it reads is the target's own memory."""
        rng = np.random.default_rng(15)
        prefix = self.tokens(rng, self.prefix_length)
        state = self.target().open()
        try:
            self.commit(state, prefix)
            beside = self.head().open(state)
            assert beside.num_missing == 0
            self.assert_as_fresh(beside, prefix, "opened late")
        finally:
            state.close()


def test_rows_are_those_of_a_model_that_has_no_other_layers(tmp_path: Path) -> None:
    """The same checkpoint without its last layer, loaded as a model of its own."""
    short = Path(shutil.copytree(folder(), tmp_path / "two"))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    weights = load_file(short / "model.safetensors")
    kept = {name: value for name, value in weights.items() if f"layers.{LAYERS}." not in name}
    assert len(kept) < len(weights)
    save_file(kept, short / "model.safetensors")
    alone = BACKEND.load(short, LoadSettings(num_sequences=1, context=256))
    tokens = np.random.default_rng(0).integers(0, 50, 30).astype(np.int32)
    state = alone.open()
    [scores] = alone.forward([Step(state, (HostTokens(tokens),), chain_parents(state, len(tokens)))])
    expected = scores.rows(range(25, 30)).copy()
    alone.close()

    mine = target().open()
    beside = head().open(mine)
    target().forward([Step(mine, (HostTokens(tokens[:25]),), chain_parents(mine, 25), ())])
    mine.keep(range(25))
    rows = [beside.start(int(tokens[25])).rows([0])[0]]
    guesses = ((HostTokens(tokens[26 + place : 27 + place]), [place - 1]) for place in range(4))
    rows += [beside.extend(ids, parents).rows([0])[0] for ids, parents in guesses]
    mine.close()
    assert np.allclose(rows, expected, atol=1e-4)


def test_a_pass_that_has_begun_is_neither_seen_nor_disturbed() -> None:
    """Behind quiet rounds the anchor is pending in the target already, when the head is asked."""
    tokens, model = np.arange(20, dtype=np.int32), target()
    state = model.open()
    beside = head().open(state)
    model.forward([Step(state, (HostTokens(tokens),), chain_parents(state, 20), ())])
    state.keep(range(20))
    expected = beside.start(7).rows([0]).copy()
    model.forward([Step(state, (HostTokens(np.array([7], np.int32)),), chain_parents(state, 1))])
    assert np.allclose(beside.start(7).rows([0]), expected, atol=1e-4)
    assert state.num_pending == 1
    state.keep([0])
    [scores] = model.forward([Step(state, (HostTokens(np.array([9, 9], np.int32)),), chain_parents(state, 2))])
    behind = scores.rows([0]).copy()
    state.truncate(0)
    again = np.array([*tokens, 7, 9, 9], np.int32)
    [scores] = model.forward([Step(state, (HostTokens(again),), chain_parents(state, len(again)))])
    assert np.allclose(scores.rows([len(again) - 2]), behind, atol=1e-4)
    state.close()


@pytest.mark.parametrize("drafter", ["early_exit:num=4", "early_exit:num=8,shape=tree", "early_exit:num=3+suffix"])
def test_text_equals_plain_decoding(drafter: str) -> None:
    settings = LoadSettings(context=256, num_sequences=3, trees=True)
    with open_pair(str(folder()), backend="mlx", settings=settings, heads=[f"early_exit:layers={LAYERS}"]) as pair:
        assert pair.heads[0].info.kind == "early_exit" and pair.heads[0].info.path == folder()
        with pair.session("nothing") as plain, pair.session(drafter) as drafted:
            for temperature in (0.0, 0.8):
                for prompt in ([*range(40, 60)], [*range(40, 60), 7, 8, 9], [5]):  # turns of one session
                    params = SamplingParams(temperature=temperature, seed=3, max_tokens=16, ignore_eos=True)
                    result = drafted.generate(prompt, params)
                    assert result.tokens == plain.generate(prompt, params).tokens
                    assert result.stats.num_drafted > 0


def test_what_there_is_not_is_refused() -> None:
    for layers in (0, 3):
        with pytest.raises(SettingError, match="1 to 2"):
            BACKEND.early_exit(target(), layers)
    assert is_early_exit("early_exit") and is_early_exit("early_exit:layers=4") and not is_early_exit("early")
    assert exit_layers("early_exit") is None and exit_layers("early_exit:layers=4") == 4
    with pytest.raises(SettingError, match="layers=N"):
        exit_layers("early_exit:depth=4")


def test_a_target_with_recurrent_layers_is_refused() -> None:
    """Their state is not a row that could be forgotten."""
    model: LanguageModel = import_module("scripts.tiny_mlx").open_model("qwen3_next")
    with pytest.raises(UnsupportedModelError, match="depends on the path"):
        BACKEND.early_exit(model, 1)
    model.close()


def test_what_is_measured_of_some_layers_is_not_taken_for_others() -> None:
    assert describe_head(BACKEND.early_exit(target(), 1)) != describe_head(head())


def test_the_schedule_may_use_it() -> None:
    settings = LoadSettings(context=256, num_sequences=3)
    with open_pair(str(folder()), backend="mlx", settings=settings, heads=["early_exit:layers=2"]) as pair:
        params = SamplingParams(temperature=0.8, seed=3, max_tokens=16, ignore_eos=True)
        with pair.session("nothing") as plain, pair.session("auto") as drafted:
            assert drafted.generate([*range(40, 60)], params).tokens == plain.generate([*range(40, 60)], params).tokens


def test_without_a_number_about_half_of_the_layers_draft() -> None:
    assert BACKEND.early_exit(target(), None).info.name.endswith("2 of 3 layers")


@pytest.mark.real
def test_llama_cpp_refuses_with_the_reason() -> None:
    if not get_backend("llamacpp").is_installed():
        pytest.skip("needs llama.cpp")
    with pytest.raises(UnsupportedModelError, match="all layers of a model or none"):
        open_pair(str(bundled_path("tiny", "target")), backend="llamacpp", heads=["early_exit:layers=4"])
