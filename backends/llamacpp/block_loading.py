"""From a file of architecture `dflash` to a head that guesses a block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from localspec.errors import HeadFileError, PairMismatchError, UnsupportedModelError
from localspec.protocols import HeadInfo
from localspec.types import Logits

from . import head_tables
from .block_head import Block, BlockHead
from .block_rows import Confidence, Markov, MarkovRows, PlainRows, Rows, Selector, SelectorRows
from .head_context import HeadContext
from .head_file import BATCH, HeadFile, check_outputs, check_vocabulary, check_width, contexts, notes, open_weights
from .model import LlamaModel
from .taps import Features, Taps

_NUM_IDS = 2  # a sequence's own, and one that carries cells when they are copied
_MAX_BLOCK = 64


def load_block(file: HeadFile, target: LlamaModel) -> BlockHead:
    """Raises members of the error tree."""
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
    check_width(file, taps, hidden)
    check_vocabulary(file, target)
    block = _block(file, target, hidden)
    weights = open_weights(file, target)
    try:
        causal = file.flag("attention.causal", False)

        def set_up(context: HeadContext) -> None:
            if not causal:
                context.attend_both_ways()

        memory = contexts(
            weights, target, taps.width, batch=max(BATCH, block.size), outputs=block.size, ids=_NUM_IDS,
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
        notes=notes(file, target),
    )
    return BlockHead(info, block, taps, target.memory, memory, weights.close)


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
    ids = check_outputs(file, target, hidden)
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
