"""JSON by random schemas: is it always valid, is it the text of plain decoding, and what is accepted under it?"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from localspec.bench.schemas import Schema, random_schemas
from localspec.constraint import Grammar
from localspec.drafters import Nothing
from localspec.engine.answer import Generation
from localspec.engine.prefix import encode_prompt
from localspec.engine.template import render
from localspec.errors import BackendMissingError
from localspec.pair import Pair
from localspec.protocols import Tokenizer
from localspec.sampling import SamplingParams
from localspec.types import TokenIds

PLAIN = Nothing.name
FREE_EVERY = 4


@dataclass(slots=True)
class Row:
    """One drafter at one temperature. num_valid: answers that a validator of its own accepts.  num_cut_off: that ran
    into the limit, and were reported so.  num_equal: whose tokens are those of plain decoding under the same grammar.
    tokens and rounds: (with the grammar, without it)."""

    drafter: str
    temperature: float
    num_schemas: int = 0
    num_valid: int = 0
    num_cut_off: int = 0
    num_equal: int = 0
    num_tokens: list[int] = field(default_factory=lambda: [0, 0])
    num_rounds: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, place: int, answer: Generation) -> None:
        """Count an answer with the grammar (0) or without (1)."""
        self.num_tokens[place] += answer.stats.num_tokens
        self.num_rounds[place] += answer.stats.num_rounds

    def length(self, place: int) -> float:
        """Accepted length, the bonus counted: with the grammar (0), without (1)."""
        return self.num_tokens[place] / max(self.num_rounds[place], 1)


@dataclass(slots=True)
class Report:
    """All rows. wrong: what was not valid although it was said to be complete, or not equal."""

    target: str
    max_tokens: int
    rows: list[Row] = field(default_factory=list)
    wrong: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def measure(
    pair: Pair,
    num_schemas: int,
    drafters: Sequence[str],
    temperatures: Sequence[float],
    max_tokens: int,
    on_schema: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Answer each schema plainly and with each drafter, and one in four once more without the grammar."""
    info = pair.target.info
    report = Report(f"{info.name} {info.quantization} on {info.backend}, {info.device}", max_tokens)
    rows = {(name, value): Row(name, value) for value in temperatures for name in drafters}
    report.rows = list(rows.values())
    with ExitStack() as stack:
        sessions = {name: stack.enter_context(pair.session(name)) for name in dict.fromkeys((PLAIN, *drafters))}
        for number, schema in enumerate(random_schemas(num_schemas)):
            prompt = _prompt(pair.target.tokenizer, schema).tolist()
            for temperature in temperatures:
                free = SamplingParams(temperature=temperature, seed=number, max_tokens=max_tokens)
                held = replace(free, grammar=Grammar.json_schema(schema))
                plain = sessions[PLAIN].generate(prompt, held)
                for name in drafters:
                    row = rows[name, temperature]
                    answer = sessions[name].generate(prompt, held)
                    _count(row, report, schema, plain, answer)
                    row.add(0, answer)
                    if number % FREE_EVERY == 0:
                        row.add(1, sessions[name].generate(prompt, free))
            on_schema(report)
    return report


def _prompt(tokenizer: Tokenizer, schema: Schema) -> TokenIds:
    text = f"Answer with an example in JSON of this schema: {json.dumps(schema, ensure_ascii=False)}"
    if tokenizer.chat_template is not None:
        text = render(tokenizer, [{"role": "user", "content": text}])
    return encode_prompt(tokenizer, text)


def _count(row: Row, report: Report, schema: Schema, plain: Generation, held: Generation) -> None:
    row.num_schemas += 1
    row.num_cut_off += held.complete is False
    equal, valid = held.tokens == plain.tokens, is_valid(held.text, schema)
    row.num_equal += equal
    row.num_valid += valid
    if not equal or (held.complete and not valid):
        report.wrong.append({"schema": schema, "text": held.text, "plain": plain.text, "drafter": row.drafter})


def is_valid(text: str, schema: Schema) -> bool:
    """Does a validator that shares nothing with what made the text accept it? Raises BackendMissingError if there is
    none."""
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        raise BackendMissingError("jsonschema is not installed", fix='pip install "localspec[bench]".') from None
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return bool(Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).is_valid(value))


def table(report: Report) -> str:
    """Markdown."""
    lines = [
        f"target: {report.target}; random JSON schemas, {report.max_tokens} tokens at most per answer",
        "accepted length: tokens emitted per round, the bonus counted",
        "",
        "| T | drafter | schemas | valid | cut off, and said so | equal to plain | accepted length | without grammar |",
        "|---" * 8 + "|",
    ]
    lines += [
        f"| {row.temperature:g} | {row.drafter} | {row.num_schemas} | {row.num_valid} | {row.num_cut_off} "
        f"| {row.num_equal} | {row.length(0):.2f} | {row.length(1):.2f} |"
        for row in report.rows
    ]
    return "\n".join(lines)
