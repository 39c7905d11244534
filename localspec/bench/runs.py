"""What a speed benchmark writes down: one line of JSON per answer, as it comes.

The first line holds the conditions. An interrupted benchmark loses at most the answer in progress, and goes on
where it stopped if it is started again under the same conditions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from localspec.errors import DiskError, SettingError

SCHEMA = 1
_CHANGING = ("started", "load_average", "experience")
"""Conditions that may differ between a benchmark and its continuation."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, timed.

    num_timed: the tokens that `decode_ms` covers; reading the prompt is never part of it.  num_rounds and what
    follows: None where a library does not say.  draft_ms, verify_ms, host_ms: the parts of `decode_ms`.
    drafted_by_depth, accepted_by_depth: rounds that guessed so deep, and in which that guess was taken.
    digest: of the tokens.  num_rechecked, recheck_ms: of guarded decoding; the time is part of `host_ms` too.
    rounds: each one's [nodes, accepted, width, draft ms, verify ms, host ms], ours only.
    """

    num_tokens: int
    num_timed: int
    decode_ms: float
    digest: str
    num_rounds: int | None = None
    num_drafted: int | None = None
    num_accepted: int | None = None
    draft_ms: float | None = None
    verify_ms: float | None = None
    host_ms: float | None = None
    drafted_by_depth: Sequence[int] | None = None
    accepted_by_depth: Sequence[int] | None = None
    num_rechecked: int | None = None
    recheck_ms: float | None = None
    rounds: Sequence[Sequence[float]] | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """An answer and where it belongs."""

    workload: str
    prompt: str
    temperature: float
    contender: str
    repeat: int
    answer: Answer

    @property
    def key(self) -> tuple[str, str, float, str, int]:
        """What no two runs of a benchmark have in common."""
        return self.workload, self.prompt, self.temperature, self.contender, self.repeat

    def as_dict(self) -> dict[str, Any]:
        """Flat, ready for JSON."""
        place = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "answer"}
        return place | asdict(self.answer)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Run:
        """The inverse. Raises KeyError and TypeError for what is no run."""
        names = [field.name for field in fields(cls) if field.name != "answer"]
        answer = Answer(**{name: value for name, value in data.items() if name not in names})
        return cls(**{name: data[name] for name in names}, answer=answer)


def read_runs(path: Path) -> list[Run]:
    """Those that a benchmark wrote down. Raises SettingError for a file that is none."""
    try:
        conditions, runs, _ = _read(path)
        if not conditions:
            raise ValueError("it was written by another version")
        return runs
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(f"{path} holds no runs of a benchmark: {error}", fix="Name the folder of one.") from None


def _read(path: Path) -> tuple[dict[str, Any], list[Run], int]:
    """(conditions, none of another schema; runs; the file's length in bytes without a last line that was cut off)."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    first, *lines = content[:whole].decode("utf-8").splitlines()
    head = json.loads(first)
    conditions = head["conditions"] if head["schema"] == SCHEMA else {}
    return conditions, [Run.from_dict(json.loads(line)) for line in lines], whole


class RunLog:
    """Runs in memory and, where a path is given, in a file. Use it with `with`.

    resume: take over the runs that the file holds. Raises SettingError if there is a file and `resume` is not set,
    or if it was written under other conditions.
    """

    def __init__(self, conditions: Mapping[str, Any], path: Path | None = None, *, resume: bool = False) -> None:
        self.conditions = dict(conditions)
        self.runs: list[Run] = []
        self._stream = None
        if path is not None:
            whole = self._take_over(path, resume) if path.exists() else 0
            try:
                self._stream = path.open("r+" if whole else "w", encoding="utf-8")
                if whole:  # a last line that was cut off is written again
                    os.truncate(path, whole)
                    self._stream.seek(whole)
                else:
                    self._write({"schema": SCHEMA, "conditions": self.conditions})
            except OSError as error:
                raise DiskError(f"cannot write {path}: {error.strerror}") from error
        self._done = {run.key for run in self.runs}

    def has(self, key: tuple[str, str, float, str, int]) -> bool:
        """Is this run there already?"""
        return key in self._done

    def add(self, run: Run) -> None:
        """Keep a run."""
        self.runs.append(run)
        self._done.add(run.key)
        self._write(run.as_dict())

    def _write(self, data: Mapping[str, Any]) -> None:
        if self._stream is not None:
            self._stream.write(json.dumps(data) + "\n")
            self._stream.flush()

    def _take_over(self, path: Path, resume: bool) -> int:
        """Read the runs of a file; its length in bytes without a last line that was cut off."""
        if not resume:
            raise SettingError(
                f"{path} exists already", fix="Give another --output, or go on with that benchmark: --resume."
            )
        try:
            before, self.runs, whole = _read(path)
        except (ValueError, KeyError, TypeError) as error:
            raise SettingError(
                f"{path} holds no benchmark that can go on: {error}", fix="Leave --resume out."
            ) from None
        now = json.loads(json.dumps(self.conditions))
        changed = sorted(
            name for name in {*before, *now} if name not in _CHANGING and before.get(name) != now.get(name)
        )
        if changed:
            raise SettingError(
                f"{path} was written under other conditions",
                got=", ".join(changed),
                fix="Give another --output, or the same options as then.",
            )
        self.conditions = dict(before)
        return whole

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._stream is not None:
            self._stream.close()
