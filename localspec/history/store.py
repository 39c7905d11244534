"""Earlier sessions on disk: a file for each, so that processes share nothing that one of them could break.

    FOLDER/VOCABULARY/about.json      what the vocabulary is, for people
    FOLDER/VOCABULARY/NAME.session    a checksum and the tokens of one session

Ids mean something in one vocabulary only, so that is what they are kept under. A file is written whole beside its
place and moved there; whoever deletes one, at any time, deletes that session and nothing else. All of it is readable
by its owner alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import tempfile
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs

from localspec.errors import DiskError, SettingError
from localspec.fingerprint import Vocabulary
from localspec.history.index import SuffixArray
from localspec.protocols import Tokenizer
from localspec.types import TokenIds

DEFAULT_BYTES = 2 << 20
"""Half a million tokens, about 2 MB of text, per vocabulary."""

_MAGIC = b"localspec session 1\n"
_HEAD = len(_MAGIC) + 4
_SUFFIX = ".session"
_GROWTH = 4  # the index is made anew once a quarter of its size was added

_ABANDONED_S = 3600.0

_log = logging.getLogger("localspec.history")


class History:
    """The sessions of one vocabulary, of at most `max_bytes`; the oldest go first. Several threads may use it.

    tokenizer: whose ids they are.  about: what people call it.  Trouble with the disk is logged once and costs what
    would have been remembered, nothing else. Raises SettingError for a bound below a kilobyte.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        about: str = "",
        max_bytes: int = DEFAULT_BYTES,
        folder: Path | None = None,
    ) -> None:
        if max_bytes < 1024:
            raise SettingError("the history's size is out of range", got=max_bytes, expected="at least 1024 bytes")
        self.max_bytes = max_bytes
        self.folder = (default_folder() if folder is None else folder) / vocabulary_key(tokenizer)
        self._about = {"name": about, "num_tokens": tokenizer.num_tokens}
        self._lock = threading.Lock()
        self._index: SuffixArray | None = None
        self._num_new = 0  # tokens that ended sessions added since the index was made
        self._has_warned = False

    def index(self) -> SuffixArray:
        """What was said in the sessions that have ended. Those that ended lately may still be missing from it."""
        with self._lock:
            if self._index is None or self._num_new * _GROWTH > len(self._index):
                self._index, self._num_new = SuffixArray(self._texts()), 0
            return self._index

    def entry(self) -> Entry:
        """A place for a session that begins."""
        return Entry(self, f"{secrets.token_hex(8)}{_SUFFIX}")

    # ------------------------------------------------------------ for entries

    def write(self, name: str, tokens: TokenIds) -> None:
        """Store a session under its name, in the place of what was stored there; its end, if it is too long."""
        kept = tokens[-((self.max_bytes - _HEAD) // 4) :]
        payload = kept.astype("<u4").tobytes()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not (self.folder / "about.json").exists():
                _write(self.folder / "about.json", json.dumps(self._about).encode())
            _write(self.folder / name, _MAGIC + zlib.crc32(payload).to_bytes(4, "little") + payload)
            self._make_room()
        except OSError as error:
            self._warn(f"a session could not be kept: {error}")

    def ended(self, num_tokens: int) -> None:
        """A session of so many tokens has ended; the index may hold it from now on."""
        with self._lock:
            self._num_new += num_tokens

    # ------------------------------------------------------------ inside

    def _texts(self) -> list[TokenIds]:
        """The tokens of each session that can be read, oldest first. One that cannot is deleted."""
        texts = []
        try:
            for file, _ in _sessions(self.folder):
                try:
                    texts.append(_read(file))
                except FileNotFoundError:  # another process made room
                    continue
                except ValueError as error:
                    self._warn(f"{file} is deleted, since it is damaged: {error}")
                    file.unlink(missing_ok=True)
        except OSError as error:
            self._warn(f"earlier sessions cannot be read: {error}")
        return texts

    def _make_room(self) -> None:
        """Delete what is over, and what interrupted writing left."""
        for file, written, _ in _files(self.folder, ".*"):
            if time.time() - written > _ABANDONED_S:
                file.unlink(missing_ok=True)
        sessions = _sessions(self.folder)
        total = sum(size for _, size in sessions)
        for file, size in sessions:
            if total <= self.max_bytes:
                return
            file.unlink(missing_ok=True)
            total -= size

    def _warn(self, text: str) -> None:
        if not self._has_warned:
            _log.warning("%s", text)
        self._has_warned = True


class Entry:
    """One session's place."""

    def __init__(self, history: History, name: str) -> None:
        self._history, self._name = history, name
        self._num_written = 0

    def write(self, tokens: TokenIds) -> None:
        """Store the session as it is now."""
        self._history.write(self._name, tokens)
        self._num_written = len(tokens)

    def end(self) -> None:
        """Nothing more comes."""
        self._history.ended(self._num_written)
        self._num_written = 0


# ---------------------------------------------------------------- for people


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of one vocabulary. name: the model that was used when it was first written."""

    folder: Path
    name: str
    num_sessions: int
    num_bytes: int


def default_folder() -> Path:
    """Where sessions lie unless another folder is named."""
    return platformdirs.user_data_path("localspec") / "history"


def listing(folder: Path | None = None) -> list[Kept]:
    """All that is kept. Raises DiskError where that cannot be told."""
    found = []
    try:
        for place in _folders(folder):
            sessions = _sessions(place)
            found.append(Kept(place, _name(place), len(sessions), sum(size for _, size in sessions)))
    except OSError as error:
        raise DiskError(f"the history cannot be read: {error}") from error
    return found


def forget(folder: Path | None = None) -> int:
    """Delete all that is kept, also what interrupted writing left; number of sessions. Raises DiskError."""
    count = 0
    try:
        for place in _folders(folder):
            for file in place.iterdir():
                count += file.suffix == _SUFFIX
                file.unlink(missing_ok=True)
            place.rmdir()
    except OSError as error:
        raise DiskError(f"the history could not be deleted: {error}", fix="Delete the folder yourself.") from error
    return count


def vocabulary_key(tokenizer: Tokenizer) -> str:
    """The same for tokenizers in which every id means the same bytes."""
    texts = Vocabulary(tokenizer).texts
    digest = hashlib.sha256(len(texts).to_bytes(4, "little"))
    for text in texts:
        digest.update(len(text).to_bytes(4, "little") + text)
    return digest.hexdigest()[:16]


def _folders(folder: Path | None) -> list[Path]:
    root = default_folder() if folder is None else folder
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def _name(place: Path) -> str:
    try:
        return str(json.loads((place / "about.json").read_bytes())["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


# ---------------------------------------------------------------- files


def _sessions(folder: Path) -> list[tuple[Path, int]]:
    """(file, size) of each session, the least recently written first."""
    return [(file, size) for file, _, size in _files(folder, f"*{_SUFFIX}")]


def _files(folder: Path, pattern: str) -> list[tuple[Path, float, int]]:
    """(file, when it was written, size), oldest first, of those that nobody deletes meanwhile."""
    found = []
    for file in folder.glob(pattern):
        try:
            about = file.stat()
        except FileNotFoundError:
            continue
        found.append((about.st_mtime_ns, file, about.st_size))
    return [(file, written / 1e9, size) for written, file, size in sorted(found)]


def _read(file: Path) -> TokenIds:
    raw = file.read_bytes()
    if not raw.startswith(_MAGIC) or (len(raw) - _HEAD) % 4:
        raise ValueError("it does not look like a session")
    if zlib.crc32(raw[_HEAD:]).to_bytes(4, "little") != raw[len(_MAGIC) : _HEAD]:
        raise ValueError("its checksum is another")
    tokens = np.frombuffer(raw, "<u4", offset=_HEAD)
    if len(tokens) and int(tokens.max()) >= 1 << 31:
        raise ValueError("it holds numbers that are no tokens")
    return tokens.astype(np.int32)


def _write(file: Path, content: bytes) -> None:
    """All or nothing. The temporary file is the owner's alone from its beginning."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
