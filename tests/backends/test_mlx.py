"""The MLX backend against the contract, how often it waits for the device, and passes that are refused or fail."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest

from localspec import noise
from localspec.errors import BackendError
from localspec.noise import Purpose
from localspec.protocols import LanguageModel, LoadSettings, Step, Tokens, chain_parents
from localspec.testing.conformance import BackendConformance
from localspec.testing.files import write_gguf, write_safetensors
from tests.backends.mlx_backend import BACKEND, ROOT, change_json, host, module, needs_mlx, opened, rows_of, step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlx")


# ---------------------------------------------------------------- the contract


@needs_mlx
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gguf"], scope="class")
class TestConformance(BackendConformance):
    """All architectures that GGUF files of ours may have, and a quantised GGUF file."""

    path: ClassVar[Path]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _file(cls, kind: str, folder: Path) -> None:
        if kind == "gguf":
            TestConformance.path = write_gguf(folder / "suite.gguf", quantization="Q4_0")
        else:
            TestConformance.path = write_safetensors(folder / f"suite-{kind}", architecture=kind)

    def model(self) -> LanguageModel:
        return opened(self.path)


@needs_mlx
@pytest.mark.parametrize("kind", ["llama", "qwen3", "window"], scope="class")
class TestManyInOnePass(BackendConformance):
    """Sequences side by side on the batch axis, trees and windows included."""

    num_random_rounds = 5
    opened: ClassVar[LanguageModel]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _file(cls, kind: str, folder: Path) -> None:
        path = write_safetensors(
            folder / f"many-{kind}", architecture="llama" if kind == "window" else kind, num_layers=2
        )
        if kind == "window":
            types = ["full_attention", "sliding_attention"]
            change_json(path / "config.json", layer_types=types, sliding_window=8)
        TestManyInOnePass.opened = BACKEND.load(path, LoadSettings(context=512, num_sequences=6, batch=True))

    def model(self) -> LanguageModel:
        return self.opened

    def test_it_runs_them_together(self) -> None:
        capabilities = self.model().capabilities
        assert capabilities.batches and capabilities.trees


@needs_mlx
@pytest.mark.slow
@pytest.mark.real
class TestConformanceOfTheBundledDraft(BackendConformance):
    """Real weights, whose rows are sharp and whose rounding is not that of random ones."""

    num_random_rounds = 6

    def model(self) -> LanguageModel:
        return opened(ROOT / "models" / "tiny" / "draft.gguf")


@needs_mlx
class TestSlidingWindowConformance(BackendConformance):
    """Layers with a window of 8 tokens: full-length caches with a mask, so rewinding stays exact."""

    path: ClassVar[Path]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _file(cls, folder: Path) -> None:
        cls.path = write_safetensors(folder / "window", architecture="llama", num_layers=2)
        change_json(cls.path / "config.json", layer_types=["full_attention", "sliding_attention"], sliding_window=8)

    def model(self) -> LanguageModel:
        return opened(self.path)

    def test_rows_equal_those_of_mlx_lm_with_its_ring_buffer(self) -> None:
        """The window is the one that the model was made for."""
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        ids = [int(t) for t in np.random.default_rng(0).integers(3, 200, 30)]
        reference = load_model(self.path)[0]
        cache = make_prompt_cache(reference)
        want = [np.array(reference(mx.array([[token]]), cache=cache)[0, 0]) for token in ids]
        np.testing.assert_allclose(rows_of(self.model(), ids), np.array(want), atol=1e-4)


# ---------------------------------------------------------------- waiting for the device


@needs_mlx
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_round_waits_for_the_device_once(folder: Path, temperature: float) -> None:
    """Four chained draft steps, the verify pass and its winners: one wait, whatever is read afterwards."""
    target = cast(Any, opened(write_gguf(folder / "t.gguf", seed=1)))
    draft = cast(Any, opened(write_gguf(folder / "d.gguf", seed=1, jitter=0.1)))
    states = target.open(), draft.open()
    anchor: Tokens = host(7)
    for round_number in range(3):
        before = target.num_syncs
        segments: list[Tokens] = [anchor]
        for depth in range(4):
            [scores] = draft.forward([step(states[1], segments[-1])])
            keys = noise.keys(5, Purpose.TOKEN, np.array([depth]))
            segments.append(scores.winners(temperature, keys) if temperature else scores.argmax())
        [scores] = target.forward([step(states[0], *segments)])
        keys = noise.keys(5, Purpose.TOKEN, np.arange(5))
        winners = scores.winners(temperature, keys) if temperature else scores.argmax()
        assert target.num_syncs == before, "a pass waited"
        winners.numpy()
        assert target.num_syncs == before + 1
        for segment in segments:
            segment.numpy()
        assert target.num_syncs == before + 1, f"round {round_number}: a drafted token was waited for again"
        anchor = host(int(winners.numpy()[-1]))
        for state in states:
            state.keep((0,))
    for state in states:
        state.close()


@needs_mlx
def test_tokens_made_later_do_not_hold_up_earlier_ones(folder: Path) -> None:
    """Reading one token fetches those made before it, not those made after it."""
    model = cast(Any, opened(write_gguf(folder / "order.gguf")))
    state = model.open()
    [scores] = model.forward([step(state, host(5))])
    first = scores.argmax()
    [scores] = model.forward([step(state, first)])
    second = scores.argmax()
    first.numpy()
    before = model.num_syncs
    second.numpy()
    assert model.num_syncs == before + 1
    state.close()


# ---------------------------------------------------------------- passes


@needs_mlx
def test_a_long_prefill_in_chunks_gives_the_rows_of_short_steps(folder: Path) -> None:
    """Rows on both sides of the cut after 512 tokens, a tree across it included."""
    path = write_safetensors(folder / "long")
    change_json(path / "config.json", max_position_embeddings=2048)
    model = opened(path)
    ids = [int(t) for t in np.random.default_rng(1).integers(3, 200, 700)]
    state = model.open()
    [scores] = model.forward([step(state, host(*ids), rows=(10, 511, 512, 699))])
    whole = scores.rows(range(4)).copy()
    state.keep(())
    parts = []
    for start in range(0, 700, 100):
        [scores] = model.forward([step(state, host(*ids[start : start + 100]))])
        parts.append(scores.rows(range(100)).copy())
        state.keep(range(100))
    np.testing.assert_allclose(whole, np.concatenate(parts)[[10, 511, 512, 699]], atol=1e-5)
    state.truncate(0)
    parents = chain_parents(state, 700)
    parents[600] = -1  # a second root after the cut: its row is that of the token alone
    [scores] = model.forward([Step(state, (host(*ids),), parents, (600,))])
    np.testing.assert_allclose(scores.rows((0,)), rows_of(model, [ids[600]]), atol=1e-5)
    state.close()


@needs_mlx
def test_malformed_steps_are_refused_before_anything_changes(folder: Path) -> None:
    model = opened(write_gguf(folder / "steps.gguf"))
    state, other = model.open(), model.open()
    model.forward([step(state, host(3, 4, 5))])
    wrong = [
        Step(state, (host(1, 2),), np.array([2], np.int32)),
        Step(state, (host(1),), np.array([3], np.int32)),
        Step(state, (host(1),), np.array([-2], np.int32)),
        Step(state, (host(model.vocab_size),), np.array([2], np.int32)),
        Step(state, (host(1, 2),), np.array([2, 3], np.int32), (1, 0)),
        Step(state, (host(1, 2),), np.array([2, 3], np.int32), (2,)),
        Step(opened(write_gguf(folder / "other.gguf")).open(), (host(1),), np.array([-1], np.int32)),
    ]
    for bad in wrong:
        with pytest.raises(ValueError):  # noqa: PT011 - the contract names no more than that
            model.forward([step(other, host(1)), bad])
        assert (state.num_pending, other.num_pending) == (3, 0)
    with pytest.raises(ValueError, match="two steps"):
        model.forward([step(state, host(1)), step(state, host(2))])
    state.close()
    other.close()


@needs_mlx
def test_a_failed_pass_has_not_happened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BackendError with the runtime's message; both sequences go on as before."""
    model = cast(Any, opened(write_gguf(folder / "fails.gguf")))
    states = [model.open(), model.open()]
    for state in states:
        model.forward([step(state, host(3, 4))])
    want = rows_of(model, [3, 4, 5])[2]
    run = model._network.run

    def fail(ids: Any, caches: Any, *rest: Any) -> Any:
        result = run(ids, caches, *rest)
        if caches is states[1].caches:
            raise RuntimeError("the device fell over")
        return result

    monkeypatch.setattr(model._network, "run", fail)
    with pytest.raises(BackendError, match="fell over"):
        model.forward([step(state, host(9, 9)) for state in states])
    monkeypatch.undo()
    for state in states:
        assert (state.length, state.num_pending) == (0, 2)
        [scores] = model.forward([step(state, host(5))])
        assert np.array_equal(scores.rows((0,))[0], want)
        state.close()


