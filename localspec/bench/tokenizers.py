"""Real vocabularies against each other: how much they share, whether translation holds, what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from localspec.bench.prompts import Prompt
from localspec.drafters.byte_encoder import ByteEncoder
from localspec.drafters.continuation import Prefixes, continuations
from localspec.drafters.mirror import Mirror, Tail
from localspec.drafters.shape import MOST_CHILDREN
from localspec.fingerprint import Relation, Vocabulary, relate
from localspec.loading import choose_backend
from localspec.testing.alignment import fuzz

_NEW_TOKENS = 4
_ROUNDS = 200


@dataclass(frozen=True, slots=True)
class Overlap:
    """A target's vocabulary against a draft's. by_text: share of the prompts' tokens that the draft has, too."""

    target: str
    draft: str
    num_target: int
    num_draft: int
    num_shared: int
    target_share: float
    by_text: float


@dataclass(slots=True)
class Report:
    """overhead_ms: by length of context in tokens, the median time that a round spends on translation."""

    overlaps: list[Overlap] = field(default_factory=list)
    num_strings: int = 0
    num_checked: int = 0
    fuzz_seconds: float = 0.0
    overhead_ms: dict[int, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def open_vocabularies(paths: Sequence[Path], backend: str) -> dict[str, Vocabulary]:
    """By short name. Raises members of the error tree."""
    names = [path.stem.removeprefix("ggml-vocab-") for path in paths]
    return {
        name: Vocabulary(choose_backend(backend, path).open_tokenizer(path))
        for name, path in zip(names, paths, strict=True)
    }


def measure(
    vocabularies: Mapping[str, Vocabulary], prompts: Sequence[Prompt], num_strings: int, lengths: Sequence[int]
) -> Report:
    """Compare all ordered pairs; fuzz them with so many strings; time the first pair at so many tokens of context.

    Raises AssertionError where a translation loses, replaces or doubles anything.
    """
    report = Report(num_strings=num_strings)
    text = "\n".join(prompt.text or str(prompt.messages[0]["content"] if prompt.messages else "") for prompt in prompts)
    counts = {
        name: Counter(vocabulary.tokenizer.encode(text, special=False).tolist())
        for name, vocabulary in vocabularies.items()
    }
    relations = []
    for target, mine in vocabularies.items():
        for draft, other in vocabularies.items():
            if mine is not other:
                relation = relate(mine, other)
                relations.append(relation)
                report.overlaps.append(
                    Overlap(
                        target,
                        draft,
                        len(mine),
                        len(other),
                        relation.num_shared,
                        relation.target_share,
                        relation.coverage(counts[target]),
                    )
                )
    started = perf_counter()
    if num_strings:
        report.num_checked = fuzz(list(vocabularies.values()), relations, num_strings)
        report.fuzz_seconds = perf_counter() - started
    for length in lengths:
        report.overhead_ms[length] = overhead_ms(relations[0], text, length)
    return report


def overhead_ms(relation: Relation, text: str, length: int) -> float:
    """Median milliseconds that a round spends outside models behind `length` tokens of context: taking in four
    tokens, choosing among the first ones of a guess, and encoding it token by token."""
    own = relation.target.tokenizer.encode(text, special=False)
    tokens = np.resize(own, length + _NEW_TOKENS * _ROUNDS).astype(np.int32)
    mirror, encoder = Mirror(relation), ByteEncoder(relation.target)
    mirror.begin(tokens[:length])
    prefixes = Prefixes(relation.draft)
    rows = np.random.default_rng(0).normal(size=(3, len(relation.draft))).astype(np.float32)
    times = []
    for end in range(length + _NEW_TOKENS, len(tokens), _NEW_TOKENS):
        guess = b"".join(relation.target.texts[token] for token in tokens[end : end + _NEW_TOKENS].tolist())
        started = perf_counter()
        mirror.follow(tokens[:end])
        continuations(rows, mirror.ids[-2:], relation.draft.texts, prefixes, MOST_CHILDREN)
        tail = Tail(mirror, encoder, tokens[:end])
        for part in range(1, _NEW_TOKENS + 2):
            tail.encode(guess[: part * len(guess) // (_NEW_TOKENS + 1)])
        times.append((perf_counter() - started) * 1e3)
    return float(np.median(times))


def table(report: Report) -> str:
    """Markdown."""
    lines = [
        "| target | tokens | draft | tokens | shared | of the target's tokens | of the tokens of text |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.target} | {row.num_target:,} | {row.draft} | {row.num_draft:,} | {row.num_shared:,} "
        f"| {row.target_share:.0%} | {row.by_text:.1%} |"
        for row in report.overlaps
    ]
    if report.num_checked:
        steps = f"each on all {len(report.overlaps)} ordered pairs, {report.num_checked:,} steps of translation"
        lines += ["", f"{report.num_strings:,} random strings, {steps}: nothing lost, replaced or doubled"]
        lines += ["", f"checked in {report.fuzz_seconds:.0f} s"]
    if report.overhead_ms:
        costs = ", ".join(f"{value:.3f} ms at {length:,} tokens" for length, value in report.overhead_ms.items())
        lines += ["", f"translation per round, models left out: {costs}"]
    return "\n".join(lines)
