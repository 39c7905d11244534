"""A Hub on 127.0.0.1: the parts of the Hub's HTTP interface that the real client library speaks, and faults on order.

Two servers, as in the real thing: the Hub itself, and a storage host on another port to which it redirects
for large files. Every request is noted, and every byte of content counted.

    with LoopbackHub() as hub:
        commit = hub.add("org/name", {"model.gguf": Path(...), "README.md": b"..."})
        hub.fault("model.gguf", Cut(after=1000))           # the next request for it; `times=None`: all of them
        ... HF_ENDPOINT=hub.url ...
        hub.content_bytes                                  # what was really sent
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = (".gguf", ".safetensors", ".bin")
_PIECE = 16 << 10


@dataclass(frozen=True)
class Content:
    """One version of a file."""

    data: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def digest(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass
class Repo:
    """Commits by their ids, branches and tags; who may see it; a listing to send instead of the true one."""

    commits: dict[str, dict[str, Content]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    siblings: list[dict[str, Any]] | None = None


# ---------------------------------------------------------------- faults


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong with one answer."""


@dataclass(frozen=True)
class Status(Fault):
    """Answer with a status only."""

    code: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": "as ordered"}'


@dataclass(frozen=True)
class Cut(Fault):
    """Send so many bytes of the content, then close the connection."""

    after: int


@dataclass(frozen=True)
class Slow(Fault):
    """So many bytes a second."""

    bytes_per_s: float


@dataclass(frozen=True)
class Hang(Fault):
    """Say nothing for so long."""

    seconds: float


@dataclass(frozen=True)
class Corrupt(Fault):
    """Flip one bit of the byte at this place of the file."""

    at: int


@dataclass(frozen=True)
class Truncate(Fault):
    """As if the file ended there; the headers agree."""

    size: int


@dataclass(frozen=True)
class Endless(Fault):
    """Without a length, and the content again and again."""


@dataclass(frozen=True)
class NoRanges(Fault):
    """Always the whole file."""


@dataclass(frozen=True)
class WrongRange(Fault):
    """Another part than was asked for."""


@dataclass(frozen=True)
class Circle(Fault):
    """A redirect to the same place."""


@dataclass
class _Order:
    part: str
    fault: Fault
    times: int | None


@dataclass(frozen=True)
class Request:
    """What was asked."""

    server: str
    method: str
    path: str
    range: str | None
    authorization: str | None


# ---------------------------------------------------------------- the Hub


