"""The llama.cpp backend as its tests find it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from localspec.loading import get_backend
from localspec.protocols import HostTokens, LoadSettings, SequenceState, Step, chain_parents

BACKEND = get_backend("llamacpp")
SMALL = LoadSettings(context=256, num_sequences=2)


def module(name: str) -> Any:
    """A module of the backend, which is loaded under a name of the core's choosing."""
    return import_module(f"{type(BACKEND).__module__}.{name}")


def step(state: SequenceState, ids: list[int], rows: tuple[int, ...] | None = None) -> Step:
    """A chain below what is pending."""
    return Step(state, (HostTokens(np.array(ids, np.int32)),), chain_parents(state, len(ids)), rows)
