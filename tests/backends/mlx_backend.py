"""The MLX backend as its tests find it."""

from __future__ import annotations

import json
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localspec.loading import get_backend
from localspec.protocols import HostTokens, LanguageModel, LoadSettings, SequenceState, Step, Tokens, chain_parents
from localspec.types import Logits

BACKEND = get_backend("mlx")
ROOT = Path(__file__).resolve().parents[2]
needs_mlx = pytest.mark.skipif(not BACKEND.is_installed(), reason='needs MLX: pip install "localspec[mlx-cpu]"')


def module(name: str) -> Any:
    """A module of the backend, which is loaded under a name of the core's choosing."""
    return import_module(f"{type(BACKEND).__module__.rpartition('.')[0]}.{name}")


def step(state: SequenceState, *tokens: Tokens, rows: tuple[int, ...] | None = None) -> Step:
    """A chain below what is pending."""
    return Step(state, tokens, chain_parents(state, sum(len(part) for part in tokens)), rows)


def host(*ids: int) -> HostTokens:
    return HostTokens(np.array(ids, np.int32))


def rows_of(model: LanguageModel, ids: list[int]) -> Logits:
    """[T, V] rows of a fresh sequence."""
    state = model.open()
    try:
        [scores] = model.forward([step(state, host(*ids))])
        return scores.rows(range(len(ids))).copy()
    finally:
        state.close()


@cache
def opened(path: Path, **settings: Any) -> LanguageModel:
    return BACKEND.load(path, LoadSettings(**settings))


def change_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content), encoding="utf-8")
