"""How many threads are sensible: cores this process may use, not their hyperthreads."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def num_cores() -> int:
    """Physical cores within this process's affinity and container quota, at least 1.

    Matrix products gain nothing from a second thread on the same core, and a team larger than the
    quota waits at every barrier for a thread that is not allowed to run.
    """
    return max(1, min(_num_physical(), _quota()))


def _num_physical() -> int:
    logical = os.cpu_count() or 1
    if sys.platform == "darwin":
        return _num_performance_cores() or logical
    if sys.platform != "linux":
        return logical // 2
    allowed = os.sched_getaffinity(0)
    try:
        return len({Path(_TOPOLOGY.format(number)).read_text() for number in allowed})
    except OSError:
        return len(allowed)


def _num_performance_cores() -> int:
    """Apple's efficiency cores would hold the others up."""
    import ctypes

    value, size = ctypes.c_int32(0), ctypes.c_size_t(4)
    ask = ctypes.CDLL(None).sysctlbyname
    failed = ask(b"hw.perflevel0.physicalcpu", ctypes.byref(value), ctypes.byref(size), None, 0)
    return 0 if failed else value.value


def _quota() -> int:
    """Whole processors that the container's quota allows; very many without one."""
    try:
        limit, period = _QUOTA.read_text().split()
        return max(1, round(int(limit) / int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return 1 << 16
