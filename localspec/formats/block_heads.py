"""Reads the headers of heads that guess a whole block in one pass: DSpark, DFlash, DFlash 2 and JetSpec.

Layouts: DeepSpec's (settings at the top of config.json), z-lab's and SpecForge's (in `dflash_config`), vLLM's
speculators (the backbone in `transformer_layer_config`), and GGUF. What the file is, is judged by its tensors; what is
not known is refused by its name, because a head that is run wrongly only guesses badly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from localspec.errors import HeadFileError

from .block_tensors import BlockDetails, check_block_tensors
from .gguf_block_heads import read_gguf_block_head
from .head_header import Backbone, HeadFiles, HeadHeader
from .head_settings import HeadSettings, check_architecture

_ARCHITECTURES = (
    "Qwen3DSparkModel", "Gemma4DSparkModel", "DSparkDraftModel", "DSparkSpeculator", "DFlashDraftModel",
    "DFlashSpeculator", "DFlash2DraftModel", "Lfm2DSparkDraftModel", "LingDSparkModel",
)  # fmt: skip
_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
_LAYER = re.compile(r"layers\.(\d{1,4})\..*")
_LOGITS = "logit_head."
_STARTS = ("sample_from_anchor", "shift_label")
_MAX_LAYERS = 256
_MAX_BLOCK = 256
_IN_MODEL = "dspark_block_size"  # DeepSeek-V4 carries its DSpark stages inside the checkpoint


def read_block_head(files: HeadFiles) -> HeadHeader | None:
    """The header of a block head, None for anything else. Raises HeadFileError naming a key or tensor."""
    if files.format == "gguf":
        return read_gguf_block_head(files)
    if _IN_MODEL in files.config:
        raise HeadFileError(f"config.json: {_IN_MODEL} marks stages inside a model, which are not known as a head")
    prefix = block_prefix(files.shapes)
    if prefix is None:
        return None
    header = _Reader(files, prefix).header()
    check_block_tensors(header)
    return header


def block_prefix(names: Collection[str]) -> str | None:
    """What stands before the names of a block head's tensors, None for anything else."""
    return next((p for p in ("", "model.") if f"{p}fc.weight" in names and f"{p}hidden_norm.weight" in names), None)


def block_kind(names: Collection[str], causal: bool) -> str:
    """Which block head has tensors of these names (without their prefix). causal: the settings' `causal_head`."""
    if _markov_name(names) is not None or _confidence_name(names) is not None:
        return "dspark"
    if "candidate_selector.predecessor_codebook" in names:
        return "dflash2"
    return "jetspec" if causal else "dflash"


def _logits_prefix(names: Collection[str]) -> str:
    return _LOGITS if any(name.startswith(_LOGITS) for name in names) else ""


def _markov_name(names: Collection[str]) -> str | None:
    """The newer files have the tensors of both heads in modules, others bare."""
    prefix = _logits_prefix(names)
    return next((name for name in ("markov_head.", "") if f"{prefix}{name}markov_w1.weight" in names), None)


def _confidence_name(names: Collection[str]) -> str | None:
    prefix = _logits_prefix(names)
    return next(
        (name for name in ("confidence_head.proj", "confidence_proj") if f"{prefix}{name}.weight" in names), None
    )


