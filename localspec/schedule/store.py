"""What was measured, kept between runs: one small JSON file per pair, machine, runtime, options and kind.

A file is written all at once, so two processes may do it at the same time; what `localspec tune` found and what was
measured in short lie in files of their own, so the short version never replaces the long one. A file that cannot be
understood is measured anew, with one warning; one that was written by a version which measured less, without.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import platformdirs

from localspec.errors import SettingError
from localspec.exactness import Bound
from localspec.protocols import DraftHead, LanguageModel, Rewind, WidthClass
from localspec.schedule.bound import measure as measure_bound
from localspec.schedule.classes import Classes, class_to_use, is_inside
from localspec.schedule.classes import find as find_classes
from localspec.schedule.cost import Costs, HeadCosts
from localspec.schedule.experience import Experience
from localspec.schedule.heads import assumed_heads, build_heads, measure_heads
from localspec.schedule.machine import describe_files, describe_head, describe_machine, describe_model
from localspec.schedule.measure import Overhead, Progress, assumed, build, quick
from localspec.schedule.score import best

FORMAT = 2
_FIRST_FORMAT = 1  # options, classes, bounds and heads mean what they always did
_DEEP_FORMAT = 2  # costs and reports of before often know one context only
T = TypeVar("T")

_TUNED, _QUICK, _CLASS, _OPTIONS = "tuned", "quick", "class", "options"
_LOOKED = "looked"
_BOUND, _QUICK_BOUND = "bound", "quick-bound"
_HEADS = "heads"
_EXPERIENCE = "experience"
_CLASS_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16)  # looked at in short: none is left out where kernels change
_CLASS_SECONDS = 2.0

_log = logging.getLogger("localspec.schedule")
_automatic = True


def set_automatic(allowed: bool) -> None:
    """May `load_or_measure` measure in this process? It may unless this says no; what is stored is used anyway."""
    global _automatic
    _automatic = allowed


# ---------------------------------------------------------------- costs of a pair


def load_or_measure(
    target: LanguageModel,
    draft: LanguageModel | None = None,
    on_progress: Progress | None = None,
    *,
    overhead: Overhead | None = None,
    folder: Path | None = None,
    heads: Sequence[DraftHead] = (),
) -> Costs:
    """The costs of a loaded pair: as `localspec tune` found them, else as measured in short before, else measured in
    short now and stored; and those of heads. One sequence of each model must be free for that. Where measuring is not
    allowed (`set_automatic`) they are assumed instead, and `Costs.measured` is empty.
    Where each width needs something built in every process (`Capabilities.width_steps`), it is built here, not in the
    middle of the first answers."""
    found = _load_or_measure_pair(target, draft, on_progress, overhead, folder)
    return replace(found, heads=_load_or_measure_heads(target, heads, found, folder)) if heads else found


def _load_or_measure_pair(
    target: LanguageModel,
    draft: LanguageModel | None,
    on_progress: Progress | None,
    overhead: Overhead | None,
    folder: Path | None,
) -> Costs:
    key = _pair_key(target, draft)
    for kind in (_TUNED, _QUICK):
        stored = _find(_file(folder, kind, key), key, Costs.from_dict, oldest=_DEEP_FORMAT)
        if stored is not None:
            build(target, draft)
            return stored
    if not _automatic:
        return assumed(target, draft)
    found = quick(target, draft, overhead=overhead, on_progress=on_progress)
    _write(_file(folder, _QUICK, key), key, found.as_dict())
    return found


def _load_or_measure_heads(
    target: LanguageModel, heads: Sequence[DraftHead], costs: Costs, folder: Path | None
) -> Mapping[str, HeadCosts]:
    key = {**_target_key(target), "heads": [describe_head(head) for head in heads]}

    def read(data: Mapping[str, Any]) -> dict[str, HeadCosts]:
        return {head.info.kind: HeadCosts.from_dict(data[head.info.kind]) for head in heads}

    stored = _find(_file(folder, _HEADS, key), key, read)
    if stored is not None:
        build_heads(target, heads)
        return stored
    if not _automatic:
        return assumed_heads(heads, costs.target.at(1, 0), target.info.num_parameters)
    found = measure_heads(target, heads)
    if found:
        _write(_file(folder, _HEADS, key), key, {kind: one.as_dict() for kind, one in found.items()})
    return found


def is_tuned(target: LanguageModel, draft: LanguageModel | None, folder: Path | None = None) -> bool:
    """Is there what `localspec tune` found for a loaded pair under the options in force?"""
    key = _pair_key(target, draft)
    return _find(_file(folder, _TUNED, key), key, Costs.from_dict, oldest=_DEEP_FORMAT) is not None


def keep_costs(target: LanguageModel, draft: LanguageModel | None, costs: Costs, folder: Path | None = None) -> None:
    """Store what `localspec tune` found for a loaded pair under the options in force."""
    key = _pair_key(target, draft)
    _write(_file(folder, _TUNED, key), key, costs.as_dict())


# ---------------------------------------------------------------- the width class of a target


def class_for(target: LanguageModel, folder: Path | None = None) -> WidthClass:
    """The class that a loaded target should stay in: as `localspec tune` found it with the options in force, else what
    the backend says. Where that is a guess about a CPU, it is looked at in short, once, if measuring is allowed; one
    sequence must be free for that."""
    key = _class_key(target)
    file = _file(folder, _CLASS, key)
    found = _find(file, key, _width_class)
    claimed, known = target.capabilities.width_class, target.capabilities
    if found is not None:
        return found
    on_cpu = known.host_scores and not dict(target.info.options).get("gpu_layers", 0)
    if claimed.measured or not on_cpu or not _automatic or known.rewind is not Rewind.FREE:
        return claimed
    looked = find_classes(target, _CLASS_WIDTHS, seconds=_CLASS_SECONDS)

    def value(one: WidthClass) -> float:
        """Many widths, and narrow ones: the narrowest is what plain decoding pays."""
        return (sum(is_inside(width, one) for width in looked.widths) - 0.5) / one.min_width

    found = _in_short(class_to_use(claimed, looked, value)[0])  # no contradiction: nothing was promised
    keep_class(target, found, folder)
    return found


def look_for_classes(target: LanguageModel, folder: Path | None = None) -> Classes | None:
    """Which widths give equal rows, looked at in short where nobody has, and kept. None: `localspec tune` has looked,
    looking is not allowed, would have much built or would say nothing of the trees that the target verifies; or there
    was no time for rows behind several contexts, with which kernels change, too. One sequence must be free."""
    key, known = _class_key(target), target.capabilities
    file = _file(folder, _LOOKED, key)
    if known.width_steps or known.exact_trees or known.rewind is not Rewind.FREE:
        return None
    if _file(folder, _CLASS, key).exists():
        return None
    found = _find(file, key, Classes.from_dict)
    if found is None and _automatic:
        found = find_classes(target, _CLASS_WIDTHS, seconds=_CLASS_SECONDS)
        if len(set(found.contexts)) < 2:
            return None
        _write(file, key, found.as_dict())
    return found


def class_that_pays(target: LanguageModel, looked: Classes, costs: Costs) -> WidthClass | None:
    """The class in which a text of which half is as easy as assumed, and half has no guess, is expected to be quickest,
    if it is quicker than plain decoding at width 1."""
    known = target.capabilities

    def worth(one: WidthClass) -> float:
        rounds = best(costs, replace(known, width_class=one))
        return 2.0 / (1.0 / rounds.tokens_per_second + 1.0 / rounds.plain_tokens_per_second)

    found = _in_short(class_to_use(known.width_class, looked, worth)[0])
    return found if found.measured and worth(found) > worth(WidthClass(1, 1)) else None


def _in_short(found: WidthClass) -> WidthClass:
    """Saying so."""
    return replace(found, evidence=found.evidence.replace("by `localspec tune`", "by a short look at first load"))


def keep_class(target: LanguageModel, width_class: WidthClass, folder: Path | None = None) -> None:
    """Store the class that was found for a loaded target under the options in force."""
    key = _class_key(target)
    _write(_file(folder, _CLASS, key), key, asdict(width_class))


def load_or_measure_bound(
    target: LanguageModel, on_progress: Progress | None = None, folder: Path | None = None
) -> Bound:
    """The bound of guarded decoding for a loaded target: as `localspec tune` found it with the options in force, else
    as measured in short before, else measured in short now and stored. One sequence must be free for that.
    Raises SettingError where measuring is not allowed (`set_automatic`)."""
    key = _target_key(target)
    for kind in (_BOUND, _QUICK_BOUND):
        stored = _find(_file(folder, kind, key), key, Bound.from_dict)
        if stored is not None:
            return stored
    if not _automatic:
        raise SettingError(
            "guarded decoding needs a bound that is measured, and measuring is switched off",
            got="LOCALSPEC_MEASURE=0",
            expected="`localspec tune` run before, or exact class or off",
        )
    found = measure_bound(target, on_progress=on_progress)
    _write(_file(folder, _QUICK_BOUND, key), key, found.as_dict())
    return found


def knows_bound(target: LanguageModel, folder: Path | None = None) -> bool:
    """Can `load_or_measure_bound` answer?"""
    key = _target_key(target)
    return _automatic or any(_file(folder, kind, key).exists() for kind in (_BOUND, _QUICK_BOUND))


def keep_bound(target: LanguageModel, bound: Bound, folder: Path | None = None) -> None:
    """Store the bound that was found for a loaded target under the options in force."""
    key = _target_key(target)
    _write(_file(folder, _BOUND, key), key, bound.as_dict())


# ---------------------------------------------------------------- what sessions learned


def experience_for(
    target: LanguageModel,
    draft: LanguageModel | None,
    heads: Sequence[DraftHead],
    make: Callable[[], Experience],
    folder: Path | None = None,
) -> Experience:
    """What `make` gives, going on from what earlier runs learned of this pair with these heads and widths."""
    fresh = make()
    key = _experience_key(target, draft, heads, fresh)

    def read(data: Mapping[str, Any]) -> Experience:
        found = make()
        found.recall(data)
        return found

    return _find(_file(folder, _EXPERIENCE, key), key, read) or fresh


def keep_experience(
    target: LanguageModel,
    draft: LanguageModel | None,
    heads: Sequence[DraftHead],
    experience: Experience,
    folder: Path | None = None,
) -> None:
    """Store what sessions have learned, for the next run; nothing where that was little, or measuring is not allowed.
    It counts for less than what that run sees itself."""
    if _automatic and experience.worth_keeping:
        key = _experience_key(target, draft, heads, experience)
        _write(_file(folder, _EXPERIENCE, key), key, experience.as_dict())


def _experience_key(
    target: LanguageModel, draft: LanguageModel | None, heads: Sequence[DraftHead], experience: Experience
) -> dict[str, Any]:
    """With the table of costs: what was learned of times corrects that one."""
    live = experience.live
    table = [live.costs.as_dict(), {kind: one.as_dict() for kind, one in sorted(live.costs.heads.items())}]
    return {
        **_pair_key(target, draft),
        "heads": [describe_head(head) for head in heads],
        "widths": [live.min_width, live.max_width],
        "costs": hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16],
    }


# ---------------------------------------------------------------- options and the report


def options_for(
    path: Path, backend: str, draft: Path | None = None, folder: Path | None = None
) -> dict[str, bool | int | str]:
    """The `LoadSettings` fields that won for a target with this draft model (None: without one) on this machine; empty
    if `localspec tune` was not run for them."""
    key = _options_key(path, backend, draft)
    return _find(_file(folder, _OPTIONS, key), key, lambda data: _options(data["options"])) or {}


def find_report(
    path: Path, backend: str, draft: Path | None, folder: Path | None = None
) -> tuple[dict[str, bool | int | str], Mapping[str, Any]] | None:
    """(the options that won, all that `localspec tune` said) for a target with a draft model, if it was run by a
    version that measured what this one does."""
    key = _options_key(path, backend, draft)

    def read(data: Mapping[str, Any]) -> tuple[dict[str, bool | int | str], Mapping[str, Any]]:
        return _options(data["options"]), dict(data["report"])

    return _find(_file(folder, _OPTIONS, key), key, read, oldest=_DEEP_FORMAT)


def keep_report(
    path: Path,
    backend: str,
    draft: Path | None,
    options: Mapping[str, bool | int | str],
    report: Mapping[str, Any],
    folder: Path | None = None,
) -> None:
    """Store the options that won, with the report."""
    key = _options_key(path, backend, draft)
    _write(_file(folder, _OPTIONS, key), key, {"options": dict(options), "report": report})


# ---------------------------------------------------------------- keys


def _target_key(target: LanguageModel) -> dict[str, Any]:
    return {"machine": describe_machine(), "target": describe_model(target)}


def _class_key(target: LanguageModel) -> dict[str, Any]:
    """With what the backend says, for a later version of it may know better."""
    claimed = target.capabilities.width_class
    return {**_target_key(target), "claimed": [claimed.min_width, claimed.max_width, claimed.measured]}


def _pair_key(target: LanguageModel, draft: LanguageModel | None) -> dict[str, Any]:
    key = {**_target_key(target), "draft": None if draft is None else describe_model(draft)}
    steps = target.capabilities.width_steps  # tables of other widths may have what was built for them as a pass's price
    return {**key, "steps": list(steps)} if steps else key


def _options_key(path: Path, backend: str, draft: Path | None) -> dict[str, Any]:
    """Without the runtime's version, which is not known before it is loaded: options of an older one are still
    options, only perhaps not the best."""
    return {
        "machine": describe_machine(),
        "backend": backend,
        "target": describe_files(path),
        "draft": None if draft is None else describe_files(draft),
    }


def _width_class(data: Mapping[str, Any]) -> WidthClass:
    most = None if data["max_width"] is None else int(data["max_width"])
    return WidthClass(
        int(data["min_width"]), most, str(data["evidence"]), bool(data["measured"]), bool(data.get("plain_only"))
    )


def default_folder() -> Path:
    """Where results lie unless another folder is named."""
    return platformdirs.user_cache_path("localspec") / "tune"


def _file(folder: Path | None, kind: str, key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return (default_folder() if folder is None else folder) / f"{digest}-{kind}.json"


# ---------------------------------------------------------------- files


def _options(data: Mapping[str, Any]) -> dict[str, bool | int | str]:
    if not isinstance(data, dict) or not all(isinstance(value, int | str) for value in data.values()):
        raise TypeError("options that are neither numbers nor yes or no")
    return dict(data)


def _find(
    file: Path, key: Mapping[str, Any], read: Callable[[Mapping[str, Any]], T], oldest: int = _FIRST_FORMAT
) -> T | None:
    """What a file says of this key; None if there is none, or it cannot be used, which is said, or its format is one
    before `oldest`."""
    try:
        stored = json.loads(file.read_bytes())
        if stored["format"] not in range(_FIRST_FORMAT, FORMAT + 1):
            raise ValueError(f"format {stored['format']!r}, expected {FORMAT}")
        if stored["key"] != json.loads(json.dumps(key)):
            raise ValueError("it is about another pair")
        if stored["format"] < oldest:
            _log.info("%s was written by an earlier version, which measured less: it is measured anew", file)
            return None
        return read(stored["found"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # a list where a mapping was, say
        _refuse(file, error)
        return None


def _refuse(file: Path, error: Exception) -> None:
    """Say it once: the file goes, so the next process does not find it again."""
    _log.warning(
        "what was measured before cannot be used (%s: %s); it is measured anew, what `localspec tune` found by "
        "the next `localspec tune`",
        file,
        error,
    )
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
