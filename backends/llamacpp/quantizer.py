"""Quantising GGUF files through llama.cpp's own function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from localspec.errors import SettingError
from localspec.formats import summarize

from . import native
from .processors import num_cores

_FILE_TYPES = {
    "Q2_K": "MOSTLY_Q2_K",
    "Q3_K_M": "MOSTLY_Q3_K_M",
    "Q4_0": "MOSTLY_Q4_0",
    "Q4_K_M": "MOSTLY_Q4_K_M",
    "Q8_0": "MOSTLY_Q8_0",
}
_MANY_BITS, _SOME_BITS = 7.0, 3.6  # a weight


class LlamaQuantizer:
    """`preparation.Quantizer` for GGUF files."""

    names = tuple(_FILE_TYPES)

    def for_drafting(self, bits: float) -> str | None:
        """Four bits for eight or more, two for four."""
        return "Q4_0" if bits >= _MANY_BITS else "Q2_K" if bits >= _SOME_BITS else None

    def write(
        self, source: Path, output: Path, name: str, on_progress: Callable[[str], None], *, again: bool = False
    ) -> None:
        """Raises SettingError, ModelFileError, BackendMissingError and BackendError."""
        if name not in _FILE_TYPES:
            raise SettingError("unknown quantization", got=name, expected=", ".join(_FILE_TYPES))
        model = summarize(source)  # llama.cpp may die on a corrupt file; ours does not
        on_progress(f"{name}: {model.num_parameters / 1e6:.0f}M parameters, by llama.cpp")
        native.quantize(source, output, _FILE_TYPES[name], num_cores(), again=again)
