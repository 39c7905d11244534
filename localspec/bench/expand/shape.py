"""How large the expanded model is, and where the small one lies in it.

The hidden state becomes `copies` copies of the small one's, side by side. Its mean square is then the same, so
norms keep their weights and their epsilon: nothing is rescaled and nothing is rounded. (Padding with zeros would
need norm weights times sqrt(H'/H), which half precision rounds, and another epsilon, which head norms share.)

- What writes to the hidden state (embedding, attention output, MLP output) writes every copy.
- What reads it (queries, keys, values, MLP inputs, output matrix) reads the first copy: its other columns are 0.
- More heads and more MLP units are random and read all copies; their columns in the output matrices are 0.
- More layers are random and their output matrices are 0: they add exactly 0.
- The output matrix stands apart from the embedding, which they could not share with such rows.

Source: ours; padding trained networks without changing their function goes back to Net2Net (Chen et al., 2016).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from localspec.errors import SettingError, UnknownNameError, UnsupportedModelError

_STEP = 256  # units of an MLP; what kernels and blocks like
_EMBEDDING, _OUTPUT, _FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True, slots=True)
class Size:
    """What is asked for. hidden: at least.  num_parameters: as near as the MLP's width allows, in all layers alike."""

    num_parameters: int
    num_layers: int
    hidden: int

    @classmethod
    def named(cls, name: str) -> Size:
        """Raises UnknownNameError."""
        if name not in SIZES:
            raise UnknownNameError.among("size", name, SIZES)
        return SIZES[name]


SIZES = {
    "0.5b": Size(500_000_000, 24, 896),
    "1b": Size(1_000_000_000, 16, 2048),
    "8b": Size(8_000_000_000, 36, 4096),
}
"""Layers and hidden size of Qwen2.5-0.5B, Llama-3.2-1B and Qwen3-8B."""


class Part(Enum):
    """What becomes of a tensor."""

    EMBEDDING = "columns in every copy"
    OUTPUT = "first copy, other columns 0"
    READER = "first copy, other columns 0; more rows random"
    WRITER = "rows in every copy; more columns 0"
    HIDDEN_NORM = "every copy"
    HEAD_NORM = "unchanged"
    BIAS = "more entries random"


LAYER_PARTS = {
    "input_layernorm.weight": Part.HIDDEN_NORM,
    "post_attention_layernorm.weight": Part.HIDDEN_NORM,
    "self_attn.q_norm.weight": Part.HEAD_NORM,
    "self_attn.k_norm.weight": Part.HEAD_NORM,
    "self_attn.q_proj.weight": Part.READER,
    "self_attn.k_proj.weight": Part.READER,
    "self_attn.v_proj.weight": Part.READER,
    "self_attn.q_proj.bias": Part.BIAS,
    "self_attn.k_proj.bias": Part.BIAS,
    "self_attn.v_proj.bias": Part.BIAS,
    "self_attn.o_proj.weight": Part.WRITER,
    "mlp.gate_proj.weight": Part.READER,
    "mlp.up_proj.weight": Part.READER,
    "mlp.down_proj.weight": Part.WRITER,
}
"""By the tensor's name within its layer."""


@dataclass(frozen=True, slots=True)
class Grown:
    """One tensor of the expanded model. source: the small model's tensor, None in layers it does not have."""

    name: str
    part: Part
    shape: tuple[int, ...]
    source: str | None


@dataclass(frozen=True, slots=True)
class Layout:
    """config: of the expanded model.  copies: of the hidden state.  tensors: in the order in which they are read."""

    config: Mapping[str, Any]
    copies: int
    tensors: tuple[Grown, ...]

    @property
    def num_parameters(self) -> int:
        """All of them, the zeros included."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


def lay_out(config: Mapping[str, Any], names: Mapping[str, object], size: Size) -> Layout:
    """Plan the expansion of a model with this configuration and these tensors.

    Raises SettingError where the source is larger than `size`, UnsupportedModelError for tensors it does not know.
    """
    copies = -(-size.hidden // int(config["hidden_size"]))
    num_layers = size.num_layers
    small = _described(config)
    if num_layers < config["num_hidden_layers"] or size.hidden < config["hidden_size"]:
        raise SettingError("the source is larger than the size asked for", got=small, expected="a smaller source")
    modules = _modules(names)
    grown = dict(config)
    grown |= {
        "hidden_size": copies * config["hidden_size"],
        "num_hidden_layers": num_layers,
        "num_attention_heads": copies * config["num_attention_heads"],
        "num_key_value_heads": copies * config["num_key_value_heads"],
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "intermediate_size": 0,
        "tie_word_embeddings": False,
    }
    if "max_window_layers" in grown:
        grown["max_window_layers"] = num_layers
    if "layer_types" in grown:
        grown["layer_types"] = [config["layer_types"][0]] * num_layers
    rest = Layout(grown, copies, tuple(_tensors(grown, config, modules))).num_parameters
    wanted = (size.num_parameters - rest) / (3 * num_layers * grown["hidden_size"])
    inner = round(wanted / _STEP) * _STEP
    if inner < config["intermediate_size"]:
        raise SettingError("the source is larger than the size asked for", got=small, expected="a smaller source")
    grown["intermediate_size"] = inner
    return Layout(grown, copies, tuple(_tensors(grown, config, modules)))


def _described(config: Mapping[str, Any]) -> str:
    return f"{config['num_hidden_layers']} layers of {config['hidden_size']}, MLP {config['intermediate_size']}"


def _modules(names: Mapping[str, object]) -> list[str]:
    """Names within a layer, checked to be known and the same in all layers."""
    layers: dict[str, set[str]] = {}
    for name in names:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is not None:
            layers.setdefault(match[1], set()).add(match[2])
        elif name not in (_EMBEDDING, _OUTPUT, _FINAL_NORM):
            raise UnsupportedModelError("expansion does not know the tensor", got=name)
    found = layers.get("0", set())
    unknown = sorted(module for modules in layers.values() for module in modules if module not in LAYER_PARTS)
    if unknown or any(modules != found for modules in layers.values()):
        raise UnsupportedModelError(
            "expansion is for dense models whose layers are all alike", got=unknown[0] if unknown else "unequal layers"
        )
    return [module for module in LAYER_PARTS if module in found]


def _tensors(config: Mapping[str, Any], small: Mapping[str, Any], modules: list[str]) -> Iterator[Grown]:
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    outputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": inner, "up_proj": inner}
    yield Grown(_EMBEDDING, Part.EMBEDDING, (vocabulary, hidden), _EMBEDDING)
    for layer in range(config["num_hidden_layers"]):
        for module in modules:
            name, part, projection = f"model.layers.{layer}.{module}", LAYER_PARTS[module], module.split(".")[-2]
            shapes = {
                Part.HIDDEN_NORM: (hidden,),
                Part.HEAD_NORM: (head,),
                Part.WRITER: (hidden, queries if projection == "o_proj" else inner),
            }
            if part is Part.READER:
                shapes[part] = (outputs[projection], hidden)
            elif part is Part.BIAS:
                shapes[part] = (outputs[projection],)
            yield Grown(name, part, shapes[part], name if layer < small["num_hidden_layers"] else None)
    yield Grown(_FINAL_NORM, Part.HIDDEN_NORM, (hidden,), _FINAL_NORM)
    yield Grown(_OUTPUT, Part.OUTPUT, (vocabulary, hidden), _EMBEDDING if small["tie_word_embeddings"] else _OUTPUT)
