"""The border to llama.cpp: its library, its log, one context with its batch. `Any` lives here only.

llama.cpp reports what went wrong in its log and returns NULL or a number, so the log is kept and
quoted. Everything above this file sees ints, bytes, numpy arrays and the error tree.
"""

from __future__ import annotations

import _thread
import atexit
import ctypes
import hashlib
import importlib
import logging
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from localspec.errors import BackendError, BackendMissingError
from localspec.preparation import GpuMemory
from localspec.types import Logits, Positions, TokenIds

from . import runtime

if TYPE_CHECKING:
    from .taps import Taps

INSTALL_COMMAND = "pip install llama-cpp-python"

_REBUILD_SHARED = (
    "CMAKE_ARGS=\"-DCMAKE_SHARED_LINKER_FLAGS='-nostdlib++ -Wl,--no-as-needed,-l:libstdc++.so.6'\" "
    f"{INSTALL_COMMAND} --force-reinstall --no-cache-dir (with the other CMAKE_ARGS that you built it with)"
)

_SPIN_COUNT = "1000"
_GPU_DEVICE = 1  # GGML_BACKEND_DEVICE_TYPE_GPU
_MOMENT = 0.01  # s
_QUIET = 3  # passes that nobody listens to, until hidden states are kept no more
_LEVEL_WARNING, _LEVEL_ERROR, _LEVEL_CONTINUED = 3, 4, 5
_LOG_LEVELS = {_LEVEL_WARNING: logging.INFO, _LEVEL_ERROR: logging.INFO}  # the rest is for debugging

_FUNCTION_NAME = re.compile(r"^\w+: (?=.)")

_logger = logging.getLogger("localspec.llamacpp")


# ---------------------------------------------------------------- the package


def is_installed() -> bool:
    """Cheap: looks for the package without importing it."""
    return util.find_spec("llama_cpp") is not None


def package_folder() -> Path:
    """Where llama_cpp is installed. Raises BackendMissingError."""
    spec = util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise BackendMissingError("llama-cpp-python is not installed", fix=f"Install it with: {INSTALL_COMMAND}")
    return Path(spec.origin).parent


def version() -> str:
    """Version of llama-cpp-python, or an empty string."""
    try:
        return metadata.version("llama_cpp_python")
    except metadata.PackageNotFoundError:
        return ""


@lru_cache(maxsize=1)
def build() -> str:
    """Hash that tells builds of one version apart: by the names, sizes and times of the libraries."""
    libraries = sorted((package_folder() / "lib").glob("*"))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in libraries]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:12]


@lru_cache(maxsize=1)
def library() -> Any:
    """The low-level binding, imported and initialised once. Raises BackendMissingError, BackendError."""
    package_folder()
    # Between passes idle OpenMP threads would spin for milliseconds and take the core that the other
    # model, or Python, needs. A short spin still bridges the gaps inside a pass. libgomp reads this
    # when it is loaded, so it must stand before the import; a user's own choice is left alone.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    try:
        binding: Any = importlib.import_module("llama_cpp.llama_cpp")
    except Exception as error:  # the binding raises RuntimeError, OSError or AttributeError as it fits
        raise BackendError(
            f"llama.cpp's library does not load: {error}", fix=f"Reinstall it: {INSTALL_COMMAND}"
        ) from error
    _check_runtime()
    _install_log(binding)
    binding.llama_backend_init()
    return binding


def _check_runtime() -> None:
    """Raise BackendError for a build that would end the process as soon as it opens a model."""
    ggml: Any = importlib.import_module("llama_cpp._ggml").libggml
    private = runtime.private_runtime(ggml)
    if private is not None and runtime.is_shared_runtime_loaded():
        raise BackendError(
            "this build of llama.cpp has a C++ library of its own and would crash beside numpy's",
            got=f"libstdc++ inside {private.name}",
            expected="the system's libstdc++.so.6",
            fix=f"Rebuild it: {_REBUILD_SHARED}",
        )


def devices() -> tuple[str, ...]:
    """Descriptions of the processors that this build can use."""
    library()
    ggml: Any = importlib.import_module("llama_cpp._ggml").libggml
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.argtypes, ggml.ggml_backend_dev_get.restype = [ctypes.c_size_t], ctypes.c_void_p
    describe = ggml.ggml_backend_dev_description
    describe.argtypes, describe.restype = [ctypes.c_void_p], ctypes.c_char_p
    handles = [ggml.ggml_backend_dev_get(index) for index in range(ggml.ggml_backend_dev_count())]
    return tuple(str(describe(handle).decode(errors="replace")) for handle in handles)


