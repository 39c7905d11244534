"""Which pairs run with this version, which fit a machine, and which of a pair's choices to take.

Memory is an estimate from parameters and quantisation unless the catalog has a number: enough to sort a
list by, not a plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from localspec.drafters import DRAFTERS
from localspec.errors import CatalogFileError, ModelNotFoundError, SettingError, UnknownNameError
from localspec.hub.catalog import BITS, Catalog, Choice, KnownPair, load_catalog
from localspec.loading import bundled_names, resolve_model

USABLE = 0.75
"""Share of a machine's memory that models may fill: the system needs some, and GPUs of Macs get no more."""

_CROSS = "cross_tokenizer"  # the drafter of that name is what makes unlike tokenizers work
_UNKNOWN_HEAD = (0.1, 2.0)  # share of the target's parameters, and billions at most, where nobody says
_SLACK = (1.1, 0.5)  # factor, and GB on top: caches of about 4k tokens, buffers, the runtime
_GB = 1e9
_SIZE = re.compile(r"(\d{1,7}(?:\.\d{1,7})?)\s*([MGT])(?:I?B)?", re.IGNORECASE)
_UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}


def parse_memory(text: str) -> int:
    """Bytes of "16G", "16 GB", "512M"; M, G and T are powers of 1024, as memory is sold. Raises SettingError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise SettingError("--memory", got=repr(text[:40]), expected="a size such as 16G")
    return int(float(match[1]) * _UNITS[match[2].upper()])


# ---------------------------------------------------------------- one pair


def missing(pair: KnownPair) -> str:
    """Why this version cannot run the pair; empty if it can. What it can is what it has drafters for."""
    needed = _CROSS if pair.tokenizer == "cross" and pair.drafter == "draft_model" else pair.drafter
    return "" if needed in DRAFTERS else f"this version has no drafter {needed}"


def memory_gb(pair: KnownPair, choice: Choice) -> float:
    """GB that both models need, as the catalog says or estimated."""
    if choice.memory is not None:
        return choice.memory
    weights = pair.parameters * BITS[choice.quantization] / 8
    if choice.draft is not None:
        share, most = _UNKNOWN_HEAD
        billions = pair.draft_parameters or min(pair.parameters * share, most)
        weights += billions * BITS[choice.draft_quantization] / 8
    factor, constant = _SLACK
    return weights * factor + constant


def fits(pair: KnownPair, choice: Choice, memory: int) -> bool:
    """Does it fit a machine of so many bytes?"""
    return memory_gb(pair, choice) * _GB <= memory * USABLE


def best_choice(pair: KnownPair, choices: Sequence[Choice], memory: int) -> Choice:
    """The finest quantisation that fits, the first of equals; where none fits, the smallest."""
    fitting = [choice for choice in choices if fits(pair, choice, memory)]
    if fitting:
        return max(fitting, key=lambda choice: BITS[choice.quantization])
    return min(choices, key=lambda choice: memory_gb(pair, choice))


# ---------------------------------------------------------------- many


@dataclass(frozen=True, slots=True)
class Row:
    """A pair with the choice that suits the machine. lacks: why this version cannot run it, or empty."""

    pair: KnownPair
    choice: Choice
    fits: bool
    lacks: str

    @property
    def rank(self) -> int:
        """0: runs and fits, 1: runs but is too big, 2: does not run."""
        return 2 if self.lacks else int(not self.fits)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: the pair, and what was worked out about it."""
        return {
            **self.pair.as_dict(),
            "supported": not self.lacks,
            "unsupported_because": self.lacks or None,
            "fits": self.fits,
            "suggested": self.choice.target,
            "memory_gb": round(memory_gb(self.pair, self.choice), 1),
            "memory_estimated": self.choice.memory is None,
        }


def row_of(pair: KnownPair, choices: Sequence[Choice], memory: int) -> Row:
    """The pair with the best of these choices for a machine of so many bytes."""
    choice = best_choice(pair, choices, memory)
    return Row(pair, choice, fits(pair, choice, memory), missing(pair))


def select(
    catalog: Catalog, memory: int, *, text: str = "", backend: str | None = None, drafter: str | None = None
) -> list[Row]:
    """Pairs that match, those that run and fit first, then by size and name.

    text: all of its words must occur in name, family, target, drafter, kind or repository.
    """
    words = text.casefold().split()
    rows = []
    for pair in catalog.pairs:
        choices = [choice for choice in pair.choices if backend in (None, choice.backend)]
        if choices and drafter in (None, pair.drafter) and all(word in _searched(pair) for word in words):
            rows.append(row_of(pair, choices, memory))
    return sorted(rows, key=lambda row: (row.rank, -row.pair.parameters, row.pair.name))


def _searched(pair: KnownPair) -> str:
    repositories = [f"{choice.target} {choice.draft or ''}" for choice in pair.choices]
    return " ".join([pair.name, pair.family, pair.target, pair.drafter, pair.draft, *repositories]).casefold()


