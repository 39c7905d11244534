"""One plan of the memory that a pair takes, made from file headers before anything is loaded.

What a model takes is its backend's knowledge (`MemoryPlanner`); here it is added up, compared with the
machine, and turned into a context that fits or a refusal that shows the numbers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from localspec.errors import OutOfMemoryError
from localspec.formats import ModelSummary
from localspec.preparation import GpuMemory, MemoryPlanner, MemoryScope
from localspec.protocols import LoadSettings

DEFAULT_CONTEXT = 4096
"""Tokens per sequence where nobody names a number, unless the model was trained for fewer."""

_STEP = 256  # llama.cpp makes cells in this step
_LEAST = 512  # a shorter context is not worth opening unasked
_RESERVE = 0.05  # of the machine's memory: what else runs grows, too


@dataclass(frozen=True, slots=True)
class Machine:
    """Memory in bytes; None: not told. available: without pushing out other programs."""

    total: int | None
    available: int | None

    @property
    def usable(self) -> int | None:
        """What a plan may take: what is available, or else all there is; a twentieth of the total stays free."""
        have = self.total if self.available is None else self.available
        return None if have is None else max(0, int(have - _RESERVE * (self.total or have)))


@dataclass(frozen=True, slots=True)
class Part:
    """One model of a plan. role: for people, e.g. target."""

    role: str
    model: ModelSummary
    planner: MemoryPlanner


@dataclass(frozen=True, slots=True)
class PlanLine:
    """num_bytes: of one; it is needed `times` times."""

    part: str
    what: str
    num_bytes: int
    times: int
    on_gpu: int

    @property
    def total(self) -> int:
        return self.num_bytes * self.times


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a pair takes with `context` tokens in each of `num_sequences` conversations."""

    lines: tuple[PlanLine, ...]
    context: int
    num_sequences: int
    machine: Machine
    gpu: GpuMemory | None
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes, wherever they lie."""
        return sum(line.total for line in self.lines)

    @property
    def on_gpu(self) -> int:
        return sum(line.on_gpu * line.times for line in self.lines)

    @property
    def in_memory(self) -> int:
        """Bytes of the machine's own memory."""
        apart = self.gpu is not None and not self.gpu.shared
        return self.total - (self.on_gpu if apart else 0)

    @property
    def fits(self) -> bool:
        """False only where a number is known that says so."""
        usable = self.machine.usable
        if usable is not None and self.in_memory > usable:
            return False
        return self.gpu is None or self.on_gpu <= self.gpu.free

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            **asdict(self),
            "total": self.total,
            "in_memory": self.in_memory,
            "on_gpu": self.on_gpu,
            "usable": self.machine.usable,
            "fits": self.fits,
        }


