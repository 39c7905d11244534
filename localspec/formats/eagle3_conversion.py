"""What llama.cpp's `eagle3` architecture wants to have said about an EAGLE-3 head: three taps, one layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from localspec.errors import HeadFileError, PairMismatchError, UnsupportedModelError

from .conversion import LAYER_MODULES, interleave_heads
from .summary import ModelSummary

if TYPE_CHECKING:
    from gguf import GGUFWriter

NUM_TAPS = 3
_BLOCKS = ("midlayer.", "layers.0.")
_OUTER = {
    "embed_tokens.weight": "token_embd.weight",
    "lm_head.weight": "output.weight",
    "norm.weight": "output_norm.weight",
    "fc.weight": "fc.weight",
    "input_norm.weight": "enc.output_norm.weight",
}
_LAYER = {**LAYER_MODULES, "hidden_norm": "attn_norm_2"}
_NOT_THERE = ("self_attn.q_norm", "self_attn.k_norm")
_UNUSED = ("t2d", "d2t")


def is_eagle3(names: Mapping[str, object]) -> bool:
    """Judged by its tensors: the norm over features stands inside its one layer."""
    return any(f"{block}hidden_norm.weight" in names for block in _BLOCKS)


def tensors(config: Mapping[str, Any], names: Mapping[str, object]) -> dict[str, str]:
    """llama.cpp's name for each of the head's tensors. Raises UnsupportedModelError for those without a place."""
    found = {}
    for name in names:
        if name in _UNUSED:
            continue
        block = next((block for block in _BLOCKS if name.startswith(block)), None)
        module = "" if block is None else name.removeprefix(block).removesuffix(".weight")
        if name in _OUTER:
            found[name] = _OUTER[name]
        elif name.endswith(".weight") and module in _LAYER and module not in _NOT_THERE:
            found[name] = f"blk.0.{_LAYER[module]}.weight"
        else:
            raise UnsupportedModelError("llama.cpp's eagle3 architecture has no place for the head's tensor", got=name)
    return found


def add_metadata(
    writer: GGUFWriter, config: Mapping[str, Any], weights: Mapping[str, NDArray[np.float32]], target: ModelSummary
) -> None:
    """Raises UnsupportedModelError for other than three taps and one layer, PairMismatchError for another target."""
    hidden = target.hidden_size
    width = weights["fc.weight"].shape[1] if "fc.weight" in weights else 0
    if width % hidden:
        raise PairMismatchError(
            "the head was trained for another target: fc.weight is no multiple of its hidden size",
            got=width,
            expected=f"a multiple of {hidden}",
        )
    if width != NUM_TAPS * hidden or config.get("num_hidden_layers", 1) != 1:
        raise UnsupportedModelError(
            "llama.cpp runs EAGLE-3 heads with three taps and one layer only",
            got=f"{width // hidden} taps, {config.get('num_hidden_layers', 1)} layers",
        )
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise UnsupportedModelError("an EAGLE-3 head with scaled positions is not converted", got=str(scaling)[:80])
    if config.get("norm_output"):
        raise UnsupportedModelError("an EAGLE-3 head that feeds back its normed state is not run by llama.cpp")
    writer.add_array("eagle3.target_layers", taps(config, target.num_layers))
    writer.add_uint32("eagle3.target_hidden_size", hidden)
    writer.add_bool("eagle3.norm_before_residual", bool(config.get("norm_before_residual")))
    writer.add_bool("eagle3.norm_before_fc", "input_norm.weight" in weights)


def taps(config: Mapping[str, Any], num_layers: int) -> list[int]:
    """Layers whose inputs are read. Two conventions exist, told apart by the first id [sglang PR 25454]: from 1 on
    outputs are meant, from 2 on inputs. Raises HeadFileError."""
    inner = config.get("eagle_config")
    stated = config.get(
        "eagle_aux_hidden_state_layer_ids",
        inner.get("eagle_aux_hidden_state_layer_ids") if isinstance(inner, dict) else None,
    )
    if stated is None:
        return [2, num_layers // 2, num_layers - 3]
    ids = [int(tap) for tap in stated]
    if len(ids) != NUM_TAPS:
        raise HeadFileError("the head names another number of taps", got=ids, expected=NUM_TAPS)
    return [tap + 1 for tap in ids] if ids[0] == 1 else ids


def arranged(name: str, weight: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
    """A tensor as llama.cpp wants it: it rotates neighbours where the head's own framework rotates halves."""
    return interleave_heads(name, weight, {**config, "model_type": "llama"})
