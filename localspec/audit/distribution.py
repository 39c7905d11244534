"""Does rejection sampling write what the target would? Two tests on every token of real answers.

Behind each prefix of an answer the target's own row gives the law p that plain decoding would have drawn the next
token from. Lay the law out in any order that was fixed before the draw: a token drawn from p falls uniformly on
[0, 1] (the randomised probability integral transform: within its own share of the law a place is drawn). So all
places of all tokens together must be uniform, whatever was drafted; chi-square over twenty bins asks whether they
are. The order decides which mistakes show: the likeliest first, for rules that take likely tokens too readily; what
the drafter overrates first (by q / p), for rules that take guesses too readily or forget the residual.

Source: ours, from Rosenblatt (1952) and Brockwell (2007).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from localspec.audit.rows import Prefix
from localspec.audit.statistics import chi_square_tail, shift_for_power
from localspec.bench.prompts import Prompt
from localspec.context import Context
from localspec.engine.session import Session
from localspec.protocols import Drafter
from localspec.sampling import Law, Sampler, SamplingParams
from localspec.types import Probabilities, TokenIds
from localspec.verify import Acceptance, Trial, Verdict

NUM_BINS = 20
LEVEL = 1e-3
POWER = 0.99
_GRID = np.linspace(0.0, 1.0, NUM_BINS + 1)
MIN_TOKENS = 10 * NUM_BINS
"""Fewer leave less than ten to a bin: the test then says nothing."""


@dataclass(slots=True)
class Places:
    """Where tokens fell in one order of their laws. wrong: the mistake that it shows.  bins: tokens per place.
    mistaken: how many would lie there if that mistake were always made.  impossible: tokens that the target's law
    does not hold at all."""

    order: str
    wrong: str
    bins: list[int] = field(default_factory=lambda: [0] * NUM_BINS)
    mistaken: list[float] = field(default_factory=lambda: [0.0] * NUM_BINS)
    num_tokens: int = 0
    impossible: int = 0

    def add(self, law: Law, keys: Probabilities, mistake: Probabilities, token: int, chance: float) -> None:
        """Count a token. keys [K]: what the law is ordered by, largest first.  mistake [K]: the law of the mistake.
        chance: drawn from (0, 1), the token's place within its own share."""
        order = np.argsort(-keys, kind="stable")
        ends = np.cumsum(law.probs[order])
        self.num_tokens += 1
        masses = np.interp(_GRID, np.append(0.0, ends), np.append(0.0, np.cumsum(mistake[order])))
        for bin_, mass in enumerate(np.diff(masses).tolist()):
            self.mistaken[bin_] += mass
        hits = np.flatnonzero(law.ids[order] == token)
        if not len(hits):
            self.impossible += 1
            return
        place = int(hits[0])
        start = float(ends[place - 1]) if place else 0.0
        at = start + chance * (float(ends[place]) - start)
        self.bins[min(int(at * NUM_BINS), NUM_BINS - 1)] += 1

    @property
    def p_value(self) -> float:
        """Chance of bins as uneven as these, or more, if every token were drawn from its law."""
        if self.impossible:
            return 0.0
        expected = self.num_tokens / NUM_BINS
        return chi_square_tail(sum((count - expected) ** 2 for count in self.bins) / expected, NUM_BINS - 1)

    @property
    def smallest_leak(self) -> float:
        """The share of tokens that, taken by mistake, would be noticed with chance POWER; 1 where none would."""
        total = sum(self.mistaken)
        uneven = sum((mass / total * NUM_BINS - 1) ** 2 for mass in self.mistaken) / NUM_BINS if total else 0.0
        if not uneven:
            return 1.0
        return min(1.0, math.sqrt(shift_for_power(LEVEL, NUM_BINS - 1, POWER) / (self.num_tokens * uneven)))

    @property
    def enough(self) -> bool:
        """Were there tokens enough?"""
        return self.num_tokens >= MIN_TOKENS

    def line(self) -> str:
        """For people."""
        if not self.enough:
            return f"{self.order}: {self.num_tokens} tokens are too few to test, at least {MIN_TOKENS} are needed"
        text = f"{self.order}: {self.num_tokens} tokens, p = {self.p_value:.2g}"
        if self.impossible:
            text += f", {self.impossible} of them impossible under the target's law"
        return f"{text} ({self.smallest_leak:.0%} of tokens {self.wrong} would show in 99 of 100 runs)"


