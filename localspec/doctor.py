"""What is installed here, what each backend can do, and what was worked around."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

from localspec import __version__
from localspec.drafters import DRAFTERS
from localspec.errors import LocalspecError
from localspec.loading import BUNDLED, backend_names, bundled_path, choose_backend, get_backend
from localspec.protocols import BackendReport
from localspec.schedule.machine import processor


@dataclass(frozen=True, slots=True)
class Report:
    """Everything `localspec doctor` prints."""

    version: str
    python: str
    platform: str
    processor: str
    num_cores: int
    memory_gib: float
    backends: tuple[BackendReport, ...]
    bundled: str
    choice: str
    drafters: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def examine() -> Report:
    """Look at this machine. Opens no model of the user's; backends may run a short self-test."""
    target = bundled_path(BUNDLED, "target")
    try:
        choice = f"{choose_backend('auto', target).name} for the bundled pair"
    except LocalspecError as error:
        choice = str(error)
    size = sum(bundled_path(BUNDLED, role).stat().st_size for role in ("target", "draft")) if target.is_file() else 0
    return Report(
        version=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        processor=processor(),
        num_cores=os.cpu_count() or 1,
        memory_gib=memory_bytes() / 2**30,
        backends=tuple(_report(name) for name in backend_names()),
        bundled=f"{BUNDLED}, {size / 1e6:.0f} MB" if size else "missing: reinstall localspec",
        choice=choice,
        drafters=tuple(DRAFTERS),
    )


def _report(name: str) -> BackendReport:
    try:
        return get_backend(name).report()
    except LocalspecError as error:
        return BackendReport(name, False, "", (), (str(error),), "")


def memory_bytes() -> int:
    """Memory of this machine; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
