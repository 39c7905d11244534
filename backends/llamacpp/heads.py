"""Opens a GGUF head beside a target.

    dflash    DSpark, DFlash, JetSpec, DFlash 2
    eagle3    EAGLE-3
    MTP       layers inside the target's own file

Everything that could end the process in llama.cpp is checked before it is asked.
"""

from __future__ import annotations

from pathlib import Path

from localspec.errors import BackendError, HeadFileError, ModelFileError, UnsupportedModelError
from localspec.formats import gguf
from localspec.formats.summary import GGUF_HEADS
from localspec.protocols import DraftHead, LanguageModel

from . import loading
from .block_loading import load_block
from .head_file import HeadFile
from .model import LlamaModel
from .step_loading import load_eagle3, load_mtp


def load_head(path: Path, target: LanguageModel) -> DraftHead:
    """See `Backend.load_head`."""
    if not isinstance(target, LlamaModel):
        raise UnsupportedModelError("this target was not loaded by the llamacpp backend", got=target.info.backend)
    if path.is_dir():
        raise HeadFileError(
            "the llamacpp backend reads heads as GGUF files", got=path, fix="Make one with `localspec convert`."
        )
    loading.check_file(path)
    file = _read(path)
    if target.memory.num_open:
        raise BackendError("a head is loaded before its target has open sequences", got=target.memory.num_open)
    head = _load(file, target)
    try:
        target.settle_taps()
    except BaseException:
        head.close()
        raise
    return head


def _load(file: HeadFile, target: LlamaModel) -> DraftHead:
    if file.architecture == "dflash":
        return load_block(file, target)
    if file.architecture == "eagle3":
        return load_eagle3(file, target)
    if file.path.resolve() == target.info.path.resolve():
        return load_mtp(file, target)
    raise UnsupportedModelError(
        "the llamacpp backend does not run such a head",
        got=file.architecture or "no architecture",
        expected="dflash, eagle3, or the target's own file for the MTP layer in it",
    )


def _read(path: Path) -> HeadFile:
    try:
        parts = gguf.read_parts(path)
    except ModelFileError as error:
        raise HeadFileError(error.what, got=error.got, expected=error.expected, fix=error.fix) from error
    metadata = parts[0][1].metadata
    architecture = str(metadata.get("general.architecture", ""))
    if len(parts) > 1 and architecture in GGUF_HEADS:
        raise UnsupportedModelError("a head in several files is not read", got=path.name)
    tensors = {name: tensor for _, header in parts for name, tensor in header.tensors.items()}
    return HeadFile(path, gguf.GgufHeader(metadata, tensors), architecture)
