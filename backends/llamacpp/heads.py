"""Opens a GGUF head beside a target. Everything that could end the process in llama.cpp is checked before it is asked.

dflash    DSpark, DFlash, JetSpec, DFlash 2        block_head
eagle3    EAGLE-3                                  step_head
MTP       layers inside the target's own file      step_head
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localspec.errors import (
    BackendError,
    HeadFileError,
    ModelFileError,
    PairMismatchError,
    UnsupportedModelError,
)
from localspec.formats import gguf
from localspec.formats.gguf import GgufHeader
from localspec.protocols import DraftHead, HeadInfo, LanguageModel
from localspec.types import Logits

from . import head_tables, loading, native
from .block_head import Block, BlockHead
from .block_rows import Confidence, Markov, MarkovRows, PlainRows, Rows, Selector, SelectorRows
from .head_context import HeadContext, parameters
from .memory import Memory
from .model import LlamaModel
from .state import LlamaState
from .step_head import StepHead
from .taps import Features, Taps
from .weights import Weights

_BATCH = 64
"""Tokens of a pass. llama.cpp makes room for as many rows of logits, so it is no larger."""

_STEP_IDS = 34  # leaves of a tree of guesses, and one that carries cells
_STEPS: dict[str, int] = {"batch": _BATCH, "outputs": _BATCH, "ids": _STEP_IDS, "slack": 2 * _BATCH}
_EAGLE3_TAPS = 3
_CONTEXT_OF_MTP = 1  # LLAMA_CONTEXT_TYPE_MTP
_BEHIND_THE_NORM = -2  # in `HeadInfo.taps`: what the target's own output matrix reads
_MTP = frozenset({"qwen3next", "qwen35", "qwen35moe"})
_NUM_IDS = 2  # a sequence's own, and one that carries cells when they are copied
_MAX_BLOCK = 64
_STEP = 256  # cells are made in this step


@dataclass(frozen=True, slots=True)
class HeadFile:
    """A head's file. prefix: of its own keys."""

    path: Path
    header: GgufHeader
    architecture: str

    def number(self, key: str, default: int | None = None) -> int:
        """A key of its own. Raises HeadFileError where it is missing or no number."""
        value = self.header.metadata.get(f"{self.architecture}.{key}", default)
        if type(value) is not int:
            raise HeadFileError(f"{self.path.name}: {self.architecture}.{key} is no whole number", got=value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        """The same for yes or no."""
        value = self.header.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, bool):
            raise HeadFileError(f"{self.path.name}: {self.architecture}.{key} is neither true nor false", got=value)
        return value

    def layers(self) -> tuple[int, ...]:
        """Layers whose inputs it reads. Raises HeadFileError."""
        value = self.header.metadata.get(f"{self.architecture}.target_layers")
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or not len(value):
            raise HeadFileError(f"{self.path.name}: {self.architecture}.target_layers is no list of layers", got=value)
        return tuple(value.tolist())

    def shape(self, tensor: str, *expected: int | None) -> tuple[int, ...]:
        """The shape of a tensor that must be there. Raises HeadFileError where it is not or is another."""
        found = self.header.tensors.get(tensor)
        if found is None:
            raise HeadFileError(f"{self.path.name} lacks a tensor", got=tensor)
        if len(found.shape) != len(expected) or any(
            want is not None and want != size for want, size in zip(expected, found.shape, strict=True)
        ):
            raise HeadFileError(f"tensor {tensor} of {self.path.name} has another shape", got=found.shape,
                                expected=expected)  # fmt: skip
        return found.shape


