"""The audit of one opened pair: its rows, its texts, and under rejection its distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from localspec.audit.distribution import DistributionTest, run_test
from localspec.audit.report import Part, Plan
from localspec.audit.rows import measure_rows
from localspec.bench.equality import Report, compare
from localspec.drafters import DraftModel
from localspec.exactness import AUTO as AUTO_EXACT
from localspec.exactness import Mode
from localspec.pair import Pair
from localspec.sampling import SamplingParams
from localspec.verify import make_acceptance

Tell = Callable[[str, int, int], None]
"""Told what is done, how much of it, and how much there is."""

_NUM_TEXTS = 3  # whose rows are compared


def default_drafters(pair: Pair) -> tuple[str, ...]:
    """What is audited when nothing is named: chains, lookup, trees and their combination; of heads, too."""
    lookup = "ngram:min=1"
    own = [DraftModel.name] if pair.draft is not None else []
    names = [*own, *(head.info.kind for head in pair.heads)]
    branching = [*own, *(head.info.kind for head in pair.heads if head.info.trees)]
    trees = tuple(f"{name}:num=8,shape=tree" for name in branching)
    return (*names, lookup, *trees, *(f"{tree}+{lookup}" for tree in trees[:1]))


def audit_part(pair: Pair, drafters: Sequence[str], plan: Plan, tell: Tell = lambda what, done, total: None) -> Part:
    """Audit these drafters on the pair as it is loaded. Needs two free sequences of the target beside the sessions'."""
    model = pair.target
    texts = [prompt.encode(model.tokenizer) for prompt in plan.prompts]
    tell("rows", 0, 1)
    part = Part.of(model, drafters, measure_rows(model, texts[:_NUM_TEXTS]), pair.exactness(plan.exact))
    if "walk" in plan.acceptances:
        part.walk = _compare(pair, drafters, plan, "walk", plan.temperatures, part, tell)
    if "rejection" in plan.acceptances:
        if 0.0 in plan.temperatures:
            part.rejection = _compare(pair, drafters, plan, "rejection", [0.0], part, tell)
        part.distributions = _distributions(pair, drafters, plan, tell)
    return part


def _compare(
    pair: Pair, drafters: Sequence[str], plan: Plan, rule: str, temperatures: Sequence[float], part: Part, tell: Tell
) -> Report:
    done = 0

    def count(_: Report) -> None:
        nonlocal done
        done += 1
        tell(f"texts, {rule}", done, len(plan.prompts))

    return compare(
        pair,
        plan.prompts,
        drafters,
        temperatures,
        plan.max_tokens,
        count,
        num_seeds=plan.num_seeds,
        acceptance=rule,
        exact=_exact(plan, rule),
        known=part.rows,
    )


def _exact(plan: Plan, rule: str) -> str:
    """What sessions under a rule promise: there is nothing to guard in one that is equal in distribution only."""
    guarded = plan.exact == Mode.GUARDED.value and make_acceptance(rule).needs_law
    return AUTO_EXACT if guarded else plan.exact


def _distributions(pair: Pair, drafters: Sequence[str], plan: Plan, tell: Tell) -> list[DistributionTest]:
    rule, tests, done = make_acceptance("rejection"), [], 0
    warm = [temperature for temperature in plan.temperatures if temperature]
    total = len(warm) * len(drafters) * len(plan.prompts) * plan.num_seeds

    def count() -> None:
        nonlocal done
        done += 1
        tell("distribution, rejection", done, total)

    exact = _exact(plan, rule.name)
    with pair.session("nothing", acceptance=rule.name, exact=exact) as session:
        plain = session.drafter
        for name in drafters:
            drafter = pair.drafter(name, exact=exact, acceptance=rule.name)
            try:
                for number, temperature in enumerate(warm):
                    params = SamplingParams(temperature=temperature, seed=50_000 + number, max_tokens=plan.max_tokens)
                    named = (name, drafter)
                    tests.append(run_test(session, plan.prompts, named, rule, params, plan.num_seeds, count))
            finally:
                session.use(plain)
                drafter.close()
    return tests
