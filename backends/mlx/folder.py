"""Opens a Hugging Face folder: config.json, model*.safetensors, tokenizer.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from localspec.errors import ModelFileError, UnsupportedModelError
from localspec.formats import safetensors

from .border import is_memory_error
from .loader import Opened
from .tokenizer import open_folder_tokenizer

_MAX_NAMES = 5  # of tensors in a message
_SHAPE_ERROR = re.compile(r"Expected shape (\(.*?\)) but received shape (\(.*?\)) for parameter (\S+)")


def open_folder(path: Path) -> Opened:
    """Raises ModelFileError or UnsupportedModelError, naming what is wrong with which file."""
    config = read_json(path / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not re.fullmatch(r"\w[\w.-]*", model_type):
        raise ModelFileError("config.json names no model_type", got=model_type, expected="a name such as qwen3")
    if config.get("model_file") is not None:
        raise UnsupportedModelError("the model brings its own code, which is never run", got=config["model_file"])
    names = _check_weight_files(path)
    _check_size(config, len(names))
    module = _load(path, model_type)
    parameters = dict(tree_flatten(module.parameters()))
    dtypes = {value.dtype for value in parameters.values() if mx.issubdtype(value.dtype, mx.floating)}
    return Opened(
        module=module,
        tokenizer=open_folder_tokenizer(path),
        name=path.resolve().name,
        architecture=model_type,
        quantization=_quantization(config, dtypes),
        trained_context=_trained_context(config),
        dtype=None,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelFileError where the file is missing or not that."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelFileError(
            f"{path.name} is missing", got=path.parent, fix="Download the whole model folder."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path.name} cannot be read", got=error, expected="a JSON object") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path.name} cannot be read", got=type(content).__name__, expected="a JSON object")
    return content


def _load(path: Path, model_type: str) -> nn.Module:
    """mlx-lm's loader, with its many ways to fail sorted."""
    try:
        module: nn.Module = load_model(path, lazy=True, strict=True)[0]
        return module
    except Exception as error:  # it raises whatever a model file's constructor does
        if is_memory_error(error):
            raise
        message = str(error)
        if "not supported" in message and isinstance(error, ValueError):
            raise UnsupportedModelError(
                "mlx-lm has no such architecture", got=model_type, expected="one that it lists"
            ) from error
        if isinstance(error, NotImplementedError):
            raise UnsupportedModelError("mlx-lm cannot run this model", got=message) from error
        shapes = _SHAPE_ERROR.search(message)
        if shapes:
            expected, got, name = shapes.groups()
            raise ModelFileError(
                f"tensor {name.rstrip('.')} has the wrong shape", got=got, expected=expected
            ) from error
        raise ModelFileError(
            f"the {model_type} model in {path.name} cannot be built from its files", got=_first_lines(message, error)
        ) from error


def _first_lines(message: str, error: Exception) -> str:
    """mlx lists every missing or surplus tensor on a line of its own; a few say enough."""
    lines = message.splitlines() or [type(error).__name__]
    more = len(lines) - _MAX_NAMES - 1
    text = " ".join(lines[: _MAX_NAMES + 1])
    return f"{type(error).__name__}: {text}" + (f" and {more} more" if more > 0 else "")


def _check_weight_files(path: Path) -> list[str]:
    """Names of all tensors. Files are checked here, since mlx reads them lazily and fails late."""
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise ModelFileError("no weights in the folder", got=path, expected="model.safetensors or its parts")
    return [name for _, tensors in safetensors.read_folder(path) for name in tensors]


def _check_size(config: dict[str, Any], num_tensors: int) -> None:
    """A layer has at least one tensor; more layers than that would be built for nothing, or for ever."""
    num_layers = config.get("num_hidden_layers", 0)
    if not isinstance(num_layers, int) or num_layers > num_tensors:
        raise ModelFileError(
            "config.json does not fit the weights", got=f"{num_layers} layers", expected=f"at most {num_tensors}"
        )


def _trained_context(config: dict[str, Any]) -> int | None:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        value = part.get("max_position_embeddings")
        if isinstance(value, int) and value > 0:
            return value
    return None


def _quantization(config: dict[str, Any], dtypes: set[mx.Dtype]) -> str:
    """For people: `4 bits in groups of 64`, or the type of the weights."""
    quantization = config.get("quantization") or config.get("quantization_config")
    if isinstance(quantization, dict):
        if "bits" in quantization:
            return f"{quantization['bits']} bits in groups of {quantization.get('group_size', '?')}"
        return str(quantization.get("quant_method", "quantised"))
    return ", ".join(sorted(str(dtype).rpartition(".")[2] for dtype in dtypes))
