"""A head's file and what is checked of it, whatever its kind; and the contexts that it gets beside a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localspec.errors import BackendError, HeadFileError, ModelFileError, PairMismatchError
from localspec.formats import gguf
from localspec.formats.gguf import GgufHeader

from . import head_tables, loading, native
from .head_context import HeadContext, parameters
from .memory import Memory
from .model import LlamaModel
from .state import LlamaState
from .taps import Taps
from .weights import Weights

BATCH = 64
"""Tokens of a pass. llama.cpp makes room for as many rows of logits, so it is no larger."""

_STEP = 256  # cells are made in this step


@dataclass(frozen=True, slots=True)
class HeadFile:
    """A head's file, or a target's with one inside. architecture: stands before its own keys."""

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


# ---------------------------------------------------------------- does it fit?


def check_vocabulary(file: HeadFile, target: LlamaModel) -> None:
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


def check_width(file: HeadFile, taps: Taps, hidden: int) -> None:
    """Raise PairMismatchError where features are not as wide as the head reads them."""
    _, width = file.shape("fc.weight", hidden, None)
    if width != taps.width:
        raise PairMismatchError(
            "the head was trained for another target: its fc.weight is not as wide as what it reads",
            got=width,
            expected=f"{len(taps.layers)} states of {taps.hidden}",
            fix="Give the model that the head was trained for.",
        )


def check_outputs(file: HeadFile, target: LlamaModel, hidden: int) -> NDArray[np.int64] | None:
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


def notes(file: HeadFile, target: LlamaModel) -> tuple[str, ...]:
    """What its user should know."""
    trained = file.number("context_length", target.info.context_length)
    if trained >= target.info.context_length:
        return ()
    return (f"the head was trained for {trained} tokens of context; beyond that its guesses get worse",)


# ---------------------------------------------------------------- what it runs in


def open_weights(file: HeadFile, target: LlamaModel) -> Weights:
    """On the processors that run the target. Raises HeadFileError, UnsupportedModelError, OutOfMemoryError."""
    options = dict(target.info.options)
    try:
        return Weights(file.path, gpu_layers=int(options["gpu_layers"]), extra_buffers=bool(options["extra_buffers"]))
    except ModelFileError as error:
        raise HeadFileError(error.what, got=error.got, expected=error.expected, fix=error.fix) from error


def contexts(
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
