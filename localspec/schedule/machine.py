"""Where and with what something was measured: the machine, the model's files, the runtime. Keys of what is kept."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from localspec.protocols import DraftHead, LanguageModel

_HEADER = 1 << 16  # bytes: enough for the metadata that tells two models of equal size apart


@lru_cache(maxsize=1)
def processor() -> str:
    """The model name where Linux tells it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_machine() -> dict[str, Any]:
    """Processor, cores that this process may use, system. GPUs are named by the models that run on them."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return {"processor": processor(), "cores": cores, "system": f"{platform.system()} {platform.machine()}"}


def describe_files(path: Path) -> dict[str, Any]:
    """Size, time and a hash of the first bytes of a model's file, or of the files of its folder. Not of all bytes:
    models are large. Files that cannot be read (a model that is no file) count as absent."""
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    sizes, times, content = 0, 0, hashlib.sha256()
    for file in files:
        try:
            found = file.stat()
            with file.open("rb") as stream:
                content.update(stream.read(_HEADER))
        except OSError:  # a folder in the folder, or a name without a file
            continue
        sizes += found.st_size
        times = max(times, found.st_mtime_ns)
        content.update(f"{file.name}:{found.st_size}".encode())
    return {"size": sizes, "modified_ns": times, "header": content.hexdigest()[:16]}


def describe_model(model: LanguageModel) -> dict[str, Any]:
    """A loaded model: its files, the runtime and its options, the device."""
    info = model.info
    return {
        "name": info.name,
        "files": describe_files(info.path),
        "backend": info.backend,
        "runtime": info.runtime,
        "device": info.device,
        "options": dict(info.options),
    }


def describe_head(head: DraftHead) -> dict[str, Any]:
    """A loaded head: its kind, its size (early exit has several for one file) and its files; what runs it is its
    target's business."""
    info = head.info
    return {"kind": info.kind, "num_parameters": info.num_parameters, "files": describe_files(info.path)}