def captures_passes() -> bool:
    """Has this build devices that keep what was launched for a pass, and launch it at once for the next alike one (CUDA
    graphs)?"""
    library()
    ggml: Any = importlib.import_module("llama_cpp._ggml").libggml
    ggml.ggml_backend_reg_by_name.argtypes, ggml.ggml_backend_reg_by_name.restype = [ctypes.c_char_p], ctypes.c_void_p
    return bool(ggml.ggml_backend_reg_by_name(b"CUDA"))


def gpu_memory() -> GpuMemory | None:
    """Free memory of the first GPU of this build, or None. Raises BackendError."""
    lib = library()
    if not lib.llama_supports_gpu_offload():
        return None
    ggml: Any = importlib.import_module("llama_cpp._ggml").libggml
    ggml.ggml_backend_dev_by_type.argtypes, ggml.ggml_backend_dev_by_type.restype = [ctypes.c_int], ctypes.c_void_p
    memory = ggml.ggml_backend_dev_memory
    memory.argtypes, memory.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p], None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    device = ggml.ggml_backend_dev_by_type(_GPU_DEVICE)
    if not device:
        return None
    memory(device, ctypes.byref(free), ctypes.byref(total))
    return GpuMemory(free.value, shared=sys.platform == "darwin") if free.value else None


def quantize(source: Path, output: Path, file_type: str, num_threads: int, *, again: bool = False) -> None:
    """Write a GGUF file again in another type, e.g. MOSTLY_Q4_0. again: quantised tensors, too. Raises BackendError."""
    lib = library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_{file_type}")
    params.nthread = num_threads
    params.allow_requantize = again
    forget_errors()
    if lib.llama_model_quantize(os.fsencode(source), os.fsencode(output), ctypes.byref(params)):
        raise BackendError(f"llama.cpp could not quantise {source.name}: {quoted(complaints())}")


# ---------------------------------------------------------------- the log


class _Log:
    """Turns llama.cpp's pieces of text into lines; remembers the last lines that matter."""

    def __init__(self) -> None:
        self.recent: deque[str] = deque(maxlen=20)
        self._piece = ""
        self._level = logging.DEBUG
        self._is_error = False
        self._lock = threading.Lock()

    def receive(self, level: int, text: bytes | None, _data: object) -> None:
        """llama.cpp calls this, from any of its threads. Nothing may be raised into C."""
        try:
            with self._lock:
                if level != _LEVEL_CONTINUED:
                    self._level, self._is_error = _LOG_LEVELS.get(level, logging.DEBUG), level == _LEVEL_ERROR
                self._piece += (text or b"").decode(errors="replace")
                *lines, self._piece = self._piece.split("\n")
                for line in filter(None, map(str.strip, lines)):
                    if self._is_error:
                        self.recent.append(line)
                    _logger.log(self._level, "%s", line)
        except Exception:  # a broken logging handler must not take the process down
            self._piece = ""


_log = _Log()
_callback: Any = None  # llama.cpp keeps a bare pointer to it, so it must never be collected


def _install_log(binding: Any) -> None:
    global _callback
    _callback = binding.llama_log_callback(_log.receive)
    binding.llama_log_set(_callback, None)
    _repeat_lost_interrupts()
    # Destructors of the library may log after the interpreter is gone. This C function exists until
    # the very end and takes no notice of its arguments.
    harmless = ctypes.cast(ctypes.pythonapi.Py_IsInitialized, binding.llama_log_callback)
    atexit.register(binding.llama_log_set, harmless, None)


def _repeat_lost_interrupts() -> None:
    """Ctrl-C within a callback from C ends nothing there, and Python drops it: it is raised once more, a moment later
    (at once it would be raised in the hook, and dropped again)."""
    previous = sys.unraisablehook

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if lost.object == _log.receive and issubclass(lost.exc_type, KeyboardInterrupt):
            threading.Timer(_MOMENT, _thread.interrupt_main).start()
        else:
            previous(lost)

    sys.unraisablehook = hook


def forget_errors() -> None:
    """What llama.cpp complains of from here on is what `complaints` holds."""
    _log.recent.clear()


