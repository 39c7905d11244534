"""Block heads with random weights in the layouts that are released, tiny.

    spec = BlockSpec(layout="deepspec", markov="rnn", target=(64, 4, 320))
    write_block_head(folder, spec)
    reference = BlockReference(spec, block_tensors(spec))        # localspec/testing/block_reference.py

What a head does is said once, in the spec; its files say it in the words of each layout. Names and shapes are written
down here a second time on purpose: `localspec/formats` reads them, and two that agree by construction check nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localspec.testing.files import write_folder

__all__ = ["BlockSpec", "block_tensors", "write_block_head"]

_HEADS, _KV_HEADS, _HEAD, _FEED_FORWARD = 4, 2, 16, 96


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """What a head does.

    layout: deepspec, specforge, speculators or z-lab; bare: SpecForge's other names.  target: (hidden size, layers,
    vocabulary).  taps: outputs of the target's layers, -1 its embedding.  slots: the block's size, the anchor's slot
    included.  in_place: slot i guesses the token at its own place, the anchor's nothing.  window: of the last layer, 0
    for none.  causal: which layers hide later slots: "", windows or all.  confidence: "", plain or markov.
    draft_vocab: 0 for all of the target's.  own_ends: it carries an embedding and an output matrix.
    """

    layout: str = "deepspec"
    target: tuple[int, int, int] = (64, 4, 320)
    taps: tuple[int, ...] = (0, 2)
    num_layers: int = 2
    slots: int = 5
    in_place: bool = False
    causal: str = ""
    window: int = 0
    markov: str = ""
    rank: int = 8
    confidence: str = ""
    draft_vocab: int = 0
    own_ends: bool = True
    gemma: bool = False
    keys_are_values: bool = False
    convolved: bool = False
    jetspec: bool = False
    bare: bool = False
    mask_token: int = 7
    rope_theta: float = 5000.0
    softcap: float = 0.0
    seed: int = 0

    @property
    def num_draft_tokens(self) -> int:
        """Tokens that it can guess."""
        return self.draft_vocab or self.target[2]

    num_heads, num_kv_heads, head_size, feed_forward = _HEADS, _KV_HEADS, _HEAD, _FEED_FORWARD
    eps = 1e-6
    kernel, group, candidates = 2, 8, 6


def write_block_head(folder: Path, spec: BlockSpec) -> Path:
    """Write config.json and model.safetensors into `folder`, and return it."""
    tensors = {_stored_name(spec, name): array for name, array in block_tensors(spec).items()}
    return write_folder(folder, _config(spec), tensors)


def block_tensors(spec: BlockSpec) -> dict[str, NDArray[Any]]:
    """The head's tensors by DeepSpec's names: those of z-lab and speculators are the same, SpecForge has a prefix."""
    rng = np.random.default_rng((spec.seed, 77))
    found: dict[str, NDArray[Any]] = {}
    for name, shape in _shapes(spec):
        values = rng.standard_normal(shape, np.float32)
        if "norm" in name:
            found[name] = 1 + values / 10
        elif name.endswith("layer_scalar"):
            found[name] = 1 + values / 4
        elif name.endswith("bias"):
            found[name] = values / 2
        elif "codebook" in name:
            found[name] = values
        elif name == "lm_head.weight" or "markov_w2" in name:
            found[name] = values * np.float32(3 * shape[-1] ** -0.5)
        else:
            found[name] = values * np.float32(shape[-1] ** -0.5)
    if spec.draft_vocab:
        known = np.sort(rng.permutation(spec.target[2])[: spec.draft_vocab])
        found["d2t"] = known - np.arange(spec.draft_vocab)
        found["t2d"] = np.isin(np.arange(spec.target[2]), known)
    return found


def _shapes(spec: BlockSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, _, vocab = spec.target
    draft, rank = spec.num_draft_tokens, spec.rank
    yield "fc.weight", (hidden, len(spec.taps) * hidden)
    yield "hidden_norm.weight", (hidden,)
    yield "norm.weight", (hidden,)
    if spec.own_ends:
        yield "embed_tokens.weight", (vocab, hidden)
        yield "lm_head.weight", (draft, hidden)
    for layer in range(spec.num_layers):
        for name, shape in _layer_shapes(spec):
            yield f"layers.{layer}.{name}", shape
    if spec.markov:
        yield "markov_head.markov_w1.weight", (vocab, rank)
        yield "markov_head.markov_w2.weight", (draft, rank)
    if spec.markov == "gated":
        yield "markov_head.gate_proj.weight", (rank, hidden + rank)
        yield "markov_head.gate_proj.bias", (rank,)
    if spec.markov == "rnn":
        yield "markov_head.joint_proj.weight", (3 * rank, 2 * rank + hidden)
        yield "markov_head.joint_proj.bias", (3 * rank,)
    if spec.confidence:
        yield "confidence_head.proj.weight", (1, hidden + (rank if spec.confidence == "markov" else 0))
        yield "confidence_head.proj.bias", (1,)
    if spec.convolved:
        yield "candidate_selector.predecessor_codebook", (vocab, rank)
        yield "candidate_selector.successor_codebook", (vocab, rank)
        yield "candidate_selector.hidden_projection.weight", (rank, hidden)


def _layer_shapes(spec: BlockSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = spec.target[0]
    yield "self_attn.q_proj.weight", (_HEADS * _HEAD, hidden)
    yield "self_attn.k_proj.weight", (_KV_HEADS * _HEAD, hidden)
    if not spec.keys_are_values:
        yield "self_attn.v_proj.weight", (_KV_HEADS * _HEAD, hidden)
    yield "self_attn.o_proj.weight", (hidden, _HEADS * _HEAD)
    yield "self_attn.q_norm.weight", (_HEAD,)
    yield "self_attn.k_norm.weight", (_HEAD,)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{name}.weight", (hidden,)
    if spec.gemma:
        for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
            yield f"{name}.weight", (hidden,)
        yield "layer_scalar", (1,)
    yield "mlp.gate_proj.weight", (_FEED_FORWARD, hidden)
    yield "mlp.up_proj.weight", (_FEED_FORWARD, hidden)
    yield "mlp.down_proj.weight", (hidden, _FEED_FORWARD)
    if spec.convolved:
        for name in ("attention_conv", "mlp_conv"):
            yield f"{name}.base_kernel", (2, spec.kernel, hidden)
            yield f"{name}.kernel_projection.weight", (2 * spec.kernel * hidden // spec.group, hidden)


def _stored_name(spec: BlockSpec, name: str) -> str:
    if spec.layout != "specforge" or not name.startswith(("markov_head.", "confidence_head.")):
        return name
    if spec.bare:
        return name.replace("markov_head.", "").replace("confidence_head.proj", "confidence_proj")
    return f"logit_head.{name}"


# ---------------------------------------------------------------- config.json


def _config(spec: BlockSpec) -> dict[str, Any]:
    if spec.layout == "deepspec":
        return _deepspec(spec)
    if spec.layout == "speculators":
        return _speculators(spec)
    return _nested(spec)


def _backbone(spec: BlockSpec) -> dict[str, Any]:
    """Of the target's configuration, with the head's own layers."""
    kinds = ["full_attention"] * spec.num_layers
    if spec.window:
        kinds[-1] = "sliding_attention"
    return {
        "attention_bias": False,
        "hidden_size": spec.target[0],
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD,
        "intermediate_size": _FEED_FORWARD,
        "hidden_act": "silu",
        "rms_norm_eps": spec.eps,
        "vocab_size": spec.target[2],
        "max_position_embeddings": 512,
        "model_type": "qwen3",
        "layer_types": kinds,
        "sliding_window": spec.window or None,
        "use_sliding_window": bool(spec.window),
        "rope_parameters": {"rope_theta": spec.rope_theta, "rope_type": "default"},
    }


def _gemma(spec: BlockSpec) -> dict[str, Any]:
    """Of Gemma 4: full-attention layers of the target have another head size, and turn a quarter of it."""
    return {
        "model_type": "gemma4_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": None,
        "head_dim": 2 * _HEAD,
        "global_head_dim": _HEAD,
        "num_key_value_heads": 1 if spec.keys_are_values else _KV_HEADS,
        "num_global_key_value_heads": _KV_HEADS,
        "attention_k_eq_v": spec.keys_are_values,
        "final_logit_softcapping": spec.softcap or None,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": spec.rope_theta,
                "partial_rotary_factor": 0.25,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 123.0},
        },
    }


def _markov(spec: BlockSpec) -> dict[str, Any]:
    said: dict[str, Any] = {
        "markov_rank": spec.rank if spec.markov else 0,
        "enable_confidence_head": bool(spec.confidence),
    }
    if spec.markov:
        said["markov_head_type"] = spec.markov
    if spec.confidence:
        said["confidence_head_with_markov"] = spec.confidence == "markov"
    return said


def _deepspec(spec: BlockSpec) -> dict[str, Any]:
    return {
        "architectures": ["Gemma4DSparkModel" if spec.gemma else "Qwen3DSparkModel"],
        **_backbone(spec),
        **(_gemma(spec) if spec.gemma else {}),
        **_markov(spec),
        "block_size": spec.slots,
        "mask_token_id": spec.mask_token,
        "target_layer_ids": list(spec.taps),
        "num_target_layers": spec.target[1],
        "num_anchors": 128,
        "tie_word_embeddings": False,
        "transformers_version": "5.17.0",
    }


def _nested(spec: BlockSpec) -> dict[str, Any]:
    """z-lab's and SpecForge's: what makes the block is in `dflash_config`."""
    block: dict[str, Any] = {"mask_token_id": spec.mask_token, "target_layer_ids": list(spec.taps)}
    config = {**_backbone(spec), "block_size": spec.slots, "num_target_layers": spec.target[1]}
    if spec.layout == "specforge":
        config["architectures"] = ["DSparkDraftModel"]
        block |= {"projector_type": "dspark", "attention_mode": "gqa", **_markov(spec)}
        if spec.bare:
            block["use_confidence_head"] = block.pop("enable_confidence_head")
            block.pop("confidence_head_with_markov", None)
            block["shift_label"] = not spec.in_place
        elif spec.in_place:
            block["sample_from_anchor"] = False
    elif spec.convolved:
        config["architectures"] = ["DFlash2DraftModel"]
        del config["block_size"]
        block |= {"block_size": spec.slots, "conv_kernel_size": spec.kernel, "conv_group_size": spec.group}
        block |= {"selector_rank": spec.rank, "selector_top_k": spec.candidates}
        config["is_causal"] = spec.causal == "all"
    else:
        config["architectures"] = ["DFlashDraftModel"]
        if spec.jetspec:
            block["causal_head"] = True
        elif spec.causal == "all" or (spec.window and not spec.causal):
            block["causal"] = spec.causal == "all"
    config["dflash_config"] = block
    return config


def _speculators(spec: BlockSpec) -> dict[str, Any]:
    kind = "dspark" if spec.markov else "dflash"
    config = {
        "architectures": ["DSparkSpeculator" if spec.markov else "DFlashSpeculator"],
        "speculators_model_type": kind,
        "speculators_version": "0.5.0",
        "transformer_layer_config": _backbone(spec),
        "aux_hidden_state_layer_ids": [tap + 1 for tap in spec.taps],
        "draft_vocab_size": spec.num_draft_tokens,
        "block_size": spec.slots,
        "mask_token_id": spec.mask_token,
        "target_hidden_size": None,
        "speculators_config": {"algorithm": kind, "verifier": {"architectures": ["LlamaForCausalLM"]}},
    }
    if spec.markov:
        config |= _markov(spec)
        if spec.in_place:
            config["sample_from_anchor"] = False
    if spec.window and not spec.causal:
        config["sliding_window_non_causal"] = True
    return config
