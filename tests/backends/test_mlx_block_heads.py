"""Heads that guess a block in one pass, on MLX: every released layout against numpy, the suite for heads, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from localspec.drafters.head import HeadDrafter
from localspec.drafters.nothing import Nothing
from localspec.engine.session import Session
from localspec.engine.template import render
from localspec.errors import HeadFileError, PairMismatchError
from localspec.loading import get_backend
from localspec.protocols import (
    DraftHead,
    HeadState,
    HostTokens,
    LanguageModel,
    LoadSettings,
    Rewind,
    Scores,
    Step,
    chain_parents,
)
from localspec.sampling import SamplingParams
from localspec.testing.block_heads import BlockSpec, block_tensors, write_block_head
from localspec.testing.block_reference import BlockReference
from localspec.testing.files import write_safetensors
from localspec.testing.heads import HeadConformance

BACKEND = get_backend("mlx")
pytestmark = pytest.mark.skipif(not BACKEND.is_installed(), reason='needs MLX: pip install "localspec[mlx-cpu]"')

SPECS = {
    "dspark": BlockSpec(markov="vanilla", confidence="markov", taps=(0, 1, 2)),
    "dspark-gated": BlockSpec(markov="gated", confidence="plain", taps=(-1, 2)),
    "dspark-rnn": BlockSpec(markov="rnn", confidence="markov", taps=(3,)),
    "dspark-gemma4": BlockSpec(markov="vanilla", gemma=True, keys_are_values=True, softcap=5.0),
    "dspark-gemma4-values": BlockSpec(markov="vanilla", confidence="markov", gemma=True),
    "dflash-deepspec": BlockSpec(),
    "dspark-specforge": BlockSpec(layout="specforge", markov="vanilla", confidence="markov", own_ends=False),
    "dspark-bare": BlockSpec(layout="specforge", markov="vanilla", confidence="markov", own_ends=False, bare=True),
    "dspark-in-place": BlockSpec(layout="specforge", markov="vanilla", in_place=True, own_ends=False),
    "dspark-speculators": BlockSpec(
        layout="speculators", markov="rnn", confidence="markov", draft_vocab=90, window=6, causal="windows"
    ),
    "dspark-speculators-shared": BlockSpec(
        layout="speculators", markov="vanilla", in_place=True, own_ends=False, window=5
    ),
    "dflash-speculators": BlockSpec(layout="speculators", in_place=True, draft_vocab=70),
    "dflash": BlockSpec(layout="z-lab", in_place=True, own_ends=False),
    "dflash-windows": BlockSpec(layout="z-lab", in_place=True, own_ends=False, window=7, causal="windows"),
    "dflash-window-open": BlockSpec(layout="z-lab", in_place=True, own_ends=False, window=7),
    "dflash-causal": BlockSpec(layout="z-lab", in_place=True, own_ends=False, causal="all"),
    "jetspec": BlockSpec(layout="z-lab", in_place=True, own_ends=False, causal="all", jetspec=True, slots=8),
    "dflash2": BlockSpec(layout="z-lab", in_place=True, own_ends=False, convolved=True, window=7),
    "dflash2-causal": BlockSpec(layout="z-lab", in_place=True, own_ends=False, convolved=True, causal="all"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("block-heads")


@cache
def tiny_target(folder: Path) -> Any:
    """Four layers, an output matrix of its own, hidden 64, 320 tokens."""
    path = write_safetensors(folder / "target", architecture="llama", num_layers=4)
    return BACKEND.load(path, LoadSettings(num_sequences=6))


def sized(spec: BlockSpec, target: Any) -> BlockSpec:
    """For this target's vocabulary."""
    return replace(spec, target=(64, 4, target.vocab_size))


def ends(target: Any) -> list[NDArray[np.float32]]:
    """Its embedding and its output matrix."""
    model = target.network.module
    return [np.array(part.weight) for part in (model.model.embed_tokens, model.lm_head)]


# ---------------------------------------------------------------- against numpy


