"""Features of committed tokens reach a head's companion, whatever happens to the sequence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from localspec.errors import UnsupportedModelError
from localspec.loading import get_backend
from localspec.protocols import HostTokens, LoadSettings, Step, chain_parents
from localspec.testing.files import write_safetensors

BACKEND = get_backend("mlx")
pytestmark = pytest.mark.skipif(not BACKEND.is_installed(), reason='needs MLX: pip install "localspec[mlx-cpu]"')
TAPS = (-1, 0, 2, -2)  # the embedding, two layers, and behind the final norm


def module(name: str) -> Any:
    """A module of the backend, which is loaded under a name of the core's choosing."""
    return import_module(f"{type(BACKEND).__module__.rpartition('.')[0]}.{name}")


def recorder(head: Any = None, taps: tuple[int, ...] = TAPS) -> Any:
    """A companion that keeps all it is fed."""

    class Recorder(module("companion").Companion):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(head, taps)
            self.rows: dict[int, tuple[int, Any]] = {}

        def feed(self, tokens: Any, features: Any, start: int) -> None:
            assert tokens.shape[0] == features.shape[0]
            assert all(position < start for position in self.rows)
            for index in range(tokens.shape[0]):
                self.rows[start + index] = (int(tokens[index]), features[index])

        def truncate(self, length: int) -> None:
            self.rows = {position: row for position, row in self.rows.items() if position < length}

        def copy(self) -> Any:
            other = Recorder()
            other.rows = dict(self.rows)
            return other

        def arrays(self) -> list[Any]:
            return [features for _, features in self.rows.values()]

    return Recorder()


