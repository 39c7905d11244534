"""A model as its own drafter: a copy with fewer bits, made once and kept in the user's cache.

    FOLDER/KEY-KIND.gguf, or a folder KEY-KIND      KEY: which target

What a target says under much coarser weights is mostly what it says, and a pass costs what it reads. So any model can
draft for itself, with nothing trained and nothing fetched. The text is the target's as ever.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs

from localspec.errors import DiskError, SettingError, UnsupportedModelError
from localspec.formats import summarize
from localspec.preparation import Quantizer
from localspec.protocols import Backend
from localspec.schedule.machine import describe_files

SELF = "self"
"""In the place of a draft model's name; `self:KIND` for one of `Quantizer.names`."""

_LEAST_SAVED = 0.1  # of the target's bytes

Say = Callable[[str], None]


def is_self(draft: str | None) -> bool:
    """Is the draft model to be a copy of the target? What exists on disk is a path, whatever its name."""
    return draft is not None and draft.partition(":")[0] == SELF and not Path(draft).exists()


def make_copy(
    target: Path, backend: Backend, draft: str, *, folder: Path | None = None, on_progress: Say = lambda text: None
) -> Path:
    """The copy that `draft` (see `SELF`) names, made now if it is not there yet.

    on_progress: given a short text now and then, if there is something to do. Raises SettingError for a kind that the
    backend's quantizer does not have, UnsupportedModelError where it has no quantizer or the copy would not be smaller,
    DiskError, and what the quantizer raises.
    """
    quantizer = backend.quantizer
    if quantizer is None:
        raise UnsupportedModelError(
            f"backend {backend.name} makes no copies with fewer bits", fix="Name a draft model."
        )
    kind = _kind(target, quantizer, draft)
    place = _place(default_folder() if folder is None else folder, target, kind)
    if not place.exists():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as work:
                made = Path(work) / place.name
                on_progress(f"making a copy of {target.name} in {kind} (once)")
                quantizer.write(target, made, kind, on_progress, again=True)
                _require_smaller(target, made, kind)
                _move(made, place)
        except OSError as error:
            raise DiskError(f"the copy of {target.name} could not be written: {error}") from error
    return place


def default_folder() -> Path:
    """Where copies lie unless another folder is named."""
    return platformdirs.user_cache_path("localspec") / "copies"


def _kind(target: Path, quantizer: Quantizer, draft: str) -> str:
    """What the copy is made in: as named, or what suits the bits that the target has."""
    _, _, kind = draft.partition(":")
    if kind:
        known = {name.casefold(): name for name in quantizer.names}
        if kind.casefold() not in known:
            raise SettingError(f"unknown quantization in {draft!r}", got=kind, expected=", ".join(quantizer.names))
        return known[kind.casefold()]
    model = summarize(target)
    bits = 8 * model.total_weight_bytes / max(1, model.num_parameters)
    chosen = quantizer.for_drafting(bits)
    if chosen is None:
        raise UnsupportedModelError(
            f"{target.name} has few bits already, so a copy would save little",
            got=f"{bits:.1f} bits a weight",
            fix="Name a draft model, or the copy's quantization: self:KIND.",
        )
    return chosen


def _place(folder: Path, target: Path, kind: str) -> Path:
    key = hashlib.sha256(json.dumps(describe_files(target), sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{key}-{kind}{'' if target.is_dir() else '.gguf'}"


def _require_smaller(target: Path, made: Path, kind: str) -> None:
    before, after = summarize(target).total_weight_bytes, summarize(made).total_weight_bytes
    if after > (1.0 - _LEAST_SAVED) * before:
        raise UnsupportedModelError(
            f"a copy of {target.name} in {kind} is not worth making: it has {after / max(1, before):.0%} of its bytes",
            expected=f"at most {1.0 - _LEAST_SAVED:.0%}",
            fix="Name a smaller quantization (self:KIND), or a draft model.",
        )


def _move(made: Path, place: Path) -> None:
    """Into place in one step, unless another process was quicker."""
    try:
        made.replace(place)
    except OSError:
        if not place.exists():
            raise
        shutil.rmtree(made, ignore_errors=True)
