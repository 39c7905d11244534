"""Every error localspec raises on purpose, in one tree.

    LocalspecError
    ├── UsageError                 the request itself is wrong: exit code 2
    │   ├── SettingError           a value out of range, or a setting the backend does not have
    │   ├── UnknownNameError       no drafter, backend or model of that name (nearest one suggested)
    │   ├── PromptError            empty prompt, invalid UTF-8, longer than the context
    │   │   └── ContextOverflowError  prompt and answer have no room in the context, with both numbers
    │   └── PairMismatchError      target and drafter do not share a vocabulary
    └── FailureError               the request was fine, carrying it out failed: exit code 1
        ├── ModelNotFoundError     no such file or folder
        │   └── NotPulledError     a Hub id that is not on this machine (with the command that fetches it)
        ├── ModelFileError         truncated, corrupt, missing or misshapen tensors
        │   └── HeadFileError      the same of a trained head, or a header that nobody here knows
        ├── UnsupportedModelError  a readable model this backend cannot run, with the reason
        ├── BackendMissingError    the runtime is not installed (with the command that installs it)
        ├── BackendError           the runtime failed; its own message is quoted
        │   └── OutOfMemoryError   weights or cache did not fit
        ├── HubError               the Hub did not give what was asked; what it said is quoted
        │   ├── HubOfflineError    it cannot be reached, or HF_HUB_OFFLINE is set
        │   ├── HubAccessError     it wants a token or accepted terms (401, 403)
        │   ├── HubMissingError    no such repository, revision or file (404), with what there is
        │   ├── HubBusyError       too many requests, a failing server, no answer: after a few retries
        │   └── DownloadError      what came has another size or checksum; it was deleted
        ├── UntrustedModelError    pickled weights, code in the repository, file names that leave the cache
        ├── DiskError              no room for a download, or its folder cannot be written
        ├── ContextFullError       the sequence has no room left
        ├── QueueFullError         more requests wait than are let in, with when to try again
        ├── ClosedError            a server that is shutting down lets nobody in
        ├── GrammarError           following a grammar took more than it may
        ├── CatalogFileError       not a catalog of pairs, or an entry that breaks its schema
        ├── TraceFileError         not a trace file, a damaged one, or one that cannot be written
        └── StaleScoresError       scores were read after the model moved on

Each carries what was got, what was expected and what to do about it. Backends translate their
runtime's errors at the border, so a caller needs to know this tree only.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "BackendError",
    "BackendMissingError",
    "CatalogFileError",
    "ClosedError",
    "ContextFullError",
    "ContextOverflowError",
    "DiskError",
    "DownloadError",
    "FailureError",
    "GrammarError",
    "HeadFileError",
    "HubAccessError",
    "HubBusyError",
    "HubError",
    "HubMissingError",
    "HubOfflineError",
    "LocalspecError",
    "ModelFileError",
    "ModelNotFoundError",
    "NotPulledError",
    "OutOfMemoryError",
    "PairMismatchError",
    "PromptError",
    "QueueFullError",
    "SettingError",
    "StaleScoresError",
    "TraceFileError",
    "UnknownNameError",
    "UnsupportedModelError",
    "UntrustedModelError",
    "UsageError",
]


class LocalspecError(Exception):
    """Base of the tree. `str()` gives one line: what was wrong, got, expected, what to do."""

    exit_code = 1

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str = "") -> None:
        self.what = what
        self.got = got
        self.expected = expected
        self.fix = fix
        super().__init__(self._line())

    def _line(self) -> str:
        details = []
        if self.got is not None:
            details.append(f"got {self.got}")
        if self.expected is not None:
            details.append(f"expected {self.expected}")
        line = self.what
        if details:
            line += f" ({', '.join(details)})"
        if self.fix:
            line += f". {self.fix}"
        return " ".join(line.split())


class UsageError(LocalspecError):
    """The request itself is wrong."""

    exit_code = 2


class SettingError(UsageError):
    """A value out of range, or a setting that does not apply here."""


class UnknownNameError(UsageError):
    """No such name; suggests the nearest known one."""

    @classmethod
    def among(cls, kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
        """Build the error for `name` not being one of `known`."""
        names = sorted(known)
        if not names:
            return cls(f"unknown {kind} {name!r}", expected="none: there is nothing of that kind")
        near = get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else ""
        return cls(f"unknown {kind} {name!r}", expected=f"one of {', '.join(names)}", fix=hint)


class PromptError(UsageError):
    """The prompt cannot be used."""


class ContextOverflowError(PromptError):
    """A prompt that does not fit: `num_tokens` were given, at most `limit` have room."""

    def __init__(self, num_tokens: int, limit: int) -> None:
        self.num_tokens, self.limit = num_tokens, limit
        super().__init__(
            "prompt is too long for the context",
            got=f"{num_tokens} tokens",
            expected=f"at most {limit}",
            fix="Shorten it, or load the model with a larger --context.",
        )


class PairMismatchError(UsageError):
    """Target and drafter do not share a vocabulary."""


class FailureError(LocalspecError):
    """The request was fine; carrying it out failed."""


class ModelNotFoundError(FailureError):
    """No such file or folder."""


class NotPulledError(ModelNotFoundError):
    """A Hub id that is not on this machine."""


class ModelFileError(FailureError):
    """A model file is truncated, corrupt, or lacks tensors."""


class HeadFileError(ModelFileError):
    """A trained head's file is so, or its header is not one that is known: the tensor or key is named."""


class UnsupportedModelError(FailureError):
    """A readable model that this backend cannot run."""


class BackendMissingError(FailureError):
    """The runtime behind a backend is not installed."""


class BackendError(FailureError):
    """The runtime failed; its message is quoted."""


class OutOfMemoryError(BackendError):
    """Weights or cache did not fit into memory."""


class HubError(FailureError):
    """The Hub did not give what was asked; what it said is quoted."""


class HubOfflineError(HubError):
    """The Hub cannot be reached, or must not be asked."""


class HubAccessError(HubError):
    """The Hub wants a token, or terms to be accepted."""


class HubMissingError(HubError):
    """No such repository, revision or file."""


class HubBusyError(HubError):
    """Too many requests, a failing server or no answer, after a few retries."""


class DownloadError(HubError):
    """What was downloaded is not what the Hub promised; it was deleted."""


class UntrustedModelError(FailureError):
    """A repository that is not fetched because it could run code or write outside the cache."""


class DiskError(FailureError):
    """No room for a download, or its folder cannot be written."""


class ContextFullError(FailureError):
    """The sequence has no room left."""


class GrammarError(FailureError):
    """Following a grammar took more work or memory than it may."""


class QueueFullError(FailureError):
    """More requests wait than are let in; try again in `retry_after_s` seconds."""

    def __init__(self, num_waiting: int, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(
            "too many requests are waiting", got=num_waiting, fix=f"Try again in {retry_after_s:.0f} seconds."
        )


class ClosedError(FailureError):
    """A server that is shutting down lets nobody in."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class CatalogFileError(FailureError):
    """A catalog of pairs cannot be read, or an entry breaks its schema."""


class TraceFileError(FailureError):
    """A trace file cannot be read or written."""


class StaleScoresError(FailureError):
    """Scores were read after the model's next forward pass replaced them."""
