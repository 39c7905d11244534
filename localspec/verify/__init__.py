"""How proposals become text. Every rule implements `Acceptance`; the engine knows no rule by name."""

from __future__ import annotations

from localspec.errors import UnknownNameError
from localspec.verify.rejection import Rejection
from localspec.verify.trial import Acceptance, Trial, Verdict
from localspec.verify.walk import Walk

__all__ = ["ACCEPTANCES", "WALK", "Acceptance", "Rejection", "Trial", "Verdict", "Walk", "make_acceptance"]

ACCEPTANCES: dict[str, Acceptance] = {rule.name: rule for rule in (Walk(), Rejection())}

WALK = Walk.name
"""Name of the default rule."""


def make_acceptance(name: str) -> Acceptance:
    """The rule of that name. Raises UnknownNameError."""
    if name not in ACCEPTANCES:
        raise UnknownNameError.among("acceptance rule", name, ACCEPTANCES)
    return ACCEPTANCES[name]
