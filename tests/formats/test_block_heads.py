"""Headers of block heads: every layout says the same head in its own words; what is not a head is None."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localspec.errors import HeadFileError, ModelFileError, ModelNotFoundError
from localspec.formats.block_tensors import BlockDetails
from localspec.formats.head import HeadHeader, read_head_header
from localspec.formats.head_kind import head_kind
from localspec.formats.summary import summarize
from localspec.testing.block_heads import BlockSpec, write_block_head
from localspec.testing.files import write_gguf, write_safetensors


def read(path: Path) -> tuple[HeadHeader, BlockDetails]:
    header = read_head_header(path)
    assert header is not None and isinstance(header.details, BlockDetails)
    return header, header.details


@pytest.mark.parametrize(
    ("spec", "kind", "layout"),
    [
        (BlockSpec(markov="gated", confidence="markov", taps=(-1, 2)), "dspark", "deepspec"),
        (BlockSpec(gemma=True, keys_are_values=True, markov="vanilla", softcap=30.0), "dspark", "deepspec"),
        (BlockSpec(), "dflash", "deepspec"),
        (BlockSpec(confidence="plain"), "dspark", "deepspec"),
        (BlockSpec(layout="specforge", markov="vanilla", own_ends=False), "dspark", "specforge"),
        (BlockSpec(layout="speculators", markov="rnn", confidence="plain", draft_vocab=50), "dspark", "speculators"),
        (BlockSpec(layout="speculators", in_place=True, own_ends=False), "dflash", "speculators"),
        (BlockSpec(layout="z-lab", in_place=True, own_ends=False), "dflash", "z-lab"),
        (BlockSpec(layout="z-lab", in_place=True, own_ends=False, causal="all", jetspec=True), "jetspec", "z-lab"),
        (BlockSpec(layout="z-lab", in_place=True, own_ends=False, convolved=True, window=9), "dflash2", "z-lab"),
    ],
)
def test_a_layout_is_read_as_what_the_head_does(tmp_path: Path, spec: BlockSpec, kind: str, layout: str) -> None:
    """Taps in one convention whatever the file's, and the same kind as the summary's."""
    header, details = read(write_block_head(tmp_path, spec))
    assert (header.kind, header.layout, header.taps) == (kind, layout, spec.taps)
    assert (header.target_hidden, header.vocab_size, header.draft_vocab) == (64, 320, spec.draft_vocab or None)
    assert (details.block_size, details.in_place, details.mask_token) == (spec.slots, spec.in_place, spec.mask_token)
    assert details.num_levels == spec.slots - spec.in_place
    assert (details.markov, details.confidence) == (spec.markov, bool(spec.confidence))
    assert details.confidence_sees_markov == (spec.confidence == "markov")
    assert details.windows == (None,) * (spec.num_layers - 1) + (spec.window or None,)
    assert details.causal == (spec.causal == "all",) * spec.num_layers
    assert (details.own_embedding, details.own_output) == (spec.own_ends, spec.own_ends)
    backbone = header.backbone
    assert backbone is not None and backbone.rope_theta == spec.rope_theta
    assert (backbone.num_kv_heads, backbone.head_size) == (spec.num_kv_heads, spec.head_size)
    assert summarize(tmp_path).drafter_kind == kind


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["fc.weight", "hidden_norm.weight", "d2t"], "dflash"),
        (["model.fc.weight", "model.hidden_norm.weight", "model.markov_w1.weight"], "dspark"),
        (["markov_head.markov_w2.weight"], "dspark"),
        (["candidate_selector.odd"], "dflash2"),
        (["midlayer.odd"], "eagle3"),
        (["fc.weight", "d2t"], "eagle3"),
        (["0.0.linear.weight"], "medusa"),
        (["0.0.linear.weight", "model.embed_tokens.weight"], None),
        (["odd"], None),
    ],
)
def test_the_kind_is_told_where_settings_are_odd_and_tensors_are_missing(names: list[str], kind: str | None) -> None:
    """A summary has no opinion on what is wrong with a head; that it is one keeps it from being run alone."""
    odd = {"dflash_config": 3, "architectures": {}, "model_type": 7, "speculators_model_type": []}
    assert head_kind(odd, names) == kind


@pytest.mark.parametrize(
    ("values", "causal"),
    [
        ({}, (False, True)),  # layers with a window are, others not
        ({"is_causal": False}, (False, False)),
        ({"dflash_config": {"causal": True}}, (True, True)),
        ({"is_causal": False, "dflash_config": {"causal": True}}, (False, False)),
    ],
)
def test_causality_is_what_the_file_says_first(
    tmp_path: Path, values: dict[str, Any], causal: tuple[bool, ...]
) -> None:
    path = write_block_head(
        tmp_path, BlockSpec(layout="z-lab", in_place=True, own_ends=False, window=9, causal="windows")
    )
    config = json.loads((path / "config.json").read_text())
    nested = config["dflash_config"] | values.pop("dflash_config", {})
    (path / "config.json").write_text(json.dumps(config | values | {"dflash_config": nested}))
    assert read(path)[1].causal == causal


def test_taps_that_z_lab_leaves_out_are_spread_over_the_target(tmp_path: Path) -> None:
    """round(1 + i (layers - 4) / (head's layers - 1))."""
    spec = BlockSpec(
        layout="z-lab", in_place=True, own_ends=False, taps=(1, 13, 25), num_layers=3, target=(64, 28, 320)
    )
    path = write_block_head(tmp_path, spec)
    config = json.loads((path / "config.json").read_text())
    del config["dflash_config"]["target_layer_ids"]
    (path / "config.json").write_text(json.dumps(config))
    assert read(path)[0].taps == (1, 13, 25)
    del config["num_target_layers"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadFileError, match="target_layer_ids is missing"):
        read_head_header(path)


def test_a_rotated_fraction_of_the_target_is_not_the_heads(tmp_path: Path) -> None:
    """It leaks into configurations that are copied from the target's; the released heads turn everything."""
    path = write_block_head(tmp_path, BlockSpec())
    config = json.loads((path / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.25}
    (path / "config.json").write_text(json.dumps(config))
    backbone = read(path)[0].backbone
    assert backbone is not None and backbone.rope_scaling is not None
    assert "partial_rotary_factor" not in backbone.rope_scaling and backbone.rope_scaling["factor"] == 4.0


def test_stages_inside_a_model_are_named(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dspark_block_size": 5}))
    with pytest.raises(HeadFileError, match="dspark_block_size"):
        read_head_header(path)


def test_models_are_no_heads(tmp_path: Path) -> None:
    assert read_head_header(write_safetensors(tmp_path / "m")) is None
    assert read_head_header(write_gguf(tmp_path / "m.gguf")) is None
    with pytest.raises(ModelNotFoundError):
        read_head_header(tmp_path / "nothing")
    with pytest.raises(ModelFileError, match="Give the folder"):
        read_head_header(tmp_path / "m" / "model.safetensors")


def test_a_gguf_head_is_read_by_its_own_conventions(tmp_path: Path) -> None:
    """llama.cpp counts taps by the inputs of layers."""
    from gguf import GGUFWriter

    path = tmp_path / "head.gguf"
    writer = GGUFWriter(path, "dflash")
    writer.add_array("dflash.target_layers", [1, 3])
    for key, value in (("block_size", 7), ("embedding_length", 64), ("block_count", 2), ("feed_forward_length", 96)):
        writer.add_uint32(f"dflash.{key}", value)
    for key, value in (("head_count", 4), ("head_count_kv", 2), ("key_length", 16)):
        writer.add_uint32(f"dflash.attention.{key}", value)
    writer.add_bool("dflash.sample_from_anchor", True)
    writer.add_uint32("tokenizer.ggml.mask_token_id", 7)
    shapes = {
        "fc.weight": (64, 128),
        "token_embd.weight": (320, 64),
        "markov_w1.weight": (320, 8),
        "conf_proj.weight": (1, 72),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header, details = read(path)
    assert (header.kind, header.taps, header.target_hidden, header.vocab_size) == ("dspark", (0, 2), 64, 320)
    assert (details.num_levels, details.in_place, details.markov_rank, details.confidence) == (7, False, 8, True)
    assert details.own_embedding and not details.own_output
