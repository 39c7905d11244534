"""Does rejection sampling write what the target would? A test on every token of real answers.

Behind each prefix of an answer the target's own row gives the law p that plain decoding would have drawn the next
token from. A token drawn from p, its law laid out from the likeliest token to the least likely, falls uniformly on
[0, 1] (the randomised probability integral transform: within its own share of the law a place is drawn). So all
places of all tokens together must be uniform, whatever was drafted; chi-square over twenty bins asks whether they
are. A rule that takes likely tokens too readily crowds the first bins, one that forgets the residual the last.

Source: ours, from Rosenblatt (1952) and Brockwell (2007); the order by likelihood makes lossy acceptance show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from localspec.types import TokenIds
from localspec.verify import Acceptance

NUM_BINS = 20
LEVEL = 1e-3
POWER = 0.99
MIN_TOKENS = 10 * NUM_BINS
"""Fewer leave less than ten to a bin: the test then says nothing."""


@dataclass(slots=True)
class DistributionTest:
    """One drafter at one temperature. bins: tokens per place.  greedy: what share of them would lie there if the best
    token were always taken.  impossible: tokens that the target's law does not hold at all."""

    drafter: str
    temperature: float
    acceptance: str
    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    impossible: int = 0
    bins: list[int] = field(default_factory=lambda: [0] * NUM_BINS)
    greedy: list[float] = field(default_factory=lambda: [0.0] * NUM_BINS)

    def add(self, law: Law, token: int, chance: float) -> None:
        """Count a token; chance: drawn from (0, 1), its place within its own share."""
        order = np.argsort(-law.probs, kind="stable")
        ids, ends = law.ids[order], np.cumsum(law.probs[order])
        self.num_tokens += 1
        best = float(ends[0])
        for bin_ in range(NUM_BINS):
            inside = min(best, (bin_ + 1) / NUM_BINS) - bin_ / NUM_BINS
            self.greedy[bin_] += max(inside, 0.0) / best
        hits = np.flatnonzero(ids == token)
        if not len(hits):
            self.impossible += 1
            return
        place = int(hits[0])
        start = float(ends[place - 1]) if place else 0.0
        at = start + chance * (float(ends[place]) - start)
        self.bins[min(int(at * NUM_BINS), NUM_BINS - 1)] += 1

    @property
    def enough(self) -> bool:
        """Were there tokens enough, and drafted ones among them?"""
        return self.num_tokens >= MIN_TOKENS and self.num_drafted > 0

    @property
    def p_value(self) -> float:
        """Chance of bins as uneven as these, or more, if every token were drawn from its law."""
        if self.impossible:
            return 0.0
        expected = self.num_tokens / NUM_BINS
        return chi_square_tail(sum((count - expected) ** 2 for count in self.bins) / expected, NUM_BINS - 1)

    @property
    def smallest_leak(self) -> float:
        """The share of tokens that, taken greedily instead of drawn, would be noticed with chance POWER."""
        if not self.num_tokens:
            return 1.0
        uneven = sum((mass / self.num_tokens * NUM_BINS - 1) ** 2 for mass in self.greedy) / NUM_BINS
        return min(1.0, math.sqrt(shift_for_power(LEVEL, NUM_BINS - 1, POWER) / (self.num_tokens * uneven)))

    @property
    def passed(self) -> bool:
        """Nothing speaks against the rule. `enough` says whether that means much."""
        return self.p_value >= LEVEL

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        facts = {name: getattr(self, name) for name in ("enough", "p_value", "smallest_leak", "passed")}
        return {**asdict(self), **facts, "level": LEVEL, "power": POWER}

    def line(self) -> str:
        """For people."""
        if not self.enough:
            return (
                f"{self.num_tokens} tokens with {self.num_drafted} guesses are too few to test; at least "
                f"{MIN_TOKENS} with some guesses are needed"
            )
        text = f"{self.num_tokens} tokens, p = {self.p_value:.2g}"
        if self.impossible:
            text += f", {self.impossible} of them impossible under the target's law"
        return f"{text}; {self.smallest_leak:.0%} of tokens taken greedily would have been noticed in 99 of 100 runs"


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
    session.use(drafter[1], acceptance)
    for prompt in prompts:
        ids = prompt.encode(session.model.tokenizer)
        with Prefix(session.model, ids[:-1]) as prefix:
            for number in range(num_seeds):
                one = replace(params, seed=params.seed + number, ignore_eos=True)
                answer = session.generate(ids.tolist(), one)
                test.num_drafted += answer.stats.num_drafted
                test.num_accepted += answer.stats.num_accepted
                _count(test, prefix, ids, np.array(answer.tokens, np.int32), one, places)
                on_answer()
    return test


def _count(
    test: DistributionTest,
    prefix: Prefix,
    prompt: TokenIds,
    answer: TokenIds,
    params: SamplingParams,
    places: np.random.Generator,
) -> None:
    rows = prefix.rows(np.concatenate([prompt[-1:], answer[:-1]]))
    sampler = Sampler(params, 0)
    context = Context(prompt.tolist())
    context.start_output()
    for row, token in zip(rows, answer.tolist(), strict=True):
        test.add(sampler.law(row, context), token, float(places.random()))
        context.append(token)
