"""The catalog of known pairs: TOML files, one per family, checked against a schema of a fixed version.

Ours lie in `models/catalog/`. Users add their own in the folder of `user_folder()` or name a file; a pair of
theirs replaces one of ours that has the same name, and `KnownPair.origin` says whose it is. The fields are
explained in `models/README.md`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from platformdirs import user_config_path

from localspec.errors import CatalogFileError, UnknownNameError

SCHEMA = 1
"""Version of the format. It grows when a reader of the old one would misread the new."""

KINDS: dict[str, str] = {
    "draft_model": "a smaller model of the same family",
    "medusa": "extra heads, one per position ahead",
    "eagle3": "one layer that continues the target's features",
    "mtp": "the target's own layers for tokens further ahead",
    "dflash": "fills in a block of tokens at once",
    "dflash2": "dflash, second version",
    "dfly": "fills in a block of tokens at once, in a form for MLX",
    "dspark": "fills in a block, then corrects it token by token",
    "jetspec": "grows a whole tree in one pass",
}
"""Kinds of drafters that a catalog may name -> what they are. Which of them run is another matter."""

TOKENIZERS = ("same", "cross")
"""Does the drafter use the target's tokenizer, or one of its own?"""

IN_TARGET = frozenset({"mtp"})
"""Kinds whose drafter may be part of the target's own files."""

BITS: dict[str, float] = {
    "f32": 32.0,
    "bf16": 16.0,
    "f16": 16.0,
    "8bit": 8.5,
    "6bit": 6.5,
    "5bit": 5.5,
    "4bit": 4.5,
    "3bit": 3.5,
    "2bit": 2.5,
    "mxfp4": 4.3,
    "nvfp4": 4.6,
    "Q8_0": 8.5,
    "Q6_K": 6.6,
    "Q5_K_M": 5.7,
    "Q5_0": 5.5,
    "Q4_K_M": 4.9,
    "Q4_K_S": 4.6,
    "Q4_0": 4.5,
    "IQ4_XS": 4.3,
    "UD-Q4_K_XL": 5.0,
    "Q3_K_M": 4.0,
    "Q2_K": 3.2,
}
"""Quantisation -> bits per weight, scales included, as whole files come out; mixed types are approximate."""

_OWN_FOLDER = Path(__file__).resolve().parents[2] / "models" / "catalog"
_LARGEST_FILE = 1 << 20  # bytes; a catalog is written by hand
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_REPOSITORY = re.compile(
    r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[A-Za-z0-9][\w./-]*)?(:(?P<choice>[A-Za-z0-9][\w./-]*))?", re.ASCII
)
_LONGEST_TEXT = 300


@dataclass(frozen=True, slots=True)
class Speed:
    """Somebody's measurement. ratio: decoding speed against plain decoding, lowest and highest."""

    ratio: tuple[float, float]
    hardware: str
    source: str
    conditions: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to get the pair: what `localspec pull` takes for the target and for the drafter.

    draft: None where the drafter is part of the target's files. memory: GB as the source has it, None: estimated.
    heads: trained heads beside the drafter; which of them guesses is decided every round.
    """

    backend: str
    quantization: str
    target: str
    draft: str | None
    draft_quantization: str
    memory: float | None = None
    heads: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """A drafter that was made for one kind of text, in place of the pair's own where that is asked for."""

    name: str
    backend: str
    draft: str
    draft_quantization: str


@dataclass(frozen=True, slots=True)
class KnownPair:
    """A pair as the catalog has it. parameters, draft_parameters: in billions, all experts counted."""

    name: str
    family: str
    target: str
    parameters: float
    drafter: str
    draft: str
    draft_parameters: float | None
    tokenizer: str
    source: str
    note: str
    doubt: str
    tested: bool
    choices: tuple[Choice, ...]
    speeds: tuple[Speed, ...]
    origin: str
    tasks: tuple[Task, ...] = ()

    @property
    def ratio(self) -> tuple[float, float] | None:
        """Lowest and highest speed that anybody published; None: nobody did."""
        if not self.speeds:
            return None
        return min(speed.ratio[0] for speed in self.speeds), max(speed.ratio[1] for speed in self.speeds)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Catalog:
    """All pairs that are known here. replaced: names that more than one catalog has, with the origin that lost."""

    pairs: tuple[KnownPair, ...]
    replaced: tuple[tuple[str, str], ...] = ()

    def get(self, name: str) -> KnownPair:
        """The pair of that name. Raises UnknownNameError."""
        known = {pair.name: pair for pair in self.pairs}
        if name in known:
            return known[name]
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UnknownNameError(f"unknown pair {name!r}", fix=hint + "`localspec pairs` lists all.")