class _Reader:
    def __init__(self, files: HeadFiles, prefix: str) -> None:
        self._files, self._prefix = files, prefix
        self._names = {name.removeprefix(prefix) for name in files.shapes}
        self._architecture = check_architecture(files.config, _ARCHITECTURES)
        self._settings = HeadSettings(files.config, "dflash_config")
        self._is_speculators = "speculators_model_type" in files.config
        self._shape = self._settings.inside("transformer_layer_config") if self._is_speculators else self._settings

    def header(self) -> HeadHeader:
        """Everything but the tensors' shapes is checked."""
        settings, kind, layout = self._settings, self._kind(), self._layout()
        settings.word("projector_type", ("dflash", "dspark", "dflash2"), "dflash")
        settings.word("attention_mode", ("gqa",), "gqa")
        for key in ("output_multiplier", "input_embedding_scale"):  # the target's own are used
            if settings.number(key, 1.0) != 1.0:
                raise HeadFileError(f"config.json: {key} is not known", got=settings.get(key), expected=1.0)
        backbone = self._backbone()
        vocab = self._shape.size("vocab_size", least=1)
        taps, num_target_layers = self._taps(backbone), settings.size("num_target_layers", 0) or None
        draft_vocab = settings.size("draft_vocab_size", vocab, least=1, most=vocab)
        return HeadHeader(
            kind=kind,
            layout=layout,
            files=self._files,
            taps=taps,
            target_hidden=settings.size("target_hidden_size", backbone.hidden_size, least=1),
            num_parameters=sum(
                math.prod(shape) for name, shape in self._files.shapes.items() if name not in ("d2t", "t2d")
            ),
            backbone=backbone,
            vocab_size=vocab,
            draft_vocab=draft_vocab if draft_vocab < vocab else None,
            num_target_layers=num_target_layers,
            prefix=self._prefix,
            details=self._details(kind, layout, backbone),
        )

    def _kind(self) -> str:
        said = self._files.config.get("speculators_model_type")
        if self._is_speculators and said not in ("dspark", "dflash"):
            raise HeadFileError("config.json: speculators_model_type is not known", got=str(said)[:80])
        return block_kind(self._names, self._settings.flag("causal_head", False))

    def _layout(self) -> str:
        if self._is_speculators:
            return "speculators"
        if self._architecture in ("Qwen3DSparkModel", "Gemma4DSparkModel"):
            return "deepspec"
        return "specforge" if self._architecture == "DSparkDraftModel" else "z-lab"

    def _has(self, name: str) -> bool:
        return name in self._names

    # ------------------------------------------------------------ the backbone

    def _backbone(self) -> Backbone:
        shape, hidden = self._shape, self._files.shape(f"{self._prefix}fc.weight")[0]
        gemma = self._has("layers.0.pre_feedforward_layernorm.weight")
        family = "gemma4" if gemma else "qwen3" if self._has("layers.0.self_attn.q_norm.weight") else "llama"
        if gemma:
            shape.word("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
        else:
            shape.word("hidden_act", ("silu",), "silu")
        num_layers = 1 + max((int(match[1]) for name in self._names if (match := _LAYER.fullmatch(name))), default=-1)
        if num_layers != shape.size("num_hidden_layers", least=1, most=_MAX_LAYERS):
            raise HeadFileError(
                "config.json: num_hidden_layers does not fit the tensors",
                got=shape.get("num_hidden_layers"),
                expected=num_layers,
            )
        if shape.size("hidden_size", least=1) != hidden:
            raise HeadFileError(
                "config.json: hidden_size does not fit fc.weight", got=shape.get("hidden_size"), expected=hidden
            )
        num_heads = shape.size("num_attention_heads", least=1)
        kv_key = "num_global_key_value_heads" if self._keys_are_values(gemma) else "num_key_value_heads"
        theta, scaling = self._rope(gemma)
        return Backbone(
            family=family,
            num_layers=num_layers,
            hidden_size=hidden,
            num_heads=num_heads,
            num_kv_heads=shape.size(kv_key, num_heads, least=1, most=num_heads),
            head_size=shape.size("global_head_dim" if gemma else "head_dim", max(1, hidden // num_heads), least=1),
            feed_forward=shape.size("intermediate_size", least=1),
            norm_eps=shape.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            rope_interleaved=not shape.flag("rope_is_neox_style", True),
            attention_bias=shape.flag("attention_bias", False),
            max_positions=shape.size("max_position_embeddings", 0) or None,
        )

    def _keys_are_values(self, gemma: bool) -> bool:
        return gemma and self._shape.flag("attention_k_eq_v", False)

    def _rope(self, gemma: bool) -> tuple[float, Mapping[str, Any] | None]:
        """The head's own positions. A rotated fraction is the target's, leaked into the settings, but for Gemma."""
        shape = self._shape
        nested = next(
            (value for key in ("rope_parameters", "rope_scaling") if isinstance(value := shape.get(key), dict)), {}
        )
        if isinstance(nested.get("full_attention"), dict):
            nested = nested["full_attention"]
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind not in _ROPE_TYPES:
            raise HeadFileError(
                "config.json: rope_type is not known", got=str(kind)[:80], expected=", ".join(_ROPE_TYPES)
            )
        theta = shape.get("rope_theta") if shape.get("rope_theta") is not None else nested.get("rope_theta", 10000.0)
        if type(theta) not in (int, float) or not 1.0 < theta < 1e12:
            raise HeadFileError("config.json: rope_theta is out of range", got=str(theta)[:80])
        if not gemma:
            nested = {key: value for key, value in nested.items() if key != "partial_rotary_factor"}
        return float(theta), None if kind == "default" else dict(nested)

    def _taps(self, backbone: Backbone) -> tuple[int, ...]:
        shifted = self._settings.integers("aux_hidden_state_layer_ids")
        taps = self._settings.integers("target_layer_ids")
        if shifted is not None:  # inputs of layers, as vLLM counts
            taps = tuple(tap - 1 for tap in shifted)
        total = self._settings.size("num_target_layers", 0)
        if taps is None and total < 4:
            raise HeadFileError("config.json: target_layer_ids is missing", expected="the layers to read")
        if taps is None:
            last = backbone.num_layers - 1
            taps = tuple(round(1 + i * (total - 4) / last) for i in range(last + 1)) if last else (total // 2,)
        if any(not -1 <= tap < (total or 4096) for tap in taps):
            raise HeadFileError("config.json: a tap is out of range", got=taps, expected=f"-1 to {(total or 4096) - 1}")
        return taps

    # ------------------------------------------------------------ the block

    def _details(self, kind: str, layout: str, backbone: Backbone) -> BlockDetails:
        settings, markov_name = self._settings, _markov_name(self._names)
        gemma = backbone.family == "gemma4"
        windows = self._windows(backbone)
        rank = settings.size("markov_rank", 0)
        if (rank > 0) != (markov_name is not None):
            raise HeadFileError("config.json: markov_rank does not fit the tensors", got=rank)
        confidence, sees_markov = self._confidence(backbone.hidden_size, rank)
        block = settings.size("block_size", least=2, most=_MAX_BLOCK)
        own = BlockDetails(
            block_size=block,
            mask_token=settings.size("mask_token_id"),
            in_place=not self._starts_at_anchor(layout == "deepspec" or kind == "dspark"),
            causal=self._causal(kind, layout, windows),
            windows=windows,
            window_from_anchor=self._is_speculators,
            markov=settings.word("markov_head_type", ("vanilla", "gated", "rnn"), "vanilla") if rank else "",
            markov_rank=rank,
            confidence=confidence is not None,
            confidence_sees_markov=sees_markov,
            logits_prefix=_logits_prefix(self._names),
            markov_name=markov_name if markov_name is not None else "markov_head.",
            confidence_name=confidence or "confidence_head.proj",
            own_embedding=self._has("embed_tokens.weight"),
            own_output=self._has("lm_head.weight"),
            embedding_scale=math.sqrt(backbone.hidden_size) if gemma else 1.0,
            softcap=settings.number("final_logit_softcapping", 0.0) or None if gemma else None,
            keys_are_values=self._keys_are_values(gemma),
            convolution=self._pair("conv_kernel_size", "conv_group_size", backbone.hidden_size)
            if kind == "dflash2"
            else None,
            selector=self._pair("selector_rank", "selector_top_k", None) if kind == "dflash2" else None,
        )
        if own.mask_token >= self._shape.size("vocab_size"):
            raise HeadFileError("config.json: mask_token_id is out of range", got=own.mask_token)
        return own

    def _starts_at_anchor(self, default: bool) -> bool:
        """Does the anchor's slot guess, and every slot the token behind it? Two trainers, two names."""
        said = [self._settings.flag(key, default) for key in _STARTS if self._settings.get(key) is not None]
        if len(set(said)) > 1:
            raise HeadFileError(f"config.json: {' and '.join(_STARTS)} disagree")
        return said[0] if said else default

    def _confidence(self, hidden: int, rank: int) -> tuple[str | None, bool]:
        """(the tensors' name, does it see the token before?), by the tensors; flags must not say otherwise."""
        name = _confidence_name(self._names)
        for key in ("enable_confidence_head", "use_confidence_head"):
            if self._settings.flag(key, name is not None) != (name is not None):
                raise HeadFileError(f"config.json: {key} does not fit the tensors", got=self._settings.get(key))
        if name is None:
            return None, False
        width = self._files.shape(f"{self._prefix}{_logits_prefix(self._names)}{name}.weight")[1]
        return name, self._settings.flag("confidence_head_with_markov", rank > 0 and width == hidden + rank)

    def _pair(self, first: str, second: str, divided: int | None) -> tuple[int, int]:
        pair = (self._settings.size(first, least=1, most=4096), self._settings.size(second, least=1, most=4096))
        if divided is not None and divided % pair[1]:
            raise HeadFileError(f"config.json: {second} does not divide hidden_size", got=pair[1], expected=divided)
        return pair

    def _windows(self, backbone: Backbone) -> tuple[int | None, ...]:
        shape, settings = self._shape, self._settings
        if settings.flag("use_swa", False):
            return (settings.size("swa_window_size", least=1),) * backbone.num_layers
        kinds = shape.get("layer_types")
        if kinds is None:
            kinds = ["full_attention"] * backbone.num_layers
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != backbone.num_layers or any(kind not in known for kind in kinds):
            raise HeadFileError("config.json: layer_types is wrong", got=str(kinds)[:80], expected=" or ".join(known))
        if "sliding_attention" not in kinds:
            return (None,) * backbone.num_layers
        window = shape.size("sliding_window", least=1)
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    def _causal(self, kind: str, layout: str, windows: tuple[int | None, ...]) -> tuple[bool, ...]:
        """As vLLM decides: by what the file says, otherwise layers with a window are."""
        settings = self._settings
        if kind == "jetspec":
            return (True,) * len(windows)
        if layout == "deepspec":
            return (False,) * len(windows)
        for key in ("is_causal", "causal"):
            if settings.get(key) is not None:
                return (settings.flag(key, False),) * len(windows)
        if settings.flag("sliding_window_non_causal", False):
            return (False,) * len(windows)
        return tuple(window is not None for window in windows)
