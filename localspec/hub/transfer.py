"""One file from the Hub into a partial file, which is resumed byte for byte and checked before it counts.

The client library downloads to a file of a new name each time and drops it when it is interrupted, so
the transfer itself is ours; requests, redirects, tokens and proxies stay the library's.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from localspec.errors import DiskError, DownloadError, HubError

from .client import Hub, RefusedError, RemoteFile, border, pause
from .name import HubName

if TYPE_CHECKING:
    from httpx2 import Response

_PROGRESS = 1 << 20  # bytes; a connection that gave fewer before it broke counts as a failed attempt
_SLOW_TO_READ = 1 << 30  # bytes; a bar that stands still wants a reason
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Watcher(Protocol):
    """Is told how a pull goes."""

    def begin(self, file: RemoteFile, num_bytes: int) -> None:
        """`file` is next; `num_bytes` of it are here already."""

    def advance(self, num_bytes: int) -> None:
        """So many more have arrived; negative if some were thrown away."""

    def note(self, text: str) -> None:
        """Something a person should know."""


class Unwatched:
    """Nobody is."""

    def begin(self, file: RemoteFile, num_bytes: int) -> None: ...

    def advance(self, num_bytes: int) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Transfer:
    """One file on its way."""

    hub: Hub
    name: HubName
    url: str
    file: RemoteFile
    partial: Path
    watcher: Watcher

    def run(self) -> int:
        """Complete the partial file; bytes that came over the network. It holds the right content afterwards.

        Raises members of HubError and DiskError. A partial file that cannot become the right one is deleted;
        any other stays for the next time.
        """
        with disk_errors(self.partial):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            held = self._held()
            self.watcher.begin(self.file, held)
            received = self._complete(held)
            if self._is_right():
                return received
            self.partial.unlink()
            if held == 0:
                raise self._damaged("checksum", "other content")
            # the fault may lie in what an earlier run left; once more, all of it from the Hub
            self.watcher.note(f"{self.file.name}: what was left of an earlier download is damaged, starting again")
            self.watcher.advance(-self.file.size)
            received += self._complete(0)
            if not self._is_right():
                self.partial.unlink()
                raise self._damaged("checksum", "other content")
            return received

    def _held(self) -> int:
        """Bytes that an earlier run left."""
        if self.partial.is_symlink() or (self.partial.is_file() and self.partial.stat().st_size > self.file.size):
            self.partial.unlink()
        return self.partial.stat().st_size if self.partial.is_file() else 0

    def _complete(self, held: int) -> int:
        """Fetch until all bytes are there. `num_failures` counts attempts in a row that brought next to nothing."""
        received = num_failures = 0
        with self.partial.open("ab") as out:
            while (start := out.tell()) < self.file.size:
                try:
                    with border(self.hub, self.name):
                        received += self._fetch(out, start)
                except RefusedError as refused:
                    gained = self.partial.stat().st_size - start
                    received += max(gained, 0)
                    num_failures = 0 if gained >= _PROGRESS else num_failures + 1
                    pause(self.hub.patience, num_failures - 1 if num_failures else 0, refused, self.watcher.note)
        return received

    def _fetch(self, out: IO[bytes], start: int) -> int:
        """One request for the rest; bytes that arrived. Raises RefusedError if the answer ends early."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = {**build_hf_headers(library_name="localspec"), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", self.url, headers=headers, timeout=timeout) as response:
            if response.status_code == 416:
                raise self._delete_and_blame(f"no bytes from {start} on")
            hf_raise_for_status(response)
            start = self._begin_at(response, out, start)
            position = start
            for chunk in response.iter_raw():
                position += len(chunk)
                if position > self.file.size:  # before it is written: a file without end would fill the disk
                    raise self._delete_and_blame(f"more than {self.file.size} bytes")
                out.write(chunk)
                out.flush()
                self.watcher.advance(len(chunk))
        if position < self.file.size:
            raise RefusedError(HubError("the connection ended early", got=f"{position} of {self.file.size} bytes"))
        return position - start

    def _begin_at(self, response: Response, out: IO[bytes], start: int) -> int:
        """Where the answer's first byte belongs; sizes other than the promised one are refused."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise HubError("the Hub sends a compressed file that was asked for as it is", fix="Check proxies.")
        whole: Any = response.headers.get("Content-Length")
        if response.status_code == 206:
            match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != start:
                raise HubError("the Hub sends another part of the file than was asked for", fix="Check proxies.")
            whole = match[3]
        elif start:  # the server knows no ranges
            out.truncate(0)
            out.seek(0)
            self.watcher.advance(-start)
            start = 0
        if whole is not None and int(whole) != self.file.size:
            raise self._delete_and_blame(f"{whole} bytes")
        return start

    def _is_right(self) -> bool:
        if self.file.size > _SLOW_TO_READ:
            self.watcher.note(f"{self.file.name}: comparing the checksum")
        return matches(self.partial, self.file)

    def _delete_and_blame(self, got: str) -> DownloadError:
        self.partial.unlink(missing_ok=True)
        return self._damaged("size", got)

    def _damaged(self, what: str, got: str) -> DownloadError:
        expected = f"{self.file.size} bytes" if what == "size" else self.file.digest
        return DownloadError(
            f"{self.file.name} of {self.name.repo} came with the wrong {what}",
            got=got,
            expected=expected,
            fix="It was deleted. Run it again; if it stays so, the repository or a proxy is damaged.",
        )


def matches(path: Path, file: RemoteFile) -> bool:
    """Does a file have the listed size and checksum?"""
    if path.stat().st_size != file.size:
        return False
    if file.is_large:
        digest = hashlib.sha256()
    else:  # git's object id: a header, then the content
        digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == file.digest


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the disk refuses becomes a DiskError."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DiskError(
                f"no room left in {path.parent}",
                got=error.strerror,
                fix="Make room and run it again: what has arrived is kept.",
            ) from None
        raise DiskError(
            f"cannot write in {path.parent}",
            got=error.strerror or str(error),
            fix="Check the folder, or set HF_HUB_CACHE.",
        ) from None
