"""The Hub's answers, through huggingface_hub's client. The border: foreign errors end here.

Tokens, offline mode, the endpoint and the cache's place are the library's own business: HF_TOKEN, HF_HUB_OFFLINE,
HF_ENDPOINT, HF_HOME and HF_HUB_CACHE mean here what they mean everywhere.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from localspec.errors import HubAccessError, HubBusyError, HubError, HubMissingError, HubOfflineError, LocalspecError

from .name import HubName, is_commit

if TYPE_CHECKING:
    from httpx2 import HTTPError

T = TypeVar("T")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_OID = re.compile(r"[0-9a-f]{40}")
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Patience:
    """How often and how long to wait for a Hub that has no time. Seconds.

    longest_wait_s: a server that asks for more is given up at once.
    """

    num_retries: int = 4
    first_wait_s: float = 1.0
    longest_wait_s: float = 90.0

    def wait_s(self, attempt: int, asked: float | None) -> float:
        """How long to wait after failed attempt number `attempt` (from 0)."""
        return self.first_wait_s * 2**attempt if asked is None else asked


@dataclass(frozen=True, slots=True)
class Hub:
    """Which Hub, and where its cache lies; None means what the environment says."""

    endpoint: str | None = None
    cache: Path | None = None
    patience: Patience = field(default_factory=Patience)

    @property
    def root(self) -> Path:
        """The Hub cache."""
        from huggingface_hub import constants

        return self.cache if self.cache is not None else Path(constants.HF_HUB_CACHE)

    @property
    def url(self) -> str:
        """The Hub's address, without a slash at the end."""
        from huggingface_hub import constants

        return (self.endpoint or constants.ENDPOINT).rstrip("/")

    @property
    def is_offline(self) -> bool:
        """Does HF_HUB_OFFLINE forbid to ask?"""
        from huggingface_hub import constants

        return constants.is_offline_mode()


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the Hub lists it. digest: sha256 of large files, git's object id (sha1) of small ones."""

    name: str
    size: int
    digest: str

    @property
    def is_large(self) -> bool:
        """Stored outside git, and named by its sha256."""
        return len(self.digest) == 64


@dataclass(frozen=True, slots=True)
class Listing:
    """One commit of a repository."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile]


def list_files(hub: Hub, name: HubName, on_wait: Callable[[str], None]) -> Listing:
    """What the repository holds at that revision. One request. Raises members of HubError."""
    from huggingface_hub import HfApi, constants

    def ask() -> Listing:
        with border(hub, name):
            info = HfApi(endpoint=hub.url, library_name="localspec").model_info(
                name.repo, revision=name.revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
            files = [_remote_file(s.rfilename, s.size, s.blob_id, s.lfs) for s in info.siblings or ()]
            if not isinstance(info.sha, str) or not is_commit(info.sha):
                raise ValueError("no commit")
            return Listing(name.repo, info.sha, {file.name: file for file in files})

    return patiently(hub.patience, ask, on_wait)


def _remote_file(name: object, size: object, oid: object, lfs: Mapping[str, object] | None) -> RemoteFile:
    """Digests become file names of the cache, so they are looked at closely."""
    digest, pattern = (oid, _GIT_OID) if lfs is None else (lfs["sha256"], _SHA256)
    size = size if lfs is None else lfs["size"]
    if not isinstance(name, str) or not isinstance(size, int) or size < 0:
        raise ValueError(f"a file without name or size: {name!r:.120}")
    if not isinstance(digest, str) or not pattern.fullmatch(digest):
        raise ValueError(f"no usable checksum of {name!r:.120}")
    return RemoteFile(name, size, digest)


def file_url(hub: Hub, listing: Listing, file: RemoteFile) -> str:
    """Where the file's content is."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(listing.repo, file.name, revision=listing.commit, endpoint=hub.url)


# ---------------------------------------------------------------- waiting


class RefusedError(Exception):
    """An answer that a later attempt may change. wait_s: what the server asked for, if it did."""

    def __init__(self, error: HubError, wait_s: float | None = None) -> None:
        self.error = error
        self.wait_s = wait_s
        super().__init__(str(error))


def patiently(patience: Patience, action: Callable[[], T], on_wait: Callable[[str], None]) -> T:
    """The result of `action`, tried again as long as it raises RefusedError and patience lasts.

    A Hub that cannot be reached is not waited for: nothing has begun yet.
    """
    for attempt in range(patience.num_retries + 1):
        try:
            return action()
        except RefusedError as refused:
            if isinstance(refused.error, HubOfflineError):
                raise refused.error from None
            pause(patience, attempt, refused, on_wait)
    raise AssertionError("the last attempt returns or raises")


