"""From a file of architecture `eagle3`, or a target with an MTP layer, to a head that guesses step by step."""

from __future__ import annotations

import math

from localspec.errors import HeadFileError, PairMismatchError, UnsupportedModelError
from localspec.protocols import HeadInfo

from .head_context import HeadContext
from .head_file import BATCH, HeadFile, check_outputs, check_vocabulary, check_width, contexts, notes, open_weights
from .model import LlamaModel
from .step_head import StepHead
from .taps import Features, Taps

_STEP_IDS = 34  # leaves of a tree of guesses, and one that carries cells
_STEPS: dict[str, int] = {"batch": BATCH, "outputs": BATCH, "ids": _STEP_IDS, "slack": 2 * BATCH}
_EAGLE3_TAPS = 3
_CONTEXT_OF_MTP = 1  # LLAMA_CONTEXT_TYPE_MTP
_BEHIND_THE_NORM = -2  # in `HeadInfo.taps`: what the target's own output matrix reads
_MTP = frozenset({"qwen3next", "qwen35", "qwen35moe"})
"""Architectures whose MTP layer was run here."""


def load_eagle3(file: HeadFile, target: LlamaModel) -> StepHead:
    """Raises members of the error tree."""
    taps = Taps(file.layers(), False, target.weights.number("n_embd"))
    if len(taps.layers) != _EAGLE3_TAPS or file.number("block_count") != 1:
        raise UnsupportedModelError(
            "llama.cpp runs EAGLE-3 heads with three taps and one layer only",
            got=f"{len(taps.layers)} taps, {file.number('block_count')} layers",
        )
    taps.check(target.info.architecture, target.weights.number("n_layer"))
    if file.number("target_hidden_size") != taps.hidden:
        raise PairMismatchError(
            "the head was trained for another target: its hidden size differs",
            got=file.number("target_hidden_size"),
            expected=taps.hidden,
            fix="Give the model that the head was trained for.",
        )
    hidden = file.number("embedding_length")
    check_width(file, taps, hidden)
    check_vocabulary(file, target)
    check_outputs(file, target, hidden)
    if "token_embd.weight" not in file.header.tensors and hidden != taps.hidden:
        raise HeadFileError(
            f"{file.path.name} is not as wide as its target and lacks a tensor", got="token_embd.weight"
        )
    weights = open_weights(file, target)
    try:
        memory = contexts(weights, target, hidden, set_up=_give_states, **_STEPS)
    except BaseException:
        weights.close()
        raise
    info = _step_info(file, target, "eagle3", weights.number("n_params"), tuple(layer - 1 for layer in taps.layers))
    return StepHead(info, _encoded, taps, target.memory, memory, weights.close)


def load_mtp(file: HeadFile, target: LlamaModel) -> StepHead:
    """The layer behind the last one of the target's own file, which was loaded with it. Raises members of the error
    tree."""
    number = file.number("nextn_predict_layers", 0)
    if not number:
        raise UnsupportedModelError("the file is a whole model and has no MTP layer in it", got=file.path.name)
    if file.architecture not in _MTP or number != 1:
        raise UnsupportedModelError(
            "MTP layers of this kind were not tried, and llama.cpp may end the process over them",
            got=f"{number} of {file.architecture}",
            expected=f"one, of {', '.join(sorted(_MTP))}",
        )
    layer = target.weights.number("n_layer")
    for name in ("eh_proj", "enorm", "hnorm"):
        if f"blk.{layer}.nextn.{name}.weight" not in file.header.tensors:
            raise HeadFileError(f"the MTP layer of {file.path.name} lacks a tensor", got=f"blk.{layer}.nextn.{name}")
    hidden = target.weights.number("n_embd")
    taps = Taps((), True, hidden)
    taps.check(target.info.architecture, layer)
    memory = contexts(target.weights, target, hidden, set_up=_give_states, kind=_CONTEXT_OF_MTP, **_STEPS)
    sizes = [math.prod(one.shape) for one in file.header.tensors.values() if one.name.startswith(f"blk.{layer}.")]
    info = _step_info(file, target, "mtp", sum(sizes), (_BEHIND_THE_NORM,))
    return StepHead(info, _as_they_are, taps, target.memory, memory, _nothing_more)


def _nothing_more() -> None:
    """The weights are the target's."""


def _give_states(context: HeadContext) -> None:
    context.give_states(masked=True)


def _encoded(context: HeadContext, features: Features) -> Features:
    return context.encode_states(features)


def _as_they_are(context: HeadContext, features: Features) -> Features:
    return features


def _step_info(file: HeadFile, target: LlamaModel, kind: str, num_parameters: int, taps: tuple[int, ...]) -> HeadInfo:
    return HeadInfo(
        name=str(file.header.metadata.get("general.name") or file.path.stem),
        path=file.path,
        kind=kind,
        num_parameters=num_parameters,
        taps=taps,
        host_scores=True,
        notes=notes(file, target),
    )
