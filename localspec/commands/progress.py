"""Bars of long commands, on standard error and only on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Tell(Protocol):
    """Told how much is done of how much; with a text, of what."""

    def __call__(self, done: int, total: int, label: str | None = None) -> None: ...


@contextmanager
def progress_bar(label: str) -> Iterator[Tell]:
    """A function that draws what it is told, with the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    progress = Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    )
    task = progress.add_task(label, total=None)

    def tell(done: int, total: int, label: str | None = None) -> None:
        progress.start()  # not before there is something to show: an empty display leaves an empty line
        progress.update(task, completed=done, total=total, description=label)

    try:
        yield tell
    finally:
        progress.stop()
