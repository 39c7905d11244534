"""llama.cpp as a localspec backend: GGUF models on CPU, CUDA and Metal.

    native      ctypes: library, log, context and batch        weights    a model's facts
    state       trees and rewinding by sequence ids            tokenizer  in bytes
    model       forward                                        loading    checks and choices
    probe       do the extra CPU buffers survive here?         processors how many threads
    planner     memory, before anything is loaded              quantizer  fewer bits
    runtime     a build that would crash beside numpy

Importing this package imports neither llama.cpp nor its binding.
"""

from __future__ import annotations

import sys
from pathlib import Path

from localspec.errors import LocalspecError, UnsupportedModelError
from localspec.protocols import Backend, BackendReport, DraftHead, LanguageModel, LoadSettings, Tokenizer

from . import heads, loading, native, probe
from .quantizer import LlamaQuantizer

__all__ = ["BACKEND"]


class LlamaCppBackend:
    """`Backend` for GGUF files."""

    name = loading.NAME
    own_settings = loading.OWN_SETTINGS
    planner = loading.PLANNER
    quantizer = LlamaQuantizer()
    formats = ("gguf",)

    def is_installed(self) -> bool:
        """Looks for llama_cpp without importing it."""
        return native.is_installed()

    def accepts(self, path: Path) -> bool:
        """A GGUF file, by name or first bytes."""
        return loading.is_model_file(path)

    def load(self, path: Path, settings: LoadSettings) -> LanguageModel:
        """Open a model. Raises members of the error tree only."""
        return loading.load(path, settings)

    def load_head(self, path: Path, target: LanguageModel) -> DraftHead:
        """A GGUF head. Raises members of the error tree only."""
        return heads.load_head(path, target)

    def early_exit(self, target: LanguageModel, layers: int | None) -> DraftHead:
        """Never: a context computes the whole graph of its model. Raises UnsupportedModelError."""
        raise UnsupportedModelError(
            "llama.cpp runs all layers of a model or none, so there is no early exit",
            got=target.info.name,
            fix="Use a copy of the target with fewer bits (--draft self), or the mlx backend.",
        )

    def open_tokenizer(self, path: Path) -> Tokenizer:
        """The tokenizer of a model file. Raises members of the error tree only."""
        return loading.open_tokenizer(path)

    def report(self) -> BackendReport:
        """Version, devices, and what had to be worked around. Never raises."""
        if not self.is_installed():
            return self._report(False, (), ("not installed",))
        try:
            devices, note = native.devices(), probe.examine().note
        except LocalspecError as error:
            return self._report(True, (), (str(error),))
        return self._report(True, devices, (note,) if note else ())

    def _report(self, installed: bool, devices: tuple[str, ...], notes: tuple[str, ...]) -> BackendReport:
        return BackendReport(
            name=self.name,
            installed=installed,
            version=native.version() if installed else "",
            devices=devices,
            notes=notes,
            install_command=_install_command(),
        )


def _install_command() -> str:
    """The wheel's build picks Metal by itself on a Mac; CUDA must be asked for."""
    if sys.platform == "darwin":
        return native.INSTALL_COMMAND
    return f"{native.INSTALL_COMMAND}   (NVIDIA: CMAKE_ARGS=-DGGML_CUDA=on {native.INSTALL_COMMAND})"


BACKEND: Backend = LlamaCppBackend()
