"""What an audit found, as data, as Markdown and as one verdict."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localspec.audit.distribution import LEVEL, DistributionTest
from localspec.audit.rows import RowReport
from localspec.bench.equality import Report, table
from localspec.bench.prompts import Prompt
from localspec.exactness import AUTO as AUTO_EXACT
from localspec.exactness import Exactness, Mode
from localspec.protocols import DraftHead, LanguageModel

_PIECE = 1 << 22


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of a pair. num_seeds: answers per prompt at temperatures above 0."""

    prompts: Sequence[Prompt]
    temperatures: Sequence[float]
    num_seeds: int
    max_tokens: int
    acceptances: Sequence[str] = ("walk", "rejection")
    exact: str = AUTO_EXACT


@dataclass(slots=True)
class Part:
    """The audit of a target as it was loaded for some drafters.

    exact: what keeps texts equal; only in the class must rows be the same bits.  walk: texts at all temperatures.
    rejection: texts at temperature 0.  distributions: above it.
    """

    drafters: tuple[str, ...]
    loaded: str
    width_class: str
    evidence: str
    rows: RowReport
    exact: Mode = Mode.CLASS
    walk: Report | None = None
    rejection: Report | None = None
    distributions: list[DistributionTest] = field(default_factory=list)

    @classmethod
    def of(cls, model: LanguageModel, drafters: Sequence[str], rows: RowReport, exactness: Exactness) -> Part:
        """Nothing but the rows audited yet."""
        info, able = model.info, model.capabilities
        trees = "trees are exact" if able.trees and able.exact_trees else "chains only"
        loaded = f"{info.backend}, {info.device}, context {info.context_length}, {trees}"
        return cls(tuple(drafters), loaded, str(exactness), exactness.widths.evidence, rows, exactness.mode)

    @property
    def findings(self) -> list[str]:
        """Everything that speaks against the promise, in words."""
        found = []
        same_bits = self.exact is Mode.CLASS
        if same_bits and self.rows.inside.worst:
            inside = self.rows.inside
            found.append(f"rows of the width class {self.width_class} are not the same bits: {inside.line()}")
        trees = self.rows.trees
        if trees is not None and trees.worst and (same_bits or self._beyond):
            kind = "more than width alone makes: a node sees what it must not see" if self._beyond else "as width makes"
            found.append(f"rows of trees are not those of chains: {trees.line()} ({kind})")
        for report in (self.walk, self.rejection):
            found += [difference.line() for difference in report.differences] if report is not None else []
        found += [f"{_title(test)}: not the target's: {test.line()}" for test in self.distributions if not test.passed]
        return found

    @property
    def _beyond(self) -> bool:
        return self.rows.trees is not None and self.rows.trees.worst > self.rows.rounding

    @property
    def gaps(self) -> list[str]:
        """What this audit could not say."""
        return [f"{_title(test)}: {test.line()}" for test in self.distributions if not test.enough]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "drafters": list(self.drafters),
            "loaded": self.loaded,
            "exact": self.exact.value,
            "width_class": self.width_class,
            "evidence": self.evidence,
            "row_comparisons": self.rows.as_dict(),
            "walk": self.walk.as_dict() if self.walk is not None else None,
            "rejection": self.rejection.as_dict() if self.rejection is not None else None,
            "distributions": [test.as_dict() for test in self.distributions],
            "findings": self.findings,
            "gaps": self.gaps,
        }

    def markdown(self) -> str:
        """A section."""
        lines = [
            f"## {', '.join(f'`{name}`' for name in self.drafters)}",
            "",
            f"Loaded: {self.loaded}. Exactness: {self.exact.value}; widths: {self.width_class}.",
            *([f"Evidence for the class: {self.evidence}."] if self.evidence else []),
            "",
            "### Rows",
            "",
            "| against the narrowest pass of the class | rows | same bits | largest difference | another best token |",
            "|---|---|---|---|---|",
        ]
        for part in self.rows.comparisons:
            way = f"{part.way} ({', '.join(map(str, self.rows.widths))})" if part is self.rows.inside else part.way
            lines.append(f"| {way} | {part.num_rows} | {part.num_equal} | {part.worst:.3g} | {part.num_other_best} |")
        alone = self.rows.alone
        if alone is not None and alone.num_rows:
            share = alone.num_other_best / alone.num_rows
            lines += ["", f"Width 1 would have said something else in {share:.1%} of these rows."]
        for title, report in (("Walk", self.walk), ("Rejection at temperature 0", self.rejection)):
            if report is not None:
                lines += ["", f"### {title}: equal text", "", table(report)]
        if self.distributions:
            lines += ["", f"### Rejection: the target's distribution (chi-square, level {LEVEL:g} per test)", ""]
            for test in self.distributions:
                verdict = "passed" if test.passed else "FAILED"
                lines.append(f"- {_title(test)}: {verdict if test.enough else 'too few'}: {test.line()}")
        return "\n".join(lines)


