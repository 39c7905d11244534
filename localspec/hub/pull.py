"""Pulling a model: list, choose, check, fetch, check again, and only then give it its name."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from localspec.errors import DiskError, UntrustedModelError
from localspec.loading import readable_formats

from . import trust
from .cache import RepoCache
from .choice import CONFIG, GGUF, INDEX, choose_format, choose_gguf, small_files, weight_files
from .client import Hub, Listing, RemoteFile, file_url, list_files, offline
from .name import MAIN, HubName
from .resolver import find_in_cache
from .transfer import Transfer, Unwatched, Watcher, disk_errors, matches

_HEADROOM = 64 << 20  # bytes that stay free on the disk


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model that is on this machine now.

    path: the GGUF file (the first part of a split one), or the folder.  commit: what the revision meant.
    num_bytes: what came over the network, 0 if all was here.
    """

    name: HubName
    path: Path
    commit: str
    num_files: int
    num_bytes: int


def pull(
    name: HubName,
    *,
    backend: str = "auto",
    hub: Hub | None = None,
    watcher: Watcher | None = None,
    verify: bool = False,
) -> Pulled:
    """Fetch one model into the Hub cache; files that are there already are not fetched again.

    backend: whose format is preferred.  verify: read files that are already here again and compare their
    checksums.  Offline (HF_HUB_OFFLINE) what was pulled before is found and nothing is asked.
    Interrupted at any moment, even killed, it goes on from the same byte the next time.

    Raises members of HubError, UntrustedModelError, ModelFileError and DiskError.
    """
    hub, watcher = hub or Hub(), watcher or Unwatched()
    formats = readable_formats(backend)
    if hub.is_offline:
        return _found_offline(hub, name, formats, watcher)
    listing = list_files(hub, name, watcher.note)
    trust.check_names(listing.files, name.repo)
    trust.check_weights(listing.files, name.repo)
    job = _Job(hub, name, listing, RepoCache(hub.root, name.repo), watcher, verify)
    kind = choose_format(listing.files, name.choice, formats, str(name.repo))
    with disk_errors(job.cache.folder / "blobs"):
        path = job.pull_gguf() if kind == GGUF else job.pull_folder()
        if not name.is_commit:
            job.cache.write_ref(name.revision or MAIN, listing.commit)
    return Pulled(name, path, listing.commit, job.counted.num_files, job.counted.num_bytes)


def _found_offline(hub: Hub, name: HubName, formats: Sequence[str], watcher: Watcher) -> Pulled:
    found = find_in_cache(hub, name, formats)
    if found is None:
        raise offline(name)
    watcher.note("offline: the Hub was not asked for a newer version")
    return Pulled(name, found.path, found.commit, 0, 0)


@dataclass(slots=True)
class _Counted:
    """What was fetched so far."""

    num_files: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Job:
    """One pull at work."""

    hub: Hub
    name: HubName
    listing: Listing
    cache: RepoCache
    watcher: Watcher
    verify: bool
    counted: _Counted = field(default_factory=_Counted)

    def pull_gguf(self) -> Path:
        """All parts of one model; the path of the first."""
        model = choose_gguf(self.listing.files, self.name.choice, str(self.name.repo))
        files = [self.listing.files[name] for name in model.files]
        self._fetch_weights(files)
        self.cache.link(self.listing.commit, reversed(files))  # the first part is what makes it a model
        return self.cache.snapshot(self.listing.commit) / model.files[0]

    def pull_folder(self) -> Path:
        """Configuration and tokenizer first: they are small, and may say that the weights are not wanted."""
        small = [self.listing.files[name] for name in small_files(self.listing.files)]
        self._check_room(small)
        for file in small:
            self._fetch(file)
            if file.name.endswith("config.json"):
                trust.check_config(self._content(file), file.name, self.name.repo)
        index = self.listing.files.get(INDEX)
        table = trust.read_json(self._content(index), f"{INDEX} of {self.name.repo}") if index else None
        weights = [self.listing.files[name] for name in weight_files(self.listing.files, table, self.name.repo)]
        self._fetch_weights(weights)
        files = sorted([*weights, *small], key=lambda file: file.name == CONFIG)  # last: it makes a folder a model
        self.cache.link(self.listing.commit, files)
        return self.cache.snapshot(self.listing.commit)

    def _fetch_weights(self, files: Sequence[RemoteFile]) -> None:
        self._check_room(files)
        for file in files:
            self._fetch(file)
            try:
                trust.check_content(self._content(file), file.name, self.name.repo)
            except UntrustedModelError:
                self._content(file).unlink()
                raise

    def _fetch(self, file: RemoteFile) -> None:
        """Have the file's blob, complete and checked."""
        with self.cache.lock(file):
            blob, partial = self.cache.blob(file), self.cache.partial(file)
            if self._is_here(file):
                return
            url = file_url(self.hub, self.listing, file)
            self.counted.num_bytes += Transfer(self.hub, self.name, url, file, partial, self.watcher).run()
            self.counted.num_files += 1
            partial.replace(blob)

    def _is_here(self, file: RemoteFile) -> bool:
        content = self._content(file)
        if self.cache.has(self.listing.commit, file) and (not self.verify or matches(content, file)):
            return True
        if content.exists():
            self.watcher.note(f"{file.name}: what was in the cache is damaged and is fetched again")
            content.unlink()
        return False

    def _content(self, file: RemoteFile) -> Path:
        return self.cache.content(self.listing.commit, file)

    def _check_room(self, files: Iterable[RemoteFile]) -> None:
        """Before the first byte: a disk that fills up harms everything else on it."""
        missing = 0
        for file in files:
            if not self.cache.has(self.listing.commit, file):
                partial = self.cache.partial(file)
                missing += file.size - (partial.stat().st_size if partial.is_file() else 0)
        self.hub.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.hub.root).free
        if missing and missing + _HEADROOM > free:
            raise DiskError(
                f"not enough room in {self.hub.root}",
                got=f"{free / 1e9:.1f} GB free",
                expected=f"{(missing + _HEADROOM) / 1e9:.1f} GB",
                fix="Make room, choose a smaller quantisation, or set HF_HUB_CACHE to another disk.",
            )
