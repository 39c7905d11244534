"""A safetensors head as a GGUF head: every number arrives, under the name and in the order that llama.cpp wants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from localspec.errors import HeadFileError, PairMismatchError, SettingError, UnsupportedModelError
from localspec.formats import gguf, summarize
from localspec.hub.convert import convert
from localspec.testing.files import write_gguf, write_safetensors
from tests.backends.numpy_heads import Head

HIDDEN, HEADS, KV_HEADS, HEAD, FEED_FORWARD, RANK = 64, 4, 2, 16, 96, 8
Weights = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("target") / "target.gguf", num_layers=6)


def layer(width: int = HIDDEN, *, norms: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HEADS * HEAD, width),
        "self_attn.k_proj": (KV_HEADS * HEAD, width),
        "self_attn.v_proj": (KV_HEADS * HEAD, width),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
        "mlp.gate_proj": (FEED_FORWARD, HIDDEN),
        "mlp.up_proj": (FEED_FORWARD, HIDDEN),
        "mlp.down_proj": (HIDDEN, FEED_FORWARD),
    }
    if norms:
        shapes |= {"self_attn.q_norm": (HEAD,), "self_attn.k_norm": (HEAD,)}
    return shapes


def dspark(num_tokens: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    config = {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "block_size": 5,
        "mask_token_id": 2,
        "target_layer_ids": [-1, 2, 4],
        "markov_rank": RANK,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "vocab_size": num_tokens,
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
        "num_hidden_layers": 2,
    }
    shapes = {
        "embed_tokens": (num_tokens, HIDDEN),
        "lm_head": (num_tokens, HIDDEN),
        "fc": (HIDDEN, 3 * HIDDEN),
        "hidden_norm": (HIDDEN,),
        "norm": (HIDDEN,),
        "markov_head.markov_w1": (num_tokens, RANK),
        "markov_head.markov_w2": (num_tokens, RANK),
        "confidence_head.proj": (1, HIDDEN + RANK),
    }
    shapes["confidence_head.proj.bias"] = (1,)
    for number in range(2):
        shapes |= {f"layers.{number}.{name}": shape for name, shape in layer().items()}
    return config, shapes


def eagle3(num_tokens: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "draft_vocab_size": 50,
        "vocab_size": num_tokens,
        "rope_theta": 10000.0,
        "num_hidden_layers": 1,
    }
    shapes = {"fc": (HIDDEN, 3 * HIDDEN), "norm": (HIDDEN,), "lm_head": (50, HIDDEN)}
    shapes |= {f"midlayer.{name}": shape for name, shape in layer(2 * HIDDEN, norms=False).items()}
    shapes["midlayer.hidden_norm"] = (HIDDEN,)
    return config, shapes


def write(
    folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], more: Weights | None = None
) -> Weights:
    from safetensors.numpy import save_file

    values = np.random.default_rng(7)
    weights: Weights = {
        name if "bias" in name else f"{name}.weight": values.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
    weights |= more or {}
    common = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "intermediate_size": FEED_FORWARD,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(common | config))
    return weights


def num_tokens(target: Path) -> int:
    return summarize(target).vocab_size


def test_a_dspark_head_arrives_whole(target: Path, tmp_path: Path) -> None:
    config, shapes = dspark(num_tokens(target))
    weights = write(tmp_path / "head", config, shapes, {"confidence_head.proj.bias": np.array([0.5], np.float32)})
    report = convert(tmp_path / "head", tmp_path / "head.gguf", quantization="F32", target=target)
    assert report.agreement is None and "by itself" in report.unchecked
    head = Head(tmp_path / "head.gguf")
    assert head.name == "dflash" and head.key("target_layers") == [0, 3, 5]
    assert head.key("block_size") == 5 and head.key("sample_from_anchor") and not head.key("attention.causal")
    assert head.key("rope.freq_base") == 5000.0 and head.key("has_confidence_head")
    for theirs, ours in (
        ("embed_tokens.weight", "token_embd.weight"),
        ("lm_head.weight", "output.weight"),
        ("hidden_norm.weight", "enc.output_norm.weight"),
        ("markov_head.markov_w2.weight", "markov_w2.weight"),
        ("confidence_head.proj.bias", "conf_proj.bias"),
        ("layers.1.self_attn.k_proj.weight", "blk.1.attn_k.weight"),
        ("layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
    ):
        assert np.array_equal(head[ours], weights[theirs]), theirs
    assert len(head.header.tensors) == len(weights)
    mine, other = (gguf.read_header(path).metadata for path in (target, tmp_path / "head.gguf"))
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.pre", "tokenizer.ggml.eos_token_id"):
        assert mine[key] == other[key]
    assert other["tokenizer.ggml.mask_token_id"] == 2


def test_a_tied_head_keeps_one_matrix_and_tables_their_bits(target: Path, tmp_path: Path) -> None:
    config, shapes = dspark(num_tokens(target))
    tied = np.random.default_rng(1).standard_normal((num_tokens(target), HIDDEN)).astype(np.float32)
    write(tmp_path / "head", config, shapes, {"embed_tokens.weight": tied, "lm_head.weight": tied})
    convert(tmp_path / "head", tmp_path / "head.gguf", quantization="Q8_0", target=target)
    tensors = gguf.read_header(tmp_path / "head.gguf").tensors
    assert "output.weight" not in tensors
    kinds = {name: tensors[name].kind for name in ("token_embd.weight", "fc.weight", "markov_w1.weight")}
    assert kinds == {"token_embd.weight": "Q8_0", "fc.weight": "Q8_0", "markov_w1.weight": "F16"}


def test_a_dflash_head_guesses_from_its_second_slot(tmp_path: Path, target: Path) -> None:
    config, shapes = dspark(num_tokens(target))
    shapes = {
        name: shape for name, shape in shapes.items() if name.split(".")[0] in ("fc", "hidden_norm", "norm", "layers")
    }
    inner = {"mask_token_id": 2, "target_layer_ids": [1, 2, 3], "causal": True}
    outer = {key: value for key, value in config.items() if key not in inner and "markov" not in key}
    outer.pop("enable_confidence_head")
    outer |= {"architectures": ["DFlashDraftModel"], "dflash_config": inner}
    outer |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32, "use_sliding_window": True}
    write(tmp_path / "head", outer, shapes)
    convert(tmp_path / "head", tmp_path / "head.gguf", target=target)
    head = Head(tmp_path / "head.gguf")
    assert not head.key("sample_from_anchor") and head.key("attention.causal")
    assert head.key("attention.sliding_window") == 32
    assert head.key("attention.sliding_window_pattern") == [True, False]
    assert head.key("target_layers") == [2, 3, 4] and "token_embd.weight" not in head


@pytest.mark.parametrize("as_folder", [False, True])
def test_an_eagle3_head_arrives_with_neighbours_paired(tmp_path: Path, as_folder: bool) -> None:
    beside = (
        write_safetensors(tmp_path / "t", num_layers=8) if as_folder else write_gguf(tmp_path / "t.gguf", num_layers=8)
    )
    config, shapes = eagle3(num_tokens(beside))
    ids = np.sort(np.random.default_rng(2).choice(num_tokens(beside), 50, replace=False))
    weights = write(tmp_path / "head", config, shapes, {"d2t": ids - np.arange(50)})
    convert(tmp_path / "head", tmp_path / "head.gguf", quantization="F32", target=beside)
    head = Head(tmp_path / "head.gguf")
    assert head.name == "eagle3" and head.key("target_layers") == [2, 4, 5] and head.key("target_hidden_size") == HIDDEN
    stored = head.header.tensors["d2t"]
    assert np.fromfile(tmp_path / "head.gguf", np.int64, 50, offset=stored.offset).tolist() == ids.tolist()
    for name, heads in (("q", HEADS), ("k", KV_HEADS)):
        theirs = weights[f"midlayer.self_attn.{name}_proj.weight"].reshape(heads, HEAD, -1)
        ours = head[f"blk.0.attn_{name}.weight"].reshape(heads, HEAD, -1)
        assert np.array_equal(ours[:, ::2], theirs[:, : HEAD // 2])
        assert np.array_equal(ours[:, 1::2], theirs[:, HEAD // 2 :])
    assert np.array_equal(head["blk.0.attn_norm_2.weight"], weights["midlayer.hidden_norm.weight"])


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "Markov head": (
        {"markov_head_type": "gated"},
        {"markov_head.gate_proj": (RANK, HIDDEN + RANK), "markov_head.gate_proj.bias": (RANK,)},
        UnsupportedModelError,
        "Markov head.*gated",
    ),
    "scaling": ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, {}, UnsupportedModelError, "yarn"),
    "rotation": ({"rope_is_neox_style": False}, {}, UnsupportedModelError, "neighbours"),
    "taps": ({"target_layer_ids": None}, {}, HeadFileError, "target_layer_ids"),
    "width": ({"target_layer_ids": [1, 2]}, {}, HeadFileError, "fc.weight"),
    "block_size": ({"block_size": None}, {}, HeadFileError, "block_size"),
    "tensor": ({}, {"g_proj": (4, 4)}, HeadFileError, "g_proj"),
    "vocabulary": (
        {"vocab_size": 99},
        dict.fromkeys(("embed_tokens", "lm_head"), (99, HIDDEN))
        | dict.fromkeys(("markov_head.markov_w1", "markov_head.markov_w2"), (99, RANK)),
        PairMismatchError,
        "another vocabulary",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_llama_cpp_would_compute_wrongly_is_refused(what: str, target: Path, tmp_path: Path) -> None:
    change, tensors, error, words = WRONG[what]
    config, shapes = dspark(num_tokens(target))
    write(tmp_path / "head", config | change, shapes | tensors)
    with pytest.raises(error, match=words):
        convert(tmp_path / "head", tmp_path / "head.gguf", target=target)
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_other_numbers_of_taps_are_refused_for_eagle3(target: Path, tmp_path: Path) -> None:
    config, shapes = eagle3(num_tokens(target))
    config["eagle_aux_hidden_state_layer_ids"] = [1, 2, 3, 4, 5]
    write(tmp_path / "head", config, shapes | {"fc": (HIDDEN, 5 * HIDDEN)}, {"d2t": np.arange(50)})
    with pytest.raises(UnsupportedModelError, match=r"number of taps.*got 5"):
        convert(tmp_path / "head", tmp_path / "head.gguf", target=target)


def test_a_head_needs_its_target_and_a_model_none(target: Path, tmp_path: Path) -> None:
    config, shapes = dspark(num_tokens(target))
    write(tmp_path / "head", config, shapes)
    with pytest.raises(SettingError, match="--target"):
        convert(tmp_path / "head", tmp_path / "head.gguf")
    with pytest.raises(SettingError, match="GGUF only"):
        convert(tmp_path / "head", tmp_path / "out", target=target)
    with pytest.raises(SettingError, match="F32"):
        convert(tmp_path / "head", tmp_path / "head.gguf", quantization="Q4_K_M", target=target)
    model = write_safetensors(tmp_path / "model")
    with pytest.raises(SettingError, match="only a trained head"):
        convert(model, tmp_path / "model.gguf", target=target)
