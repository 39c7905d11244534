"""Does a pair fit this machine? A plan from file headers, and the same as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localspec.compatibility import translation
from localspec.drafters import AUTO
from localspec.errors import UnsupportedModelError
from localspec.hub.resolver import find_model
from localspec.loading import BUNDLED, HEAD, bundled_names, check_pair, plan_parts, sort_out
from localspec.memory import Machine, MemoryPlan, default_context, largest_context, look, make_plan, size
from localspec.protocols import LoadSettings


def plan(
    target: str | Path | None = None,
    draft: str | Path | None = None,
    *,
    context: int | None = None,
    backend: str = AUTO,
    settings: LoadSettings | None = None,
    num_sequences: int = 1,
    machine: Machine | None = None,
) -> MemoryPlan:
    """The memory that a pair takes: paths, pulled Hub ids or bundled names (None: the bundled pair), nothing is loaded.

    context: tokens per conversation (None: what would be opened unasked).  machine: None asks this one.
    Raises members of the error tree; a plan that does not fit is returned, `MemoryPlan.fits` says so.
    """
    return examine(
        target,
        draft,
        context=context,
        backend=backend,
        settings=settings,
        num_sequences=num_sequences,
        machine=machine,
    ).plan


@dataclass(frozen=True, slots=True)
class Fit:
    """A plan, and what else would go. longest: tokens of context, at most what the target was trained for.
    notes: doubts about the pair.
    """

    plan: MemoryPlan
    longest: int | None
    trained: int | None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            **self.plan.as_dict(),
            "longest_context": self.longest,
            "trained_context": self.trained,
            "doubts": self.notes,
        }


def examine(
    target: str | Path | None = None,
    draft: str | Path | None = None,
    *,
    context: int | None = None,
    backend: str = AUTO,
    settings: LoadSettings | None = None,
    num_sequences: int = 1,
    machine: Machine | None = None,
    heads: Sequence[str | Path] = (),
) -> Fit:
    """As `plan`, with the longest context that would fit, and what is doubtful about the pair."""
    settings, machine = settings or LoadSettings(), machine or look()
    target = str(target or BUNDLED)
    if draft is None and target in bundled_names() and not Path(target).exists():
        draft = target
    target_path = find_model(target, "target", backend)
    draft_path = find_model(str(draft), "draft", backend) if draft is not None else None
    draft_path, head_paths = sort_out(draft_path, [find_model(str(head), HEAD, backend) for head in heads])
    parts = plan_parts(target_path, draft_path, backend, head_paths)
    notes = check_pair(parts)
    if draft_path is not None and (said := translation(target_path, draft_path)) is not None:
        notes += (said,)
    if not parts:
        raise UnsupportedModelError(f"no backend can tell what {target_path.name} takes")
    model = parts[0].model
    wanted = context or settings.context or default_context(model)
    if wanted > (model.trained_context or wanted):
        notes += (f"{wanted} tokens are more than the target was trained for ({model.trained_context})",)
    made = make_plan(parts, settings, wanted, machine, num_sequences=num_sequences)
    most = max(wanted, model.trained_context or wanted)
    longest = largest_context(parts, settings, most, machine, num_sequences=num_sequences)
    return Fit(made, longest, model.trained_context, notes)


def verdict(fit: Fit) -> str:
    """One line: does it fit, with which numbers, and how far it would go."""
    plan, usable = fit.plan, fit.plan.machine.usable
    have = f"{size(usable)} of memory usable" if usable is not None else "this machine does not tell its memory"
    if plan.gpu is not None:
        have += f", {size(plan.gpu.free)} on the GPU"
    answer = "fits" if plan.fits else "does not fit"
    further = f"the longest context that fits is {fit.longest}" if fit.longest else "no context fits"
    return f"{answer}: {size(plan.in_memory)} of {have}; {further}"
