"""Do llama.cpp's extra buffers work here? Asked in a child process, so that a crash hits nobody.

Known case: builds with GCC 12 on processors with AMX die as soon as a quantised model runs with them.
Without extra buffers the matrix unit is not used. Only the crash is observed here, not its cause.

The verdict is kept per machine and build, so the question (under a second) is asked once. Where the
self-test itself cannot be run, there is no verdict: models are loaded without extra buffers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path

import numpy as np
import platformdirs

from . import native
from .probe_child import model_bytes

_TIMEOUT_SECONDS = 120.0
_TOLERANCE = 0.2  # of the logits' spread; kernels differ by far less, a broken one by far more

REBUILD = (
    "CC=clang CXX=clang++ pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python "
    '"llama-cpp-python=={}"'
)

_logger = logging.getLogger("localspec.llamacpp")


class Verdict(Enum):
    """What the extra buffers do on this machine with this build."""

    WORK = "work"
    CRASH = "crash"
    WRONG = "wrong"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict and how it came about: a signal's name, or what the child said."""

    verdict: Verdict
    detail: str = ""

    @property
    def note(self) -> str:
        """For people: what was switched off, why, and what helps; empty if nothing was."""
        reasons = {
            Verdict.WORK: "",
            Verdict.CRASH: f"this build of llama.cpp crashes with them on this processor ({self.detail})",
            Verdict.WRONG: "this build of llama.cpp computes wrong numbers with them on this processor",
            Verdict.UNKNOWN: f"whether they work here is not known, for {self.detail}; models may run all the same",
        }
        reason = reasons[self.verdict]
        if not reason:
            return ""
        return f"extra CPU buffers are off: {reason}" + (f"; {self.remedy}" if self.remedy else "")

    @property
    def remedy(self) -> str:
        """The command that repairs the build, if the build is known to be at fault."""
        if self.verdict in (Verdict.WORK, Verdict.UNKNOWN):
            return ""
        cause = "a known fault of builds with GCC 12 on processors with AMX; "
        return f"{cause}rebuild it with clang, or GCC 13 and later: {REBUILD.format(native.version())}"


@lru_cache(maxsize=1)
def examine() -> Finding:
    """The verdict of this machine and build, looked up or asked for once per process."""
    return find(Path(platformdirs.user_cache_dir("localspec")))


def find(folder: Path) -> Finding:
    """The verdict remembered in a folder, or else asked for and, if there is one, put there."""
    file = folder / f"llamacpp-extra-buffers-{identity()[:16]}.json"
    found = _read(file)
    if found is None:
        found = _ask()
        if found.verdict is not Verdict.UNKNOWN:
            _write(file, found)
    return found


def identity() -> str:
    """Hash of processor and build: a new one asks again."""
    whole = repr((_processor(), platform.machine(), native.version(), native.build()))
    return hashlib.sha256(whole.encode()).hexdigest()


def _processor() -> str:
    """Model name and instruction sets where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def _read(file: Path) -> Finding | None:
    """A remembered finding; None if there is none or it cannot be understood."""
    try:
        stored = json.loads(file.read_text())
        return Finding(Verdict(stored["verdict"]), str(stored["detail"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(file: Path, found: Finding) -> None:
    """All or nothing, for other processes may read at any time. A read-only cache only costs time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem)
        with os.fdopen(handle, "w") as stream:
            json.dump({**asdict(found), "verdict": found.verdict.value}, stream)
        Path(temporary).replace(file)
    except OSError as error:
        _logger.info("the verdict on extra buffers could not be stored: %s", error)


def _ask() -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.gguf"
        path.write_bytes(model_bytes())
        plain, complaint = _child(path, extra_buffers=False)
        if plain is None:  # says nothing of extra buffers, nor of other models: a user's own may well run
            return Finding(Verdict.UNKNOWN, f"the self-test itself failed, without them too ({complaint})")
        logits, complaint = _child(path, extra_buffers=True)
    if logits is None and complaint.startswith("SIG"):
        return Finding(Verdict.CRASH, complaint)
    if logits is None:
        return Finding(Verdict.UNKNOWN, f"the self-test with them failed ({complaint})")
    return judge(plain, logits)


def judge(plain: list[float], logits: list[float]) -> Finding:
    """Compare logits with and without extra buffers."""
    expected, got = np.array(plain), np.array(logits)
    if got.shape != expected.shape or not np.all(np.abs(got - expected) <= _TOLERANCE * expected.std()):
        return Finding(Verdict.WRONG)
    return Finding(Verdict.WORK)


def _child(path: Path, *, extra_buffers: bool) -> tuple[list[float] | None, str]:
    """(logits, "") or (None, name of the signal or what the child said)."""
    script = Path(__file__).with_name("probe_child.py")
    command = [sys.executable, str(script), str(native.package_folder().parent), str(path), str(int(extra_buffers))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    if done.returncode == 0:
        try:
            return [float(value) for value in json.loads(done.stdout)], ""
        except (ValueError, TypeError):
            return None, "the test printed no numbers"
    return None, _how_it_ended(done.returncode, done.stderr)


def _how_it_ended(status: int, stderr: str) -> str:
    """A name that starts with SIG for a crash, else the child's last words."""
    if status < 0:
        try:
            return signal.Signals(-status).name
        except ValueError:
            return f"SIG{-status}"
    if status >= 0xC0000000:  # Windows reports a crash as an NTSTATUS code
        return f"SIGNAL 0x{status:X}"
    return (stderr.strip().splitlines() or [f"exit status {status}"])[-1]
