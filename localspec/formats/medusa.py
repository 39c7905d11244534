"""What the tensors of Medusa heads say; the released configurations count heads wrongly.

Head i, block j: `{i}.{j}.linear.weight` and `.bias`; projection `{i}.{blocks}.weight`. Medusa-1 files hold the heads
alone, Medusa-2 ones the whole model, with `medusa_head.` before these names. Source: FasterDecoding/Medusa
medusa_model.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from localspec.errors import HeadFileError

from .head_header import HeadFiles, HeadHeader
from .head_tensors import Shapes, require_shapes

PREFIX = "medusa_head."
_BLOCK = re.compile(r"(?:medusa_head\.)?(\d+)\.(\d+)\.linear\.(weight|bias)")
_PROJECTION = re.compile(r"(?:medusa_head\.)?(\d+)\.(\d+)\.weight")


@dataclass(frozen=True, slots=True)
class MedusaConfig:
    """num_blocks: residual blocks of each head.  vocab: rows of its projection, 0 where it uses the target's.
    prefix: before the names of tensors.  tensors: all that are read, by stored name."""

    num_heads: int
    num_blocks: int
    hidden: int
    vocab: int
    prefix: str
    tensors: tuple[str, ...]

    @property
    def own_head(self) -> bool:
        """Does each head bring its projection?"""
        return self.vocab > 0


def read_medusa_head(files: HeadFiles) -> HeadHeader | None:
    """Its header; None for what has no such tensors. `details` is the `MedusaConfig`. Raises HeadFileError."""
    if files.format != "safetensors" or files.config.get("speculators_model_type") is not None:
        return None
    if not has_medusa(files.shapes):
        return None
    config = medusa_config(files.shapes)
    return HeadHeader(
        kind="medusa",
        layout="medusa-2" if config.prefix else "medusa-1",
        files=files,
        taps=(-2,),
        target_hidden=config.hidden,
        num_parameters=sum(math.prod(files.shapes[name]) for name in config.tensors),
        vocab_size=config.vocab or None,
        prefix=config.prefix,
        details=config,
    )


def has_medusa(names: Iterable[str]) -> bool:
    """Are there blocks of Medusa heads, alone or beside a model?"""
    return any(_BLOCK.fullmatch(name) for name in names)


def medusa_config(tensors: Shapes) -> MedusaConfig:
    """Raises HeadFileError naming the tensor that is wrong."""
    prefix = PREFIX if any(name.startswith(PREFIX) for name in tensors) else ""
    own = {name: shape for name, shape in tensors.items() if _BLOCK.fullmatch(name) or _PROJECTION.fullmatch(name)}
    blocks = [(int(match[1]), int(match[2])) for name in own if (match := _BLOCK.fullmatch(name))]
    num_heads, num_blocks = max(head for head, _ in blocks) + 1, max(block for _, block in blocks) + 1
    first = own.get(f"{prefix}0.0.linear.weight")
    if first is None or len(first) != 2:
        raise HeadFileError(f"tensor {prefix}0.0.linear.weight is missing", got=first)
    projection = own.get(f"{prefix}0.{num_blocks}.weight")
    found = MedusaConfig(num_heads, num_blocks, first[0], projection[0] if projection else 0, prefix, tuple(own))
    must: dict[str, tuple[int, ...]] = {}
    for head in range(num_heads):
        for block in range(num_blocks):
            must[f"{prefix}{head}.{block}.linear.weight"] = (found.hidden, found.hidden)
            must[f"{prefix}{head}.{block}.linear.bias"] = (found.hidden,)
        if found.own_head:
            must[f"{prefix}{head}.{num_blocks}.weight"] = (found.vocab, found.hidden)
    require_shapes(own if prefix else tensors, must, {})
    return found
