"""Gemma 4's assistant beside a Gemma 4 on MLX: its rows against numpy, the suite for heads, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from localspec.drafters.head import HeadDrafter
from localspec.drafters.nothing import Nothing
from localspec.engine.session import Session
from localspec.errors import HeadFileError, PairMismatchError, UnsupportedModelError
from localspec.loading import get_backend
from localspec.protocols import DraftHead, HostTokens, LanguageModel, LoadSettings, Step, chain_parents
from localspec.sampling import SamplingParams
from localspec.testing.files import write_safetensors
from localspec.testing.gemma_assistant import assistant_row, write_gemma_assistant
from localspec.testing.heads import HeadConformance

BACKEND = get_backend("mlx")
pytestmark = pytest.mark.skipif(not BACKEND.is_installed(), reason='needs MLX: pip install "localspec[mlx-cpu]"')
WIDTH, NUM_LAYERS = 64, 6


@cache
def gemma(folder: Path) -> Any:
    """A tiny Gemma 4: two sliding layers and a full one, twice, of which the second three read the first one's keys."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.models import gemma4_text

    path = write_safetensors(folder / "target")
    config = json.loads((path / "config.json").read_text()) | {
        "model_type": "gemma4_text", "hidden_size": WIDTH, "num_hidden_layers": NUM_LAYERS, "head_dim": 16,
        "global_head_dim": 32, "num_kv_shared_layers": 3, "num_key_value_heads": 2, "sliding_window": 8,
        "sliding_window_pattern": 3, "hidden_size_per_layer_input": 0, "intermediate_size": 64,
        "use_double_wide_mlp": False, "tie_word_embeddings": True,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    mx.random.seed(7)
    network: Any = gemma4_text.Model(gemma4_text.ModelArgs.from_dict(config))
    weights = tree_map(
        lambda w: w if w.ndim < 2 else mx.random.normal(w.shape) / w.shape[-1] ** 0.5, network.parameters()
    )
    network.update(weights)
    network.save_weights(str(path / "model.safetensors"))
    return BACKEND.load(path, LoadSettings(num_sequences=6))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("assistant")


def sizes(target: Any) -> tuple[int, int, int]:
    return WIDTH, NUM_LAYERS, target.vocab_size


def as_on_cuda(patch: pytest.MonkeyPatch, blocks: bool = True) -> None:
    """There attention over several rows is given whole blocks of cells."""
    patch.setattr(
        import_module(f"{type(BACKEND).__module__.rpartition('.')[0]}.heads.assistant"),
        "builds_attention",
        lambda: blocks,
    )


@pytest.mark.parametrize(("clusters", "blocks"), [(False, False), (True, False), (False, True)], scope="class")
class TestConformance(HeadConformance):
    """blocks: as on CUDA."""

    tolerance = 1e-4  # the target's keys are written by passes of other widths, whose last bits differ
    num_random_rounds = 20
    path: ClassVar[Path]
    opened: ClassVar[DraftHead]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _file(cls, clusters: bool, blocks: bool, folder: Path) -> Iterator[None]:
        target = gemma(folder)
        write_gemma_assistant(folder / f"head{clusters}", target=sizes(target), clusters=clusters)
        with pytest.MonkeyPatch.context() as patch:
            as_on_cuda(patch, blocks)
            TestConformance.path, TestConformance.opened = folder, BACKEND.load_head(folder / f"head{clusters}", target)
        yield
        TestConformance.opened.close()

    def head(self) -> DraftHead:
        return self.opened

    def target(self) -> LanguageModel:
        loaded: LanguageModel = gemma(self.path)
        return loaded


def rows_of(cells: Any, count: int) -> NDArray[np.float64]:
    """[count, heads, size] of a cache's cells."""
    return np.array(cells[0, :, :count], np.float64).swapaxes(0, 1)


@pytest.mark.parametrize("blocks", [False, True], ids=["rows", "blocks"])
@pytest.mark.parametrize("clusters", [False, True])
def test_rows_are_those_of_numpy(
    tmp_path: Path, folder: Path, clusters: bool, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the target's keys, values, embedding and last hidden states as they are; before and behind the window, and
    where that lies behind a whole block of cells."""
    import mlx.core as mx

    as_on_cuda(monkeypatch, blocks)
    target = gemma(folder)
    weights = write_gemma_assistant(tmp_path, target=sizes(target), clusters=clusters)
    head = BACKEND.load_head(tmp_path, target)
    state = target.open()
    beside = head.open(state)
    rng = np.random.default_rng(2)
    entered = np.array(target.ends.embed(mx.arange(target.vocab_size)), np.float64)
    tokens: list[int] = []
    for count in (5, 20, 240):
        ids = rng.integers(0, target.vocab_size, count).astype(np.int32)
        target.forward([Step(state, (HostTokens(ids),), chain_parents(state, count), ())])
        state.keep(range(count))
        tokens += ids.tolist()
        hidden = np.array(target.network.body(mx.array([tokens]))[0, -1], np.float64)
        cells = {
            kind: (rows_of(cache.keys, len(tokens)), rows_of(cache.values, len(tokens)))
            for kind, cache in zip(("sliding_attention", "full_attention"), state.caches[1:], strict=True)
        }
        anchor, *guesses = rng.integers(0, target.vocab_size, 5).tolist()

        def check(row: Any, path: Sequence[int]) -> None:
            want = assistant_row(weights, entered, cells, hidden, path)  # noqa: B023 - used in this round only
            # in float32 a position's angles are the less exact the further it is
            np.testing.assert_allclose(row.astype(np.float64), want, rtol=0, atol=5e-4)

        check(beside.start(anchor).rows([0])[0], [anchor])
        first = beside.extend(HostTokens(np.array(guesses[:2], np.int32)), [-1, -1]).rows([0, 1])
        check(first[0], [anchor, guesses[0]])
        check(first[1], [anchor, guesses[1]])
        check(
            beside.extend(HostTokens(np.array([guesses[2]], np.int32)), [0]).rows([0])[0],
            [anchor, guesses[0], guesses[2]],
        )
        last = beside.extend(HostTokens(np.array([guesses[3]], np.int32)), [2]).rows([0])[0]
        check(last, [anchor, guesses[0], guesses[2], guesses[3]])
    state.close()
    head.close()


def test_guesses_side_by_side_are_given_few_numbers_of_cells(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a kernel is built for each: one while the context grows within a block."""
    import mlx.core as mx

    as_on_cuda(monkeypatch)
    target = gemma(folder)
    write_gemma_assistant(tmp_path, target=sizes(target))
    head = BACKEND.load_head(tmp_path, target)
    state = target.open()
    beside = head.open(state)
    attention, given = mx.fast.scaled_dot_product_attention, set()

    def watched(queries: Any, keys: Any, values: Any, **options: Any) -> Any:
        given.add((queries.shape[2], keys.shape[2], values.shape[2], options["mask"].shape))
        return attention(queries, keys, values, **options)

    for _ in range(12):
        target.forward([Step(state, (HostTokens(np.array([9], np.int32)),), chain_parents(state, 1), ())])
        state.keep([0])
        beside.start(3)
        with monkeypatch.context() as during:
            during.setattr(mx.fast, "scaled_dot_product_attention", watched)
            beside.extend(HostTokens(np.array([4, 5, 6], np.int32)), [-1, -1, -1])
    assert given == {(3, 256, 256, (3, 256))}
    state.close()
    head.close()


def test_text_is_that_of_plain_decoding(tmp_path: Path, folder: Path) -> None:
    target = gemma(folder)
    write_gemma_assistant(tmp_path, target=sizes(target))
    head = BACKEND.load_head(tmp_path, target)
    for temperature in (0.0, 0.8):
        params = SamplingParams(max_tokens=20, temperature=temperature, seed=11, ignore_eos=True)
        with Session(target, Nothing()) as session:
            plain = session.generate([5, 6, 7, 8], params).tokens
        for shape in ("chain", "tree"):
            with Session(target, HeadDrafter(head, num=4, shape=shape)) as session:
                assert session.generate([5, 6, 7, 8], params).tokens == plain
    head.close()


def test_what_is_wrong_is_named(tmp_path: Path, folder: Path) -> None:
    target = gemma(folder)
    write_gemma_assistant(tmp_path, target=sizes(target))
    config = json.loads((tmp_path / "config.json").read_text())

    def refused(error: type[Exception], said: str, **text: Any) -> None:
        changed = config | {"text_config": config["text_config"] | text}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(error, match=said):
            BACKEND.load_head(tmp_path, target)

    refused(HeadFileError, r"layer_types is wrong", layer_types=["full_attention", "odd", "odd"])
    refused(HeadFileError, r"tensor model.embed_tokens.weight has the wrong shape", hidden_size=16)
    refused(HeadFileError, r"enable_moe_block is not known", enable_moe_block=True)
    (tmp_path / "config.json").write_text(json.dumps(config | {"backbone_hidden_size": 48}))
    with pytest.raises(HeadFileError, match=r"projection.weight has the wrong shape .*48"):
        BACKEND.load_head(tmp_path, target)
    write_gemma_assistant(tmp_path, target=(48, NUM_LAYERS, target.vocab_size))
    with pytest.raises(PairMismatchError, match=r"pre_projection.weight .*got 48, expected 64"):
        BACKEND.load_head(tmp_path, target)


def test_other_targets_are_refused(tmp_path: Path, folder: Path) -> None:
    target = BACKEND.load(write_safetensors(tmp_path / "m"), LoadSettings())
    write_gemma_assistant(tmp_path / "h", target=(64, 2, target.vocab_size))
    with pytest.raises(UnsupportedModelError, match="keys of a Gemma 4"):
        BACKEND.load_head(tmp_path / "h", target)
    target.close()
