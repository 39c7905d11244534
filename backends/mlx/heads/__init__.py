"""Trained heads on MLX: from a head's files to a network beside a loaded target.

`_BUILDERS` names, for each kind of head, the module of this folder whose `build(header, target)` makes it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import cast

from localspec.errors import HeadFileError, UnsupportedModelError
from localspec.formats.head import read_head_header
from localspec.protocols import DraftHead

from ..model import MlxModel

_BUILDERS = {
    "dspark": "block",
    "dflash": "block",
    "dflash2": "block",
    "jetspec": "block",
    "eagle3": "eagle3",
    "medusa": "medusa",
    "mtp": "mtp",
}


def load_head(path: Path, target: MlxModel) -> DraftHead:
    """A head for a loaded target. Raises members of the error tree, and what mlx raises."""
    header = read_head_header(path)
    if header is None:
        raise HeadFileError("this is not a trained head", got=path, fix="A model that runs alone is a --drafter.")
    if header.files.format != "safetensors":
        raise UnsupportedModelError(
            "the mlx backend reads heads from safetensors folders only", got=path.name, fix="Try the llamacpp backend."
        )
    name = _BUILDERS.get(header.kind)
    if name is None:
        raise UnsupportedModelError(
            f"the mlx backend runs no heads of kind {header.kind}", expected=", ".join(sorted(_BUILDERS))
        )
    module = import_module(f".{name}", __package__)
    return cast("DraftHead", module.build(header, target))
