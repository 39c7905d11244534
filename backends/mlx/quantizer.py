"""Quantising safetensors folders through mlx-lm's own functions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from localspec.errors import BackendMissingError, SettingError, UnsupportedModelError
from localspec.formats import safetensors

from .border import translated

_BITS = {"2bit": 2, "3bit": 3, "4bit": 4, "8bit": 8}
_MANY_BITS, _SOME_BITS = 7.0, 3.6  # a weight
_GROUP = 64
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py")


class MlxQuantizer:
    """`preparation.Quantizer` for folders."""

    names = tuple(_BITS)

    def for_drafting(self, bits: float) -> str | None:
        """Four bits for eight or more, two for four."""
        return "4bit" if bits >= _MANY_BITS else "2bit" if bits >= _SOME_BITS else None

    def write(
        self, source: Path, output: Path, name: str, on_progress: Callable[[str], None], *, again: bool = False
    ) -> None:
        """Raises SettingError, ModelFileError, UnsupportedModelError and BackendMissingError."""
        if name not in _BITS:
            raise SettingError("unknown quantization", got=name, expected=", ".join(_BITS))
        if not source.is_dir():
            raise UnsupportedModelError(
                "MLX quantises model folders, not GGUF files", got=source.name, fix="Give the folder, or use llama.cpp."
            )
        config = safetensors.read_json(source / "config.json")
        known = [key for key in ("quantization", "quantization_config") if config.pop(key, None)]
        if known and not again:
            raise UnsupportedModelError(f"{source.name} is quantised already", fix="Convert the original.")
        try:
            from mlx_lm.utils import dequantize_model, quantize_model, save_config, save_model

            from .folder import open_folder
        except (ImportError, OSError) as error:
            raise BackendMissingError("MLX is not installed or cannot be imported", got=error) from error
        with translated(f"converting {source.name}"), redirect_stdout(StringIO()):  # mlx-lm prints
            module = open_folder(source).module
            if known:
                module = dequantize_model(module)
            on_progress(f"{name}: groups of {_GROUP}, by mlx-lm")
            module, config = quantize_model(module, config, _GROUP, _BITS[name])
            output.mkdir(parents=True)
            save_model(output, module, donate_model=True)
            save_config(config, output / "config.json")
        for file in sorted(source.iterdir()):  # tokenizer, template, licence; never code
            is_extra = file.is_file() and file.suffix not in _WEIGHTS and file.name != "config.json"
            if is_extra and not file.name.endswith(".index.json"):
                shutil.copyfile(file, output / file.name)
