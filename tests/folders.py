"""Folders that outlive a test: what several tests of a process share is made once, outside of any fixture."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path


def kept_folder() -> Path:
    """A new folder, removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="localspec-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
