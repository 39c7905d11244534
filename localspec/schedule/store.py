"""What was measured, kept between runs: one small JSON file per pair, machine, runtime, options and kind.

A file is written all at once, so two processes may do it at the same time; what `localspec tune` found and what was
measured in short lie in files of their own, so the short version never replaces the long one. A file that cannot be
understood is measured anew, with one warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import platformdirs

from localspec.protocols import LanguageModel, WidthClass
from localspec.schedule.cost import Costs
from localspec.schedule.machine import describe_files, describe_machine, describe_model
from localspec.schedule.measure import Overhead, Progress, assumed, quick

FORMAT = 1
T = TypeVar("T")

_TUNED, _QUICK, _OPTIONS = "tuned", "quick", "options"

_log = logging.getLogger("localspec.schedule")
_automatic = True


def switch_off() -> None:
    """From now on nothing is measured that `localspec tune` was not asked for; what is stored is used."""
    global _automatic
    _automatic = False


@dataclass(frozen=True, slots=True)
class Tuned:
    """What `localspec tune` found for a pair under the options it was loaded with.

    width_class: the class to stay in, where the classes were looked for.
    """

    costs: Costs
    width_class: WidthClass | None = None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        found = self.width_class
        return {"costs": self.costs.as_dict(), "width_class": None if found is None else asdict(found)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tuned:
        """The inverse. Raises ValueError, KeyError or TypeError for anything else."""
        found = data["width_class"]
        return cls(Costs.from_dict(data["costs"]), None if found is None else width_class_from(found))


def width_class_from(data: Mapping[str, Any]) -> WidthClass:
    """A width class from its fields. Raises ValueError, KeyError or TypeError for anything else."""
    most = None if data["max_width"] is None else int(data["max_width"])
    return WidthClass(int(data["min_width"]), most, str(data["evidence"]), bool(data["measured"]))


def load_or_measure(
    target: LanguageModel,
    draft: LanguageModel | None = None,
    on_progress: Progress | None = None,
    *,
    overhead: Overhead | None = None,
    folder: Path | None = None,
) -> Costs:
    """The costs of a loaded pair: as `localspec tune` found them, else as measured in short before, else measured in
    short now and stored. One sequence of each model must be free for that. With `switch_off` they are assumed instead
    (`Costs.measured` is empty then)."""
    key = _pair_key(target, draft)
    tuned = find_tuned(target, draft, folder)
    if tuned is not None:
        return tuned.costs
    file = _file(folder, _QUICK, key)
    stored = _read(file, key)
    found = None if stored is None else _understood(file, stored, Costs.from_dict)
    if found is not None:
        return found
    if not _automatic:
        return assumed(target, draft)
    found = quick(target, draft, overhead=overhead, on_progress=on_progress)
    _write(file, key, found.as_dict())
    return found


def find_tuned(target: LanguageModel, draft: LanguageModel | None = None, folder: Path | None = None) -> Tuned | None:
    """What `localspec tune` found for a loaded pair, if it was run for these files, this machine, runtime and
    these options."""
    key = _pair_key(target, draft)
    file = _file(folder, _TUNED, key)
    stored = _read(file, key)
    return None if stored is None else _understood(file, stored, Tuned.from_dict)


def keep_tuned(target: LanguageModel, draft: LanguageModel | None, tuned: Tuned, folder: Path | None = None) -> None:
    """Store what was found for a loaded pair."""
    key = _pair_key(target, draft)
    _write(_file(folder, _TUNED, key), key, tuned.as_dict())


def options_for(
    path: Path, backend: str, draft: Path | None = None, folder: Path | None = None
) -> dict[str, bool | int]:
    """The `LoadSettings` fields that won for a target with this draft model (None: without one) on this machine; empty
    if `localspec tune` was not run for them."""
    report = find_report(path, backend, draft, folder)
    return {} if report is None else report[0]


def find_report(
    path: Path, backend: str, draft: Path | None, folder: Path | None = None
) -> tuple[dict[str, bool | int], Mapping[str, Any]] | None:
    """(the options that won, all that `localspec tune` said) for a target with a draft model, if it was run."""
    key = _options_key(path, backend, draft)
    file = _file(folder, _OPTIONS, key)
    stored = _read(file, key)
    return (
        None if stored is None else _understood(file, stored, lambda data: (_options(data["options"]), data["report"]))
    )


def keep_report(
    path: Path,
    backend: str,
    draft: Path | None,
    options: Mapping[str, bool | int],
    report: Mapping[str, Any],
    folder: Path | None = None,
) -> None:
    """Store the options that won, with the report."""
    key = _options_key(path, backend, draft)
    _write(_file(folder, _OPTIONS, key), key, {"options": dict(options), "report": report})


# ---------------------------------------------------------------- keys


def _pair_key(target: LanguageModel, draft: LanguageModel | None) -> dict[str, Any]:
    return {
        "machine": describe_machine(),
        "target": describe_model(target),
        "draft": None if draft is None else describe_model(draft),
    }


def _options_key(path: Path, backend: str, draft: Path | None) -> dict[str, Any]:
    """Without the runtime's version, which is not known before it is loaded: options of an older one are still
    options, only perhaps not the best."""
    return {
        "machine": describe_machine(),
        "backend": backend,
        "target": describe_files(path),
        "draft": None if draft is None else describe_files(draft),
    }


def default_folder() -> Path:
    """Where results lie unless another folder is named."""
    return platformdirs.user_cache_path("localspec") / "tune"


def _file(folder: Path | None, kind: str, key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return (default_folder() if folder is None else folder) / f"{digest}-{kind}.json"


# ---------------------------------------------------------------- files


def _options(data: Mapping[str, Any]) -> dict[str, bool | int]:
    if not isinstance(data, dict) or not all(isinstance(value, int) for value in data.values()):
        raise TypeError("options that are neither numbers nor yes or no")
    return dict(data)


def _read(file: Path, key: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a file holds of this key; None if there is none, or it cannot be used, which is said."""
    try:
        stored = json.loads(file.read_bytes())
        if stored["format"] != FORMAT:
            raise ValueError(f"format {stored['format']!r}, expected {FORMAT}")
        if stored["key"] != json.loads(json.dumps(key)):
            raise ValueError("it is about another pair")
        return dict(stored["found"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _refuse(file, error)
        return None


def _understood(file: Path, data: Mapping[str, Any], read: Callable[[Mapping[str, Any]], T]) -> T | None:
    try:
        return read(data)
    except (ValueError, KeyError, TypeError) as error:
        _refuse(file, error)
        return None


def _refuse(file: Path, error: Exception) -> None:
    """Say it once: the file goes, so the next process does not find it again."""
    _log.warning("measured costs in %s cannot be used and are measured anew: %s", file, error)
    try:
        file.unlink(missing_ok=True)
    except OSError:  # a read-only cache: it will be said again
        pass


def _write(file: Path, key: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """All or nothing, for other processes may read at any time. A read-only cache only costs time."""
    temporary: Path | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.stem)
        temporary = Path(name)
        with os.fdopen(handle, "w") as stream:
            json.dump({"format": FORMAT, "key": key, "found": found}, stream, indent=1)
        temporary.replace(file)
    except OSError as error:
        _log.info("measured costs could not be stored: %s", error)
        if temporary is not None:
            temporary.unlink(missing_ok=True)
