"""Bars of long commands, on standard error and only on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A function that is told (done, in all) and draws it with the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    progress = Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    )
    task = progress.add_task(label, total=None)

    def tell(done: int, total: int) -> None:
        progress.start()  # not before there is something to show: an empty display leaves an empty line
        progress.update(task, completed=done, total=total)

    try:
        yield tell
    finally:
        progress.stop()
