"""What an EAGLE-3 head's configuration and tensors say, in any of the layouts that are released.

EAGLE, SpecForge, AngelSlim and NVIDIA name the block `midlayer`, speculators and DeepSpec `layers.0`; the first layer
reads the token's embedding beside the hidden state, any others read what came before. Which layers of the target are
read is written in three conventions (`taps`). Sources: SafeAILab/EAGLE model/cnets.py, vllm-project/speculators
models/eagle3, deepseek-ai/DeepSpec modeling/eagle3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from localspec.errors import HeadFileError

from .head_header import HeadFiles, HeadHeader
from .head_settings import HeadSettings, check_architecture
from .head_tensors import Shapes, require_shapes

ARCHITECTURES = (
    "LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel", "Qwen3Eagle3Model",
    "LlamaForCausalLM",
)  # fmt: skip
"""Names in use. EAGLE's own files say LlamaForCausalLM, like any other model; the tensors tell."""

_BACKBONES = ("llama", "qwen2", "qwen3")
_FIRST = re.compile(r"(midlayer|layers\.0)\.hidden_norm\.weight")


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """hidden: E.  target_hidden: of the target's layers.  tap_ids: as written (None: EAGLE's three).  tap_shift: added
    to a tap id to get the layer whose output it is.  draft_vocab: Vd.  vocab: V, or None where nothing says it.
    feedback_normed: children are fed with the normed output.  norm_taps: each tap is normed on its own, together:
    all side by side.  block: what the tensors of the first layer begin with.
    """

    hidden: int
    target_hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    feed_forward: int
    eps: float
    rope_base: float
    rope_scaling: Mapping[str, Any] | None
    max_positions: int
    draft_vocab: int
    vocab: int | None
    num_taps: int
    tap_ids: tuple[int, ...] | None
    tap_shift: int | None
    norm_before_residual: bool
    norm_together: bool
    norm_each: bool
    feedback_normed: bool
    head_norms: bool
    biases: bool
    output_bias: bool
    block: str
    own_embedding: bool
    own_head: bool

    def taps(self, num_target_layers: int) -> tuple[int, ...]:
        """Layers of a target whose outputs are read. Raises HeadFileError where it has no such layers."""
        if self.tap_ids is None:
            taps = default_taps(num_target_layers)
        else:
            shift = self.tap_shift
            if shift is None:  # nothing says so: ids that begin at layer 1, and stay inside, are outputs
                shift = 0 if self.tap_ids[0] == 1 and max(self.tap_ids) < num_target_layers else -1
            taps = tuple(tap + shift for tap in self.tap_ids)
        if any(not -1 <= tap < num_target_layers for tap in taps):
            raise HeadFileError(
                "the head reads layers that the target does not have",
                got=f"outputs of {', '.join(map(str, taps))}",
                expected=f"-1 to {num_target_layers - 1}",
            )
        return taps


def default_taps(num_target_layers: int) -> tuple[int, ...]:
    """Layers whose outputs a head reads that names none."""
    return 1, num_target_layers // 2 - 1, num_target_layers - 4


def read_eagle3_head(files: HeadFiles) -> HeadHeader | None:
    """Its header, by what it says or by its tensors; None for another kind. `details` is the `Eagle3Config`, and `taps`
    is empty where only the target tells them. Raises HeadFileError."""
    said = files.config.get("speculators_model_type")
    if files.format != "safetensors" or (said != "eagle3" if said is not None else not is_eagle3(files.shapes)):
        return None
    config = eagle3_config(files.config, files.shapes)
    num_layers = files.config.get("num_target_layers")
    known = config.tap_shift is not None and config.tap_ids is not None
    return HeadHeader(
        kind="eagle3",
        layout="speculators" if said is not None else "deepspec" if "target_layer_ids" in files.config else "eagle",
        files=files,
        taps=tuple(tap + (config.tap_shift or 0) for tap in config.tap_ids or ()) if known else (),
        target_hidden=config.target_hidden,
        num_parameters=sum(math.prod(shape) for name, shape in files.shapes.items() if name not in ("d2t", "t2d")),
        vocab_size=config.vocab,
        draft_vocab=config.draft_vocab if config.draft_vocab != config.vocab else None,
        num_target_layers=num_layers if isinstance(num_layers, int) else None,
        prefix=config.block,
        details=config,
    )


