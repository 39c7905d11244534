"""A draft model of another tokenizer against one of the target's own: accepted length, and what of the gap is
the drafter's and what the tokenizer's."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

from localspec.bench.accounting import WordStarts, cut, foreign
from localspec.bench.prompts import Prompt
from localspec.drafters import CrossTokenizer, make_drafter
from localspec.engine.session import Session
from localspec.errors import UsageError
from localspec.pair import Pair
from localspec.protocols import Drafter, LanguageModel
from localspec.sampling import SamplingParams
from localspec.types import TokenIds

OWN, FOREIGN, OTHER = "same tokenizer", "same tokenizer, as if foreign", "other tokenizer"
_ALL = "all"


class _Closing(Protocol):
    def close(self) -> None: ...


_Made = TypeVar("_Made", bound=_Closing)


@dataclass(slots=True)
class Row:
    """One drafter in one domain at one temperature."""

    drafter: str
    temperature: float
    domain: str
    num_prompts: int = 0
    num_equal: int = 0
    num_tokens: int = 0
    num_rounds: int = 0
    draft_ms: float = 0.0

    @property
    def length(self) -> float:
        """Accepted length, the bonus counted."""
        return self.num_tokens / max(self.num_rounds, 1)


@dataclass(slots=True)
class Agreement:
    """From word starts on, tokens of the target's that a draft model alone writes greedily."""

    drafter: str
    domain: str
    num_tokens: int = 0
    num_places: int = 0

    @property
    def length(self) -> float:
        """Accepted length if every round began at a word, the bonus counted."""
        return 1.0 + self.num_tokens / max(self.num_places, 1)