def load_head(path: Path, target: LanguageModel) -> DraftHead:
    """See `Backend.load_head`."""
    if not isinstance(target, LlamaModel):
        raise UnsupportedModelError("this target was not loaded by the llamacpp backend", got=target.info.backend)
    if path.is_dir():
        raise HeadFileError(
            "the llamacpp backend reads heads as GGUF files", got=path, fix="Make one with `localspec convert`."
        )
    loading.check_file(path)
    try:
        header = gguf.read_header(path)
    except ModelFileError as error:
        raise HeadFileError(error.what, got=error.got, expected=error.expected, fix=error.fix) from error
    file = HeadFile(path, header, str(header.metadata.get("general.architecture", "")))
    if target.memory.num_open:
        raise BackendError("a head is loaded before its target has open sequences", got=target.memory.num_open)
    if file.architecture == "dflash":
        return _load_block(file, target)
    if file.architecture == "eagle3":
        return _load_eagle3(file, target)
    if path.resolve() == target.info.path.resolve():
        return _load_mtp(file, target)
    raise UnsupportedModelError(
        "the llamacpp backend does not run such a head",
        got=file.architecture or "no architecture",
        expected="dflash, eagle3, or the target's own file for the MTP layer in it",
    )


# ---------------------------------------------------------------- what all have in common


def _check_vocabulary(file: HeadFile, target: LlamaModel) -> None:
    """Raise PairMismatchError unless the head's tokens are the target's."""
    mine = gguf.read_parts(target.info.path)[0][1].metadata.get("tokenizer.ggml.tokens")
    other = file.header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(mine, list) or not isinstance(other, list):
        raise HeadFileError(f"{file.path.name} or its target names no tokens")
    if mine == other:
        return
    place = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    raise PairMismatchError(
        "the head was trained for another vocabulary",
        got=f"{len(other)} tokens, token {place}: {str(other[place : place + 1])[:80]}",
        expected=f"{len(mine)} tokens, token {place}: {str(mine[place : place + 1])[:80]}",
        fix="Give the model that the head was trained for.",
    )


def _check_width(file: HeadFile, taps: Taps, hidden: int) -> None:
    """Raise PairMismatchError where features are not as wide as the head reads them."""
    _, width = file.shape("fc.weight", hidden, None)
    if width != taps.width:
        raise PairMismatchError(
            "the head was trained for another target: its fc.weight is not as wide as what it reads",
            got=width,
            expected=f"{len(taps.layers)} states of {taps.hidden}",
            fix="Give the model that the head was trained for.",
        )


def _open_weights(file: HeadFile, target: LlamaModel) -> Weights:
    options = dict(target.info.options)
    try:
        return Weights(file.path, gpu_layers=int(options["gpu_layers"]), extra_buffers=bool(options["extra_buffers"]))
    except ModelFileError as error:
        raise HeadFileError(error.what, got=error.got, expected=error.expected, fix=error.fix) from error


