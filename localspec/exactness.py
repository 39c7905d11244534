"""What a session promises about its text, and which widths it may use for that.

CLASS: every pass stays in one width class, so rows are the same bits. GUARDED: passes of any width; a choice that is
nearer than rows were measured to differ is decided by a reference row instead (`engine.recheck`). OFF: passes of any
width, nothing promised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from localspec.protocols import LanguageModel, Rewind, WidthClass
from localspec.sampling import Tolerance


class Mode(Enum):
    """How text is kept equal to plain decoding's."""

    CLASS = "class"
    GUARDED = "guarded"
    OFF = "off"


AUTO = "auto"
"""Let what is known of the model decide between CLASS and GUARDED."""

EXACT_CHOICES = (AUTO, *(mode.value for mode in Mode))


@dataclass(frozen=True, slots=True)
class Bound:
    """How far rows are taken to lie from the reference rows.

    tolerance: with a factor of safety over what was seen; nearer choices are re-checked.  block: tokens in a pass of
    the reference.  loose: tokens at the end of a sequence that other passes may have written, at most as many as
    in the measurement.  num_rows: rows that were compared, of these widths.  width_one: (rows, rows whose best token
    at width 1 was not the reference's).  share_close: of choices within the tolerance.
    """

    tolerance: Tolerance
    block: int
    loose: int
    widths: tuple[int, ...] = ()
    num_rows: int = 0
    width_one: tuple[int, int] = (0, 0)
    share_close: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Bound:
        """The inverse. Raises ValueError, KeyError or TypeError for anything else."""
        tolerance = Tolerance(float(data["tolerance"]["difference"]), float(data["tolerance"]["shift"]))
        rows, other = data["width_one"]
        found = cls(
            tolerance,
            int(data["block"]),
            int(data["loose"]),
            tuple(map(int, data["widths"])),
            int(data["num_rows"]),
            (int(rows), int(other)),
            float(data["share_close"]),
        )
        if not (found.block > 0 and found.loose > 0 and tolerance.difference >= 0.0 and tolerance.shift >= 0.0):
            raise ValueError("a bound that bounds nothing")
        return found

    @property
    def evidence(self) -> str:
        """How it was found, in words."""
        return (
            f"{self.num_rows} rows of widths {', '.join(map(str, self.widths))} against passes of {self.block}: "
            f"choices nearer than {self.tolerance.difference:.2g} are re-checked"
        )


@dataclass(frozen=True, slots=True)
class Exactness:
    """mode: what is promised.  widths: of the passes; narrower ones are padded.  bound: in guarded mode."""

    mode: Mode
    widths: WidthClass
    bound: Bound | None = None

    @classmethod
    def of_class(cls, model: LanguageModel) -> Exactness:
        """Staying in the model's width class."""
        return cls(Mode.CLASS, model.capabilities.width_class)

    @classmethod
    def guarded(cls, bound: Bound) -> Exactness:
        """Passes of any width, re-checked."""
        return cls(Mode.GUARDED, WidthClass(1, None, bound.evidence, measured=False), bound)

    @classmethod
    def one_token(cls, reason: str) -> Exactness:
        """Passes of one token each, which need no promise; and why."""
        return cls(Mode.CLASS, WidthClass(1, 1, reason, plain_only=True))

    @classmethod
    def off(cls) -> Exactness:
        """Passes of any width, and nothing promised."""
        return cls(Mode.OFF, WidthClass(1, None, "given up for speed", measured=False))

    @property
    def leaves_room(self) -> bool:
        """May a pass be wide enough for a guess?"""
        return self.widths.max_width != 1

    @property
    def widest_padding(self) -> int:
        """Tokens that a pass over a single one may need room for."""
        return max(self.widths.min_width, 1 if self.bound is None else self.bound.block)

    def __str__(self) -> str:
        if self.mode is Mode.CLASS:
            return str(self.widths)
        if self.bound is None:
            return "any (exactness given up)"
        return f"any (guarded within {self.bound.tolerance.difference:.2g})"


def wants_guarding(model: LanguageModel) -> bool:
    """Does no measured width class hold the widths worth using, though tokens can be taken back?"""
    known, widths = model.capabilities, model.capabilities.width_class
    is_wide = widths.max_width is None or widths.max_width > widths.min_width
    return known.rewind is not Rewind.NEVER and not widths.plain_only and not (widths.measured and is_wide)
