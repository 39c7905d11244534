"""Is text under speculation the text of plain decoding? Compared token for token, differences with margin."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from localspec.bench.prompts import Prompt
from localspec.drafters import make_drafter
from localspec.engine.session import Generation
from localspec.engine.width import pad
from localspec.errors import SettingError
from localspec.loading import Pair
from localspec.protocols import HostTokens, Step, chain_parents
from localspec.ranking import top_ids
from localspec.sampling import SamplingParams
from localspec.types import TokenIds


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two texts part: the first differing token, and how close the target's decision was.

    margin: difference of the two best raw logits at that place, as decoded plainly.
    """

    prompt: str
    drafter: str
    temperature: float
    index: int
    plain_token: int
    other_token: int
    margin: float


@dataclass(slots=True)
class Row:
    """Counts of one drafter at one temperature."""

    drafter: str
    temperature: float
    domain: str
    num_prompts: int = 0
    num_equal: int = 0
    num_tokens: int = 0
    num_rounds: int = 0

    def add(self, result: Generation, want: Sequence[int]) -> None:
        """Count one run; want: what plain decoding said."""
        self.num_prompts += 1
        self.num_equal += result.tokens == want
        self.num_tokens += result.stats.num_tokens
        self.num_rounds += result.stats.num_rounds


@dataclass(slots=True)
class Report:
    """All rows and every difference. evidence: how the width class was found.  runs: what was asked for.
    num_done: prompts that are in it."""

    target: str
    width_class: str
    evidence: str = ""
    runs: str = ""
    num_done: int = 0
    rows: list[Row] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def num_different(self) -> int:
        """Runs whose text was not that of plain decoding."""
        return len(self.differences)

    @property
    def all_equal(self) -> bool:
        """Something was compared, and nothing differed."""
        return bool(self.rows) and not self.differences

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """What `as_dict` made."""
        parts = {"rows": [Row(**row) for row in data["rows"]]}
        return cls(**{**data, **parts, "differences": [Difference(**item) for item in data["differences"]]})


def compare(
    pair: Pair,
    prompts: Sequence[Prompt],
    drafters: Sequence[str],
    temperatures: Sequence[float],
    max_tokens: int,
    on_prompt: Callable[[Report], None] = lambda report: None,
    begun: Report | None = None,
) -> Report:
    """Run every prompt plainly and with each drafter, same seed; the seed differs per prompt.

    One session serves all, so a prompt is prefilled once. on_prompt: called with the report so far after
    each prompt: a long run that is cut off has not been for nothing.  begun: such a report, to go on from.
    Raises SettingError where that one is of another run.
    """
    info = pair.target.info
    classes = pair.target.capabilities.width_class
    target = f"{info.name} {info.quantization} on {info.backend}, {info.device}"
    report = Report(target, str(classes), classes.evidence)
    draft = "no draft model" if pair.draft is None else f"{pair.draft.info.name} {pair.draft.info.quantization}"
    named = hashlib.sha256(" ".join(prompt.id for prompt in prompts).encode()).hexdigest()[:8]
    report.runs = f"{draft}; {', '.join(drafters)}; T {list(temperatures)}; {max_tokens} tokens; prompts {named}"
    if begun is not None:
        if (begun.target, begun.width_class, begun.runs) != (report.target, report.width_class, report.runs):
            got, expected = f"{begun.target}; {begun.runs}", f"{report.target}; {report.runs}"
            raise SettingError("the run to go on with was another one", got=got, expected=expected)
        report = begun
    makers = {name: make_drafter(name, pair.drafting) for name in drafters}
    with ExitStack() as stack:
        for drafter in makers.values():
            stack.callback(drafter.close)
        session = stack.enter_context(pair.session("nothing"))
        plain = session.drafter
        for number, prompt in list(enumerate(prompts))[report.num_done :]:
            tokens = prompt.encode(pair.target.tokenizer)
            for temperature in temperatures:
                params = SamplingParams(temperature=temperature, seed=1000 + number, max_tokens=max_tokens)
                session.use(plain)
                want = session.generate(tokens.tolist(), params).tokens
                for name, drafter in makers.items():
                    session.use(drafter)
                    result = session.generate(tokens.tolist(), params)
                    _row(report, name, temperature, prompt.domain).add(result, want)
                    if result.tokens != want:
                        report.differences.append(_difference(pair, prompt, tokens, name, temperature, want, result))
            report.num_done = number + 1
            on_prompt(report)
    report.rows.sort(key=lambda row: (row.drafter, row.temperature))
    return report


def _row(report: Report, drafter: str, temperature: float, domain: str) -> Row:
    """The row of these three, made at its first use."""
    for row in report.rows:
        if (row.drafter, row.temperature, row.domain) == (drafter, temperature, domain):
            return row
    report.rows.append(Row(drafter, temperature, domain))
    return report.rows[-1]


def _difference(
    pair: Pair,
    prompt: Prompt,
    tokens: TokenIds,
    drafter: str,
    temperature: float,
    want: Sequence[int],
    result: Generation,
) -> Difference:
    part = _first_difference(want, result.tokens)
    return Difference(
        prompt.id,
        drafter,
        temperature,
        part,
        want[part] if part < len(want) else -1,
        result.tokens[part] if part < len(result.tokens) else -1,
        _margin(pair, np.concatenate([tokens, np.array(want[:part], np.int32)])),
    )


def _first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def _margin(pair: Pair, tokens: TokenIds) -> float:
    """Best minus second-best raw logit after these tokens."""
    state = pair.target.open()
    try:
        step = Step(state, (HostTokens(tokens),), chain_parents(state, len(tokens)), (len(tokens) - 1,))
        [scores] = pair.target.forward([pad(step, pair.target.capabilities.width_class)])
        row = scores.rows((0,))[0]
        best, second = top_ids(row, 2)
        return float(row[best] - row[second])
    finally:
        state.close()


def table(report: Report) -> str:
    """Markdown."""
    lines = [
        f"target: {report.target}; width class: {report.width_class}",
        *([f"evidence for the width class: {report.evidence}"] if report.evidence else []),
        "",
        "| drafter | T | domain | prompts | text equals plain | tokens per round (bonus counted) |",
        "|---|---|---|---|---|---|",
    ]
    for row in report.rows:
        length = row.num_tokens / row.num_rounds if row.num_rounds else 0.0
        equal = f"{row.num_equal} of {row.num_prompts}"
        lines.append(
            f"| {row.drafter} | {row.temperature:g} | {row.domain} | {row.num_prompts} | {equal} | {length:.2f} |"
        )
    total, equal_runs = sum(r.num_prompts for r in report.rows), sum(r.num_equal for r in report.rows)
    lines += ["", f"{equal_runs} of {total} runs equal plain decoding token for token."]
    for d in report.differences:
        lines.append(
            f"different: {d.prompt}, {d.drafter}, T = {d.temperature:g}, token {d.index}: plain {d.plain_token}, "
            f"speculative {d.other_token}, margin of the two best logits {d.margin:.4f}"
        )
    return "\n".join(lines)