def pause(patience: Patience, attempt: int, refused: RefusedError, on_wait: Callable[[str], None]) -> None:
    """Wait before the next attempt, or raise the error if there shall be none."""
    wait_s = patience.wait_s(attempt, refused.wait_s)
    if attempt >= patience.num_retries or wait_s > patience.longest_wait_s:
        raise refused.error from None
    on_wait(f"{refused.error.what}: trying again in {wait_s:.0f} s")
    time.sleep(wait_s)


# ---------------------------------------------------------------- the border


@contextmanager
def border(hub: Hub, name: HubName) -> Iterator[None]:
    """Errors of the client become ours. Those worth another attempt become RefusedError."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except (LocalspecError, RefusedError):
        raise
    except OfflineModeIsEnabled:
        raise offline(name) from None
    except HfHubHTTPError as error:
        raise _of_status(hub, name, error) from None
    except httpx2.TooManyRedirects:
        raise HubError(
            f"the Hub redirects {name.repo} in a circle", fix=f"Look at {hub.url}/{name.repo} in a browser."
        ) from None
    except httpx2.ConnectError as error:
        raise RefusedError(
            HubOfflineError(
                f"cannot reach {_origin(error, hub)}", got=str(error), fix="Check the connection and HF_ENDPOINT."
            )
        ) from None
    except httpx2.TimeoutException:
        raise RefusedError(
            HubBusyError("the Hub does not answer", fix="Run it again: what has arrived is kept.")
        ) from None
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise HubError("the Hub's address cannot be used", got=str(error), fix="Check HF_ENDPOINT.") from None
    except (httpx2.LocalProtocolError, UnicodeEncodeError):  # these can quote the token
        raise HubError("the request cannot be sent", fix="Check HF_TOKEN for characters that do not belong.") from None
    except httpx2.HTTPError as error:
        raise RefusedError(
            HubError("the connection broke", got=str(error), fix="Run it again: what has arrived is kept.")
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # what parsing a strange answer raises
        raise HubError(
            f"{hub.url} does not answer like a Hub", got=str(error)[:200], fix="Check HF_ENDPOINT and proxies."
        ) from None


def _origin(error: HTTPError, hub: Hub) -> str:
    """Who was asked: the Hub, or a storage host that it redirected to."""
    try:
        url = error.request.url
    except RuntimeError:  # the client knows none
        return hub.url
    return f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}"


def offline(name: HubName) -> HubOfflineError:
    """The error for asking while HF_HUB_OFFLINE is set."""
    return HubOfflineError(f"cannot pull {name}: HF_HUB_OFFLINE is set", fix="Unset it, and run it again.")


def _of_status(hub: Hub, name: HubName, error: object) -> HubError | RefusedError:
    """The error for an answer of 400 and more."""
    from huggingface_hub.errors import HfHubHTTPError

    assert isinstance(error, HfHubHTTPError)
    status, code = error.response.status_code, error.response.headers.get("X-Error-Code")
    page = f"{hub.url}/{name.repo}"
    if code == "GatedRepo":
        return HubAccessError(
            f"{name.repo} is gated: its owner gives access to those who accept the terms",
            got=status,
            fix=f"Accept them at {page}, then run `hf auth login` or set HF_TOKEN (see {hub.url}/settings/tokens).",
        )
    if code in ("RevisionNotFound", "EntryNotFound") or (status == 404 and code is None and name.revision):
        what = f"revision {name.revision or 'main'}" if code != "EntryNotFound" else "such file"
        return HubMissingError(f"{name.repo} has no {what}", got=status, fix=f"See {page}.")
    if code == "RepoNotFound" or status == 404:
        return HubMissingError(
            f"there is no repository {name.repo}, or it is private",
            got=status,
            fix="Check the spelling; for a private one set HF_TOKEN or run `hf auth login`.",
        )
    if status in (401, 403):
        return HubAccessError(
            f"the Hub gives no access to {name.repo}",
            got=_said(status, error),
            fix="Check HF_TOKEN (or run `hf auth login`): the token may be wrong, expired, or not allowed to read it.",
        )
    if status in _BUSY:
        what = "the Hub says too many requests" if status == 429 else "the Hub has an error of its own"
        asked = retry_after_s(error.response.headers)
        wait = "" if asked is None else f" in {asked:.0f} seconds"
        return RefusedError(
            HubBusyError(what, got=_said(status, error), fix=f"Run it again{wait}: what has arrived is kept."), asked
        )
    return HubError(f"the Hub refuses {name.repo}", got=_said(status, error), fix=f"See {page}.")


def _said(status: int, error: object) -> str:
    """Status and the server's own words, made harmless for a terminal."""
    words = str(getattr(error, "server_message", None) or "")
    return f"{status} {''.join(c if c.isprintable() else ' ' for c in words)[:200]}".strip()


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, None if it does not say. Dates are not understood."""
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    value = headers.get("Retry-After", "").strip()
    return float(value) if value.isdecimal() and len(value) < 10 else None
