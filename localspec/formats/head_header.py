"""What a trained head's headers say, in our own conventions: from config.json and tensor shapes, or GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localspec.errors import HeadFileError


@dataclass(frozen=True, slots=True)
class HeadFiles:
    """Headers as they are. config: config.json, or the GGUF metadata.  shapes: of all tensors by stored name, rows
    first.  format: "safetensors" or "gguf"."""

    path: Path
    format: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    def shape(self, name: str, num_dimensions: int = 2) -> tuple[int, ...]:
        """A tensor's shape. Raises HeadFileError where it is not there, or has another number of dimensions."""
        shape = self.shapes.get(name)
        if shape is None:
            raise HeadFileError(f"the head lacks the tensor {name}", got=self.path.name)
        if len(shape) != num_dimensions:
            raise HeadFileError(
                f"tensor {name} has the wrong shape", got=shape, expected=f"{num_dimensions} dimensions"
            )
        return shape


@dataclass(frozen=True, slots=True)
class Backbone:
    """Sizes of a head's own transformer layers.

    family: whose layers they are (qwen3, llama, gemma4).  rope_scaling: as configurations write it, None for plain
    positions.  attention_bias: projections of attention have biases.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    feed_forward: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = None
    rope_interleaved: bool = False
    attention_bias: bool = False
    max_positions: int | None = None


@dataclass(frozen=True, slots=True)
class HeadHeader:
    """A head by its headers.

    kind: as `HeadInfo.kind`.  layout: whose names the file uses (deepspec, z-lab, specforge, speculators, gguf, ...).
    taps: j >= 0 the output of the target's layer j, -1 its embedding's, -2 the last one behind the final norm; whatever
    the file's own convention.  target_hidden: hidden size of the target.  vocab_size: tokens of the target, where the
    file says.  draft_vocab: tokens that the head can guess, where fewer.  num_target_layers: where the file says.
    prefix: before the names of tensors.  backbone: None without layers of its own.  details: what only this kind has.
    """

    kind: str
    layout: str
    files: HeadFiles
    taps: tuple[int, ...]
    target_hidden: int
    num_parameters: int
    backbone: Backbone | None = None
    vocab_size: int | None = None
    draft_vocab: int | None = None
    num_target_layers: int | None = None
    prefix: str = ""
    details: object = field(default=None)

    @property
    def path(self) -> Path:
        """The head's file or folder."""
        return self.files.path
