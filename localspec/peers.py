"""Other libraries' own decoding, so that benchmarks can run it beside ours on the same files.

A backend's folder may hold a `peer.py` whose `PEER` is a `PeerLibrary`: the runtime's usual Python
interface, used as its documentation says, with its own speculative modes. `loading.get_peer` finds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from localspec.errors import SettingError, UsageError
from localspec.protocols import LoadSettings


@dataclass(frozen=True, slots=True)
class PeerRequest:
    """What a peer is to decode. tokens: the prompt, BOS included.  stop_tokens: none of them to go on to the end."""

    tokens: Sequence[int]
    max_tokens: int
    temperature: float
    seed: int
    stop_tokens: frozenset[int]


@dataclass(frozen=True, slots=True)
class PeerAnswer:
    """tokens: what was written, a stop token included.  decode_ms: from the end of the first pass, in which the
    prompt was read, to the last token; it covers the `num_timed` tokens that came later.  num_rounds, num_drafted:
    passes over the target and guesses, where the library's interface lets them be counted."""

    tokens: tuple[int, ...]
    num_timed: int
    decode_ms: float
    num_rounds: int | None = None
    num_drafted: int | None = None


class Peer(Protocol):
    """One way of decoding of one library, opened."""

    @property
    def name(self) -> str: ...

    def decode(self, request: PeerRequest) -> PeerAnswer:
        """Write an answer, nothing kept from the one before. Raises members of the error tree."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


@dataclass(frozen=True, slots=True)
class PeerMode:
    """Settings of a speculative mode, as in `--against NAME:num=4`."""

    library: str
    settings: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> PeerMode:
        """Raises SettingError."""
        name, _, rest = text.strip().partition(":")
        settings: dict[str, int] = {}
        for item in filter(None, rest.split(",")):
            key, _, value = item.partition("=")
            if not value.strip().isdecimal() or int(value) < 1:
                raise SettingError(f"--against {text}", got=item, expected="name=number, e.g. num=4")
            settings[key.strip()] = int(value)
        return cls(name, settings)

    def get(self, known: Mapping[str, int]) -> dict[str, int]:
        """The settings over their defaults. Raises SettingError for unknown ones."""
        foreign = set(self.settings) - set(known)
        if foreign:
            raise SettingError(
                f"{self.library} has no setting {', '.join(sorted(foreign))}", expected=", ".join(sorted(known))
            )
        return {**known, **self.settings}


class PeerLibrary(Protocol):
    """A library that decodes by itself. Importing the module that defines it must not import the library."""

    @property
    def name(self) -> str: ...

    @property
    def backend(self) -> str:
        """The backend of ours that runs on the same runtime."""
        ...

    def version(self) -> str:
        """Of the library; empty where it is not installed."""
        ...

    def open(self, target: Path, draft: Path | None, settings: LoadSettings, modes: Sequence[PeerMode]) -> list[Peer]:
        """Its plain decoding, then a peer per speculative mode that these files allow.

        Raises UsageError where it cannot read the files, and members of the error tree where it fails.
        """
        ...


def require(library: PeerLibrary, *, readable: bool, path: Path, reads: str) -> None:
    """Raise UsageError unless the library reads such a file."""
    if not readable:
        raise UsageError(
            f"{library.name} cannot open {path.name}",
            expected=reads,
            fix="Give such a --target, or leave --against out.",
        )
