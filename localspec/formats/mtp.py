"""Layers for multi-token prediction, inside a model's own checkpoint or in a folder of their own.

    Qwen3-Next, Qwen3.5         mtp.fc, mtp.pre_fc_norm_{embedding,hidden}, mtp.norm, mtp.layers.0.*
    DeepSeek-V3                 model.layers.{N}.{eh_proj,enorm,hnorm,shared_head.norm} and a block, behind the N layers
    speculators                 mtp_layers.0.{input_proj,token_layernorm,hidden_layernorm,final_layernorm} and a block

To use the layer that a model ships, give the folder of the model that its publisher released as the head: conversions
for MLX leave it out. Found by tensors, since settings are wrong both ways. The copies of the embedding and the output
matrix that DeepSeek's files hold are not read: the target has them. Sources: vLLM deepseek_mtp.py, qwen3_next_mtp.py;
vllm-project/speculators models/mtp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from localspec.errors import HeadFileError, UnsupportedModelError

from .head_header import HeadFiles, HeadHeader
from .head_settings import HeadSettings
from .head_tensors import Shapes, require_shapes

_QWEN = re.compile(r"((?:\w+\.)*mtp\.)fc\.weight")
_DEEPSEEK = re.compile(r"((?:model\.)?layers\.(\d+)\.)eh_proj\.weight")
_SPECULATORS = re.compile(r"(mtp_layers\.0\.)input_proj\.weight")
_OTHER = re.compile(r"(?:\w+\.)*mtp_(?:layers|block)\.\d+\.")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|weight_scale_inv|scales|biases)")

_FAMILIES = {
    "qwen": {
        "qwen3_next": "qwen3_next", "qwen3_5": "qwen3_5", "qwen3_5_text": "qwen3_5", "qwen3_5_moe": "qwen3_5_moe",
        "qwen3_5_moe_text": "qwen3_5_moe",
    },
    "deepseek": {"deepseek_v3": "deepseek_v3", "kimi_k2": "deepseek_v3", "joyai_llm_flash": "deepseek_v3"},
    "speculators": {
        "qwen3": "qwen3", "qwen3_next": "qwen3_next", "qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe",
    },
}  # fmt: skip
"""By style, model types and those whose block it is."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Names of the tensors around the block: the projection [E, 2E], the norms [E] of embedding, hidden state and
    output. block: what those of the block begin with."""

    projection: str
    embedding_norm: str
    hidden_norm: str
    final_norm: str
    block: str


@dataclass(frozen=True, slots=True)
class MtpConfig:
    """family: whose layer the block is, as model type.  settings: of that model.  hidden: E.  num_experts: 0 for a
    dense block.  tensors: all that are read, by stored name.  zero_centred: norms of this family may be stored as
    weight - 1."""

    family: str
    settings: Mapping[str, Any]
    hidden: int
    eps: float
    num_experts: int
    parts: Parts
    tensors: tuple[str, ...]
    zero_centred: bool


def read_mtp_head(files: HeadFiles) -> HeadHeader | None:
    """Its header; None for what has no such layer. `details` is the `MtpConfig`. Raises HeadFileError, and
    UnsupportedModelError for families and layouts that are not known."""
    said = files.config.get("speculators_model_type")
    if files.format != "safetensors" or said not in (None, "mtp"):
        return None
    found = _find(files.shapes, by_speculators=said is not None)
    if found is None:
        if said is not None:
            raise HeadFileError("tensor mtp_layers.0.input_proj.weight is missing")
        other = next((name for name in files.shapes if _OTHER.match(name)), None)
        if other is not None:
            raise UnsupportedModelError("MTP layers of this layout are not known", got=other)
        return None
    style, parts = found
    config = _read(style, parts, files)
    num_layers = config.settings.get("num_hidden_layers")
    return HeadHeader(
        kind="mtp",
        layout=style,
        files=files,
        taps=(-2,),
        target_hidden=config.hidden,
        num_parameters=sum(math.prod(files.shapes[name]) for name in config.tensors),
        vocab_size=HeadSettings(config.settings).size("vocab_size", 0, least=1) or None,
        num_target_layers=num_layers if isinstance(num_layers, int) else None,
        prefix=parts.block,
        details=config,
    )


def has_mtp(names: Iterable[str]) -> bool:
    """Are there MTP layers in Qwen's or DeepSeek's layout, alone or behind a model?"""
    return any(_QWEN.fullmatch(name) or _DEEPSEEK.fullmatch(name) for name in names)


def _find(shapes: Shapes, by_speculators: bool) -> tuple[str, Parts] | None:
    """(style, where everything is). Raises UnsupportedModelError for more than one layer."""
    if by_speculators:
        found = [match[1] for name in shapes if (match := _SPECULATORS.fullmatch(name))]
        names = ("input_proj", "token_layernorm", "hidden_layernorm", "final_layernorm")
        return ("speculators", _parts(found[0], names, found[0])) if found else None
    found = [match[1] for name in shapes if (match := _QWEN.fullmatch(name))]
    if found:
        more = next((name for name in shapes if name.startswith(f"{found[0]}layers.1.")), None)
        if more is not None:
            raise UnsupportedModelError("several MTP layers are not known", got=more)
        names = ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        return "qwen", _parts(found[0], names, f"{found[0]}layers.0.")
    found = [match[1] for name in shapes if (match := _DEEPSEEK.fullmatch(name))]
    if len(found) > 1:
        raise UnsupportedModelError("several MTP layers are not known", got=", ".join(found[:3]))
    return (
        ("deepseek", _parts(found[0], ("eh_proj", "enorm", "hnorm", "shared_head.norm"), found[0])) if found else None
    )


def _parts(prefix: str, names: tuple[str, str, str, str], block: str) -> Parts:
    projection, embedding, hidden, final = (f"{prefix}{name}.weight" for name in names)
    return Parts(projection, embedding, hidden, final, block)


def _read(style: str, parts: Parts, files: HeadFiles) -> MtpConfig:
    outer, shapes = HeadSettings(files.config, "transformer_layer_config", "text_config"), files.shapes
    nested = [outer.get(key) for key in ("transformer_layer_config", "text_config")]
    settings: Mapping[str, Any] = next((inner for inner in nested if inner is not None), files.config)
    said = settings.get("model_type", files.config.get("model_type"))
    family = _FAMILIES[style].get(str(said))
    if family is None:
        raise UnsupportedModelError(
            "MTP layers of this model type are not known", got=said, expected=", ".join(_FAMILIES[style])
        )
    fields = HeadSettings(settings)
    hidden = fields.size("hidden_size", least=1)
    around = (parts.projection, parts.embedding_norm, parts.hidden_norm, parts.final_norm)
    must = dict.fromkeys(around, (hidden,)) | {parts.projection: (hidden, 2 * hidden)}
    quantized = f"{parts.projection.removesuffix('weight')}scales" in shapes
    if quantized:
        must[parts.projection] = (hidden, -1)
    require_shapes({name: shape for name, shape in shapes.items() if name in must}, must, {})
    block = tuple(name for name in shapes if name.startswith(parts.block) and _belongs(name, parts, around))
    num_experts = int(settings.get("n_routed_experts") or settings.get("num_experts") or 0)
    has_experts = any(".experts." in name or ".switch_mlp." in name for name in block)
    if has_experts:
        _check_experts({name.removeprefix(parts.block): shapes[name] for name in block}, num_experts, parts.block)
    beside = [f"{parts.projection.removesuffix('weight')}{part}" for part in ("scales", "biases")]
    return MtpConfig(
        family=family,
        settings=settings,
        hidden=hidden,
        eps=fields.number("rms_norm_eps", 1e-6),
        num_experts=num_experts if has_experts else 0,
        parts=parts,
        tensors=(*around, *(name for name in beside if name in shapes), *block),
        zero_centred=family.startswith(("qwen3_next", "qwen3_5")),
    )


def _belongs(name: str, parts: Parts, around: tuple[str, ...]) -> bool:
    """Is a tensor below the block's prefix one of the block itself?"""
    inner = name.removeprefix(parts.block)
    if inner.startswith(("embed_tokens.", "shared_head.head.")) or name.endswith("rotary_emb.inv_freq"):
        return False
    return name not in around and not inner.startswith(("eh_proj.", "input_proj."))


def _check_experts(block: Shapes, num_experts: int, prefix: str) -> None:
    """Experts are stacked later, which would name none of them."""
    single = {name: match for name in block if (match := _EXPERT.fullmatch(name))}
    kinds = {(match[2], match[3]) for match in single.values()}
    for kind, part in sorted(kinds):
        first = block.get(f"mlp.experts.0.{kind}.{part}")
        for expert in range(num_experts):
            name = f"mlp.experts.{expert}.{kind}.{part}"
            if name not in block:
                raise HeadFileError(f"tensor {prefix}{name} is missing", expected=first)
            if block[name] != first:
                raise HeadFileError(f"tensor {prefix}{name} has the wrong shape", got=block[name], expected=first)
    beyond = next((name for name, match in single.items() if int(match[1]) >= num_experts), None)
    if beyond is not None:
        raise HeadFileError(f"tensor {prefix}{beyond} is one too many", expected=f"{num_experts} experts")
