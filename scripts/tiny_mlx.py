"""Every model file of the installed mlx-lm, built tiny with random float32 weights.

A configuration is derived from the names of the fields that a file's `ModelArgs` has: BASE says what such a
field means everywhere, OVERRIDES what one file wants differently. Windows and chunks are shorter than the
contexts that are examined, and there are enough layers for each kind that a file mixes.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from localspec.loading import get_backend
from localspec.protocols import LanguageModel, LoadSettings
from localspec.testing.architectures import Finding, examine
from localspec.testing.reference import ByteTokenizer
from localspec.types import Logits

VOCABULARY = 64

HELPERS = {
    "activations": "activation functions",
    "base": "the base of all ModelArgs, masks",
    "bitlinear_layers": "ternary layers",
    "cache": "caches",
    "gated_delta": "the gated delta rule",
    "mla": "a layer of latent attention",
    "pipeline": "distribution over machines",
    "rope_utils": "rotary embeddings",
    "ssm": "state space scans",
    "switch_layers": "layers of experts",
}

LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
LINEAR_ATTENTION = {
    "full_attn_layers": [2, 4], "kda_layers": [1, 3], "head_dim": 16, "num_heads": 4, "short_conv_kernel_size": 4,
}  # fmt: skip

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "use_bias": False, "use_qkv_bias": False, "bias": False, "layer_norm_epsilon": 1e-5, "layer_norm_eps": 1e-5,
    "layernorm_epsilon": 1e-5, "norm_eps": 1e-5, "norm_epsilon": 1e-5, "rope_scaling": None,
    # other names of the same sizes
    "n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 512, "n_ctx": 512, "n_inner": 96, "block_size": 512,
    "n_kv_heads": 2, "num_kv_heads": 2, "num_heads": 4, "d_model": 64, "n_heads": 4, "n_layers": 4,
    "num_local_experts": 4, "num_vocab": VOCABULARY, "embedding_size": VOCABULARY, "mlp_hidden_size": 192,
    "model_dim": 64, "hidden_dim": 64, "kv_channels": 16, "model_max_length": 512,
    # windows
    "sliding_window": 8, "sliding_window_size": 8, "window_size": 8, "attention_window_size": 8,
    "sliding_window_pattern": 2, "layer_types": LAYER_TYPES, "attention_chunk_size": 8,
    # experts
    "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "num_experts_per_token": 2, "top_k_experts": 2, "moe_top_k": 2, "moe_k": 2, "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32, "shared_expert_intermediate_size": 32, "share_expert_dim": 32,
    "shared_intermediate_size": 32, "num_shared_experts": 1, "n_shared_experts": 1, "num_shared_expert": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_freq": 1, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 96,
    # latent attention
    "kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "qk_head_dim": 32, "index_head_dim": 32, "index_n_heads": 2, "index_topk": 8,
    # recurrent layers
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 2, "layer_group_size": 2, "group_norm_size": 1,
    "conv_kernel": 4, "conv1d_width": 4, "state_size": 16, "ssm_state_size": 16, "time_step_rank": 4, "n_groups": 1,
    "use_conv_bias": True, "conv_bias": False, "conv_L_cache": 3, "full_attn_idxs": [1, 3],
    "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 32,
    "mamba_d_ssm": 128, "mamba_n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_proj_bias": False,
    "mamba_chunk_size": 8, "time_step_limit": (0.001, 100.0), "linear_attn_config": LINEAR_ATTENTION,
    "a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8,
    "linear_allow_neg_eigval": True,
    # factors
    "partial_rotary_factor": 0.5, "logits_scaling": 1.0, "attention_multiplier": 0.25, "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0, "dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 1.0, "rotary_dim": 8,
    "rotary_pct": 0.5, "rotary_emb_base": 10000, "query_pre_attn_scalar": 16, "logits_soft_cap": 30.0,
    "use_qk_norm": True, "qk_norm": True, "post_norm": False, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "original_max_position_embeddings": 512,
    "use_expert_bias": True, "mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_num": 1,
    "zero_expert_type": "identity", "attention_method": "MLA",
}  # fmt: skip

_YARN = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
_LLAMA_4 = {"rope_parameters": {
    "rope_theta": 1e4, "rope_type": "default", "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 32,
}}  # fmt: skip
_ROPE_BY_TYPE = {"rope_parameters": {
    kind: {"rope_theta": theta, "rope_type": "default"}
    for kind, theta in (("sliding_attention", 1e3), ("full_attention", 1e4))
}}  # fmt: skip
_GEMMA_4 = {
    "global_head_dim": 32, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2, "rope_parameters": None,
}  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"rope_scaling": _YARN},
    "exaone4": {"sliding_window_pattern": "LG"},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "gear": {"layer_types": ["conv_mixer", "sliding_attention", "conv_mixer", "full_attention"]},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "mellum": _ROPE_BY_TYPE,
    "spark2_5": _ROPE_BY_TYPE,
    "minicpm3": {"rope_scaling": {"original_max_position_embeddings": 512}},
    "ministral3": _LLAMA_4,
    "mistral4": _LLAMA_4,
    "plamo": {"n_shared_head": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
    "afm7": {"num_kv_reuse_layers": 1},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    },
    "deepseek_v41": {
        "o_lora_rank": 16, "o_groups": 2, "head_dim": 32, "compress_ratios": [1, 4, 4, 2],
        "candidate_topk_blocks": 8, "candidate_block_size": 2,
    },
    "exaone_moe": {"is_moe_layer": [False, True, True, True]},
    "gemma3": {"text_config": {}},
    "gemma3n": {"text_config": {
        "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY, "rope_local_base_freq": 1e3,
        "final_logit_softcapping": 30.0, "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 8, "altup_num_inputs": 2, "altup_coef_clip": 120.0,
        "altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 8,
        "intermediate_size": [96] * 4,
    }},
    "gemma4": {"text_config": _GEMMA_4},
    "gemma4_text": _GEMMA_4,
    "gptj": {"n_kv_heads": 4},
    "hunyuan": {
        "use_mixed_mlp_moe": True, "use_cla": True, "cla_share_factor": 2,
        "rope_scaling": {"alpha": 10.0, "factor": 1.0, "type": "dynamic"},
    },
    "iquestloopcoder": {"loop_window_size": 8},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "kimi_k25": {"text_config": {}},
    "kimi_k3": {"text_config": {}},
    "kimi_vl": {"text_config": {}},
    "lfm2": {
        "block_dim": 64, "block_multiple_of": 16, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
    },
    "lfm2-vl": {"text_config": {
        "block_dim": 64, "block_multiple_of": 16, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
    }},
    "llama4": {"text_config": {"intermediate_size_mlp": 96, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}},
    "llama4_text": {"intermediate_size_mlp": 96, "no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash_ngram": {"ngram_vocab_size_ratio": 4},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 1, 0], "add_swa_attention_sink_bias": True, "swa_rope_theta": 1e4,
        "add_full_attention_sink_bias": False, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
        "swa_head_dim": 16, "swa_v_head_dim": 16, "moe_layer_freq": [0, 1, 1, 1],
    },
    "minimax_m3_vl": {"text_config": {
        "moe_layer_freq": [0, 1, 1, 1], "index_block_size": 4, "index_topk_blocks": 2, "rotary_dim": 8,
    }},
    "mistral3": {"text_config": {}},
    "muse_spark": {"text_config": {
        "post_norm_eps": 1e-8, "layer_rope_theta": [1e4, 0, 1e4, 0], "final_logit_softcapping": 20.0,
        "output_multiplier": 0.2, "moe_hidden_size": 32, "num_shared_experts": 0,
    }},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "M", "-", "E"]},
    "nemotron-nas": {"block_configs": [
        {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
        {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
        {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.0}},
        {"attention": {"n_heads_in_group": 2}, "ffn": {"no_op": True}},
    ]},
    "openelm": {
        "num_transformer_layers": 4, "ffn_dim_divisor": 16, "num_query_heads": [4] * 4, "num_kv_heads": [2] * 4,
        "ffn_multipliers": [1.0] * 4,
    },
    "phi3small": {
        "dense_attention_every_n_layers": 2, "ff_intermediate_size": 96, "gegelu_limit": 20.0,
        "blocksparse_block_size": 32, "blocksparse_num_local_blocks": 1, "blocksparse_vert_stride": 2,
    },
    "pixtral": {"text_config": {}},
    "plamo2": {"hidden_size_per_head": 16},
    "prism_hadamard_qwen35": {
        "text_config": {"intermediate_size": 128, "num_experts": 0}, "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [{"path": "model.layers.0.mlp.down_proj", "embedding": False, "dtype": "float16", "block": 0}],
    },
    "qwen2_vl": {"text_config": {}},
    "qwen3_5": {"text_config": {"num_experts": 0}},
    "qwen3_5_moe": {"text_config": {}},
    "qwen3_vl": {"text_config": {}},
    "qwen3_vl_moe": {"text_config": {}},
    "step3p5": {"num_attention_groups": 2},
}  # fmt: skip


UNCACHED = {
    "plamo3": "its mask asks for one row more than its ring buffer holds, so mlx-lm's own rows change with the width "
    "of a pass. It gets what the mask asks for, and is compared with a pass without cache",
}


def names() -> list[str]:
    """All model files, helpers left out."""
    import mlx_lm.models

    files = {entry.name for entry in pkgutil.iter_modules(mlx_lm.models.__path__)}
    return sorted(files - set(HELPERS))


def versions() -> str:
    """Of the runtime, and what it computes on."""
    return f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, {mx.default_device().type.name}, float32"


def build(name: str, seed: int = 0, jitter: float = 0.0) -> nn.Module:
    """A model file's `Model`, with random weights. jitter: disturb each by so much of its own size, which
    makes a draft model that mostly agrees."""
    if name == "olmo":  # asks whether this package is there, and uses nothing of it
        sys.modules.setdefault("hf_olmo", ModuleType("hf_olmo"))
    file: Any = import_module(f"mlx_lm.models.{name}")
    override = dict(OVERRIDES.get(name, {}))
    config = BASE | {"model_type": name} | override
    if "text_config" in override:
        config["text_config"] = BASE | {"model_type": name} | override["text_config"]
    mx.random.seed(seed)  # what is not replaced below is drawn when a layer is made
    module: nn.Module = file.Model(file.ModelArgs.from_dict(config))
    randomize(module)
    if jitter:
        weights = _weights(module)
        noisy = [(path, weight * (1.0 + jitter * mx.random.normal(weight.shape))) for path, weight in weights]
        module.update(tree_unflatten(noisy))
    return module


def _weights(module: nn.Module) -> list[tuple[str, mx.array]]:
    return tree_flatten(module.parameters())  # type: ignore[return-value]


def randomize(module: nn.Module) -> None:
    """Weights that keep activations at their size: matrices by their inputs, vectors near where they begin."""
    weights = []
    for path, start in _weights(module):
        if not mx.issubdtype(start.dtype, mx.floating):
            continue
        noise = mx.random.normal(start.shape)
        if start.ndim < 2 or path.endswith(("A_log", "dt_bias", ".D")):
            weights.append((path, start.astype(mx.float32) + 0.1 * noise))
        else:
            inputs = start[0].size if "conv" in path else start.shape[-1]
            weights.append((path, noise * (1.0 if "embed" in path else inputs**-0.5)))
    module.update(tree_unflatten(weights))
    mx.eval(module.parameters())


def open_model(name: str, seed: int = 0, jitter: float = 0.0) -> LanguageModel:
    """The tiny model behind the backend's own loading, with a tokenizer of bytes."""
    parts = type(get_backend("mlx")).__module__.rpartition(".")[0]
    loader, scores = import_module(f"{parts}.loader"), import_module(f"{parts}.scores")
    opened = loader.Opened(build(name, seed, jitter), ByteTokenizer(VOCABULARY), name, name, "F32", 512, None)
    model: LanguageModel = loader.assemble(opened, Path(name), LoadSettings(context=256), scores.Ledger())
    return model


def native_rows(name: str, ids: Sequence[int], seed: int = 0) -> Logits:
    """[T, V] the rows that mlx-lm gives with its own caches, token by token."""
    module: Any = build(name, seed)
    if name in UNCACHED:
        return np.array(module(mx.array([ids]))[0].astype(mx.float32))
    cache = make_prompt_cache(module)
    rows = [np.array(module(mx.array([[token]]), cache=cache)[0, 0].astype(mx.float32)) for token in ids]
    return np.array(rows)


def examined(name: str, rounds: int = 200, weights: str | None = None) -> Finding:
    """Judge one model file. Raises ValueError for weights in another type than float32."""
    if weights is not None:
        raise ValueError(f"mlx-lm's files are built in float32 here, not {weights}")
    return examine(name, lambda: open_model(name), num_rounds=rounds, own_rows=lambda ids: native_rows(name, ids))


def remarks() -> str:
    """What stands below the table."""
    uncached = "".join(f"`{name}`: {why}.\n\n" for name, why in UNCACHED.items())
    return f"{uncached}No models: {'; '.join(f'`{name}` ({why})' for name, why in HELPERS.items())}.\n"