# ---------------------------------------------------------------- where catalogs are


def own_files() -> list[Path]:
    """The catalogs that come with localspec."""
    return sorted(_OWN_FOLDER.glob("*.toml"))


def user_folder() -> Path:
    """Where the user's own catalogs are looked for."""
    return user_config_path("localspec", appauthor=False) / "catalog"


def load_catalog(extra: Path | None = None, *, folder: Path | None = None) -> Catalog:
    """Ours, over it the user's folder, over that `extra`. Raises CatalogFileError for the first fault."""
    folder = folder or user_folder()
    own = _unique([pair for path in own_files() for pair in read_file(path, f"localspec ({path.name})")])
    user = _unique([pair for path in sorted(folder.glob("*.toml")) for pair in read_file(path)])
    named = read_file(extra) if extra is not None else []
    merged: dict[str, KnownPair] = {}
    replaced = []
    for pair in (*own, *user, *named):
        if pair.name in merged:
            replaced.append((pair.name, merged[pair.name].origin))
        merged[pair.name] = pair
    return Catalog(tuple(merged.values()), tuple(replaced))


def _unique(pairs: Sequence[KnownPair]) -> Sequence[KnownPair]:
    seen: dict[str, str] = {}
    for pair in pairs:
        if pair.name in seen:
            raise CatalogFileError(
                f"{pair.origin}: pair {pair.name!r} is in {seen[pair.name]} as well", fix="Rename one of them."
            )
        seen[pair.name] = pair.origin
    return pairs


# ---------------------------------------------------------------- one file


def read_file(path: Path, origin: str | None = None) -> list[KnownPair]:
    """The pairs of one file, checked. Raises CatalogFileError, which names file, pair and field."""
    try:
        if path.exists() and not path.is_file():
            raise CatalogFileError(f"{path} is not a file", fix="Name one .toml file.")
        with path.open("rb") as file:
            raw = file.read(_LARGEST_FILE + 1)
        if len(raw) > _LARGEST_FILE:
            raise CatalogFileError(f"{path} is too large for a catalog", expected=f"at most {_LARGEST_FILE} bytes")
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CatalogFileError(f"{path} is not UTF-8 (byte {error.start})", fix="Convert it to UTF-8.") from None
    except OSError as error:
        raise CatalogFileError(f"{path} cannot be read: {error.strerror}", fix="Check the path.") from None
    return read_text(text, str(path), origin)


