"""What `localspec tune` found, set of options by set of options; ready to be stored and read again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from localspec.exactness import Bound
from localspec.protocols import WidthClass
from localspec.schedule.classes import Classes
from localspec.schedule.cost import Costs
from localspec.schedule.score import Best
from localspec.tune.options import Options

CONTEXT = 256
"""Committed tokens at which sets of options are compared."""

_BETTER = 1.03  # less is noise


@dataclass(slots=True)
class Candidate:
    """A set of options and what was found with it. failed: why it could not be loaded, empty if it could.
    width_class, classes, contradiction: where the classes were looked for.  plain_ratio: what a plain pass of the class
    costs against one of width 1.  free: the best round if passes may have any width (exactness off).  bound: of guarded
    decoding; None where tokens cannot be taken back.  may_join: rounds keys and
    values otherwise, and is measured for its width class; never chosen without being asked for."""

    options: Options
    device: str = ""
    costs: Costs | None = None
    best: Best | None = None
    width_class: WidthClass | None = None
    classes: Classes | None = None
    contradiction: str = ""
    failed: str = ""
    free: Best | None = None
    bound: Bound | None = None
    may_join: bool = False

    @property
    def speed(self) -> float:
        """Predicted tokens per second; 0 if nothing is known."""
        return self.best.tokens_per_second if self.best else 0.0

    @property
    def worth(self) -> float:
        """Tokens per second over a text of which half pays as assumed and half not at all and is decoded plainly
        (harmonic mean); 0 if nothing is known."""
        if self.best is None:
            return 0.0
        return 2.0 / (1.0 / self.best.tokens_per_second + 1.0 / self.best.plain_tokens_per_second)

    @property
    def is_finalist(self) -> bool:
        """Was it measured at length?"""
        return self.classes is not None

    @property
    def plain_ratio(self) -> float | None:
        """Cost of a plain pass in the class over that of width 1."""
        if self.costs is None or self.width_class is None:
            return None
        curve = self.costs.target
        return curve.at(self.width_class.min_width, CONTEXT) / curve.at(1, CONTEXT)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "options": self.options,
            "device": self.device,
            "costs": self.costs and self.costs.as_dict(),
            "best": self.best and asdict(self.best),
            "width_class": self.width_class and asdict(self.width_class),
            "classes": self.classes and self.classes.as_dict(),
            "contradiction": self.contradiction,
            "failed": self.failed,
            "free": self.free and asdict(self.free),
            "bound": self.bound and self.bound.as_dict(),
            "may_join": self.may_join,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidate:
        """The inverse. Raises ValueError, KeyError or TypeError for anything else."""
        return cls(
            dict(data["options"]),
            str(data["device"]),
            data["costs"] and Costs.from_dict(data["costs"]),
            data["best"] and Best(**data["best"]),
            data["width_class"] and WidthClass(**data["width_class"]),
            data["classes"] and Classes.from_dict(data["classes"]),
            str(data["contradiction"]),
            str(data["failed"]),
            data["free"] and Best(**data["free"]),
            data["bound"] and Bound.from_dict(data["bound"]),
            bool(data["may_join"]),
        )


@dataclass(slots=True)
class Result:
    """What `localspec tune` found. searched: were options varied?  candidates: in the order in which they were tried.
    seconds: what it took.  date: when."""

    target: str
    draft: str | None
    backend: str
    runtime: str
    searched: bool
    candidates: list[Candidate] = field(default_factory=list)
    seconds: float = 0.0
    date: str = ""

    @property
    def winner(self) -> Candidate:
        """The best of those measured at length that compute the same; among equals, give or take, what the backend
        would choose first."""
        first, *others = (one for one in self.candidates if one.is_finalist and not one.may_join)
        for other in others:
            if other.worth > _BETTER * first.worth:
                first = other
        return first

    @property
    def joined(self) -> Candidate | None:
        """The one that rounds otherwise, if it is clearly better than the winner."""
        for one in self.candidates:
            if one.may_join and one.is_finalist and one.worth > _BETTER * self.winner.worth:
                return one
        return None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "target": self.target,
            "draft": self.draft,
            "backend": self.backend,
            "runtime": self.runtime,
            "searched": self.searched,
            "seconds": round(self.seconds, 2),
            "date": self.date,
            "candidates": [one.as_dict() for one in self.candidates],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """The inverse. Raises ValueError, KeyError or TypeError for anything else."""
        return cls(
            str(data["target"]),
            data["draft"] and str(data["draft"]),
            str(data["backend"]),
            str(data["runtime"]),
            bool(data["searched"]),
            [Candidate.from_dict(one) for one in data["candidates"]],
            float(data["seconds"]),
            str(data["date"]),
        )