def look() -> Machine:
    """The memory of this machine, or of the container that this process runs in."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return Machine(None, None)
    available = _meminfo("MemAvailable")
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is not None and limit < total:
        total = limit
        left = limit - (used or 0) + (_cgroup_cache() or 0)
        available = left if available is None else min(available, left)
    return Machine(total, available)


def default_context(model: ModelSummary) -> int:
    """Tokens per sequence where nobody names a number."""
    return min(model.trained_context or DEFAULT_CONTEXT, DEFAULT_CONTEXT)


def make_plan(
    parts: Sequence[Part], settings: LoadSettings, context: int, machine: Machine, *, num_sequences: int = 1
) -> MemoryPlan:
    """The plan at one context length. num_sequences: conversations held open at once."""
    lines, once = [], set[str]()
    notes = []
    for part in parts:
        own = settings if part is parts[0] else replace(settings, trees=False)  # as `open_pair` loads draft models
        for item in part.planner.items(part.model, own, context):
            if item.scope is MemoryScope.PROCESS:
                if item.what in once:
                    continue
                once.add(item.what)
            times = num_sequences if item.scope is MemoryScope.SEQUENCE else 1
            role = "program" if item.scope is MemoryScope.PROCESS else part.role
            lines.append(PlanLine(role, item.what, item.num_bytes, times, item.on_gpu))
        if part.model.state_values is None:
            notes.append(f"{part.role}: how large the states of its recurrent layers are is not known; not counted")
    gpu = next((found for part in parts if (found := part.planner.gpu()) is not None), None)
    return MemoryPlan(tuple(lines), context, num_sequences, machine, gpu, tuple(notes))


def largest_context(
    parts: Sequence[Part], settings: LoadSettings, most: int, machine: Machine, *, num_sequences: int = 1
) -> int | None:
    """The longest context up to `most` that fits, in steps of 256; None if not even 256 tokens do."""

    def fits(context: int) -> bool:
        return make_plan(parts, settings, context, machine, num_sequences=num_sequences).fits

    if fits(most):
        return most
    low, high = 0, -(-most // _STEP)  # in steps: low fits, or is nothing; high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * _STEP) else (low, middle)
    return low * _STEP or None


def settle(parts: Sequence[Part], settings: LoadSettings, machine: Machine) -> tuple[LoadSettings, tuple[str, ...]]:
    """(settings whose context fits, what was decided). One conversation must fit, with `batch` all, whose caches are
    made at once; that the others which `num_sequences` allows may not is said.

    Raises OutOfMemoryError where a context that was asked for does not fit, naming the longest that would,
    and where no useful context does.
    """
    if not parts:
        return settings, ()
    asked = settings.context
    wanted = asked or default_context(parts[0].model)
    at_once = settings.num_sequences if settings.batch else 1
    plan = make_plan(parts, settings, wanted, machine, num_sequences=at_once)
    if plan.fits:
        full = make_plan(parts, settings, wanted, machine, num_sequences=settings.num_sequences)
        if full.fits:
            return settings, ()
        note = f"memory suffices for one conversation of {wanted} tokens, not for {settings.num_sequences} at once"
        return settings, (f"{note} ({describe(full)})",)
    most = largest_context(parts, settings, wanted, machine, num_sequences=at_once)
    if asked is None and most is not None and most >= min(_LEAST, wanted):
        smaller = make_plan(parts, settings, most, machine, num_sequences=at_once)
        note = f"the context is {most} tokens instead of {wanted}, which memory does not allow ({describe(plan)})"
        return replace(settings, context=most), (f"{note}; {size(smaller.in_memory)} are needed now",)
    fix = (
        f"The longest context that fits is {most}: --context {most}."
        if most is not None
        else "Use a smaller model or one with fewer bits."
    )
    if at_once > 1:
        fix += f" Or answer fewer requests at once than {at_once}."
    raise OutOfMemoryError(f"a context of {wanted} tokens does not fit into memory", got=describe(plan), fix=fix)


def describe(plan: MemoryPlan) -> str:
    """The numbers of a plan in a line: what is needed, of which most, and what there is."""
    weights = sum(line.total for line in plan.lines if line.what.startswith("weights"))
    caches = sum(line.total for line in plan.lines if line.what.startswith("keys and values"))
    parts = f"{size(plan.in_memory)} needed: weights {size(weights)}, caches {size(caches)}"
    usable = plan.machine.usable
    have = f"{size(usable)} usable" if usable is not None else "this machine does not tell its memory"
    if plan.gpu is not None and plan.on_gpu > plan.gpu.free:
        return f"{size(plan.on_gpu)} needed on the GPU, {size(plan.gpu.free)} free there"
    return f"{parts}; {have}"


def size(num_bytes: int) -> str:
    """For people: 1.5 GiB, 31 MiB."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    return f"{num_bytes / 2**20:.0f} MiB"


def _meminfo(key: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == key:
                return int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _cgroup_cache() -> int | None:
    """Bytes that count as used by the container and can be taken back at once."""
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, ValueError, IndexError):
        return None
