"""Heads that guess token by token, loaded beside a target on MLX: the suite for heads, text equality, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from localspec.drafters.head import HeadDrafter
from localspec.drafters.nothing import Nothing
from localspec.engine.session import Session
from localspec.errors import HeadFileError, PairMismatchError, UnsupportedModelError
from localspec.formats import summarize, summarize_head
from localspec.formats.head import read_head_header
from localspec.loading import get_backend
from localspec.protocols import DraftHead, HostTokens, LanguageModel, LoadSettings, Step, chain_parents
from localspec.sampling import SamplingParams
from localspec.testing.eagle3 import Eagle3Reference, write_eagle3
from localspec.testing.files import write_gguf, write_safetensors
from localspec.testing.heads import HeadConformance
from localspec.testing.medusa import write_medusa
from localspec.testing.mtp import write_mtp
from localspec.testing.pair_heads import TargetEnds, guess_row

BACKEND = get_backend("mlx")
TINY = Path(__file__).resolve().parents[2] / "models" / "tiny" / "target.gguf"
pytestmark = pytest.mark.skipif(not BACKEND.is_installed(), reason='needs MLX: pip install "localspec[mlx-cpu]"')

Writer = Callable[[Path, tuple[int, int, int]], object]
"""Writes a head with random weights into a folder, for a target of (hidden size, layers, V)."""

WRITERS: dict[str, Writer] = {
    "eagle3": lambda folder, target: write_eagle3(folder, "eagle", target=target),
    "eagle3-specforge": lambda folder, target: write_eagle3(
        folder, "specforge", target=target, draft_vocab=target[2] // 2
    ),
    "eagle3-speculators": lambda folder, target: write_eagle3(folder, "speculators", target=target),
    "eagle3-deepspec": lambda folder, target: write_eagle3(folder, "deepspec", target=target),
    "medusa": lambda folder, target: write_medusa(folder, target=target),
    "mtp-qwen3_next": lambda folder, target: write_mtp(folder, "qwen3_next", target=target),
    "mtp-deepseek_v3": lambda folder, target: write_mtp(folder, "deepseek_v3", target=target),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@cache
def tiny_target(folder: Path) -> LanguageModel:
    path = write_safetensors(folder / "target", architecture="llama", num_layers=8)
    return BACKEND.load(path, LoadSettings(num_sequences=6))


def sizes(target: Any) -> tuple[int, int, int]:
    """(hidden size, layers, V)."""
    return target.network.body.norm.weight.size, target.network.taps.num_layers, target.vocab_size


@pytest.mark.parametrize("kind", WRITERS, scope="class")
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
        WRITERS[kind](folder / kind, sizes(target))
        TestConformance.path = folder
        TestConformance.opened = BACKEND.load_head(folder / kind, target)
        yield
        TestConformance.opened.close()

    def head(self) -> DraftHead:
        return self.opened

    def target(self) -> LanguageModel:
        return tiny_target(self.path)


@cache
def bundled() -> LanguageModel:
    return BACKEND.load(TINY, LoadSettings(num_sequences=4))


@cache
def plain(temperature: float) -> tuple[int, ...]:
    with Session(bundled(), Nothing()) as session:
        params = SamplingParams(max_tokens=20, temperature=temperature, seed=11)
        return session.generate("Once upon a time", params).tokens


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("kind", WRITERS)
def test_text_is_that_of_plain_decoding(tmp_path: Path, kind: str) -> None:
    """A head of random weights, beside a real target; chains and trees, greedy and sampled."""
    target = bundled()
    WRITERS[kind](tmp_path, sizes(target))
    head = BACKEND.load_head(tmp_path, target)
    for shape in ("chain", "tree"):
        with Session(target, HeadDrafter(head, num=4, shape=shape)) as session:
            for temperature in (0.0, 0.8):
                params = SamplingParams(max_tokens=20, temperature=temperature, seed=11)
                answer = session.generate("Once upon a time", params)
                assert answer.tokens == plain(temperature)
                assert answer.stats.num_drafted > 0
    head.close()


# ---------------------------------------------------------------- refusals


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"architectures": ["SomethingEagle4"]}, "architectures is not known .*SomethingEagle4"),
        ({"hidden_act": "relu"}, "hidden_act .*relu"),
        ({"hidden_size": 32}, r"tensor \S+ has the wrong shape"),
        ({"num_attention_heads": "four"}, "num_attention_heads"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type .*longrope"),
        ({"parallel_drafting": True}, "parallel_drafting is not known"),
        ({"draft_vocab_size": 7}, "draft_vocab_size .*got 320, expected 7"),
        ({"norm_before_fc": True}, "tensor input_norm.weight is missing"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 3, 99]}, "layers that the target does not have"),
        ({"speculators_model_type": "eagle9"}, "speculators_model_type is not known .*eagle9"),
    ],
)
def test_eagle3_headers_that_are_wrong_are_named(tmp_path: Path, folder: Path, values: Any, said: str) -> None:
    target = tiny_target(folder)
    write_eagle3(tmp_path, "eagle", target=sizes(target))
    change_config(tmp_path, **values)
    with pytest.raises(HeadFileError, match=said):
        BACKEND.load_head(tmp_path, target)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("midlayer.self_attn.k_proj.weight"), "tensor midlayer.self_attn.k_proj.weight is missing"),
        (lambda w: w.update({"norm.weight": w["norm.weight"][:-1]}), "tensor norm.weight has the wrong shape"),
        (lambda w: w.update(odd=w["norm.weight"]), "tensor that nothing here knows .*odd"),
        (lambda w: w.update({"d2t": w["d2t"] * 0 + 1}), "t2d and d2t"),
        (lambda w: w.update({"d2t": w["d2t"] - 500}), "tensor d2t names"),
        (lambda w: (w.pop("d2t"), w.pop("t2d")), "tensor d2t is missing"),
    ],
)
def test_eagle3_tensors_that_are_wrong_are_named(tmp_path: Path, folder: Path, change: Any, said: str) -> None:
    target = tiny_target(folder)
    write_eagle3(tmp_path, "eagle", target=sizes(target), draft_vocab=100)
    change_tensors(tmp_path, change)
    with pytest.raises(HeadFileError, match=said):
        BACKEND.load_head(tmp_path, target)


@pytest.mark.parametrize(
    ("layout", "change", "said"),
    [
        ("qwen3_next", lambda w: w.pop("mtp.norm.weight"), "tensor mtp.norm.weight is missing"),
        ("qwen3_next", lambda w: w.pop("mtp.layers.0.self_attn.q_norm.weight"), "0.self_attn.q_norm.weight is missing"),
        (
            "qwen3_next",
            lambda w: w.pop("mtp.layers.0.mlp.experts.2.up_proj.weight"),
            "experts.2.up_proj.weight is miss",
        ),
        (
            "qwen3_next",
            lambda w: w.update({"mtp.layers.0.mlp.experts.4.up_proj.weight": w["mtp.layers.0.mlp.gate.weight"]}),
            "experts.4.up_proj.weight is one too many",
        ),
        ("qwen3_5", lambda w: w.update({"mtp.fc.weight": w["mtp.fc.weight"][:, 1:]}), "mtp.fc.weight has the wrong"),
        (
            "qwen3_5",
            lambda w: w.update({"mtp.layers.0.mlp.up_proj.weight": w["mtp.layers.0.mlp.up_proj.weight"][1:]}),
            "mtp.layers.0.mlp.up_proj.weight has the wrong shape",
        ),
        (
            "deepseek_v3",
            lambda w: w.update({"model.layers.8.odd.weight": np.ones(3, np.float32)}),
            "no place .*8.odd",
        ),
    ],
)
def test_mtp_tensors_that_are_wrong_are_named(
    tmp_path: Path, folder: Path, layout: str, change: Any, said: str
) -> None:
    target = tiny_target(folder)
    write_mtp(tmp_path, layout, target=sizes(target))
    change_tensors(tmp_path, change)
    with pytest.raises(HeadFileError, match=said):
        BACKEND.load_head(tmp_path, target)


@pytest.mark.parametrize(
    ("layout", "change", "said"),
    [
        ("qwen3_5", lambda w: w.update({"mtp.layers.1.x": w["mtp.norm.weight"]}), "several MTP layers .*layers.1.x"),
        (
            "deepseek_v3",
            lambda w: w.update({"model.layers.9.eh_proj.weight": w["model.layers.8.eh_proj.weight"]}),
            "several",
        ),
        (
            "qwen3_5",
            lambda w: [w.update({n.replace("mtp.", "mtp_block.0."): w.pop(n)}) for n in list(w)],
            "layout .*mtp_block",
        ),
    ],
)
def test_mtp_layouts_that_are_not_known_are_named(
    tmp_path: Path, folder: Path, layout: str, change: Any, said: str
) -> None:
    target = tiny_target(folder)
    write_mtp(tmp_path, layout, target=sizes(target))
    change_tensors(tmp_path, change)
    with pytest.raises(UnsupportedModelError, match=said):
        BACKEND.load_head(tmp_path, target)


def test_mtp_of_another_family_is_refused_by_its_name(tmp_path: Path, folder: Path) -> None:
    target = tiny_target(folder)
    write_mtp(tmp_path, "deepseek_v3", target=sizes(target))
    change_config(tmp_path, model_type="step3p5")
    with pytest.raises(UnsupportedModelError, match="got step3p5"):
        BACKEND.load_head(tmp_path, target)


def test_a_layer_that_a_model_ships_is_reached_by_the_models_own_folder(tmp_path: Path) -> None:
    """Target and head from one folder; the target's states are replayed, as it has recurrent layers."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3_5

    path = write_safetensors(tmp_path / "m", num_layers=4)
    vocab = json.loads((path / "config.json").read_text())["vocab_size"]
    config, _ = write_mtp(tmp_path / "layer", "qwen3_5", target=(64, 4, vocab))
    mx.random.seed(5)
    weights: Any = dict(tree_flatten(qwen3_5.Model(qwen3_5.ModelArgs.from_dict(config)).parameters()))
    layer: Any = mx.load(str(tmp_path / "layer" / "model.safetensors"))
    mx.save_safetensors(str(path / "model.safetensors"), weights | layer)
    change_config(path, **config)
    alone = summarize_head(path)
    assert summarize(path).drafter_kind is None
    assert (alone.drafter_kind, alone.target_hidden, alone.num_target_layers) == ("mtp", 64, 4)
    assert alone.total_weight_bytes == sum(value.nbytes for value in layer.values())
    target = BACKEND.load(path, LoadSettings(num_sequences=4))
    with Session(target, Nothing()) as session:
        plainly = session.generate([5, 6, 7, 8], SamplingParams(max_tokens=24, ignore_eos=True)).tokens
    head = BACKEND.load_head(path, target)
    assert head.info.kind == "mtp" and head.info.num_parameters == sum(value.size for value in layer.values())
    with Session(target, HeadDrafter(head, num=3)) as session:
        assert session.generate([5, 6, 7, 8], SamplingParams(max_tokens=24, ignore_eos=True)).tokens == plainly
    target.close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("2.0.linear.bias"), "tensor 2.0.linear.bias is missing"),
        (lambda w: w.pop("1.1.weight"), "tensor 1.1.weight is missing"),
        (lambda w: w.update({"3.1.weight": w["3.1.weight"][:, 1:]}), "tensor 3.1.weight has the wrong shape"),
        (lambda w: w.update(odd=w["0.0.linear.bias"]), "nothing here knows .*odd"),
    ],
)
def test_medusa_tensors_that_are_wrong_are_named(tmp_path: Path, folder: Path, change: Any, said: str) -> None:
    target = tiny_target(folder)
    write_medusa(tmp_path, target=sizes(target))
    change_tensors(tmp_path, change)
    with pytest.raises(HeadFileError, match=said):
        BACKEND.load_head(tmp_path, target)