def suggest(catalog: Catalog, memory: int, backends: Sequence[str]) -> Row | None:
    """The largest target of a pair that runs, and fits with what `choice_for` takes; no doubtful ones."""
    best: Row | None = None
    for pair in catalog.pairs:
        if pair.doubt or missing(pair) or not any(choice.backend in backends for choice in pair.choices):
            continue
        choice = choice_for(pair, memory, backends)
        if fits(pair, choice, memory) and (best is None or _value(pair) > _value(best.pair)):
            best = Row(pair, choice, True, "")
    return best


def suggestion(memory: int, backends: Sequence[str]) -> str:
    """One line for those who named no pair: the best that fits, what it needs, how to start it; or empty."""
    try:
        row = suggest(load_catalog(), memory, backends)
    except CatalogFileError as error:  # a faulty catalog of the user's must not keep the bundled pair from running
        return f"none suggested: {error}"
    if row is None:
        return ""
    need = memory_gb(row.pair, row.choice)
    return f"{row.pair.name} fits this machine (about {need:.0f} GB): localspec pairs show {row.pair.name}"


def _value(pair: KnownPair) -> tuple[float, float]:
    return pair.parameters, pair.ratio[1] if pair.ratio else 0.0


# ---------------------------------------------------------------- from a name to files


def names_a_pair(text: str) -> bool:
    """Can only a pair of a catalog be meant? Neither a path, nor a bundled name, nor a Hub id."""
    is_file = text.startswith(("~", ".")) or text.endswith((".gguf", ".safetensors")) or Path(text).exists()
    return "/" not in text and not is_file and text not in bundled_names()


def choice_for(pair: KnownPair, memory: int, backends: Sequence[str], quantization: str | None = None) -> Choice:
    """What to open: the finest quantisation that fits, for the first of these backends that the pair has.

    Raises SettingError where this version cannot run the pair, no backend has files for it, or the
    quantisation asked for is not among the choices.
    """
    if reason := missing(pair):
        raise SettingError(
            f"pair {pair.name} does not run: {reason}",
            fix=f"`localspec pairs` shows which do; its target runs alone with --target {pair.choices[0].target}.",
        )
    for backend in backends:
        choices = [choice for choice in pair.choices if choice.backend == backend]
        wanted = [
            choice
            for choice in choices
            if quantization is None or quantization.casefold() == choice.quantization.casefold()
        ]
        if wanted:
            return best_choice(pair, wanted, memory)
    if quantization is not None and any(choice.backend in backends for choice in pair.choices):
        offered = [choice.quantization for choice in pair.choices if choice.backend in backends]
        raise UnknownNameError.among(f"quantisation of pair {pair.name}:", quantization, offered)
    raise SettingError(
        f"pair {pair.name} has no files for backend {' or '.join(backends)}",
        expected=" or ".join(dict.fromkeys(choice.backend for choice in pair.choices)),
        fix="Name it with --backend; `localspec doctor` says what is installed.",
    )


def for_task(pair: KnownPair, choice: Choice, task: str) -> Choice:
    """The choice with the drafter that was made for a task. Raises UnknownNameError."""
    for one in pair.tasks:
        if (one.name, one.backend) == (task, choice.backend):
            return replace(choice, draft=one.draft, draft_quantization=one.draft_quantization)
    known = [one.name for one in pair.tasks if one.backend == choice.backend]
    raise UnknownNameError.among(f"task of pair {pair.name} on {choice.backend}:", task, known)


@dataclass(frozen=True, slots=True)
class Located:
    """What a choice needs, on this machine."""

    target: Path
    draft: Path | None
    heads: tuple[Path, ...]


def locate(pair: KnownPair, choice: Choice, resolve: Callable[[str], Path] = resolve_model) -> Located:
    """Where target, drafter and heads lie on this machine; a head that is part of the target lies there. resolve: finds
    what a repository's or a path's text means.

    Raises ModelNotFoundError, which names everything that is missing and how to get it.
    """
    found: list[Path] = []
    lacking: list[str] = []
    reasons: list[str] = []
    references = [choice.target, *([] if choice.draft is None else [choice.draft]), *choice.heads]
    for reference in references:
        try:
            found.append(resolve(reference))
        except ModelNotFoundError as error:
            lacking.append(reference)
            reasons += [str(error.got)] if error.got is not None else []
    if lacking:
        pulls = " and ".join(f"`localspec pull {text}`" for text in lacking if not text.startswith(("/", "~")))
        raise ModelNotFoundError(
            f"pair {pair.name} is not on this machine: {' and '.join(lacking)}",
            got="; ".join(dict.fromkeys(reasons)) or None,
            fix=f"Get it with {pulls}." if pulls else "Check the paths in its catalog.",
        )
    target, *others = found
    draft = others.pop(0) if choice.draft is not None else None
    inside = [target] if choice.draft is None else []
    return Located(target, draft, (*inside, *others))