@dataclass(slots=True)
class DistributionTest:
    """One drafter at one temperature."""

    drafter: str
    temperature: float
    acceptance: str
    num_drafted: int = 0
    num_accepted: int = 0
    likely: Places = field(default_factory=lambda: Places("likeliest first", "taken greedily"))
    overrated: Places = field(
        default_factory=lambda: Places("overrated by the drafter first", "guessed and not tested")
    )

    def add(self, law: Law, token: int, chance: float, guessed: Law | None) -> None:
        """Count a token; guessed: the drafter's law for its place, None where nothing was guessed."""
        best = np.zeros(len(law.ids))
        best[int(law.probs.argmax())] = 1.0
        self.likely.add(law, law.probs, best, token, chance)
        if guessed is not None:
            q = np.zeros(len(law.ids))
            known = np.isin(guessed.ids, law.ids)
            order = np.argsort(law.ids)
            q[order[np.searchsorted(law.ids[order], guessed.ids[known])]] = guessed.probs[known]
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.nan_to_num(q / law.probs, nan=0.0)
            self.overrated.add(law, ratio, q, token, chance)

    @property
    def parts(self) -> tuple[Places, Places]:
        """Both orders."""
        return self.likely, self.overrated

    @property
    def enough(self) -> bool:
        """Were there tokens enough, and guesses among them?"""
        return all(part.enough for part in self.parts)

    @property
    def passed(self) -> bool:
        """Nothing speaks against the rule. `enough` says whether that means much."""
        return all(part.impossible == 0 and (not part.enough or part.p_value >= LEVEL) for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        facts = asdict(self)
        for name, part in (("likely", self.likely), ("overrated", self.overrated)):
            facts[name] |= {"p_value": part.p_value if part.num_tokens else None, "smallest_leak": part.smallest_leak}
        return {**facts, "enough": self.enough, "passed": self.passed, "level": LEVEL, "power": POWER}

    def line(self) -> str:
        """For people."""
        return "; ".join(part.line() for part in self.parts)


class Ledger:
    """An acceptance rule that remembers the drafter's law at every position that a token was emitted at."""

    def __init__(self, rule: Acceptance) -> None:
        self.rule, self.name, self.needs_law = rule, rule.name, rule.needs_law
        self.laws: dict[int, Law] = {}

    def chooses_winners(self, sampler: Sampler) -> bool:
        """No: it reads rows, which a pass begun early may overwrite."""
        return False

    def accept(self, trial: Trial) -> Verdict:
        """As the rule does."""
        start, laws = len(trial.context), trial.proposal.laws
        verdict = self.rule.accept(trial)
        for place, row in enumerate(verdict.rows):
            children = verdict.tree.children(row - 1)
            if len(children):
                first = int(children[0])  # the law of later siblings knows what the first one was
                sure = Law(verdict.tree.token[[first]], np.ones(1))
                self.laws[start + place] = laws[first] if laws is not None else sure
        return verdict


def run_test(
    session: Session,
    prompts: Sequence[Prompt],
    drafter: tuple[str, Drafter],
    acceptance: Acceptance,
    params: SamplingParams,
    num_seeds: int,
    on_answer: Callable[[], None] = lambda: None,
) -> DistributionTest:
    """Write an answer to every prompt with every seed, and test all tokens. Needs one sequence besides the session's.

    params: temperature above 0; its seed is the first of `num_seeds`.
    """
    assert params.temperature > 0.0 and params.seed is not None
    test = DistributionTest(drafter[0], params.temperature, acceptance.name)
    places = np.random.default_rng(params.seed)
    ledger = Ledger(acceptance)
    session.use(drafter[1], ledger)
    for prompt in prompts:
        ids = prompt.encode(session.model.tokenizer)
        with Prefix(session.model, ids[:-1]) as prefix:
            for number in range(num_seeds):
                one = replace(params, seed=params.seed + number, ignore_eos=True)
                ledger.laws.clear()
                answer = session.generate(ids.tolist(), one)
                test.num_drafted += answer.stats.num_drafted
                test.num_accepted += answer.stats.num_accepted
                _count(test, prefix, ids, np.array(answer.tokens, np.int32), one, places, ledger.laws)
                on_answer()
    return test


def _count(
    test: DistributionTest,
    prefix: Prefix,
    prompt: TokenIds,
    answer: TokenIds,
    params: SamplingParams,
    places: np.random.Generator,
    guessed: Mapping[int, Law],
) -> None:
    rows = prefix.rows(np.concatenate([prompt[-1:], answer[:-1]]))
    sampler = Sampler(params, 0)
    context = Context(prompt.tolist())
    context.start_output()
    for row, token in zip(rows, answer.tolist(), strict=True):
        test.add(sampler.law(row, context), token, float(places.random()), guessed.get(len(context)))
        context.append(token)
