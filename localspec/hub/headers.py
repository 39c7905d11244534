"""The headers of a model on the Hub, for whoever wants to know what it takes before fetching it.

What comes out are files as long as the real ones, of which only the beginning holds anything (the rest takes
no room on disks that know holes). The readers of `localspec.formats` take them for the real thing; they
never go into the cache and are never loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from localspec.errors import HubError, ModelFileError
from localspec.formats import gguf, safetensors
from localspec.loading import readable_formats

from . import trust
from .choice import CONFIG, GGUF, INDEX, choose_format, choose_gguf, weight_files
from .client import Hub, Listing, RefusedError, RemoteFile, border, file_url, list_files, offline, patiently
from .name import HubName
from .transfer import disk_errors

_FIRST = 1 << 20  # bytes that are looked at first; then twice as many, and so on
_MOST = 128 << 20  # as `localspec.formats`


@dataclass(slots=True)
class Headers:
    """path: as `pull` would give it.  num_bytes: what came over the network, the lists of files not counted."""

    path: Path
    num_bytes: int = 0


def fetch_headers(
    name: HubName,
    folder: Path,
    *,
    backend: str = "auto",
    hub: Hub | None = None,
    on_wait: Callable[[str], None] = lambda text: None,
) -> Headers:
    """The headers of one model, below `folder`. What would be refused by `pull` is refused here, too.

    Raises members of HubError, UntrustedModelError, ModelFileError and DiskError.
    """
    hub = hub or Hub()
    if hub.is_offline:
        raise offline(name)
    listing = list_files(hub, name, on_wait)
    trust.check_names(listing.files, name.repo)
    trust.check_weights(listing.files, name.repo)
    job = _Job(hub, name, listing, folder / name.repo, on_wait)
    with disk_errors(folder):
        if choose_format(listing.files, name.choice, readable_formats(backend), name.repo) == GGUF:
            model = choose_gguf(listing.files, name.choice, name.repo)
            job.fetch(model.files, _end_of_gguf)
            return Headers(job.folder / model.files[0], job.num_bytes)
        small = [file for file in (CONFIG, INDEX) if file in listing.files]
        job.fetch(small, lambda path: path.stat().st_size)
        trust.check_config(job.folder / CONFIG, CONFIG, name.repo)
        table = trust.read_json(job.folder / INDEX, f"{INDEX} of {name.repo}") if INDEX in small else None
        job.fetch(weight_files(listing.files, table, name.repo), _end_of_safetensors)
        return Headers(job.folder, job.num_bytes)


def _end_of_gguf(path: Path) -> int:
    """Where the header ends, or a little behind. Raises ModelFileError for one that is not whole: tensors come
    last, and zeros are none."""
    header = gguf.read_header(path)
    return min((tensor.offset for tensor in header.tensors.values()), default=path.stat().st_size)


def _end_of_safetensors(path: Path) -> int:
    safetensors.read_header(path)
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@dataclass(slots=True)
class _Job:
    """Files of one repository on their way."""

    hub: Hub
    name: HubName
    listing: Listing
    folder: Path
    on_wait: Callable[[str], None]
    num_bytes: int = 0

    def fetch(self, names: Sequence[str], end: Callable[[Path], int]) -> None:
        """As much of each file as its header takes, which is up to `end` once that raises no ModelFileError."""
        for name in names:
            patiently(self.hub.patience, partial(self._fetch, self.listing.files[name], end), self.on_wait)

    def _fetch(self, file: RemoteFile, end: Callable[[Path], int]) -> None:
        """One request, of which no more is read than is needed."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        path, most = self.folder / file.name, min(file.size, _MOST)
        path.parent.mkdir(parents=True, exist_ok=True)
        headers = {**build_hf_headers(library_name="localspec"), "Accept-Encoding": "identity"}
        headers["Range"] = f"bytes=0-{max(0, most - 1)}"
        url, timeout = file_url(self.hub, self.listing, file), constants.HF_HUB_DOWNLOAD_TIMEOUT
        with (
            path.open("wb") as out,
            border(self.hub, self.name),
            get_session().stream("GET", url, headers=headers, timeout=timeout) as response,
        ):
            hf_raise_for_status(response)
            wanted = min(_FIRST, most)
            for chunk in response.iter_raw():
                self.num_bytes += len(chunk)
                out.write(chunk[: most - out.tell()])
                if out.tell() >= wanted:
                    out.flush()
                    out.truncate(file.size)
                    if self._is_whole(path, out.tell(), most, end):
                        return
                    wanted = min(2 * wanted, most)
        raise RefusedError(HubError(f"the connection ended early in {file.name}", fix="Run it again."))

    def _is_whole(self, path: Path, held: int, most: int, end: Callable[[Path], int]) -> bool:
        """Raises ModelFileError if the header is bad with all bytes that there are."""
        try:
            return end(path) <= held
        except ModelFileError:
            if held >= most:
                raise
            return False