class Watched:
    """A sequence, its head, and what numpy makes of the same tokens."""

    def __init__(
        self, target: Any, reference: BlockReference, taps: Sequence[int], state: Any, beside: HeadState
    ) -> None:
        self.target, self.reference, self.taps = target, reference, taps
        self.state, self.beside = state, beside
        self.tokens: list[int] = []

    def read(self, ids: Sequence[int]) -> None:
        """Commit a chain."""
        self.give(ids, chain_parents(self.state, len(ids)))
        self.state.keep(range(len(ids)))
        self.tokens += ids

    def scores(self, ids: Sequence[int]) -> Scores:
        """Of a chain that becomes pending."""
        step = Step(self.state, (HostTokens(np.array(ids, np.int32)),), chain_parents(self.state, len(ids)))
        [scores] = self.target.forward([step])
        made: Scores = scores
        return made

    def give(self, ids: Sequence[int], parents: Any) -> None:
        """Make nodes pending."""
        step = Step(self.state, (HostTokens(np.array(ids, np.int32)),), np.array(parents, np.int32))
        self.target.forward([step])

    def check(self, anchor: int, num_levels: int) -> None:
        """A tree of guesses, each row and confidence that of its path in numpy."""
        paths: list[list[int]] = [[]]
        rows = [self.beside.start(anchor).rows((0,))[0]]
        sure = [self.beside.confidence()]
        level, number = [-1], 0
        for depth in range(num_levels - 1):
            ids = [(11 * (number + i) + 3 * depth) % self.target.vocab_size for i in range(2 * len(level))][:4]
            parents = [level[i // 2] for i in range(len(ids))]
            made = self.beside.extend(HostTokens(np.array(ids, np.int32)), parents)
            rows += list(made.rows(range(len(ids))))
            sure.append(self.beside.confidence())
            paths += [[*paths[1 + parent], token] for parent, token in zip(parents, ids, strict=True)]
            level = list(range(number, number + len(ids)))
            number += len(ids)
        features = self.features()
        for index, path in enumerate(paths):
            want, chance = self.reference.rows(features, range(len(self.tokens)), anchor, path)
            assert np.array_equal(np.isneginf(rows[index]), np.isneginf(want[-1]))
            known = np.isfinite(want[-1])
            np.testing.assert_allclose(rows[index][known], want[-1][known], atol=1e-4, err_msg=str(path))
            if chance is None:
                assert sure[0] is None
            else:
                assert abs(np.concatenate([part for part in sure if part is not None])[index] - chance[-1]) < 1e-5

    def features(self) -> NDArray[np.float32]:
        """[n, taps * hidden], by running the target's layers over all tokens at once, without its caches."""
        import mlx.core as mx
        from mlx_lm.models.base import create_attention_mask

        if not self.tokens:
            return np.zeros((0, 64 * len(self.taps)), np.float32)
        body = self.target.network.body
        hidden = body.embed_tokens(mx.array([self.tokens]))
        found = {-1: hidden}
        for index, layer in enumerate(body.layers):
            hidden = found[index] = layer(hidden, create_attention_mask(hidden, None), None)
        return np.array(mx.concatenate([found[tap][0] for tap in self.taps], axis=-1))

    def beside_copy(self, state: Any, head: DraftHead) -> Watched:
        """The same of a copy of the sequence."""
        other = Watched(self.target, self.reference, self.taps, state, head.open(state))
        other.tokens = list(self.tokens)
        return other


def module(name: str) -> Any:
    """A module of the backend, which is loaded under a name of the core's choosing."""
    return import_module(f"{type(BACKEND).__module__.rpartition('.')[0]}.{name}")


@pytest.mark.parametrize("blocks", [False, True], ids=["rows", "blocks"])
@pytest.mark.parametrize("kind", SPECS)
def test_rows_are_those_of_an_independent_forward_pass(
    tmp_path: Path, folder: Path, kind: str, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several rounds: kept branches of trees, truncation, forks and saved sequences. blocks: as on CUDA, where
    attention is given whole blocks of cells, and done in separate operations."""
    for name in ("heads.backbone", "heads.attention"):
        monkeypatch.setattr(module(name), "builds_attention", lambda: blocks)
    target = tiny_target(folder)
    spec = sized(SPECS[kind], target)
    head = BACKEND.load_head(write_block_head(tmp_path, spec), target)
    levels = spec.slots - 1 if spec.in_place else spec.slots
    name = kind.split("-")[0].replace("dflash2", "dflash")  # one drafter runs both
    assert (head.info.kind, head.info.levels, head.info.taps) == (name, levels, spec.taps)
    assert head.info.confident == bool(spec.confidence) and head.info.one_pass
    reference = BlockReference(spec, block_tensors(spec), *ends(target))
    state = target.open()
    one = Watched(target, reference, spec.taps, state, head.open(state))
    one.check(5, levels)
    one.read([5, 9, 30, 31, 4])
    one.read([8, 100, 101])
    one.check(12, levels)
    one.give([12, 40, 41, 42, 43], [-1, 0, 0, 2, 2])
    state.keep([0, 2, 4])
    one.tokens += [12, 41, 43]
    one.check(50, levels)
    fork, saved = state.fork(), state.save()
    state.truncate(6)
    one.tokens = one.tokens[:6]
    one.check(60, levels)
    one.read([61, 62])
    for copy in (fork, saved.open()):
        other = Watched(target, reference, spec.taps, copy, head.open(copy))
        other.tokens = [5, 9, 30, 31, 4, 8, 100, 101, 12, 41, 43]
        other.read([50, 51])
        other.check(70, levels)
        copy.close()
    one.check(63, levels)
    state.close()
    head.close()


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("dspark", [256, 512]),
        ("dflash-windows", [256, 512, 256]),  # its windows lie across the border of a block, then behind it
        ("dspark-speculators", [256, 512, 256]),
    ],
)
def test_attention_is_given_few_numbers_of_cells(
    tmp_path: Path, folder: Path, kind: str, shown: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a kernel is built for each; before, that was once a round. Rows are those of the numpy pass there, too."""
    import mlx.core as mx

    monkeypatch.setattr(module("heads.backbone"), "builds_attention", lambda: True)
    monkeypatch.setattr(module("cache"), "BLOCK", 256)
    target = tiny_target(folder)
    spec = sized(SPECS[kind], target)
    head = BACKEND.load_head(write_block_head(tmp_path, spec), target)
    state = target.open()
    one = Watched(target, BlockReference(spec, block_tensors(spec), *ends(target)), spec.taps, state, head.open(state))
    one.read([(7 * i) % target.vocab_size for i in range(240)])
    attention, given = mx.fast.scaled_dot_product_attention, []

    def watched(queries: Any, keys: Any, values: Any, **options: Any) -> Any:
        given.append((queries.shape[2], keys.shape[2], values.shape[2], options["mask"].shape))
        return attention(queries, keys, values, **options)

    for anchor in range(30):
        with monkeypatch.context() as during:
            during.setattr(mx.fast, "scaled_dot_product_attention", watched)
            one.beside.start(anchor)
        one.read([anchor])
    last = given[1::2]  # of two layers the one that has a window
    assert [cells for cells, _ in groupby(keys for _, keys, _, _ in last)] == shown
    assert all(keys == values and mask == (rows, keys) for rows, keys, values, mask in given)
    one.check(12, 2)
    state.close()
    head.close()


def test_the_numpy_pass_would_show_a_wrong_reading(tmp_path: Path, folder: Path) -> None:
    """Taps off by one, and slots that guess in place: both are far from the tolerance."""
    target = tiny_target(folder)
    spec = sized(BlockSpec(markov="vanilla"), target)
    path = write_block_head(tmp_path, spec)
    unread = [np.zeros((1, 1)), np.zeros((1, 1))]
    for wrong in ({"target_layer_ids": [1, 3]}, {"rope_parameters": {"rope_theta": 9e3, "rope_type": "default"}}):
        changed(path, **wrong)
        head = BACKEND.load_head(path, target)
        state = target.open()
        one = Watched(target, BlockReference(spec, block_tensors(spec), *unread), spec.taps, state, head.open(state))
        one.read([5, 9, 30, 31, 4])
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            one.check(12, 2)
        state.close()
        head.close()


def test_tokens_from_before_a_head_are_a_hole(tmp_path: Path, folder: Path) -> None:
    """What it sees later stands at its own positions."""
    target = tiny_target(folder)
    spec = sized(SPECS["dflash-windows"], target)
    head = BACKEND.load_head(write_block_head(tmp_path, spec), target)
    reference = BlockReference(spec, block_tensors(spec), *ends(target))
    state = target.open()
    one = Watched(target, reference, spec.taps, state, beside=None)  # type: ignore[arg-type]
    one.read([5, 9, 30])
    one.beside = head.open(state)
    one.read([31, 4, 8])
    want, _ = reference.rows(one.features()[3:], (3, 4, 5), 12, [])
    np.testing.assert_allclose(one.beside.start(12).rows((0,)), want, atol=1e-4)
    state.close()
    head.close()


# ---------------------------------------------------------------- the suite


@pytest.mark.parametrize("kind", ["dspark", "dspark-rnn", "dspark-speculators", "dflash", "dflash2"], scope="class")
class TestConformance(HeadConformance):
    """Beside a target whose trees are exact."""

    tolerance = 1e-4  # keys are written by passes of other widths, whose last bits differ
    num_random_rounds = 20
    path: ClassVar[Path]
    opened: ClassVar[DraftHead]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _file(cls, kind: str, folder: Path) -> Iterator[None]:
        target = tiny_target(folder)
        TestConformance.path = folder
        TestConformance.opened = BACKEND.load_head(write_block_head(folder / kind, sized(SPECS[kind], target)), target)
        yield
        TestConformance.opened.close()

    def head(self) -> DraftHead:
        return self.opened

    def target(self) -> LanguageModel:
        model: LanguageModel = tiny_target(self.path)
        return model


@cache
def replaying() -> Any:
    """A target with recurrent layers, which runs kept tokens again."""
    return import_module("scripts.tiny_mlx").open_model("qwen3_next")


class TestBesideATargetThatReplays(HeadConformance):
    """Features are those of the verified pass; replayed tokens are not fed twice."""

    tolerance = 1e-3  # as replays are equal within rounding only
    num_random_rounds = 20
    opened: ClassVar[DraftHead]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _file(cls, folder: Path) -> Iterator[None]:
        target = replaying()
        assert target.capabilities.rewind is Rewind.REPLAY
        sizes = (target.ends.hidden_size, target.network.taps.num_layers, target.vocab_size)
        spec = BlockSpec(markov="rnn", confidence="markov", taps=(-1, 0, sizes[1] - 1), target=sizes)
        cls.opened = BACKEND.load_head(write_block_head(folder / "replays", spec), target)
        yield
        cls.opened.close()

    def head(self) -> DraftHead:
        return self.opened

    def target(self) -> LanguageModel:
        model: LanguageModel = replaying()
        return model


@cache
def batching(folder: Path) -> LanguageModel:
    """A target whose steps run as one pass."""
    path = write_safetensors(folder / "batching", architecture="llama", num_layers=4)
    return BACKEND.load(path, LoadSettings(num_sequences=6, batch=True))


class TestBesideATargetThatBatches(HeadConformance):
    """Each sequence is fed its own rows, and none of the padding."""

    tolerance = 1e-4  # keys are written by passes of other widths, whose last bits differ
    num_random_rounds = 20
    path: ClassVar[Path]
    opened: ClassVar[DraftHead]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _file(cls, folder: Path) -> Iterator[None]:
        cls.path, target = folder, batching(folder)
        assert target.capabilities.batches
        cls.opened = BACKEND.load_head(write_block_head(folder / "batched", sized(SPECS["dspark"], target)), target)
        yield
        cls.opened.close()

    def head(self) -> DraftHead:
        return self.opened

    def target(self) -> LanguageModel:
        return batching(self.path)


@pytest.mark.parametrize("kind", ["dspark", "dspark-speculators", "jetspec", "dflash2"])
def test_text_is_that_of_plain_decoding(tmp_path: Path, folder: Path, kind: str) -> None:
    """Chains and trees, greedy and sampled; a head of random weights guesses badly, and changes nothing."""
    target = tiny_target(folder)
    head = BACKEND.load_head(write_block_head(tmp_path, sized(SPECS[kind], target)), target)
    for temperature in (0.0, 0.8):
        params = SamplingParams(max_tokens=24, temperature=temperature, seed=11)
        with Session(target, Nothing()) as session:
            want = session.generate("Once upon a time", params).tokens
        for shape in ("chain", "tree"):
            with Session(target, HeadDrafter(head, shape=shape)) as session:
                answer = session.generate("Once upon a time", params)
                assert answer.tokens == want
                assert answer.stats.num_drafted > 0
    head.close()


def test_a_chain_is_guessed_without_waiting(tmp_path: Path, folder: Path) -> None:
    """Rows stay on the device, and so do the tokens that are chosen from them."""
    target = tiny_target(folder)
    head = BACKEND.load_head(write_block_head(tmp_path, sized(SPECS["dspark-rnn"], target)), target)
    state = target.open()
    beside = head.open(state)
    before = target.num_syncs
    tokens = [beside.start(3).argmax()]
    for level in range(3):
        tokens.append(beside.extend(tokens[-1], [level - 1]).argmax())
    assert target.num_syncs == before
    tokens[-1].numpy()
    assert target.num_syncs == before + 1
    state.close()
    head.close()


# ---------------------------------------------------------------- refusals


def changed(path: Path, **values: Any) -> None:
    """Settings of config.json; None takes one out."""
    file = path / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def changed_tensors(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, path / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("dspark", {"architectures": ["Qwen4DSparkModel"]}, "architectures is not known .*Qwen4DSparkModel"),
        ("dspark", {"markov_head_type": "lstm"}, "markov_head_type is not known .*lstm"),
        ("dspark", {"markov_rank": 0}, "markov_rank does not fit"),
        ("dspark", {"markov_rank": 9}, r"markov_w1.weight has the wrong shape .*\(\d+, 8\).*\(\d+, 9\)"),
        ("dspark", {"block_size": 1}, "block_size"),
        ("dspark", {"mask_token_id": None}, "mask_token_id is missing"),
        ("dspark", {"mask_token_id": 99999}, "mask_token_id is out of range"),
        ("dspark", {"target_layer_ids": [0, 1, 99]}, "a tap is out of range"),
        ("dspark", {"target_layer_ids": [0, 1]}, "fc.weight"),
        ("dspark", {"hidden_act": "relu"}, "hidden_act .*relu"),
        ("dspark", {"num_hidden_layers": 3}, "num_hidden_layers does not fit"),
        ("dspark", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type is not known .*spiral"),
        ("dspark", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types .*linear_attention"),
        ("dspark", {"confidence_head_with_markov": "yes"}, "confidence_head_with_markov"),
        ("dspark-speculators", {"speculators_model_type": "dspark9"}, "speculators_model_type is not known .*dspark9"),
        ("dflash", {"dflash_config": 3}, "dflash_config is wrong"),
        ("dflash-speculators", {"projector_type": "domino"}, "projector_type is not known .*domino"),
        ("dspark-in-place", {"shift_label": True}, "sample_from_anchor and shift_label disagree"),
        ("dspark", {"enable_confidence_head": False}, "enable_confidence_head does not fit"),
        ("dspark", {"confidence_head_with_markov": False}, r"confidence_head.proj.weight has the wrong shape"),
        ("dspark", {"attention_mode": "mla"}, "attention_mode is not known .*mla"),
        ("dflash", {"output_multiplier": 0.2}, "output_multiplier is not known"),
    ],
)
def test_headers_that_are_not_known_are_refused_by_name(
    tmp_path: Path, folder: Path, kind: str, values: dict[str, Any], said: str
) -> None:
    target = tiny_target(folder)
    path = write_block_head(tmp_path, sized(SPECS[kind], target))
    changed(path, **values)
    with pytest.raises(HeadFileError, match=said):
        BACKEND.load_head(path, target)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("dspark", lambda w: w.pop("layers.1.mlp.up_proj.weight"), "lacks the tensor layers.1.mlp.up_proj.weight"),
        ("dspark", lambda w: w.update({"norm.weight": w["norm.weight"][:-1]}), r"norm.weight .*\(63,\).*\(64,\)"),
        ("dspark", lambda w: w.update({"odd.weight": w["norm.weight"]}), "no such tensors .*odd.weight"),
        ("dspark-speculators", lambda w: w.update({"d2t": w["d2t"] * 0 + 9}), "d2t and t2d name different"),
        ("dspark-speculators", lambda w: w.update({"d2t": w["d2t"] + 500}), "tensor d2t"),
        ("dspark-speculators", lambda w: w.pop("lm_head.weight"), "lm_head.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, folder: Path, kind: str, change: Any, said: str
) -> None:
    target = tiny_target(folder)
    path = write_block_head(tmp_path, sized(SPECS[kind], target))
    changed_tensors(path, change)
    with pytest.raises(HeadFileError, match=said):
        BACKEND.load_head(path, target)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [((64, 9, 320), "other layers"), ((32, 4, 320), "another hidden size"), ((64, 4, 300), "another vocabulary")],
)
def test_a_head_of_another_target_is_refused(
    tmp_path: Path, folder: Path, sizes: tuple[int, int, int], said: str
) -> None:
    target = tiny_target(folder)
    hidden, layers, vocab = sizes
    spec = BlockSpec(target=(hidden, layers, target.vocab_size if vocab == 320 else vocab))  # 320: the target's own
    with pytest.raises(PairMismatchError, match=said):
        BACKEND.load_head(write_block_head(tmp_path, spec), target)


def test_copies_of_the_targets_ends_take_no_memory(tmp_path: Path, folder: Path) -> None:
    """DeepSpec's heads carry both, frozen."""
    target = tiny_target(folder)
    module = target.network.module
    path = write_block_head(tmp_path, sized(SPECS["dspark"], target))
    own: Any = BACKEND.load_head(path, target)
    assert own._embedding is not module.model.embed_tokens.weight
    own.close()
    ends = {"embed_tokens.weight": module.model.embed_tokens.weight, "lm_head.weight": module.lm_head.weight}
    changed_tensors(path, lambda w: w.update({name: np.array(array) for name, array in ends.items()}))
    sharing: Any = BACKEND.load_head(path, target)
    assert sharing._embedding is module.model.embed_tokens.weight
    assert sharing._output._weight is module.lm_head.weight
    sharing.close()


def test_a_closed_head_leaves_the_target_as_it_was(tmp_path: Path, folder: Path) -> None:
    """Nothing is wrapped, no sequence is followed, and its states refuse."""
    target = tiny_target(folder)
    head = BACKEND.load_head(write_block_head(tmp_path, sized(SPECS["dspark"], target)), target)
    state = target.open()
    beside = head.open(state)
    assert bool(state.companions)
    saved = state.save()
    head.close()
    opened: Any = saved.open()  # it outlives the head
    assert not opened.companions
    opened.close()
    assert not state.companions
    assert all(type(layer).__name__ != "Tap" for layer in target.network.module.layers)
    with pytest.raises(ValueError, match="closed"):
        beside.start(3)
    with pytest.raises(ValueError, match="closed"):
        head.open(state)
    state.close()


# ---------------------------------------------------------------- a trained head


def tokens_per_call(target: Any, head: DraftHead, prompts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(target calls, accepted guesses + 1 over all of them) after the first call of each prompt: the whole block as a
    greedy chain, 48 tokens or a stop token."""
    calls = emitted = 0
    levels = head.info.levels or 1
    for ids in prompts:
        state = target.open()
        beside = head.open(state)
        one = Watched(target, None, (), state, beside)  # type: ignore[arg-type]
        answer = [int(one.scores(ids).argmax().numpy()[-1])]
        state.keep(range(len(ids)))
        while len(answer) < 48 and answer[-1] not in target.tokenizer.stop_tokens:
            chain = [beside.start(answer[-1]).argmax()]
            for level in range(levels - 1):
                chain.append(beside.extend(chain[-1], [level - 1]).argmax())
            guesses = [int(token.numpy()[0]) for token in chain]
            want = one.scores([answer[-1], *guesses]).argmax().numpy().tolist()
            same = [guess == token for guess, token in zip(guesses, want, strict=False)]
            accepted = same.index(False) if False in same else levels
            stopped = [i for i in range(accepted) if guesses[i] in target.tokenizer.stop_tokens]
            accepted = stopped[0] if stopped else accepted
            state.keep(range(accepted + 1))
            answer += want[: accepted + 1]
            calls, emitted = calls + 1, emitted + accepted + 1
        beside.close()
        state.close()
    return calls, emitted


@pytest.mark.slow
@pytest.mark.shared
def test_a_trained_head_guesses_as_in_the_code_that_trained_it(shared_models: Path) -> None:
    """DeepSpec's own code took 84 target calls for the first 8 chat prompts, 2.131 tokens each; a tap, slot or position
    off by one takes far more."""
    target: Any = BACKEND.load(shared_models / "target", LoadSettings(dtype="float32", num_sequences=1))
    head = BACKEND.load_head(shared_models / "dspark", target)
    lines = (shared_models / "prompts.jsonl").read_text().splitlines()
    prompts = [prompt for prompt in map(json.loads, lines) if prompt["domain"] == "chat"][:8]
    texts = [render(target.tokenizer, prompt["messages"]) for prompt in prompts]
    ids = [target.tokenizer.encode(text, special=True).tolist() for text in texts]
    calls, emitted = tokens_per_call(target, head, ids)
    assert (calls, round(emitted / calls, 3)) == (84, 2.131)
    head.close()
    target.close()
