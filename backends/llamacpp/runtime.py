"""Which C++ library llama.cpp was linked with.

Some compilers link libstdc++ into every shared library. numpy has loaded the system's by then, the loader makes one
of some symbols of both and keeps others apart, and the first number that llama.cpp prints kills the process.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

_SYMBOL = "_ZNSt6locale7classicEv"  # std::locale::classic(), which libstdc++ alone defines


class _Origin(ctypes.Structure):
    """Dl_info of dlfcn.h."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def private_runtime(library: Any) -> Path | None:
    """The file that holds a libstdc++ of its own, of a loaded ctypes library and those that it needs; None where they
    use the system's, or another C++ library."""
    if sys.platform != "linux":
        return None
    try:
        symbol = ctypes.cast(getattr(library, _SYMBOL), ctypes.c_void_p)
    except AttributeError:
        return None
    origin, find = _Origin(), ctypes.CDLL(None).dladdr
    find.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Origin)]
    if not find(symbol, ctypes.byref(origin)) or not origin.file:
        return None
    file = Path(os.fsdecode(origin.file))
    return None if file.name.startswith("libstdc++") else file


def is_shared_runtime_loaded() -> bool:
    """Has something in this process loaded the system's libstdc++?"""
    try:
        ctypes.CDLL("libstdc++.so.6", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    return True
