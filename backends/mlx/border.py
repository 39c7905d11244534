"""Where foreign errors become members of the error tree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from localspec.errors import BackendError, LocalspecError, OutOfMemoryError

_MEMORY_WORDS = ("out of memory", "malloc", "unable to allocate", "bad_alloc", "insufficient memory")


def is_memory_error(error: BaseException) -> bool:
    """MLX has no type of its own for this: Metal, CUDA and the CPU each word it differently."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(word in text for word in _MEMORY_WORDS)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise BackendError or OutOfMemoryError, naming `what` was going on, for anything foreign."""
    try:
        yield
    except LocalspecError:
        raise
    except Exception as error:
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if is_memory_error(error):
            raise OutOfMemoryError(
                f"{what}: memory ran out", got=message, fix="Use a smaller or quantised model, or a shorter context."
            ) from error
        raise BackendError(f"{what} failed", got=message) from error
