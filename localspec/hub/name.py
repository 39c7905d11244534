"""How a model on the Hub is written: `org/name`, `org/name:Q4_0`, `org/name@v1:Q4_0`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from localspec.errors import SettingError

MAIN = "main"
"""The revision that is meant where none is named."""

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[^:@]+))?(?::(?P<choice>[^:@]+))?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(?:/[A-Za-z0-9][A-Za-z0-9_.-]*)*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository, perhaps one of its revisions, perhaps one model among its files.

    choice: a quantisation ("Q4_K_M") or a file of the repository.
    """

    repo: str
    revision: str | None = None
    choice: str | None = None

    @classmethod
    def parse(cls, text: str, revision: str | None = None) -> HubName:
        """The name in `text`; `revision` may be given beside it instead of inside. Raises SettingError."""
        match = _NAME.fullmatch(text)
        if match is None or not _is_free_of(match["repo"], "..", "--"):
            raise SettingError("not the name of a model on the Hub", got=text[:120], expected="ORG/NAME[:QUANTISATION]")
        name = cls(match["repo"], match["revision"], match["choice"])
        if revision is not None and name.revision not in (None, revision):
            raise SettingError("two revisions were named", got=f"{name.revision} and {revision}", fix="Give one.")
        name = replace(name, revision=revision if revision is not None else name.revision)
        if name.revision is not None and not is_revision(name.revision):
            raise SettingError("not a revision", got=name.revision[:120], expected="a branch, a tag or a commit")
        return name

    @property
    def is_commit(self) -> bool:
        """Is the revision a commit, which never changes?"""
        return self.revision is not None and is_commit(self.revision)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}" + (f":{self.choice}" if self.choice else "")


def is_commit(text: str) -> bool:
    """Forty hexadecimal digits?"""
    return _COMMIT.fullmatch(text) is not None


def is_revision(text: str) -> bool:
    """Could it be a branch or tag, and is it harmless as the path of a file?"""
    return len(text) <= 200 and _REVISION.fullmatch(text) is not None and _is_free_of(text, "..")


def _is_free_of(text: str, *parts: str) -> bool:
    return not any(part in text for part in parts)