@dataclass(slots=True)
class Audit:
    """A whole audit. about: versions, machine and settings.  models: files with their hashes.  skipped: what was
    not audited, and why."""

    about: dict[str, Any]
    models: list[dict[str, Any]]
    parts: list[Part] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def findings(self) -> list[str]:
        """Of all parts."""
        return [finding for part in self.parts for finding in part.findings]

    @property
    def holds(self) -> bool:
        """Something was compared, and nothing speaks against the promise."""
        compared = any(part.rows.inside.num_rows or part.walk or part.rejection for part in self.parts)
        return compared and not self.findings

    def verdict(self) -> str:
        """In a line."""
        if self.holds:
            runs = [
                row for part in self.parts for report in (part.walk, part.rejection) if report for row in report.rows
            ]
            equal = f"{sum(row.num_equal for row in runs)} of {sum(row.num_prompts for row in runs)} texts equal"
            tests = sum(test.enough for part in self.parts for test in part.distributions)
            return f"Exactness holds: {equal} plain decoding, {tests} distribution tests passed."
        return f"Exactness does NOT hold: {len(self.findings)} finding(s)."

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "holds": self.holds,
            "verdict": self.verdict(),
            "about": self.about,
            "models": self.models,
            "parts": [part.as_dict() for part in self.parts],
            "skipped": self.skipped,
        }

    def markdown(self) -> str:
        """The report that people read."""
        gaps = [gap for part in self.parts for gap in part.gaps]
        lines = ["# localspec audit", "", f"**{self.verdict()}**", ""]
        for title, items in (("Findings", self.findings), ("Not audited", [*self.skipped, *gaps])):
            if items:
                lines += [f"## {title}", "", *(f"- {item}" for item in items), ""]
        lines += ["## Conditions", "", *(f"- {key}: {value}" for key, value in self.about.items())]
        for model in self.models:
            lines.append(f"- {model['role']}: {model['name']}, {model['architecture']}, {model['quantization']}")
            lines += [f"    - `{file}` sha256 {digest}" for file, digest in model["sha256"].items()]
        return "\n".join([*lines, "", *("\n".join([part.markdown(), ""]) for part in self.parts)])


def model_record(role: str, model: LanguageModel) -> dict[str, Any]:
    """What a model is and the hashes of its files; reads all of them."""
    info = model.info
    return {
        "role": role,
        "name": info.name,
        "path": str(info.path),
        "architecture": info.architecture,
        "quantization": info.quantization,
        "num_parameters": info.num_parameters,
        "notes": list(info.notes),
        "sha256": _hashes(info.path),
    }


def head_record(head: DraftHead) -> dict[str, Any]:
    """The same of a trained head."""
    info = head.info
    return {
        "role": "head",
        "name": info.name,
        "path": str(info.path),
        "architecture": info.kind,
        "quantization": "",
        "num_parameters": info.num_parameters,
        "notes": list(info.notes),
        "sha256": _hashes(info.path),
    }


def _hashes(path: Path) -> dict[str, str]:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".json"))
    return {file.name: _sha256(file) for file in files if file.is_file()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _title(test: DistributionTest) -> str:
    return f"`{test.drafter}` at T = {test.temperature:g}"