def _contexts(
    weights: Weights, target: LlamaModel, width: int, *, batch: int, outputs: int, ids: int, slack: int,
    set_up: Callable[[HeadContext], None], kind: int = 0,
) -> Memory:  # fmt: skip
    """A memory of contexts for the head. slack: cells beyond the target's context.  set_up: of each context.  kind:
    llama.cpp's, of a context."""
    cells = -(-(target.info.context_length + slack) // _STEP) * _STEP
    params = parameters(cells, batch=batch, outputs=outputs, ids=ids, options=dict(target.info.options))
    params.ctx_other, params.ctx_type = target.memory.context.handle, kind
    window = max(0, weights.number("n_swa"))

    def make_context() -> native.Context:
        native.forget_errors()
        try:
            context = HeadContext(weights.pointer, params, weights.vocab_size, window, width)
        except BackendError as error:
            raise loading.context_error(target.info.path, native.complaints(), error) from error
        set_up(context)
        return context

    return Memory(make_context, target.capabilities.num_sequences, LlamaState)


# ---------------------------------------------------------------- block heads


def _load_block(file: HeadFile, target: LlamaModel) -> BlockHead:
    taps = Taps(file.layers(), False, target.weights.number("n_embd"))
    taps.check(target.info.architecture, target.weights.number("n_layer"))
    hidden = file.number("embedding_length")
    if hidden != taps.hidden:
        raise PairMismatchError(
            "the head was trained for another target: its hidden size differs",
            got=hidden,
            expected=taps.hidden,
            fix="Give the model that the head was trained for.",
        )
    _check_width(file, taps, hidden)
    _check_vocabulary(file, target)
    block = _block(file, target, hidden)
    weights = _open_weights(file, target)
    try:
        causal = file.flag("attention.causal", False)

        def set_up(context: HeadContext) -> None:
            if not causal:
                context.attend_both_ways()

        memory = _contexts(
            weights, target, taps.width, batch=max(_BATCH, block.size), outputs=block.size, ids=_NUM_IDS,
            slack=block.size, set_up=set_up,
        )  # fmt: skip
    except BaseException:
        weights.close()
        raise
    info = HeadInfo(
        name=str(file.header.metadata.get("general.name") or file.path.stem),
        path=file.path,
        kind=_kind(file, block, causal),
        num_parameters=weights.number("n_params"),
        taps=tuple(layer - 1 for layer in taps.layers),
        levels=block.levels,
        one_pass=True,
        confident=block.confidence is not None,
        host_scores=True,
        notes=_notes(file, target),
    )
    return BlockHead(info, block, taps, target.memory, memory, weights.close)


def _notes(file: HeadFile, target: LlamaModel) -> tuple[str, ...]:
    trained = file.number("context_length", target.info.context_length)
    if trained >= target.info.context_length:
        return ()
    return (f"the head was trained for {trained} tokens of context; beyond that its guesses get worse",)


def _kind(file: HeadFile, block: Block, causal: bool) -> str:
    if "markov_w1.weight" in file.header.tensors:
        return "dspark"
    if "selector_hidden.weight" in file.header.tensors:
        return "dflash2"
    return "jetspec" if causal else "dflash"


def _block(file: HeadFile, target: LlamaModel, hidden: int) -> Block:
    """What the file says about its blocks. Raises HeadFileError, UnsupportedModelError."""
    names, path, header = file.header.tensors, file.path, file.header
    if file.number("hyper_connection.count", 0):
        raise UnsupportedModelError("a DSpark head of hyper-connections is not run", got=path.name)
    size = file.number("block_size")
    if not 2 <= size <= _MAX_BLOCK:
        raise HeadFileError(f"{path.name}: dflash.block_size out of range", got=size, expected=f"2 to {_MAX_BLOCK}")
    mask = header.metadata.get("tokenizer.ggml.mask_token_id")
    if type(mask) is not int or not 0 <= mask < target.vocab_size:
        raise HeadFileError(f"{path.name} names no mask token of its vocabulary", got=mask)
    for key in ("attention.key_length", "attention.value_length"):
        file.number(key)
    if file.number("attention.key_length") != file.number("attention.value_length"):
        raise UnsupportedModelError("llama.cpp runs heads whose keys and values are equally long only", got=path.name)
    ids = _check_outputs(file, target, hidden)
    is_markov, is_selector = "markov_w1.weight" in names, "selector_hidden.weight" in names
    anchored = file.flag("sample_from_anchor", is_markov)
    confidence = _confidence(file, hidden, target.vocab_size) if is_markov else None
    return Block(
        size=size,
        first=0 if anchored else 1,
        mask=mask,
        needs_hidden=is_selector or confidence is not None,
        make_rows=_row_maker(file, hidden, ids),
        confidence=confidence,
    )


def _check_outputs(file: HeadFile, target: LlamaModel, hidden: int) -> NDArray[np.int64] | None:
    """d2t. What the head does not bring it takes from the target. Raises HeadFileError."""
    ids, num_tokens = head_tables.ids(file.path, file.header), target.vocab_size
    num_rows = num_tokens if ids is None else len(ids)
    if ids is not None and (not num_rows or ids.min() < 0 or ids.max() >= num_tokens):
        raise HeadFileError(f"d2t of {file.path.name} names tokens beyond the vocabulary", got=ids.max(initial=0))
    has_embedding, has_output = (f"{name}.weight" in file.header.tensors for name in ("token_embd", "output"))
    if has_embedding:
        file.shape("token_embd.weight", num_tokens, hidden)
    if has_output:
        file.shape("output.weight", num_rows, hidden)
    if ids is not None and not has_output:
        raise HeadFileError(f"{file.path.name} has a vocabulary of its own and lacks a tensor", got="output.weight")
    return ids


def _row_maker(
    file: HeadFile, hidden: int, ids: NDArray[np.int64] | None
) -> Callable[[int, Logits, Features | None], Rows]:
    path, header = file.path, file.header
    w1, w2 = (head_tables.table(path, header, f"markov_w{number}.weight") for number in (1, 2))
    if w1 is not None:
        if w2 is None or w2.shape[1] != w1.shape[1]:
            raise HeadFileError(f"{path.name} lacks a tensor, or it has another rank", got="markov_w2.weight")
        file.shape("markov_w2.weight", None if ids is None else len(ids), w1.shape[1])
        return partial(_markov_rows, Markov(w1, w2, ids))
    gate = head_tables.table(path, header, "selector_hidden.weight")
    if gate is None:
        return PlainRows
    tables = [head_tables.table(path, header, f"selector_{name}.weight") for name in ("predecessor", "successor")]
    before, behind = tables
    if before is None or behind is None:
        raise HeadFileError(f"{path.name} lacks a tensor", got="selector_predecessor or selector_successor")
    file.shape("selector_hidden.weight", before.shape[1], hidden)
    for key in ("conv_kernel_size", "conv_group_size", "selector_rank"):
        file.number(key)
    return partial(_selector_rows, Selector(before, behind, gate, file.number("selector_top_k")))


def _markov_rows(markov: Markov, anchor: int, logits: Logits, hidden: Features | None) -> Rows:
    return MarkovRows(anchor, logits, hidden, markov)


def _selector_rows(selector: Selector, anchor: int, logits: Logits, hidden: Features | None) -> Rows:
    assert hidden is not None
    return SelectorRows(logits, hidden, selector)


def _confidence(file: HeadFile, hidden: int, num_tokens: int) -> Confidence | None:
    weight = head_tables.vector(file.path, file.header, "conf_proj.weight")
    w1 = head_tables.table(file.path, file.header, "markov_w1.weight")
    assert w1 is not None
    file.shape("markov_w1.weight", num_tokens, None)
    if weight is None:
        return None
    if len(weight) != hidden + w1.shape[1]:
        raise HeadFileError(f"conf_proj.weight of {file.path.name} has another size", got=len(weight))
    bias = head_tables.vector(file.path, file.header, "conf_proj.bias")
    return Confidence(weight, 0.0 if bias is None else float(bias[0]), w1)


# ---------------------------------------------------------------- heads that guess step by step


def _load_eagle3(file: HeadFile, target: LlamaModel) -> StepHead:
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
    _check_width(file, taps, hidden)
    _check_vocabulary(file, target)
    _check_outputs(file, target, hidden)
    if "token_embd.weight" not in file.header.tensors and hidden != taps.hidden:
        raise HeadFileError(
            f"{file.path.name} is not as wide as its target and lacks a tensor", got="token_embd.weight"
        )
    weights = _open_weights(file, target)
    try:
        memory = _contexts(weights, target, hidden, set_up=_give_states, **_STEPS)
    except BaseException:
        weights.close()
        raise
    info = _step_info(file, target, "eagle3", weights.number("n_params"), tuple(layer - 1 for layer in taps.layers))
    return StepHead(info, _encoded, taps, target.memory, memory, weights.close)


def _load_mtp(file: HeadFile, target: LlamaModel) -> StepHead:
    """The layer behind the last one of the target's own file, which was loaded with it."""
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
    memory = _contexts(target.weights, target, hidden, set_up=_give_states, kind=_CONTEXT_OF_MTP, **_STEPS)
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
        notes=_notes(file, target),
    )