def complaints() -> tuple[str, ...]:
    """The error lines that llama.cpp logged, oldest first."""
    return tuple(dict.fromkeys(_log.recent))


def quoted(lines: Sequence[str]) -> str:
    """The first line, without the function that wrote it, for errors to quote: what failed logs first, its
    callers repeat that in their own words. The others go to the log once more, beside the error."""
    for line in lines[1:]:
        _logger.debug("llama.cpp also said: %s", line)
    return _FUNCTION_NAME.sub("", lines[0]) if lines else "no reason given"


# ---------------------------------------------------------------- one context and its batch


def no_output(what: str) -> BackendError:
    """The error where a pass succeeded and left nothing."""
    return BackendError(f"llama.cpp returned no {what}")


def _address(array: NDArray[Any]) -> int:
    """Where an array's data lie."""
    return int(array.ctypes.data)


@dataclass(frozen=True, slots=True)
class Saved:
    """Cells as llama.cpp wrote them."""

    buffer: Any

    @property
    def num_bytes(self) -> int:
        """Of the buffer."""
        return len(self.buffer)


class Context:
    """A llama_context and its batch: decode, and move cache cells between sequence ids.

    max_batch: tokens per decode.  max_outputs: of them scored.  longest: tokens of one sequence per decode.
    max_ids: sequence ids 0 to max_ids - 1 exist.  window: of sliding-window attention, else 0.  taps: what is kept of
    each token's hidden states while somebody listens.  always_listens: whoever does.
    is_tapped: are they, since the last decode?
    """

    def __init__(self, model: Any, params: Any, vocab_size: int, window: int, longest: int) -> None:
        self._lib = library()
        self.window, self.longest = window, longest
        self.max_batch, self.max_ids = int(params.n_batch), int(params.n_seq_max)
        self.max_outputs = int(params.n_outputs_max)
        self._vocab_size = vocab_size
        self._pointer = self._lib.llama_init_from_model(model, params)
        if not self._pointer:
            raise BackendError("llama.cpp could not create a context")
        self._memory = self._lib.llama_get_memory(self._pointer)
        self.taps: Taps | None = None
        self.always_listens = False
        self.is_tapped, self._unheard = False, _QUIET
        self._unread: NDArray[np.float32] | None = None  # where the last decode's hidden states go
        self._allocate()

    def tap(self, taps: Taps | None) -> None:
        """What hidden states are kept from now on of passes in which somebody wants them; None: no pass has any."""
        self.always_listens, self._unheard = False, _QUIET
        self.listen(False)
        self.taps = taps

    def listen(self, wanted: bool) -> None:
        """Are hidden states kept from the next decode on? Handing them over takes a device 0.1 to 0.25 ms. No more only
        behind some passes without: where sequences share a context each change would have graphs built anew."""
        wanted |= self.always_listens
        self._unheard = 0 if wanted else self._unheard + 1
        wanted |= self._unheard < _QUIET
        if self.taps is not None and wanted is not self.is_tapped:
            self.read_taps()
            self.taps.enable(self._pointer, wanted)
            self.is_tapped = wanted

    def wait(self) -> None:
        """Return once a device has run what it was given."""
        self._lib.llama_synchronize(self._pointer)

    def fill_later(self, into: NDArray[np.float32]) -> None:
        """[T, W] for the hidden states of the last decode's tokens, in their order. They are copied when its rows are
        read, or somebody needs them, at the latest before the next decode: at once it would wait for the device."""
        self._unread = into

    def read_taps(self, *, needed: bool = True) -> None:
        """Copy what was to be copied later, if it is needed; waits for the device then."""
        into, self._unread = self._unread, None
        if into is not None and needed:
            assert self.taps is not None
            self.taps.read(self._pointer, into)

    def _allocate(self) -> None:
        """numpy arrays that llama_batch points into: filling them needs no loop."""
        size = self.max_batch
        self._tokens, self._positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self._num_ids, self._outputs = np.ones(size, np.int32), np.zeros(size, np.int8)
        self._ids = np.zeros(size * self.max_ids, np.int32)
        self._id_pointers = np.zeros(size + 1, np.uintp)
        self._one_each = np.arange(size, dtype=np.uintp) * np.uintp(self._ids.itemsize) + np.uintp(
            self._ids.ctypes.data
        )
        self._batch = self._batch_over(token=self._tokens, pos=self._positions)

    def _batch_over(self, **inputs: NDArray[Any]) -> Any:
        """A llama_batch that points into these arrays, and into those for ids and outputs."""
        batch = self._lib.llama_batch()
        fields = dict(self._lib.llama_batch._fields_)
        shared: dict[str, NDArray[Any]] = {
            "n_seq_id": self._num_ids,
            "seq_id": self._id_pointers,
            "logits": self._outputs,
        }
        for name, array in {**inputs, **shared}.items():
            setattr(batch, name, ctypes.cast(ctypes.c_void_p(_address(array)), fields[name]))
        return batch

    def decode(
        self, tokens: TokenIds, positions: Positions, ids: Sequence[Sequence[int]] | int, outputs: NDArray[np.int8]
    ) -> int:
        """Run [T] tokens; 0 on success, 1 if the cache has no room, else an error.

        ids: the sequence ids of each token, or the one id that all tokens have.
        """
        self.read_taps()
        size = len(tokens)
        self._tokens[:size], self._positions[:size], self._outputs[:size] = tokens, positions, outputs
        self._fill_ids(ids, size)
        self._batch.n_tokens = size
        return int(self._lib.llama_decode(self._pointer, self._batch))

    def _fill_ids(self, ids: Sequence[Sequence[int]] | int, size: int) -> None:
        if isinstance(ids, int):
            self._ids[:size], self._num_ids[:size] = ids, 1
            self._id_pointers[:size] = self._one_each[:size]
            return
        counts = np.fromiter(map(len, ids), np.int32, len(ids))
        starts = np.cumsum(counts) - counts
        flat = np.fromiter((one for several in ids for one in several), np.int32, int(counts.sum()))
        self._ids[: len(flat)], self._num_ids[: len(ids)] = flat, counts
        np.add(starts.astype(np.uintp) * np.uintp(4), np.uintp(_address(self._ids)), out=self._id_pointers[: len(ids)])

    def logits(self, num_rows: int) -> Logits:
        """[num_rows, V] view of llama.cpp's own buffer, which the next decode overwrites."""
        self.read_taps()
        if num_rows == 0:
            return np.zeros((0, self._vocab_size), np.float32)
        first = self._lib.llama_get_logits(self._pointer)
        if not first:
            raise no_output("logits")
        buffer: Any = (ctypes.c_float * (num_rows * self._vocab_size)).from_address(ctypes.addressof(first.contents))
        rows: Logits = np.ndarray((num_rows, self._vocab_size), np.float32, buffer)
        return rows

    def remove(self, sequence: int, start: int = 0) -> None:
        """Forget an id's cells from position `start` on. Raises BackendError if llama.cpp cannot."""
        if not self._lib.llama_memory_seq_rm(self._memory, sequence, start, -1):
            raise BackendError("llama.cpp cannot drop tokens of this model's cache", got=f"position {start}")

    def share(self, source: int, target: int, end: int, start: int = 0) -> None:
        """Give `target` the cells of `source` at positions `start` to `end`. No data is copied."""
        if end > start:
            self._lib.llama_memory_seq_cp(self._memory, source, target, start, end)

    def copy(self, source: int, target: int) -> None:
        """Give `target`, which must be empty, all of `source`; recurrent states are copied when one of them runs."""
        self._lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def save(self, sequence: int) -> Saved:
        """A copy of an id's cells, for `restore` into this or a like context. Of sliding-window layers only
        the cells in the window of the last one."""
        size = int(self._lib.llama_state_seq_get_size(self._pointer, sequence))
        buffer = (ctypes.c_uint8 * size)()
        if self._lib.llama_state_seq_get_data(self._pointer, buffer, size, sequence) != size:
            raise BackendError("llama.cpp could not copy a sequence out of its cache")
        return Saved(buffer)

    def restore(self, sequence: int, saved: Saved) -> None:
        """Put saved cells, now side by side and in order, into an empty id."""
        if not self._lib.llama_state_seq_set_data(self._pointer, saved.buffer, len(saved.buffer), sequence):
            raise BackendError("llama.cpp could not put a sequence into its cache")

    @property
    def handle(self) -> Any:
        """The llama_context, for another one that shares its model."""
        return self._pointer

    @property
    def is_closed(self) -> bool:
        """Has the context been freed?"""
        return self._pointer is None

    def close(self) -> None:
        """Free the context. Twice does nothing."""
        self._unread = None
        if self._pointer:
            self._lib.llama_free(self._pointer)
            self._pointer = None
