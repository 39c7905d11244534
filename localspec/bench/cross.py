"""A draft model of another tokenizer against one of the target's own: accepted length, and what of the gap is
the drafter's and what the tokenizer's."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from localspec.bench.prompts import Prompt
from localspec.drafters import make_drafter
from localspec.engine.session import Session
from localspec.errors import UsageError
from localspec.fingerprint import Vocabulary
from localspec.loading import Pair
from localspec.protocols import HostTokens, LanguageModel, Step, chain_parents
from localspec.sampling import SamplingParams
from localspec.types import TokenIds

OWN = "same tokenizer"
_WINDOW = 16
_PLACES = 4
_ALL = "all"


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
class Report:
    """All rows; by domain, the bytes that each of the two drafters agrees with the target in."""

    target: str
    own: str
    other: str
    relation: str
    rows: list[Row] = field(default_factory=list)
    agreement: dict[str, dict[str, float]] = field(default_factory=dict)

    def row(self, drafter: str, temperature: float, domain: str) -> Row:
        """The row of these three, made at its first use."""
        for row in self.rows:
            if (row.drafter, row.temperature, row.domain) == (drafter, temperature, domain):
                return row
        self.rows.append(Row(drafter, temperature, domain))
        return self.rows[-1]

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
    on_prompt: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Decode every prompt plainly, with the pair's own draft model and with `other`, as each of `drafters`.

    Raises UsageError without a draft model of the target's own tokenizer.
    """
    if pair.draft is None or pair.drafting is None or not pair.drafting.relation.same:
        raise UsageError(
            "the comparison needs a draft model of the target's own tokenizer", fix="Name it with --draft."
        )
    crossed = Pair(pair.target, other)
    assert crossed.drafting is not None
    report = Report(pair.target.info.name, pair.draft.info.name, other.info.name, str(crossed.drafting.relation))
    makers = {}
    for spec in drafters:
        crossing = spec.startswith("cross_tokenizer")
        makers[spec if crossing else f"{OWN}, {spec}"] = make_drafter(
            spec, crossed.drafting if crossing else pair.drafting
        )
    bytes_same: dict[str, dict[str, list[int]]] = {}
    with pair.session("nothing") as session:
        plain = session.drafter
        for prompt in prompts:
            tokens = prompt.encode(pair.target.tokenizer)
            for temperature in temperatures:
                params = SamplingParams(
                    temperature=temperature, seed=zlib.crc32(prompt.id.encode()), max_tokens=max_tokens
                )
                session.use(plain)
                want = session.generate(tokens.tolist(), params).tokens
                for name, drafter in makers.items():
                    session.use(drafter)
                    _add(report.row(name, temperature, prompt.domain), session, tokens, params, want)
                if temperature == 0.0:
                    for name, model in ((OWN, pair.draft), ("other tokenizer", other)):
                        found = bytes_same.setdefault(prompt.domain, {}).setdefault(name, [0, 0])
                        same, places = agreement(pair.target, model, tokens, want)
                        found[0], found[1] = found[0] + same, found[1] + places
            report.agreement = {
                domain: {name: same / max(places, 1) for name, (same, places) in found.items()}
                for domain, found in bytes_same.items()
            }
            on_prompt(report)
    for drafter in makers.values():
        drafter.close()
    return report


def _add(row: Row, session: Session, tokens: TokenIds, params: SamplingParams, want: Sequence[int]) -> None:
    result = session.generate(tokens.tolist(), params)
    row.num_prompts += 1
    row.num_equal += result.tokens == want
    row.num_tokens += result.stats.num_tokens
    row.num_rounds += result.stats.num_rounds
    row.draft_ms += result.stats.draft_ms


def agreement(target: LanguageModel, model: LanguageModel, prompt: TokenIds, answer: Sequence[int]) -> tuple[int, int]:
    """(bytes, places): at some word starts of the target's text the model reads what stands before, in its own
    tokens, and writes on greedily; how many of the next bytes are the target's, summed over the places.

    No boundary of the target's tokens is involved, so this is the drafter's part alone.
    """
    texts = Vocabulary(target.tokenizer).texts
    before = b"".join(texts[token] for token in prompt.tolist())
    text = b"".join(texts[token] for token in answer)
    starts = [at for at in range(1, len(text) - _WINDOW) if text[at] == 32 and not text[at - 1 : at].isspace()]
    places = starts[:: max(len(starts) // _PLACES, 1)][:_PLACES]
    return sum(_same_bytes(model, before + text[:at], text[at : at + _WINDOW]) for at in places), len(places)


def _same_bytes(model: LanguageModel, before: bytes, want: bytes) -> int:
    """How many bytes of `want` the model writes greedily behind `before`."""
    tokenizer = model.tokenizer
    ids = tokenizer.encode(before.decode(errors="replace"), special=True)
    ids = ids[-model.info.context_length + _WINDOW :]
    state = model.open()
    found = b""
    try:
        while len(found) < len(want) and want.startswith(found):
            parents = chain_parents(state, len(ids))
            [scores] = model.forward([Step(state, (HostTokens(ids),), parents, (len(ids) - 1,))])
            ids = scores.argmax().numpy()
            state.keep(range(len(parents)))
            piece = tokenizer.token_bytes(int(ids[0]))
            if not piece or tokenizer.is_special(int(ids[0])):
                break
            found += piece
    finally:
        state.close()
    same = 0
    while same < min(len(found), len(want)) and found[same] == want[same]:
        same += 1
    return same


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
    for domain, values in report.agreement.items():
        words = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
        lines += ["", f"{domain}: of the target's next {_WINDOW} bytes each drafter alone writes greedily: {words}"]
    return "\n".join(lines)


def _totals(report: Report) -> list[Row]:
    totals: dict[tuple[str, float], Row] = {}
    for row in report.rows:
        total = totals.setdefault((row.drafter, row.temperature), Row(row.drafter, row.temperature, _ALL))
        for name in ("num_prompts", "num_equal", "num_tokens", "num_rounds", "draft_ms"):
            setattr(total, name, getattr(total, name) + getattr(row, name))
    return list(totals.values())
