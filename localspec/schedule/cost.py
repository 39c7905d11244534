"""What a pass costs on this machine: a table of measured times by width and context.

The curve over widths is a staircase and may fall (backends differ, and with them kernels, blocks and
caches), so it is treated as a table: nothing is fitted to it. Between measured widths the line between its
neighbours stands in, beyond the last one the last slope does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_MOST_KNOWN = 4096  # places of a curve that are remembered


@dataclass(frozen=True)
class Curve:
    """Median milliseconds of one pass: ms[context][width], for the measured `contexts` (committed tokens, ascending)
    and `widths` (tokens in the pass, ascending)."""

    widths: tuple[int, ...]
    contexts: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]
    _known: dict[tuple[int, int], float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shape = (len(self.contexts), len(self.widths))
        rows = {len(row) for row in self.ms}
        if not all(shape) or len(self.ms) != shape[0] or rows != {shape[1]}:
            raise ValueError(f"a curve of {shape[0]} contexts by {shape[1]} widths has {len(self.ms)} rows of {rows}")
        for axis in (self.widths, self.contexts):
            if list(axis) != sorted(set(axis)):
                raise ValueError(f"not ascending: {axis}")
        if not all(value > 0.0 for row in self.ms for value in row):
            raise ValueError("a pass takes more than no time")

    def at(self, width: int, context: int) -> float:
        """Milliseconds of a pass of `width` tokens behind `context` committed ones."""
        place = (width, context >> 5 << 5)
        found = self._known.get(place)
        if found is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            found = self._known[place] = self._between(*place)
        return found

    def _between(self, width: int, context: int) -> float:
        by_context = [_line(self.widths, row, width) for row in self.ms]
        return _line(self.contexts, by_context, context)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"widths": list(self.widths), "contexts": list(self.contexts), "ms": [list(row) for row in self.ms]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Curve:
        """The inverse. Raises ValueError, KeyError or TypeError for anything else."""
        return cls(
            tuple(int(w) for w in data["widths"]),
            tuple(int(c) for c in data["contexts"]),
            tuple(tuple(float(value) for value in row) for row in data["ms"]),
        )


def _line(places: Sequence[int], values: Sequence[float], place: int) -> float:
    """Linear between measured places, the last slope (if it rises) beyond the last."""
    if place <= places[-1] or len(places) == 1:
        return float(np.interp(place, places, values))
    slope = (values[-1] - values[-2]) / (places[-1] - places[-2])
    return values[-1] + max(0.0, slope) * (place - places[-1])


@dataclass(frozen=True)
class HeadCosts:
    """What a trained head's guesses take, waited for. start: the first row (width 1).  extend: the rows behind so many
    guesses; next to nothing for heads of one pass."""

    start: Curve
    extend: Curve

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"start": self.start.as_dict(), "extend": self.extend.as_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HeadCosts:
        """The inverse. Raises ValueError, KeyError or TypeError for anything else."""
        return cls(Curve.from_dict(data["start"]), Curve.from_dict(data["extend"]))


@dataclass(frozen=True)
class Costs:
    """What the plan needs to know of a pair: the target's and the draft model's curves (None without a draft model)
    and the host's own milliseconds per round. measured: by `localspec tune`, in short at first load, or not at all.
    heads: of trained heads, by kind; kept apart, for they come and go with the same pair of models."""

    target: Curve
    draft: Curve | None = None
    overhead_ms: float = 0.1
    measured: str = ""
    notes: tuple[str, ...] = field(default=())
    heads: Mapping[str, HeadCosts] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "target": self.target.as_dict(),
            "draft": None if self.draft is None else self.draft.as_dict(),
            "overhead_ms": self.overhead_ms,
            "measured": self.measured,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Costs:
        """The inverse. Raises ValueError, KeyError or TypeError for anything else."""
        return cls(
            Curve.from_dict(data["target"]),
            None if data["draft"] is None else Curve.from_dict(data["draft"]),
            float(data["overhead_ms"]),
            str(data["measured"]),
            tuple(str(note) for note in data["notes"]),
        )
