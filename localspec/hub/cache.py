"""The Hub cache on disk, in the layout of huggingface_hub, so that every program finds what any one pulled.

    models--ORG--NAME/blobs/DIGEST               content, under its checksum
    models--ORG--NAME/blobs/DIGEST.incomplete    what an interrupted pull left
    models--ORG--NAME/snapshots/COMMIT/FILE      a link to its blob
    models--ORG--NAME/refs/REVISION              the commit that a branch or tag meant when it was pulled

A snapshot gets its links after all of its blobs are complete and checked.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from localspec.errors import DiskError

from .client import RemoteFile
from .name import is_commit, is_revision


@dataclass(frozen=True, slots=True)
class RepoCache:
    """One repository's part of the cache."""

    root: Path
    repo: str

    @property
    def folder(self) -> Path:
        """Everything of this repository."""
        return self.root / self._folder_name

    @property
    def _folder_name(self) -> str:
        return f"models--{self.repo.replace('/', '--')}"

    def blob(self, file: RemoteFile) -> Path:
        """Where the checked content lies."""
        return self.folder / "blobs" / file.digest

    def partial(self, file: RemoteFile) -> Path:
        """Where content arrives. The name is one that the client library's cleaning knows."""
        return self.folder / "blobs" / f"{file.digest}.incomplete"

    def snapshot(self, commit: str) -> Path:
        """A commit's files under their own names."""
        return self.folder / "snapshots" / commit

    def content(self, commit: str, file: RemoteFile) -> Path:
        """Where the content is, or would be: the blob, or on disks without links the snapshot's own file."""
        blob, own = self.blob(file), self.snapshot(commit) / file.name
        return own if own.is_file() and not own.is_symlink() and not blob.exists() else blob

    def has(self, commit: str, file: RemoteFile) -> bool:
        """Is the content here? Judged by name and size: it was checked when it was given that name."""
        path = self.content(commit, file)
        return path.is_file() and path.stat().st_size == file.size

    @contextmanager
    def lock(self, file: RemoteFile) -> Iterator[None]:
        """Only one process fetches a file; the client library's own downloads wait too."""
        from huggingface_hub.utils import WeakFileLock

        path = self.root / ".locks" / self._folder_name / f"{file.digest}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path):
            yield

    def link(self, commit: str, files: Iterable[RemoteFile]) -> None:
        """Give blobs their names in the snapshot, in this order, each in one step."""
        snapshot = self.snapshot(commit)
        snapshot.mkdir(parents=True, exist_ok=True)
        if not snapshot.resolve().is_relative_to(self.root.resolve()):
            raise DiskError(f"{snapshot} leads out of the cache", fix="Remove that link.")
        named: list[RemoteFile] = []
        for file in files:
            blob, pointer = self.blob(file), snapshot / file.name
            pointer.parent.mkdir(parents=True, exist_ok=True)
            if not pointer.parent.resolve().is_relative_to(snapshot.resolve()):
                raise DiskError(f"{pointer.parent} leads out of the cache", fix="Remove that link.")
            if not blob.exists() and not pointer.exists():  # another name of this snapshot took the only copy
                twin = next(other for other in named if other.digest == file.digest)
                shutil.copyfile(snapshot / twin.name, pointer)
            elif blob.exists() and not (pointer.exists() and pointer.samefile(blob)):
                _link(blob, pointer)
            named.append(file)

    def write_ref(self, revision: str, commit: str) -> None:
        """Note what a branch or tag means now."""
        path = self.folder / "refs" / revision
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{uuid.uuid4().hex}")
        fresh.write_text(commit, encoding="ascii")
        fresh.replace(path)

    def commit_of(self, revision: str) -> str | None:
        """The pulled commit that a branch, a tag or a commit means; None if it was not pulled."""
        if is_commit(revision):
            return revision if self.snapshot(revision).is_dir() else None
        if not is_revision(revision):
            return None
        try:
            commit = (self.folder / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return commit if is_commit(commit) and self.snapshot(commit).is_dir() else None

    def revisions(self) -> list[str]:
        """Branches and tags that were pulled, then commits that none of them means."""
        refs = self.folder / "refs"
        names = sorted(path.relative_to(refs).as_posix() for path in refs.rglob("*") if path.is_file())
        known = {name: self.commit_of(name) for name in names}
        commits = sorted(path.name for path in (self.folder / "snapshots").glob("*") if is_commit(path.name))
        return [name for name in names if known[name]] + [c for c in commits if c not in known.values()]

    def names(self, commit: str) -> list[str]:
        """Files of a snapshot that are really there; links that lead nowhere or out of the cache are not."""
        return files_below(self.snapshot(commit), self.root)


def files_below(folder: Path, within: Path) -> list[str]:
    """Names of the files under `folder`, as the Hub writes them, whose content lies below `within`."""
    root = within.resolve()
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.resolve().is_relative_to(root)
    )


def _link(blob: Path, pointer: Path) -> None:
    """A relative link, so that the cache can be moved. Where there are no links (exFAT), or none wanted, the
    content itself gets the name, as the client library does it; other commits cannot share it then."""
    from huggingface_hub import constants

    fresh = pointer.with_name(f".{uuid.uuid4().hex}")
    try:
        if constants.HF_HUB_DISABLE_SYMLINKS:
            raise NotImplementedError
        fresh.symlink_to(os.path.relpath(blob, pointer.parent))
    except (OSError, NotImplementedError):
        blob.replace(pointer)
    else:
        fresh.replace(pointer)
