"""The contracts for what a backend does before a model is opened: say what it will take, and write it with
fewer bits. Both are optional; `protocols.Backend` names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from localspec.formats import ModelSummary
from localspec.protocols import LoadSettings


class MemoryScope(Enum):
    """How often a piece of memory is needed."""

    PROCESS = "process"
    MODEL = "model"
    SEQUENCE = "sequence"  # each open one


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """One line of a memory plan. on_gpu: bytes of it that lie on the GPU."""

    what: str
    num_bytes: int
    scope: MemoryScope
    on_gpu: int = 0


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """free: bytes that models may take.  shared: is it the machine's own memory?"""

    free: int
    shared: bool


class MemoryPlanner(Protocol):
    """What a backend knows of the memory that its models take, before one is loaded."""

    def items(self, model: ModelSummary, settings: LoadSettings, context: int) -> tuple[MemoryItem, ...]:
        """What a model takes with `context` tokens per sequence, judged from its headers. Must not shrink
        when `context` grows."""
        ...

    def gpu(self) -> GpuMemory | None:
        """The GPU that models are put on; None where there is none, or it does not tell."""
        ...


class Quantizer(Protocol):
    """Writes models of a backend with fewer bits."""

    @property
    def names(self) -> tuple[str, ...]:
        """What it can make, e.g. Q4_0 or 4bit."""
        ...

    def for_drafting(self, bits: float) -> str | None:
        """Which of `names` a copy should be in that drafts for a model of so many bits a weight; None where none is
        much smaller."""
        ...

    def write(
        self, source: Path, output: Path, name: str, on_progress: Callable[[str], None], *, again: bool = False
    ) -> None:
        """Write `source`, which the backend reads, to `output`, which must not exist.

        on_progress: given a short text now and then.  again: also where it has few bits already, which costs quality.
        Raises SettingError for a name that is not one of `names`, else what `Backend.load` raises.
        """
        ...