class LoopbackHub:
    """Use it with `with`. token: what gated and private repositories ask for."""

    token = "hf_loopback"

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.content_bytes = 0
        self._orders: list[_Order] = []
        self._lock = threading.Lock()
        self._servers = {name: _Server(self, name) for name in ("hub", "storage")}

    @property
    def url(self) -> str:
        return self._servers["hub"].url

    @property
    def storage_url(self) -> str:
        return self._servers["storage"].url

    def __enter__(self) -> LoopbackHub:
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def add(self, repo: str, files: Mapping[str, bytes | Path], ref: str = "main") -> str:
        """A new commit, to which `ref` points from now on."""
        contents = {
            name: Content(data if isinstance(data, bytes) else data.read_bytes(), name.endswith(LARGE))
            for name, data in files.items()
        }
        state = repo + "".join(name + content.digest for name, content in sorted(contents.items()))
        commit = hashlib.sha1(state.encode()).hexdigest()
        entry = self.repos.setdefault(repo, Repo())
        entry.commits[commit] = contents
        entry.refs[ref] = commit
        return commit

    def fault(self, part: str, fault: Fault, times: int | None = 1) -> None:
        """The next requests whose path contains `part` go wrong; for a large file also by its name."""
        with self._lock:
            self._orders.append(_Order(part, fault, times))

    def heal(self) -> None:
        """No more faults."""
        with self._lock:
            self._orders.clear()

    @contextmanager
    def watched(self) -> Iterator[list[Request]]:
        """The requests that come in meanwhile."""
        start, seen = len(self.requests), list[Request]()
        yield seen
        seen.extend(self.requests[start:])

    def large(self, sha256: str) -> tuple[str, Content] | None:
        """A large file and its name."""
        for repo in self.repos.values():
            for files in repo.commits.values():
                for name, content in files.items():
                    if content.large and content.sha256 == sha256:
                        return name, content
        return None

    def _noted(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def _sent(self, num_bytes: int) -> None:
        with self._lock:
            self.content_bytes += num_bytes

    def _fault_for(self, path: str) -> Fault | None:
        with self._lock:
            for order in self._orders:
                if order.part in path and order.times != 0:
                    if order.times is not None:
                        order.times -= 1
                    return order.fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: LoopbackHub, name: str) -> None:
        self.hub, self.name = hub, name
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Silent."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.hub = self.server.hub
        self.authorization = self.headers.get("Authorization")
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        name = self.server.name
        self.hub._noted(Request(name, self.command, self.path, self.headers.get("Range"), self.authorization))
        if name == "storage":
            self._storage(path)
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"), query)
        elif "/resolve/" in path:
            self._resolve(path.lstrip("/"))
        else:
            self._status(404)

    # ------------------------------------------------------------ routes

    def _api(self, path: str, query: Mapping[str, list[str]]) -> None:
        if self._failed(self.hub._fault_for(path)):
            return
        pieces = path.split("/")
        repo_id, rest = "/".join(pieces[:2]), pieces[2:]
        repo = self._repo(repo_id, for_content=False)
        if repo is None:
            return
        revision = rest[1] if rest[:1] == ["tree"] else "/".join(rest[1:]) or "main"
        commit = self._commit(repo, revision)
        if commit is None:
            return
        files = repo.commits[commit]
        if rest[:1] == ["tree"]:
            self._json([_tree_entry(name, content) for name, content in sorted(files.items())])
            return
        siblings = repo.siblings
        if siblings is None:
            siblings = [_sibling(name, content, "blobs" in query) for name, content in sorted(files.items())]
        self._json({"id": repo_id, "sha": commit, "private": repo.private, "gated": repo.gated, "siblings": siblings})

    def _resolve(self, path: str) -> None:
        repo_id, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        fault = self.hub._fault_for(path) if not name.endswith(LARGE) else None
        if self._failed(fault):
            return
        repo = self._repo(repo_id, for_content=True)
        commit = self._commit(repo, revision) if repo is not None else None
        if repo is None or commit is None:
            return
        content = repo.commits[commit].get(name)
        if content is None:
            self._status(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not content.large:
            self._content(content, fault, {**headers, "ETag": f'"{content.oid}"'})
            return
        linked = {"X-Linked-Etag": f'"{content.sha256}"', "X-Linked-Size": str(len(content.data))}
        location = f"{self.hub.storage_url}/{content.sha256}?name={quote(name)}"
        self._status(302, {**headers, **linked, "ETag": f'"{content.oid}"', "Location": location}, b"")

    def _storage(self, path: str) -> None:
        found = self.hub.large(path.strip("/"))
        if found is None:
            self._status(404)
            return
        name, content = found
        fault = self.hub._fault_for(name)
        if not self._failed(fault):
            self._content(content, fault, {"ETag": f'"{content.sha256}"', "Accept-Ranges": "bytes"})

    # ------------------------------------------------------------ pieces

    def _repo(self, repo_id: str, *, for_content: bool) -> Repo | None:
        """Gated repositories show their listing to everybody, private ones nothing."""
        repo = self.hub.repos.get(repo_id)
        known = self.authorization == f"Bearer {self.hub.token}"
        if repo is None or (repo.private and not known):
            self._status(
                404 if known else 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            )
            return None
        if repo.gated and for_content and not known:
            code = 403 if self.authorization else 401
            self._status(code, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            return None
        return repo

    def _commit(self, repo: Repo, revision: str) -> str | None:
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self._status(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            return None
        return commit

    def _failed(self, fault: Fault | None) -> bool:
        """Faults that replace the whole answer."""
        if isinstance(fault, Status):
            self._status(fault.code, fault.headers, fault.body)
        elif isinstance(fault, Circle):
            self._status(302, {"Location": self.path}, b"")
        elif isinstance(fault, Hang):
            time.sleep(fault.seconds)
            self.close_connection = True
        else:
            return False
        return True

    def _content(self, content: Content, fault: Fault | None, headers: Mapping[str, str]) -> None:
        data = content.data
        if isinstance(fault, Corrupt):
            data = data[: fault.at] + bytes([data[fault.at] ^ 1]) + data[fault.at + 1 :]
        if isinstance(fault, Truncate):
            data = data[: fault.size]
        if isinstance(fault, Endless):
            self._endless(data)
            return
        start = self._range_start() if not isinstance(fault, NoRanges) else None
        if start is not None and start >= len(data):
            self._status(416, {"Content-Range": f"bytes */{len(data)}"})
            return
        body = data[start or 0 :]
        self.send_response(200 if start is None else 206)
        for key, value in headers.items():
            self.send_header(key, value)
        if start is not None:
            first = start + 1 if isinstance(fault, WrongRange) else start
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self._pour(body, fault)

    def _pour(self, body: bytes, fault: Fault | None) -> None:
        end = min(fault.after, len(body)) if isinstance(fault, Cut) else len(body)
        for at in range(0, end, _PIECE):
            piece = body[at : min(at + _PIECE, end)]
            self.wfile.write(piece)
            self.hub._sent(len(piece))
            if isinstance(fault, Slow):
                time.sleep(len(piece) / fault.bytes_per_s)
        if end < len(body):
            self.close_connection = True

    def _endless(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while self.command == "GET":
            self.wfile.write(b"%x\r\n" % len(data) + data + b"\r\n")

    def _range_start(self) -> int | None:
        value = self.headers.get("Range")
        return int(value.removeprefix("bytes=").partition("-")[0]) if value else None

    def _json(self, value: object) -> None:
        self._status(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _status(self, code: int, headers: Mapping[str, str] | None = None, body: bytes = b'{"error": "no"}') -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _sibling(name: str, content: Content, with_blobs: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": name}
    if with_blobs:
        entry |= {"size": len(content.data), "blobId": content.oid}
        if content.large:
            entry["lfs"] = {"sha256": content.sha256, "size": len(content.data), "pointerSize": 134}
    return entry


def _tree_entry(name: str, content: Content) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content.data), "oid": content.oid}
    if content.large:
        entry["lfs"] = {"oid": content.sha256, "size": len(content.data), "pointerSize": 134}
    return entry