def is_eagle3(names: Iterable[str]) -> bool:
    """Is there a first layer that reads a hidden state beside the token?"""
    return any(_FIRST.fullmatch(name.removeprefix("model.")) for name in names)


def eagle3_config(config: Mapping[str, Any], tensors: Shapes) -> Eagle3Config:
    """Raises HeadFileError naming the key or tensor that is wrong, or that nothing here knows."""
    names = {name.removeprefix("model."): shape for name, shape in tensors.items()}
    by_speculators = config.get("speculators_model_type") is not None
    outer = HeadSettings(config)
    layer = outer.inside("transformer_layer_config") if by_speculators else outer
    _refuse_strange(outer, layer, by_speculators)
    block = next((name.rpartition(".hidden_norm")[0] for name in names if _FIRST.fullmatch(name)), None)
    fc = names.get("fc.weight")
    if block is None or fc is None or len(fc) != 2:
        missing = "fc.weight" if block is not None else "layers.0.hidden_norm.weight"
        raise HeadFileError(f"tensor {missing} is missing", expected="the layers of an EAGLE-3 head")
    hidden, num_heads = layer.size("hidden_size", least=1), layer.size("num_attention_heads", least=1)
    ids, shift = _tap_ids(outer, by_speculators)
    num_taps = len(ids) if ids is not None else 3
    if fc[1] % num_taps:
        raise HeadFileError("tensor fc.weight has the wrong shape", got=fc, expected=f"{num_taps} taps side by side")
    vocab = layer.size("vocab_size", 0, least=1) or None
    found = Eagle3Config(
        hidden=hidden,
        target_hidden=fc[1] // num_taps,
        num_layers=_num_layers(names),
        num_heads=num_heads,
        num_kv_heads=layer.size("num_key_value_heads", num_heads, least=1),
        head_dim=layer.size("head_dim", max(hidden // num_heads, 1), least=1),
        feed_forward=layer.size("intermediate_size", least=1),
        eps=layer.number("rms_norm_eps", 1e-6),
        rope_base=_rope_base(layer),
        rope_scaling=_rope_scaling(layer),
        max_positions=layer.size("max_position_embeddings", 4096, least=1),
        draft_vocab=names["lm_head.weight"][0] if "lm_head.weight" in names else vocab or 0,
        vocab=vocab,
        num_taps=num_taps,
        tap_ids=ids,
        tap_shift=shift,
        norm_before_residual=outer.flag("norm_before_residual", False),
        norm_together=outer.flag("norm_before_fc", False) or "input_norm.weight" in names,
        norm_each=outer.flag("fc_norm", False) or "fc_norm.0.weight" in names,
        feedback_normed=by_speculators and outer.flag("norm_output", False),
        head_norms=f"{block}.self_attn.q_norm.weight" in names,
        biases=f"{block}.self_attn.q_proj.bias" in names,
        output_bias=f"{block}.self_attn.o_proj.bias" in names,
        block=block,
        own_embedding="embed_tokens.weight" in names,
        own_head="lm_head.weight" in names,
    )
    declared = outer.size("draft_vocab_size", found.draft_vocab, least=1)
    if declared != found.draft_vocab:
        raise HeadFileError("lm_head.weight does not fit draft_vocab_size", got=found.draft_vocab, expected=declared)
    if vocab is not None and found.draft_vocab < vocab and "d2t" not in names:
        raise HeadFileError("tensor d2t is missing", expected=f"{found.draft_vocab} of {vocab} tokens to be named")
    require_shapes(names, *_shapes(found))
    if found.hidden != found.target_hidden and not found.own_embedding:
        raise HeadFileError("tensor embed_tokens.weight is missing", expected="one, as the target's rows are wider")
    return found


def _refuse_strange(outer: HeadSettings, layer: HeadSettings, by_speculators: bool) -> None:
    """Whatever would change the pass and is not built here."""
    check_architecture({"architectures": outer.get("architectures")}, ARCHITECTURES)
    layer.word("model_type", _BACKBONES, "llama")
    layer.word("hidden_act", ("silu",), "silu")
    for settings, key in ((layer, "mlp_bias"), (outer, "parallel_drafting")):
        name, value = settings.find(key)
        if value:
            raise HeadFileError(f"config.json: {name} is not known", got=str(value)[:80])
    if layer.get("use_sliding_window") or "sliding_attention" in (layer.get("layer_types") or ()):
        raise HeadFileError("EAGLE-3 heads with sliding windows are not known", got="layer_types, use_sliding_window")


def _tap_ids(outer: HeadSettings, by_speculators: bool) -> tuple[tuple[int, ...] | None, int | None]:
    """(ids as written, what to add to get the layer whose output is read; None: the ids must tell)."""
    if (ids := outer.integers("target_layer_ids")) is not None:
        return ids, 0
    ids = outer.integers("eagle_aux_hidden_state_layer_ids")
    if ids is None and outer.get("eagle_config") is not None:
        ids = outer.inside("eagle_config").integers("eagle_aux_hidden_state_layer_ids")
    return ids, -1 if by_speculators else None


def _rope_base(layer: HeadSettings) -> float:
    """Base of the rotary embedding, wherever the trainer's libraries write it."""
    if layer.get("rope_theta") is None and layer.get("rope_parameters") is not None:
        return layer.inside("rope_parameters").number("rope_theta", 10000.0)
    return layer.number("rope_theta", 10000.0)


def _rope_scaling(layer: HeadSettings) -> Mapping[str, Any] | None:
    """How wavelengths are stretched; None: not at all. Others than these turn by more than differences of positions."""
    key = "rope_scaling" if layer.get("rope_scaling") is not None else "rope_parameters"
    if layer.get(key) is None:
        return None
    scaling = layer.inside(key)
    kinds = ("default", "linear", "llama3", "yarn")
    kind = scaling.word("rope_type" if scaling.get("rope_type") is not None else "type", kinds, "default")
    if kind == "default":
        return None
    scaling.number("factor")
    return {**layer.get(key), "rope_type": kind, "type": kind}


def _num_layers(names: Shapes) -> int:
    numbers = [int(match[1]) for name in names if (match := re.match(r"layers\.(\d+)\.", name))]
    return max(numbers, default=0) + 1


def _shapes(config: Eagle3Config) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """(tensors that must be there, tensors that may be)."""
    hidden, target, drafts = config.hidden, config.target_hidden, config.draft_vocab
    width = target * config.num_taps
    must: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, width), "norm.weight": (hidden,)}
    for index in range(config.num_layers):
        must |= _layer_shapes(config, config.block if not index else f"layers.{index}", 1 if index else 2)
    must[f"{config.block}.hidden_norm.weight"] = (hidden,)
    if config.norm_together:
        must["input_norm.weight"] = (width,)
    if config.norm_each:
        must |= {f"fc_norm.{tap}.weight": (target,) for tap in range(config.num_taps)}
    if config.own_head:
        must["lm_head.weight"] = (drafts, hidden)
    may: dict[str, tuple[int, ...]] = {"d2t": (drafts,), "t2d": (-1,)}
    if config.own_embedding:
        must["embed_tokens.weight"] = (config.vocab or -1, hidden)
    return must, may


def _layer_shapes(config: Eagle3Config, prefix: str, inputs: int) -> dict[str, tuple[int, ...]]:
    """inputs: how often the hidden size goes into the projections."""
    hidden, wide = config.hidden, config.feed_forward
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, inputs * hidden),
        "self_attn.k_proj.weight": (keys, inputs * hidden),
        "self_attn.v_proj.weight": (keys, inputs * hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
    }
    if config.biases:
        shapes |= {"self_attn.q_proj.bias": (queries,), "self_attn.k_proj.bias": (keys,)}
        shapes |= {"self_attn.v_proj.bias": (keys,)}
    if config.output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if config.head_norms:
        shapes |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}