# ---------------------------------------------------------------- architectures, judged by what they do

_SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "layer_norm_epsilon": 1e-5, "rope_theta": 1e4,
    "max_position_embeddings": 512, "tie_word_embeddings": True, "n_ctx": 512, "n_embd": 64, "n_head": 4, "n_layer": 2,
    "n_positions": 512, "sliding_window": None, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 16, "kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "qk_nope_head_dim": 16, "n_routed_experts": None, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "rope_parameters": {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16384},
}  # fmt: skip


@needs_mlx
@pytest.mark.parametrize(
    ("architecture", "trees", "width_one_differs"),
    [
        ("gemma2", True, False),
        ("deepseek_v3", True, True),  # latent attention, which goes another way for a single token
        ("gpt2", True, False),  # learned positions
        ("ministral3", False, False),  # scales queries by their position, from 16384 on
    ],
)
def test_the_self_check_finds_what_an_architecture_can_do(
    architecture: str, trees: bool, width_one_differs: bool
) -> None:
    import mlx.core as mx
    from mlx.utils import tree_map

    classes = import_module(f"mlx_lm.models.{architecture}")
    model = classes.Model(classes.ModelArgs.from_dict(_SIZES | {"model_type": architecture}))
    mx.random.seed(0)
    model.update(tree_map(lambda weight: 0.1 * mx.random.normal(weight.shape), model.parameters()))
    network = module("network").Network(model)
    assert (network.trees, network.width_one_differs) == (trees, width_one_differs), network.notes
    assert trees or "No token trees" in network.notes[0]
