"""Tells trained heads from whole models by the names of tensors, by the rules of those who read heads and without what
they check: a head that is broken, or that nothing here reads, is a head all the same and cannot run alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .block_heads import block_kind, block_prefix
from .eagle3 import is_eagle3
from .medusa import has_medusa
from .mtp import has_mtp

_MAX_SAID = 40
_SIGNS = {
    "dspark": ("markov_head.", "markov_w1.", "logit_head.markov_head.", "logit_head.markov_w1."),
    "dflash2": ("candidate_selector.",),
    "eagle3": ("midlayer.",),
}
"""What tensors of heads begin with, by kind: also of those that lack what a reader looks for."""


def head_kind(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """The kind of draft head in a folder with this config.json and tensors of these names, None for a whole model, also
    for one that ships a head. Never raises. Tensors count before settings, which are often copied from the target."""
    said = config.get("speculators_model_type")
    if isinstance(said, str):
        return said[:_MAX_SAID]
    prefix = block_prefix(names)
    if prefix is not None:
        return block_kind({name.removeprefix(prefix) for name in names}, _causal(config))
    if is_eagle3(names):
        return "eagle3"
    for kind, signs in _SIGNS.items():
        if any(name.startswith(signs) for name in names):
            return kind
    if _is_other_eagle3(config, names):
        return "eagle3"
    if not any(name.endswith("embed_tokens.weight") for name in names):  # beside a whole model they are a part of it
        if has_medusa(names):
            return "medusa"
        if has_mtp(names):
            return "mtp"
    if str(config.get("model_type", "")).endswith("_assistant") and "backbone_hidden_size" in config:
        return "assistant"
    return None


def _causal(config: Mapping[str, Any]) -> bool:
    places = (config, config.get("dflash_config"))
    return any(isinstance(place, Mapping) and place.get("causal_head") is True for place in places)


def _is_other_eagle3(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """By a table of tokens, or by its name."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    has_fc = "fc.weight" in names or "model.fc.weight" in names
    return has_fc and ("d2t" in names or "eagle3" in str(first).lower())
