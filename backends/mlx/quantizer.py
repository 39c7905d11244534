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

_BITS = {"4bit": 4, "8bit": 8}
_GROUP = 64
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py")


class MlxQuantizer:
    """`preparation.Quantizer` for folders."""

    names = tuple(_BITS)

    def write(self, source: Path, output: Path, name: str, on_progress: Callable[[str], None]) -> None:
        """Raises SettingError, ModelFileError, UnsupportedModelError and BackendMissingError."""
        if name not in _BITS:
            raise SettingError("unknown quantization", got=name, expected=", ".join(_BITS))
        config = safetensors.read_json(source / "config.json")
        if config.get("quantization") or config.get("quantization_config"):
            raise UnsupportedModelError(f"{source.name} is quantised already", fix="Convert the original.")
        try:
            from mlx_lm.utils import quantize_model, save_config, save_model

            from .folder import open_folder
        except (ImportError, OSError) as error:
            raise BackendMissingError("MLX is not installed or cannot be imported", got=error) from error
        with translated(f"converting {source.name}"), redirect_stdout(StringIO()):  # mlx-lm prints
            module = open_folder(source).module
            on_progress(f"{name}: groups of {_GROUP}, by mlx-lm")
            module, config = quantize_model(module, config, _GROUP, _BITS[name])
            output.mkdir(parents=True)
            save_model(output, module, donate_model=True)
            save_config(config, output / "config.json")
        for file in sorted(source.iterdir()):  # tokenizer, template, licence; never code
            is_extra = file.is_file() and file.suffix not in _WEIGHTS and file.name != "config.json"
            if is_extra and not file.name.endswith(".index.json"):
                shutil.copyfile(file, output / file.name)