@dataclass(slots=True)
class Report:
    """All rows, and what each of the two draft models alone agrees with the target in. num: tokens at most."""

    target: str
    own: str
    other: str
    relation: str
    num: int = 5
    rows: list[Row] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)

    def row(self, drafter: str, temperature: float, domain: str) -> Row:
        """The row of these three, made at its first use."""
        for row in self.rows:
            if (row.drafter, row.temperature, row.domain) == (drafter, temperature, domain):
                return row
        self.rows.append(Row(drafter, temperature, domain))
        return self.rows[-1]

    def agreement(self, drafter: str, domain: str) -> Agreement:
        """The same of these two."""
        for found in self.agreements:
            if (found.drafter, found.domain) == (drafter, domain):
                return found
        self.agreements.append(Agreement(drafter, domain))
        return self.agreements[-1]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def measure(
    pair: Pair,
    other: LanguageModel,
    prompts: Sequence[Prompt],
    drafters: Sequence[str],
    temperatures: Sequence[float],
    max_tokens: int,
    cuts: Sequence[float] = (),
    on_prompt: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Decode every prompt plainly, with the pair's own draft model and with `other`, as each of `drafters`.

    cuts: also run the own draft model as if its tokenizer were another one, freely (bytes), and restricted to so
    much of the prompts' text (intersection). Raises UsageError without a draft model of the target's own tokenizer.
    """
    if pair.draft is None or pair.drafting is None or not pair.drafting.relation.same:
        raise UsageError(
            "the comparison needs a draft model of the target's own tokenizer", fix="Name it with --draft."
        )
    own, crossed = pair.drafting, Pair(pair.target, other).drafting
    assert crossed is not None
    report = Report(pair.target.info.name, pair.draft.info.name, other.info.name, str(crossed.relation))
    encoded = [prompt.encode(pair.target.tokenizer) for prompt in prompts]
    with ExitStack() as stack:

        def opened(made: _Made) -> _Made:
            stack.callback(made.close)
            return made

        makers: dict[str, Drafter] = {}
        for spec in drafters:
            crossing = spec.startswith(CrossTokenizer.name)
            name = spec if crossing else f"{OWN}, {spec}"
            makers[name] = opened(make_drafter(spec, crossed if crossing else own))
        if cuts:
            spec = f"{CrossTokenizer.name}:num={report.num},mode="
            makers[f"{FOREIGN}, bytes"] = opened(make_drafter(f"{spec}bytes", foreign(own)))
            text = [token for tokens in encoded for token in tokens.tolist()]
            for share in cuts:
                drafter = opened(make_drafter(f"{spec}intersection", cut(own, text, share)))
                makers[f"{FOREIGN}, {share:.1%} of text shared, intersection"] = drafter
        alone = {name: opened(WordStarts(draft, report.num)) for name, draft in ((OWN, own), (OTHER, crossed))}
        session = stack.enter_context(pair.session("nothing"))
        plain = session.drafter
        for prompt, tokens in zip(prompts, encoded, strict=True):
            for temperature in temperatures:
                seed = zlib.crc32(prompt.id.encode())
                params = SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens)
                session.use(plain)
                want = session.generate(tokens.tolist(), params).tokens
                for name, drafter in makers.items():
                    session.use(drafter)
                    _add(report.row(name, temperature, prompt.domain), session, tokens, params, want)
                if temperature == 0.0:
                    for name, starts in alone.items():
                        found = report.agreement(name, prompt.domain)
                        agreed, places = starts.agreement(tokens, want)
                        found.num_tokens += agreed
                        found.num_places += places
            on_prompt(report)
    return report


def _add(row: Row, session: Session, tokens: TokenIds, params: SamplingParams, want: Sequence[int]) -> None:
    result = session.generate(tokens.tolist(), params)
    row.num_prompts += 1
    row.num_equal += result.tokens == want
    row.num_tokens += result.stats.num_tokens
    row.num_rounds += result.stats.num_rounds
    row.draft_ms += result.stats.draft_ms


def table(report: Report) -> str:
    """Markdown."""
    lines = [
        f"target: {report.target}; same tokenizer: {report.own}; other tokenizer: {report.other}",
        report.relation,
        "tokens emitted per round, the bonus counted; share: of the first drafter's",
        "",
        "| T | domain | drafter | prompts | text equals plain | accepted length | share | draft ms per round |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [*report.rows, *_totals(report)]
    first = {(row.temperature, row.domain): row.length for row in reversed(rows)}
    for row in sorted(rows, key=lambda row: (row.temperature, row.domain == _ALL)):
        share = row.length / max(first[row.temperature, row.domain], 1e-9)
        lines.append(
            f"| {row.temperature:g} | {row.domain} | {row.drafter} | {row.num_prompts} | {row.num_equal} of "
            f"{row.num_prompts} | {row.length:.2f} | {share:.0%} | {row.draft_ms / max(row.num_rounds, 1):.1f} |"
        )
    return "\n".join(lines + _accounts(report, rows))


def _accounts(report: Report, rows: Sequence[Row]) -> list[str]:
    """Whose the gap is, at T = 0: the best of the other drafter's rows against the first drafter's."""
    if not report.agreements:
        return []
    lines = [
        "",
        f"T = 0; each draft model alone, from word starts, where no tokenizer matters, {report.num} tokens at most",
        "",
        f"| domain | {OWN} | {OTHER} | share | = the drafter's | x the tokenizer's |",
        "|---|---|---|---|---|---|",
    ]
    greedy = [row for row in rows if row.temperature == 0.0]
    for domain in dict.fromkeys(row.domain for row in greedy):
        own, other = (_agreed(report, name, domain) for name in (OWN, OTHER))
        lengths = {row.drafter: row.length for row in greedy if row.domain == domain}
        first = next(iter(lengths.values()))
        best = max((value for name, value in lengths.items() if name.startswith(CrossTokenizer.name)), default=0.0)
        share, drafters = best / max(first, 1e-9), other.length / own.length
        alone = f"{own.length:.2f} | {other.length:.2f}"
        lines.append(f"| {domain} | {alone} | {share:.0%} | {drafters:.0%} | {share / drafters:.0%} |")
    return lines


def _agreed(report: Report, drafter: str, domain: str) -> Agreement:
    """In a domain, or in all."""
    found = [item for item in report.agreements if item.drafter == drafter and domain in (item.domain, _ALL)]
    return Agreement(drafter, domain, sum(item.num_tokens for item in found), sum(item.num_places for item in found))


def _totals(report: Report) -> list[Row]:
    totals: dict[tuple[str, float], Row] = {}
    for row in report.rows:
        total = totals.setdefault((row.drafter, row.temperature), Row(row.drafter, row.temperature, _ALL))
        for name in ("num_prompts", "num_equal", "num_tokens", "num_rounds", "draft_ms"):
            setattr(total, name, getattr(total, name) + getattr(row, name))
    return list(totals.values())
