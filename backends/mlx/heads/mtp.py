"""Multi-token prediction: one more layer of the target's own kind over pairs of its last hidden state and a token.

The layer is mlx-lm's, taken from a model of one layer that is built from the head's settings; so every family's
attention and experts are computed as the target's are.
"""

from __future__ import annotations

import re
from importlib import import_module
from statistics import median
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from localspec.errors import HeadFileError, PairMismatchError
from localspec.formats.gemma_assistant import AssistantConfig
from localspec.formats.head import HeadHeader
from localspec.formats.mtp import MtpConfig
from localspec.protocols import DraftHead

from ..border import is_memory_error
from ..cache import Pass
from ..device import builds_attention
from ..grafts import place_positions
from ..memory import planned
from ..model import MlxModel
from .assistant import build as build_assistant
from .borrowed import Borrowed
from .pairs import PairHead
from .parameters import head_info, read_tensors, take_weights

_LAYER = "model.layers.0."
_NORM = re.compile(r"(?:.*\.)?\w*norm\.weight")
_CENTRED_BELOW = 0.5  # mean of a norm's weights: near 0 where they are stored less one, near 1 or above where not


class _Module(nn.Module):
    def __init__(self, config: MtpConfig, block: nn.Module) -> None:
        super().__init__()
        self.projection = nn.Linear(2 * config.hidden, config.hidden, bias=False)
        self.embedding_norm = nn.RMSNorm(config.hidden, eps=config.eps)
        self.hidden_norm = nn.RMSNorm(config.hidden, eps=config.eps)
        self.final_norm = nn.RMSNorm(config.hidden, eps=config.eps)
        self.block = block


class Mtp:
    """`pairs.PairNetwork`. Raises HeadFileError, and PairMismatchError for another target's.

    weights: by their names in the file.  borrowed: the target's ends, which are the head's too.
    """

    def __init__(self, config: MtpConfig, weights: dict[str, mx.array], borrowed: Borrowed) -> None:
        parts = config.parts
        if config.hidden != borrowed.hidden_size:
            raise PairMismatchError(
                f"tensor {parts.projection} is for another hidden size than the target's",
                got=config.hidden,
                expected=borrowed.hidden_size,
            )
        self.current = Pass(blocks=builds_attention())
        self.width = config.hidden
        self.notes: list[str] = []
        self._model = _one_layer(config)
        self.module = _Module(config, self._model.layers[0])
        take_weights(self.module, self._prepared(config, weights), lambda name: _stored(name, config))
        place_positions(self.module, self.current)
        self._borrowed = borrowed
        self._dtype = self.module.final_norm.weight.dtype

    def caches(self) -> list[Any]:
        """The layer's."""
        return [planned(cache, self.current) for cache in make_prompt_cache(self._model)]

    def features(self, taps: mx.array) -> mx.array:
        """[K, E]: the last hidden state behind the final norm, as it is."""
        return taps.astype(self._dtype)

    def run(self, hidden: mx.array, tokens: mx.array, caches: list[Any]) -> mx.array:
        """[K, E] outputs, behind the layer's final norm."""
        module = self.module
        embedded = module.embedding_norm(self._borrowed.embed(tokens).astype(self._dtype))
        joined = mx.concatenate([embedded, module.hidden_norm(hidden.astype(self._dtype))], axis=-1)
        x = module.projection(joined)[None]
        mask = caches[0].make_mask(x.shape[1], return_array=True)
        outputs: mx.array = module.final_norm(module.block(x, mask, caches[0])[0])
        return outputs

    def fed_back(self, outputs: mx.array) -> mx.array:
        """[N, E] the outputs themselves, as the target's hidden states are behind a norm."""
        return outputs

    def logits(self, outputs: mx.array) -> mx.array:
        """[N, V] by the target's output matrix."""
        return self._borrowed.score(outputs)

    def _prepared(self, config: MtpConfig, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """This module's parameters: names, stacked experts and norms as mlx-lm has them. Its own conversion shifts
        norms by rules for whole models, so they go round it."""
        parts = config.parts
        around = {
            parts.projection: "projection", parts.embedding_norm: "embedding_norm", parts.hidden_norm: "hidden_norm",
            parts.final_norm: "final_norm",
        }  # fmt: skip
        stems = {name.removesuffix("weight"): f"{place}." for name, place in around.items()}
        made: dict[str, mx.array] = {}
        inner: dict[str, mx.array] = {}
        for name, value in weights.items():
            stem, _, part = name.rpartition(".")
            if f"{stem}." in stems:
                made[stems[f"{stem}."] + part] = value
            elif _NORM.fullmatch(name):
                made["block." + name.removeprefix(parts.block)] = value
            else:
                inner[_LAYER + name.removeprefix(parts.block)] = value
        for name, value in self._model.sanitize(inner).items():
            made["block." + name.rpartition("layers.0.")[2]] = value
        return self._uncentred(made) if config.zero_centred else made

    def _uncentred(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Norms as factors. Those of the block and those around it are judged apart: converters shift the former."""
        for is_inner in (True, False):
            norms = [n for n in weights if _NORM.fullmatch(n) and n.startswith("block.") == is_inner]
            if norms and median(float(weights[n].astype(mx.float32).mean()) for n in norms) < _CENTRED_BELOW:
                weights |= {n: weights[n].astype(mx.float32) + 1.0 for n in norms}
                self.notes.append(f"Norms {'of' if is_inner else 'around'} the layer are stored less one.")
        return weights


def _one_layer(config: MtpConfig) -> Any:
    """A model of the family with one layer, of the kind that the head is. Raises HeadFileError."""
    classes = import_module(f"mlx_lm.models.{config.family}")
    settings = {
        **config.settings,
        "model_type": config.family, "num_hidden_layers": 1, "full_attention_interval": 1, "layer_types": None,
        "mlp_only_layers": [], "decoder_sparse_step": 1, "moe_layer_freq": 1,
        "first_k_dense_replace": 0 if config.num_experts else 1,
    }  # fmt: skip
    if not config.num_experts:
        settings["num_experts"] = 0
    try:
        return classes.Model(classes.ModelArgs.from_dict(settings))
    except Exception as error:  # whatever a model file's constructor does with settings that are wrong
        if is_memory_error(error):
            raise
        raise HeadFileError(f"config.json does not make a {config.family} layer", got=error) from error


def _stored(name: str, config: MtpConfig) -> str:
    """The name that a parameter has in the file."""
    parts = config.parts
    around = {
        "projection.weight": parts.projection, "embedding_norm.weight": parts.embedding_norm,
        "hidden_norm.weight": parts.hidden_norm, "final_norm.weight": parts.final_norm,
    }  # fmt: skip
    return around.get(name) or parts.block + name.removeprefix("block.")


def build(header: HeadHeader, target: MlxModel) -> DraftHead:
    """The head beside its target. Raises HeadFileError, PairMismatchError, and UnsupportedModelError for a target that
    cannot be read."""
    config = header.details
    if isinstance(config, AssistantConfig):
        return cast("DraftHead", build_assistant(header, target))
    assert isinstance(config, MtpConfig)
    network = Mtp(config, read_tensors(header, config.tensors), target.ends)
    info = head_info(header, network.module, header.taps, notes=network.notes)
    return cast("DraftHead", PairHead(info, target, network))