def read_text(text: str, path: str, origin: str | None = None) -> list[KnownPair]:
    """The pairs of a catalog's text; path: what errors call it. Raises CatalogFileError."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers and dates out of range are plain ValueErrors
        raise CatalogFileError(f"{path} is not TOML: {error}", fix="See models/README.md for an example.") from None
    version = _Fields(data, path, list(data))
    if (schema := version.whole("schema")) != SCHEMA:  # before all else: another version may have other fields
        raise version.fault("schema", schema, SCHEMA, "Update localspec, or write it in this version's format.")
    top = _Fields(data, path, ("schema", "family", "pair"))
    family = top.matching("family", _NAME, "lower-case letters, digits, dots and dashes, at most 32")
    pairs: list[KnownPair] = []
    for number, table in enumerate(top.tables("pair", at_least=1), 1):
        pair = _read_pair(table, path, number, family, origin or path)
        if any(pair.name == other.name for other in pairs):
            raise CatalogFileError(f"{path}, pair {pair.name!r}: the name is there twice", fix="Rename one of them.")
        pairs.append(pair)
    return pairs


def _read_pair(table: Mapping[str, Any], path: str, number: int, family: str, origin: str) -> KnownPair:
    known = {field.name for field in fields(KnownPair)} - {"family", "origin", "choices", "speeds", "tasks"}
    name = table.get("name")
    place = f"{path}, pair {name!r}" if isinstance(name, str) and _NAME.fullmatch(name) else f"{path}, pair {number}"
    entry = _Fields(table, place, [*sorted(known), "choice", "speed", "task"])
    kind = entry.one_of("drafter", KINDS)
    return KnownPair(
        name=entry.matching("name", _NAME, "lower-case letters, digits, dots, dashes and underscores, at most 32"),
        family=family,
        target=entry.text("target"),
        parameters=entry.positive("parameters"),
        drafter=kind,
        draft=entry.text("draft"),
        draft_parameters=entry.positive("draft_parameters") if "draft_parameters" in table else None,
        tokenizer=entry.one_of("tokenizer", TOKENIZERS),
        source=entry.text("source"),
        note=entry.text("note", ""),
        doubt=entry.text("doubt", ""),
        tested=entry.flag("tested"),
        choices=tuple(
            _read_choice(row, f"{place}, choice {position}", kind)
            for position, row in enumerate(entry.tables("choice", at_least=1), 1)
        ),
        speeds=tuple(
            _read_speed(row, f"{place}, speed {position}") for position, row in enumerate(entry.tables("speed"), 1)
        ),
        origin=origin,
        tasks=tuple(
            _read_task(row, f"{place}, task {position}") for position, row in enumerate(entry.tables("task"), 1)
        ),
    )


def _read_task(table: Mapping[str, Any], place: str) -> Task:
    row = _Fields(table, place, [field.name for field in fields(Task)])
    draft, quantization = row.reference("draft", "draft_quantization")
    return Task(
        name=row.matching("name", _NAME, "lower-case letters, digits, dots and dashes, at most 32, e.g. code"),
        backend=row.matching("backend", _NAME, "a backend's name: mlx or llamacpp"),
        draft=draft,
        draft_quantization=quantization,
    )


def _read_choice(table: Mapping[str, Any], place: str, kind: str) -> Choice:
    row = _Fields(table, place, [field.name for field in fields(Choice)])
    if "draft" not in table and kind not in IN_TARGET:
        raise row.fault("draft", "nothing", "the drafter's repository", f"Only {', '.join(IN_TARGET)} may do without.")
    target, quantization = row.reference("target", "quantization")
    draft, draft_quantization = row.reference("draft", "draft_quantization") if "draft" in table else (None, "")
    return Choice(
        backend=row.matching("backend", _NAME, "a backend's name: mlx or llamacpp"),
        quantization=quantization,
        target=target,
        draft=draft,
        draft_quantization=draft_quantization,
        memory=row.positive("memory") if "memory" in table else None,
        heads=row.repositories("heads"),
    )


def _read_speed(table: Mapping[str, Any], place: str) -> Speed:
    row = _Fields(table, place, [field.name for field in fields(Speed)])
    value: Any = table.get("ratio")
    expected = "a number like 1.8, or the lowest and the highest: [1.2, 1.8]"
    bounds: list[Any] = value if isinstance(value, list) and len(value) == 2 else [value, value]
    if not all(_is_positive(bound) for bound in bounds) or bounds[0] > bounds[1]:
        raise row.fault("ratio", "nothing" if value is None else value, expected)
    return Speed(
        ratio=(float(bounds[0]), float(bounds[1])),
        hardware=row.text("hardware"),
        source=row.text("source"),
        conditions=row.text("conditions", ""),
    )


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


class _Fields:
    """The fields of one table of a catalog, each checked when it is read. place: where errors say it stands."""

    def __init__(self, table: Mapping[str, Any], place: str, known: Sequence[str]) -> None:
        self.table = table
        self.place = place
        for name in table:
            if name not in known:
                near = get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"Did you mean {near[0]!r}? " if near else ""
                raise self.fault(
                    name[:40], "a field that is not known", f"one of {', '.join(known)}", f"{hint}Else leave it out."
                )

    def fault(self, name: str, got: object, expected: object, fix: str = "See models/README.md.") -> CatalogFileError:
        """The error about one field."""
        return CatalogFileError(f"{self.place}, field {name!r}", got=_short(got), expected=expected, fix=fix)

    def _value(self, name: str, expected: str, accepts: Callable[[Any], bool]) -> Any:
        value = self.table.get(name)
        if value is None or not accepts(value):
            raise self.fault(name, "nothing" if value is None else repr(value), expected)
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """One line that a terminal can show: no control characters, so no escape codes either."""
        if default is not None and name not in self.table:
            return default

        def accepts(value: object) -> bool:
            return (
                isinstance(value, str) and 0 < len(value.strip()) <= len(value) <= _LONGEST_TEXT and value.isprintable()
            )

        return str(self._value(name, f"one line of text, at most {_LONGEST_TEXT} characters", accepts))

    def matching(self, name: str, pattern: re.Pattern[str], expected: str) -> str:
        """A text of that form."""
        return str(self._value(name, expected, lambda value: isinstance(value, str) and bool(pattern.fullmatch(value))))

    def one_of(self, name: str, known: Iterable[str]) -> str:
        """One of these words; the nearest is suggested."""
        words = list(known)
        value = self.table.get(name)
        if isinstance(value, str) and value in words:
            return value
        near = get_close_matches(value, words, n=1, cutoff=0.5) if isinstance(value, str) else []
        hint = f"Did you mean {near[0]!r}?" if near else "See models/README.md."
        raise self.fault(name, "nothing" if value is None else repr(value), f"one of {', '.join(words)}", hint)

    def positive(self, name: str) -> float:
        """A number above zero."""
        return float(self._value(name, "a number above 0 and below a billion", _is_positive))

    def whole(self, name: str) -> int:
        """A whole number."""
        return int(self._value(name, "a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool)))

    def flag(self, name: str) -> bool:
        """true or false."""
        return bool(self._value(name, "true or false", lambda value: isinstance(value, bool)))

    def tables(self, name: str, at_least: int = 0) -> list[Mapping[str, Any]]:
        """The tables written [[name]]."""
        value = self.table.get(name, [])
        if not isinstance(value, list) or not all(isinstance(row, dict) for row in value) or len(value) < at_least:
            raise self.fault(name, _short(repr(value)), f"{at_least} or more tables, each below [[...{name}]]")
        return value

    def repositories(self, name: str) -> tuple[str, ...]:
        """What `localspec pull` takes, any number of times."""
        value = self.table.get(name, [])
        if not isinstance(value, list) or not all(isinstance(text, str) and _names_files(text) for text in value):
            raise self.fault(name, _short(repr(value)), 'a list of repositories or paths, such as ["OWNER/NAME"]')
        return tuple(value)

    def reference(self, name: str, quantization: str) -> tuple[str, str]:
        """(what `localspec pull` takes, its quantisation as `BITS` spells it)."""
        text = self.text(name)
        match = _REPOSITORY.fullmatch(text)
        if not _names_files(text):
            expected = "OWNER/NAME, OWNER/NAME:QUANTISATION, OWNER/NAME:FILE, or a path from / or ~/"
            raise self.fault(name, repr(text), expected)
        spelling = {known.casefold(): known for known in BITS}
        inside = spelling.get((match["choice"] or "").casefold()) if match is not None else None
        if quantization not in self.table:
            if inside is None:
                raise self.fault(quantization, "nothing", f"one of {', '.join(BITS)}: {name} does not end in one")
            return text, inside
        given = spelling.get(self.text(quantization).casefold())
        if given is None:
            raise self.fault(quantization, repr(self.table[quantization]), f"one of {', '.join(BITS)}")
        if inside not in (None, given):
            raise self.fault(quantization, given, f"{inside}, as {name} says", "Leave one of them out.")
        return text, given


def _names_files(text: str) -> bool:
    """A repository of the Hub, or a path that means the same everywhere."""
    return text.startswith(("/", "~/")) or (_REPOSITORY.fullmatch(text) is not None and ".." not in text)


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= 80 else text[:77] + "..."