@pytest.fixture(scope="module", params=["llama", "qwen3_next"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A model whose rewinding is free, and one that replays; its features are read."""
    folder = tmp_path_factory.mktemp("taps")
    if request.param == "llama":
        loaded: Any = BACKEND.load(write_safetensors(folder / "m", num_layers=3), LoadSettings(num_sequences=6))
    else:
        loaded = recurrent(folder)
    loaded.network.taps.add(TAPS)
    yield loaded
    loaded.close()


def recurrent(folder: Path) -> Any:
    """A small model with recurrent layers."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3_next

    from localspec.testing.files import tiny_checkpoint

    path = write_safetensors(folder / "r", num_layers=3)
    config = {
        **tiny_checkpoint(num_layers=3).config,
        "model_type": "qwen3_next", "num_hidden_layers": 3, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "num_experts": 0,
        "num_experts_per_tok": 0, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 0,
        "moe_intermediate_size": 0, "mlp_only_layers": [], "partial_rotary_factor": 1.0, "full_attention_interval": 2,
        "rope_theta": 1e4, "architectures": ["Qwen3NextForCausalLM"],
    }  # fmt: skip
    mx.random.seed(3)
    network = qwen3_next.Model(qwen3_next.ModelArgs.from_dict(config))
    weights: Any = dict(tree_flatten(network.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    (path / "config.json").write_text(json.dumps(config))
    return BACKEND.load(path, LoadSettings(num_sequences=6))


def run(model: Any, state: Any, ids: Sequence[int], parents: Sequence[int] | None = None) -> None:
    """Pending nodes, no row scored."""
    chain = chain_parents(state, len(ids)) if parents is None else np.array(parents, np.int32)
    model.forward([Step(state, (HostTokens(np.array(ids, np.int32)),), chain, ())])


def want(model: Any, ids: Sequence[int]) -> NDArray[np.float32]:
    """[T, taps * hidden] features of a chain, by running the layers one by one without any of our caches."""
    import mlx.core as mx
    from mlx_lm.models.base import create_attention_mask, create_ssm_mask

    body = model.network.body
    hidden = body.embed_tokens(mx.array([list(ids)]))
    found = {-1: hidden}
    for index, layer in enumerate(body.layers):
        linear = getattr(layer, "is_linear", False)
        mask = create_ssm_mask(hidden, None) if linear else create_attention_mask(hidden, None)
        hidden = found[index] = layer(hidden, mask, None)
    found[-2] = body.norm(hidden)
    return np.array(mx.concatenate([found[tap][0] for tap in TAPS], axis=-1))


def check(model: Any, state: Any, companion: Any, ids: Sequence[int], missing: Sequence[int] = ()) -> None:
    """Asked for, it holds exactly these tokens with the features of the chain that they are."""
    state.companions.settle()
    assert [companion.rows[position][0] for position in sorted(companion.rows)] == [
        token for position, token in enumerate(ids) if position not in missing
    ]
    rows = want(model, ids)
    for position, (token, features) in companion.rows.items():
        assert token == ids[position]
        np.testing.assert_allclose(np.array(features), rows[position], atol=2e-4)


def test_kept_rows_reach_a_companion(model: Any) -> None:
    """Chunked prefill, partial keeps, growing over several passes, truncation, forks and saved copies."""
    state = model.open()
    companion = recorder()
    state.companions.add(companion)
    run(model, state, [5, 6, 7, 8, 9])
    state.keep(range(5))
    check(model, state, companion, [5, 6, 7, 8, 9])
    run(model, state, [10, 11])
    run(model, state, [12, 13])
    state.keep([0, 1, 2])
    check(model, state, companion, [5, 6, 7, 8, 9, 10, 11, 12])
    fork, saved = state.fork(), state.save()
    state.truncate(6)
    check(model, state, companion, [5, 6, 7, 8, 9, 10])
    run(model, state, [20, 21])
    state.keep([0])
    check(model, state, companion, [5, 6, 7, 8, 9, 10, 20])
    state.keep(())
    for copy in (fork, saved.open()):
        of_copy = copy.companions.of(None)
        check(model, copy, of_copy, [5, 6, 7, 8, 9, 10, 11, 12])
        run(model, copy, [30, 31, 32])
        copy.keep([0, 1])
        check(model, copy, of_copy, [5, 6, 7, 8, 9, 10, 11, 12, 30, 31])
        copy.close()
        assert not of_copy.rows
    check(model, state, companion, [5, 6, 7, 8, 9, 10, 20])
    assert saved.num_bytes > sum(array.nbytes for array in companion.arrays())
    state.close()
    assert not companion.rows


def test_features_wait_until_someone_asks(model: Any) -> None:
    """Plain passes feed nobody; what waits follows truncation, and never grows without bound."""
    state = model.open()
    companion = recorder()
    state.companions.add(companion)
    for tokens in ([5, 6, 7], [8], [9, 10], [11]):
        run(model, state, tokens)
        state.keep(range(len(tokens)))
    assert not companion.rows
    state.truncate(5)
    run(model, state, [12, 13])
    state.keep([0])
    assert not companion.rows
    check(model, state, companion, [5, 6, 7, 8, 9, 12])
    ids = [5, 6, 7, 8, 9, 12, *range(14, 44), *range(14, 44), *range(14, 44)]
    for token in ids[6:]:
        run(model, state, [token])
        state.keep([0])
    assert len(ids) - 65 <= len(companion.rows) < len(ids)
    check(model, state, companion, ids)
    run(model, state, [20])
    state.keep([0])
    state.companions.remove(companion)
    state.companions.add(late := recorder())
    state.companions.settle()
    assert not late.rows
    state.close()


def test_tokens_from_before_a_companion_are_a_hole(model: Any) -> None:
    """Committed and pending alike: what follows stands at its own position."""
    state = model.open()
    run(model, state, [5, 6])
    state.keep([0, 1])
    run(model, state, [7])
    companion = recorder()
    state.companions.add(companion)
    run(model, state, [8, 9])
    state.keep([0, 1, 2])
    check(model, state, companion, [5, 6, 7, 8, 9], missing=(0, 1, 2))
    state.companions.remove(companion)
    run(model, state, [8, 9])
    state.keep([0, 1])
    assert not companion.rows
    state.close()


def test_the_kept_branch_of_a_tree_is_fed(model: Any) -> None:
    if not model.capabilities.trees:
        pytest.skip("chains only")
    state = model.open()
    companion = recorder()
    state.companions.add(companion)
    run(model, state, [5, 6])
    state.keep([0, 1])
    run(model, state, [7, 8, 9], [-1, -1, 1])
    run(model, state, [10, 11, 12], [2, 0, 2])
    state.keep([1, 2, 5])
    check(model, state, companion, [5, 6, 8, 9, 12])
    state.close()


def test_sequences_in_one_pass_are_fed_their_own_rows(tmp_path: Path) -> None:
    """Of different widths, so that the shorter one is padded; one of them without a companion."""
    path = write_safetensors(tmp_path / "joint", num_layers=3)
    model: Any = BACKEND.load(path, LoadSettings(num_sequences=3, batch=True))
    assert model.capabilities.batches
    model.network.taps.add(TAPS)
    states = [model.open() for _ in range(3)]
    companions = [recorder(), recorder()]
    for state, companion in zip(states, companions, strict=False):
        state.companions.add(companion)
    prompts = ([5, 6, 7, 8], [9, 10], [11, 12, 13])
    model.forward([
        Step(state, (HostTokens(np.array(ids, np.int32)),), chain_parents(state, len(ids)))
        for state, ids in zip(states, prompts, strict=True)
    ])  # fmt: skip
    for state, ids in zip(states, prompts, strict=True):
        state.keep(range(len(ids) - 1))
    for state, companion, ids in zip(states, companions, prompts, strict=False):
        check(model, state, companion, ids[:-1])
    model.close()


def test_nothing_is_wrapped_without_a_head(model: Any) -> None:
    """Taps leave the model as it was, and those that others still want in place."""
    taps, tap = model.network.taps, module("taps").Tap
    layers = model.network.module.layers
    before = [isinstance(layer, tap) for layer in layers]
    assert before == [True, False, True]
    taps.add((2, 1))
    assert isinstance(model.network.module.layers[1], tap)
    taps.remove((2, 1))
    assert [isinstance(layer, tap) for layer in model.network.module.layers] == before


# ---------------------------------------------------------------- other architectures


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("qwen3", 1.0),
        ("gemma3_text", None),
        ("cohere2", 1.0),
        ("deepseek_v3", 1.0),
        ("gpt_oss", 1.0),
        ("nemotron_h", 1.0),
    ],
)
def test_a_target_lends_its_embedding_and_its_output_matrix(name: str, scale: float | None) -> None:
    """With what the model multiplies them by: Gemma's embeddings, Cohere's logits."""
    import mlx.core as mx

    model = import_module("scripts.tiny_mlx").open_model(name)
    ends, body = model.ends, model.network.body
    ends.check_taps((0, model.network.taps.num_layers - 1))
    ids = mx.array([3, 9])
    raw = next(body[key] for key in ("embed_tokens", "embeddings") if key in body)(ids)
    factor = ends.hidden_size**0.5 if scale is None else scale
    np.testing.assert_allclose(np.array(ends.embed(ids)), np.array(raw) * factor, rtol=1e-2)
    state = model.open()
    model.network.taps.add((-2,))
    companion = recorder(taps=(-2,))
    state.companions.add(companion)
    [scores] = model.forward([Step(state, (HostTokens(np.array([3, 9, 4], np.int32)),), chain_parents(state, 3))])
    state.keep(range(3))
    state.companions.settle()
    hidden = mx.stack([companion.rows[i][1] for i in range(3)])
    np.testing.assert_allclose(np.array(ends.score(hidden)), scores.rows(range(3)), atol=1e-4)
    model.close()


@pytest.mark.parametrize(
    ("name", "why"),
    [("gpt2", "adds something to its embeddings"), ("gptj", None), ("deepseek_v41", "read something else")],
)
def test_a_target_that_cannot_lend_them_says_why(name: str, why: str | None) -> None:
    """Layers that are called by keyword are read as well as others."""
    model = import_module("scripts.tiny_mlx").open_model(name)
    if why is None:
        model.ends.check_taps((-1, 0))
    else:
        with pytest.raises(UnsupportedModelError, match=why):
            _ = model.ends
    model.close()
