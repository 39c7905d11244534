"""From a path to a running model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import dequantize_model, get_total_parameters

from localspec.errors import ModelFileError
from localspec.protocols import LoadSettings, ModelInfo

from .device import describe_device, on_cpu
from .model import MlxModel
from .network import Network
from .scores import Ledger
from .selfcheck import SelfCheck
from .tokenizer import MlxTokenizer

_DEFAULT_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Opened:
    """What a model file or folder holds, weights not yet read from disk.

    dtype: compute type to use where neither the settings nor the device ask for one (None: as stored).
    """

    module: nn.Module
    tokenizer: MlxTokenizer
    name: str
    architecture: str
    quantization: str
    trained_context: int | None
    dtype: mx.Dtype | None
    notes: tuple[str, ...] = ()


def open_model(path: Path, settings: LoadSettings, ledger: Ledger) -> MlxModel:
    """Open a safetensors folder or a GGUF file. Raises members of the error tree, and what mlx raises."""
    if path.is_dir():
        from .folder import open_folder

        opened = open_folder(path)
    else:
        from .gguf_model import open_gguf

        opened = open_gguf(path)
    return assemble(opened, path, settings, ledger)


def assemble(opened: Opened, path: Path, settings: LoadSettings, ledger: Ledger) -> MlxModel:
    """A running model from what was read. Raises UnsupportedModelError where the self-check refuses it."""
    num_parameters = int(get_total_parameters(opened.module))
    dtype = settings.dtype or "auto"
    notes = [*opened.notes, *compute_in(opened.module, settings.dtype, opened.dtype)]
    mx.eval(opened.module.parameters())
    network = Network(opened.module)
    notes += network.notes
    if network.vocab_size < opened.tokenizer.num_tokens:
        raise ModelFileError(
            "the tokenizer has more tokens than the model has rows",
            got=opened.tokenizer.num_tokens,
            expected=f"at most {network.vocab_size}",
        )
    trained = opened.trained_context or _DEFAULT_CONTEXT
    context = settings.context or min(trained, _DEFAULT_CONTEXT)
    if context > trained:
        notes.append(f"A context of {context} tokens is more than the {trained} the model was trained for.")
    batches, said = _batching(network, settings)
    notes += said
    info = ModelInfo(
        name=opened.name,
        path=path,
        architecture=opened.architecture,
        quantization=opened.quantization,
        num_parameters=num_parameters,
        context_length=context,
        trained_context_length=trained,
        device=describe_device(),
        backend="mlx",
        notes=tuple(notes),
        runtime=f"mlx {metadata.version('mlx')}, mlx-lm {metadata.version('mlx-lm')}",
        options=(("dtype", dtype),),
    )
    model = MlxModel(network, info, opened.tokenizer, settings.num_sequences, ledger)
    model.capabilities = replace(model.capabilities, batches=batches)
    return model


def _batching(network: Network, settings: LoadSettings) -> tuple[bool, list[str]]:
    """(do the steps of one forward run as one pass, what to tell). Where the width class promises bits they must be
    equal, elsewhere rounding may differ."""
    if not settings.batch:
        return False, []
    why = "its memory or its positions allow only one at a time"
    if network.can_join:
        difference = SelfCheck(network).together()
        if difference is not None and difference <= (0.0 if on_cpu() else 0.1):
            return True, []
        if difference is not None:
            why = f"rows of sequences in one pass were {difference:.1e} of a row's spread away from those of each alone"
    return False, [f"Several requests are run one after another, not in one pass: {why}."]


def compute_in(module: Any, dtype: str | None, default: mx.Dtype | None) -> list[str]:
    """Bring the weights to the type to compute in, `default` where neither `dtype` nor the device asks for one.
    Returns notes on what was decided."""
    if dtype == "file":
        return []
    notes = []
    if on_cpu() and dtype in (None, "float32"):
        # Measured on a CPU: quantised layers take 1.1 (float16 scales) to 12 times (bfloat16) as long.
        if _is_quantized(module):
            _raise_scales(module)
            dequantize_model(module)
            notes.append(
                "Quantised weights were expanded to float32, which a CPU computes faster; dtype='file' keeps them."
            )
        module.set_dtype(mx.float32)
    elif dtype is not None:
        module.set_dtype({"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}[dtype])
    elif default is not None:
        module.set_dtype(default)
    return notes


def _quantized_modules(module: nn.Module) -> list[Any]:
    return [child for child in module.modules() if "scales" in child and "weight" in child]


def _is_quantized(module: nn.Module) -> bool:
    return bool(_quantized_modules(module))


def _raise_scales(module: nn.Module) -> None:
    """Scales to float32, so that the expanded weights are not rounded to 16 bits on the way."""
    for child in _quantized_modules(module):
        for name in ("scales", "biases"):
            values = child.get(name)
            if values is not None and mx.issubdtype(values.dtype, mx.floating):
                child[name] = values.astype(mx.float32)
