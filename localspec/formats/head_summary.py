"""What a head takes and what it was made for, also where it is a part of a whole model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from . import safetensors
from .head import read_head_header
from .medusa import MedusaConfig
from .mtp import MtpConfig
from .summary import ModelSummary, summarize


def summarize_head(path: Path) -> ModelSummary:
    """As `summarize`; of a model that ships a head, the head alone. Raises as that, and HeadFileError and
    UnsupportedModelError for such a head that is wrong or not known."""
    found = summarize(path)
    if found.drafter_kind is not None or found.format != "safetensors" or not path.is_dir():
        return found
    header = read_head_header(path)
    if header is None or not isinstance(header.details, MtpConfig | MedusaConfig):
        return found
    stored = {name: tensor for _, tensors in safetensors.read_folder(path) for name, tensor in tensors.items()}
    weight_bytes: Counter[str] = Counter()
    for name in header.details.tensors:
        weight_bytes[stored[name].dtype] += stored[name].num_bytes
    keys = (max(found.kv_heads, default=0),) if header.kind == "mtp" else ()
    return replace(
        found,
        num_layers=len(keys),
        kv_heads=keys,
        weight_bytes=dict(weight_bytes),
        file_bytes=sum(weight_bytes.values()),
        num_parameters=header.num_parameters,
        is_recurrent=False,
        state_values=0,
        drafter_kind=header.kind,
        target_hidden=header.target_hidden,
        num_target_layers=header.num_target_layers,
    )
