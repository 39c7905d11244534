"""Where two texts part: what each side saw there, and what that says about the cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import numpy as np

from localspec import noise
from localspec.audit.rows import Prefix, RowReport
from localspec.context import Context
from localspec.engine.session import Session
from localspec.noise import Purpose
from localspec.protocols import Drafter
from localspec.ranking import top_ids
from localspec.sampling import Sampler, SamplingParams
from localspec.types import Logits, TokenIds
from localspec.verify import Acceptance, Trial, Verdict

_DEVICE = 1e-4
"""Scores that were added up on a device and on the host may differ by this much, which is no fault of a rule."""


class Cause(Enum):
    """Why two texts differ, as far as their rows tell."""

    RULE = "rule"
    ROWS = "rows"
    TIE = "tie"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class View:
    """One side's row where the texts part. logits: of (plain token, other token).  best: the two best tokens with
    their logits.  nodes: guesses in the pass.  from_fresh: largest difference from the same row in a fresh state."""

    logits: tuple[float, float]
    best: tuple[tuple[int, float], tuple[int, float]]
    nodes: int
    branched: bool
    from_fresh: float

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> View:
        """From its fields; pairs may be lists."""
        (one, two), ((first, best), (second, next_best)) = data["logits"], data["best"]
        return cls(**{**data, "logits": (one, two), "best": ((first, best), (second, next_best))})


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token that differs; a token of -1 was not seen again.

    margin: how far the plain token's score lay above the other's in the plain row, in units of logits (with a
    temperature the noise, times the temperature, counts).  apart: largest difference of two logits of the two rows.
    rounding: the largest that width alone was measured to make.
    """

    prompt: str
    drafter: str
    acceptance: str
    temperature: float
    seed: int
    index: int
    plain_token: int
    other_token: int
    cause: Cause
    margin: float
    apart: float
    rounding: float
    plain: View | None
    other: View | None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "cause": self.cause.value, "explanation": self.explanation}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Difference:
        """What `as_dict` made."""
        fields = {name: value for name, value in data.items() if name != "explanation"}
        views = {side: None if data[side] is None else View.from_dict(data[side]) for side in ("plain", "other")}
        return cls(**{**fields, **views, "cause": Cause(data["cause"])})

    @property
    def explanation(self) -> str:
        """What the numbers mean, in a sentence."""
        if self.cause is Cause.GONE or self.plain is None or self.other is None:
            return "it did not happen again when both were run once more: passes here are not reproducible"
        if self.cause is Cause.RULE:
            return (
                f"the acceptance rule {self.acceptance!r} took token {self.other_token} although the target, with the "
                f"row that the rule itself was given, chooses {self.plain_token}: the rule is lossy"
            )
        if self.cause is Cause.TIE:
            return (
                f"a tie: the two rows differ by {self.apart:.2g}, no more than width alone makes here "
                f"({self.rounding:.2g}), and that tips a margin of {self.margin:.2g}"
            )
        wrong = "speculative" if self.other.from_fresh > self.plain.from_fresh else "plain"
        shape = "tree" if self.other.branched else "chain"
        return (
            f"not rounding: the two rows differ by {self.apart:.2g}, width alone makes {self.rounding:.2g} here. A "
            f"fresh pass over the same tokens says that the {wrong} row is wrong (plain is {self.plain.from_fresh:.2g} "
            f"off; speculative, in a {shape} of {self.other.nodes} guesses, {self.other.from_fresh:.2g}): a token saw "
            f"what it must not see, or stood in the wrong place"
        )

    def line(self) -> str:
        """For people."""
        where = f"{self.prompt}, {self.drafter}, T = {self.temperature:g}, seed {self.seed}, token {self.index}"
        said = f"plain {self.plain_token}, speculative {self.other_token}, margin {self.margin:.4f}"
        return f"different: {where}: {said}; {self.explanation}"