@pytest.mark.parametrize("kind", ["medusa", "mtp"])
def test_heads_alone_are_told_from_models(tmp_path: Path, kind: str) -> None:
    """Also Medusa's, whose configuration names no model."""
    WRITERS["medusa" if kind == "medusa" else "mtp-qwen3_next"](tmp_path, (64, 8, 320))
    assert summarize(tmp_path).drafter_kind == summarize_head(tmp_path).drafter_kind == kind


def test_pickled_heads_are_refused_with_what_to_do(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "medusa_lm_head.pt").write_bytes(b"PK")
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "medusa_lm_head.pt"):
        with pytest.raises(HeadFileError, match=r"medusa_lm_head.pt.*safetensors.torch.save_file"):
            BACKEND.load_head(path, tiny_target(folder))


def test_a_head_of_another_target_is_refused(tmp_path: Path, folder: Path) -> None:
    write_eagle3(tmp_path, "eagle", target=(48, 8, 320))
    with pytest.raises(PairMismatchError, match=r"fc.weight .*got 48, expected 64"):
        BACKEND.load_head(tmp_path, tiny_target(folder))


def test_a_head_without_an_embedding_takes_a_quantised_targets(tmp_path: Path) -> None:
    """Its rows are dequantised; what the head says is what numpy says of them."""
    import mlx.core as mx

    target: Any = BACKEND.load(write_gguf(tmp_path / "m.gguf", quantization="Q4_0"), LoadSettings(dtype="file"))
    config, weights = write_eagle3(
        tmp_path, "eagle", target=(64, 2, target.vocab_size), changes={"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
    )
    head: Any = BACKEND.load_head(tmp_path, target)
    assert head.info.taps == (-1, 0, 1)
    state = target.open()
    beside = head.open(state)
    ids = np.arange(3, 12, dtype=np.int32)
    target.forward([Step(state, (HostTokens(ids),), chain_parents(state, len(ids)), ())])
    record: dict[int, Any] = {}
    layout = import_module(f"{type(target).__module__.rpartition('.')[0]}.layout")
    target.network.run(mx.array(ids), target.network.caches(), layout.Layout(0, layout.chain(9), 9), None, record)
    state.keep(range(len(ids)))
    taps = np.concatenate([np.array(record[tap][0].astype(mx.float32), np.float64) for tap in head.info.taps], axis=1)
    entered = np.array(target.ends.embed(mx.arange(target.vocab_size)).astype(mx.float32), np.float64)
    want = guess_row(Eagle3Reference(config, weights, TargetEnds(entered, entered)), taps, ids.tolist(), [20])
    np.testing.assert_allclose(beside.start(20).rows([0])[0], want, rtol=0, atol=1e-4)
    target.close()


def test_copies_of_the_targets_ends_are_not_kept(tmp_path: Path, folder: Path) -> None:
    target: Any = tiny_target(folder)
    write_eagle3(tmp_path, "specforge", target=sizes(target))
    embedding, output = (np.array(matrix) for matrix in target.ends.matrices())
    change_tensors(tmp_path, lambda w: w.update({"embed_tokens.weight": embedding, "lm_head.weight": output}))
    head: Any = BACKEND.load_head(tmp_path, target)
    assert head._network.module.embed_tokens.weight is target.network.body.embed_tokens.weight
    assert head._network.module.lm_head.weight is target.network.module.lm_head.weight
    head.close()


def test_a_model_is_no_head(folder: Path) -> None:
    target = tiny_target(folder)
    assert read_head_header(folder / "target") is None
    with pytest.raises((HeadFileError, UnsupportedModelError), match="not a trained head"):
        BACKEND.load_head(folder / "target", target)
