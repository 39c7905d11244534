"""How long work looks on a terminal: a pull with a line per file, a conversion with its latest step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from .client import RemoteFile
from .pull import Pulled

_LONGEST = 48  # characters of a file's name


class PullProgress:
    """A `Watcher` that draws on standard error; use it with `with`."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            console=self.console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> PullProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._task is None:
            return
        self._progress.stop()
        if kind is KeyboardInterrupt:
            self.console.print("what has arrived is kept: run the same command to go on", style="dim")

    def begin(self, file: RemoteFile, num_bytes: int) -> None:
        """A new line."""
        self._progress.start()  # not before there is one: an empty display leaves an empty line
        name = file.name if len(file.name) <= _LONGEST else f"…{file.name[-_LONGEST:]}"
        self._task = self._progress.add_task(name, total=file.size, completed=num_bytes)
        if num_bytes:
            self.note(f"{file.name}: going on from {num_bytes / 1e6:.1f} MB")

    def advance(self, num_bytes: int) -> None:
        """Move the current line's bar."""
        if self._task is not None:
            self._progress.advance(self._task, num_bytes)

    def note(self, text: str) -> None:
        """A line above the bars."""
        self._progress.console.print(Text(text, style="dim"))


def pulled_line(pulled: Pulled) -> str:
    """One line about a finished pull."""
    if not pulled.num_files:
        return f"{pulled.name} is here already, nothing was fetched"
    files = "1 file" if pulled.num_files == 1 else f"{pulled.num_files} files"
    return f"{pulled.name}: {files} fetched, {pulled.num_bytes / 1e6:.1f} MB, commit {pulled.commit[:12]}"


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A function that shows what a long command is doing, on standard error where that is a terminal."""
    with Console(stderr=True, markup=False, emoji=False, highlight=False).status("") as line:
        yield line.update
