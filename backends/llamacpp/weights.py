"""A loaded llama_model: its facts and its vocabulary, as plain Python values."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localspec.errors import FailureError, ModelFileError, OutOfMemoryError, UnsupportedModelError

from . import native

_GUESSED = 1024  # llama.cpp adds this to a file type that it inferred from the tensors


class Weights:
    """One llama_model. mtp: with its layer that guesses ahead, if it has one. Raises ModelFileError,
    UnsupportedModelError or OutOfMemoryError."""

    def __init__(
        self, path: Path, *, gpu_layers: int, extra_buffers: bool, vocab_only: bool = False, mtp: bool = False
    ) -> None:
        self._lib = native.library()
        self.extra_buffers = extra_buffers
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.use_extra_bufts = extra_buffers
        params.vocab_only = vocab_only
        if mtp and hasattr(params, "load_mtp"):
            params.load_mtp = True
        native.forget_errors()
        self.pointer: Any = self._lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            raise load_error(path, native.complaints())
        self.vocab: Any = self._lib.llama_model_get_vocab(self.pointer)
        self.vocab_size = int(self._lib.llama_vocab_n_tokens(self.vocab))

    def text(self, key: str) -> str:
        """A metadata value as text; empty if the file lacks it."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            needed = int(self._lib.llama_model_meta_val_str(self.pointer, key.encode(), buffer, size))
            if needed < size:
                return buffer.value.decode(errors="replace") if needed > 0 else ""
            size = needed + 1

    def number(self, fact: str) -> int:
        """`llama_model_<fact>` of this model: n_params, n_layer, is_recurrent and so on."""
        return int(getattr(self._lib, f"llama_model_{fact}")(self.pointer))

    def quantization(self) -> str:
        """As llama.cpp names it: Q4_0, Q8_0, F16."""
        ftype = self.number("ftype") & ~_GUESSED
        known: dict[str, object] = vars(self._lib)
        for name, value in known.items():
            if name.startswith("LLAMA_FTYPE_") and value == ftype:
                return name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_")
        return f"file type {ftype}"

    def chat_template(self) -> str | None:
        """Jinja source, or None."""
        source: bytes | None = self._lib.llama_model_chat_template(self.pointer, None)
        return source.decode(errors="replace") if source else None

    def close(self) -> None:
        """Free the model. Twice does nothing."""
        if self.pointer:
            self._lib.llama_model_free(self.pointer)
            self.pointer = None


def load_error(path: Path, complaints: Sequence[str]) -> FailureError:
    """llama.cpp's complaints as a member of the error tree: all of them decide which, the first is quoted."""
    lowered, words = "\n".join(complaints).lower(), native.quoted(complaints)
    if "unknown model architecture" in lowered or "unknown pre-tokenizer" in lowered:
        return UnsupportedModelError(
            f"llama.cpp cannot run {path.name}: {words}", fix=f"A newer one may: {native.INSTALL_COMMAND} --upgrade"
        )
    if any(phrase in lowered for phrase in ("unable to allocate", "failed to allocate", "out of memory", "bad_alloc")):
        return OutOfMemoryError(
            f"{path.name} does not fit into memory: {words}", fix="Use a smaller quantisation or fewer GPU layers."
        )
    return ModelFileError(f"llama.cpp cannot read {path.name}: {words}", fix="Download or convert the file again.")