class Witness:
    """An acceptance rule that remembers the row that decided the token at one position."""

    def __init__(self, rule: Acceptance, position: int) -> None:
        self.rule, self.position = rule, position
        self.name, self.needs_law = rule.name, rule.needs_law
        self.row: Logits | None = None
        self.token = -1
        self.nodes, self.branched = 0, False

    def chooses_winners(self, sampler: Sampler) -> bool:
        """No: it reads rows, which a pass begun early may overwrite."""
        return False

    def accept(self, trial: Trial) -> Verdict:
        """As the rule does."""
        start, read = len(trial.context), trial.row_reader()
        verdict = self.rule.accept(trial)
        place = self.position - start
        if 0 <= place < len(verdict.tokens):
            self.row, self.token = np.array(read(verdict.rows[place])), verdict.tokens[place]
            parents = verdict.tree.parent.tolist()
            self.nodes, self.branched = len(parents), len(set(parents)) < len(parents)
        return verdict


def first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    """Where two texts part; the shorter one's length if it begins the other."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def explain(
    session: Session,
    prompt: tuple[str, TokenIds],
    plain: Drafter,
    drafter: tuple[str, Drafter],
    params: SamplingParams,
    want: Sequence[int],
    got: Sequence[int],
    rows: RowReport,
) -> Difference:
    """Run both once more and look at the rows that decided. prompt: its name and tokens.

    The session is left with the drafter and the rule that it had. Needs one more sequence.
    """
    name, ids = prompt
    assert params.seed is not None
    index = first_difference(want, got)
    position = len(ids) + index
    rule = session.acceptance
    seen = []
    for one in (plain, drafter[1]):
        witness = Witness(rule, position)
        session.use(one, witness)
        seen.append((witness, session.generate(ids.tolist(), params).tokens))
    session.use(drafter[1], rule)
    (first, want_again), (second, got_again) = seen
    bound = session.exactness.bound
    tokens = first.token, second.token
    again = want_again == tuple(want) and got_again == tuple(got)
    if bound is not None and again and index < min(len(want), len(got)):  # other rows may have decided
        tokens = want[index], got[index]
    rounding = max(rows.rounding, 0.0 if bound is None else bound.tolerance.difference)
    facts = (name, drafter[0], rule.name, params.temperature, params.seed, index, *tokens)
    if not again or first.row is None or second.row is None:
        return Difference(*facts, Cause.GONE, 0.0, 0.0, rounding, None, None)
    history = np.concatenate([ids, np.array(want[:index], np.int32)])
    with Prefix(session.model, history[:-1]) as prefix:
        [fresh] = prefix.rows(history[-1:])
    context = Context(ids.tolist())
    context.start_output()
    context.extend(want[:index])
    choice = Sampler(params, params.seed).choose(second.row, context)
    apart = float(np.abs(first.row - second.row).max())
    allowed = _DEVICE if bound is None else bound.tolerance.difference
    if _margin(second.row, (choice, tokens[1]), params, position) > allowed:
        cause = Cause.RULE
    else:
        cause = Cause.TIE if apart <= rounding else Cause.ROWS
    views = [_view(witness, tokens, fresh) for witness in (first, second)]
    margin = _margin(first.row, tokens, params, position)
    return Difference(*facts, cause, margin, apart, rounding, views[0], views[1])


def _view(witness: Witness, tokens: tuple[int, int], fresh: Logits) -> View:
    row = witness.row
    assert row is not None
    best, second = (int(token) for token in top_ids(row, 2))
    return View(
        logits=(float(row[tokens[0]]), float(row[tokens[1]])),
        best=((best, float(row[best])), (second, float(row[second]))),
        nodes=witness.nodes,
        branched=witness.branched,
        from_fresh=float(np.abs(row - fresh).max()),
    )


def _margin(row: Logits, tokens: tuple[int, int], params: SamplingParams, position: int) -> float:
    """The first token's score above the second's, noise included, in units of logits."""
    assert params.seed is not None
    difference = float(row[tokens[0]] - row[tokens[1]])
    if params.temperature:
        drawn = noise.gumbel(noise.key(params.seed, Purpose.TOKEN, position), np.array(tokens, np.int32))
        difference += params.temperature * float(drawn[0] - drawn[1])
    return difference
