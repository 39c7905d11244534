"""Rounds that go on as the last ones did: when, how long, with how many guesses; and that the text stays the same."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from localspec.context import Context
from localspec.drafters import make_drafter
from localspec.engine.session import Session
from localspec.protocols import Drafter, DraftRequest, Outcome
from localspec.sampling import Sampler, SamplingParams
from localspec.schedule.cost import Costs, Curve
from localspec.schedule.experience import Experience
from localspec.schedule.guard import Guard
from localspec.schedule.scheduled import Scheduled
from localspec.schedule.steady import Steady
from localspec.testing.reference import ReferenceModel
from localspec.tree.token_tree import TokenTree

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
PART, OTHER = (cast(Drafter, SimpleNamespace(name=name)) for name in ("draft_model", "dspark"))


def request(nodes: int = 8, depth: int = 8) -> DraftRequest:
    return DraftRequest(
        context=Context(np.array(PROMPT, np.int32)),
        max_nodes=nodes,
        max_depth=depth,
        sampler=Sampler(SamplingParams(), 0),
        stop_tokens=frozenset(),
    )


def outcome(num: int, accepted: int, width: int = 4) -> Outcome:
    tree = TokenTree.from_parents(np.arange(num, dtype=np.int32), np.arange(-1, num - 1, dtype=np.int32))
    return Outcome(tree, tuple(range(accepted)), tuple(range(accepted + 1)), width, 5.0)


def prices(num: int) -> tuple[float, int]:
    """Passes of 3 and 4 tokens, a guess of half a millisecond."""
    return (5.3 if num < 3 else 5.8) + 0.5 * num, max(num + 1, 3)


def change_ms(width: int) -> float:
    """To come to passes of another width."""
    return 0.0


def decide(steady: Steady, times: int, part: Drafter | None = PART, num: int = 3, ms: float = 0.3) -> None:
    for _ in range(times):
        steady.decided(part, num, num + 1, ms, 8.0)
        if steady.begins:
            steady.settle(True, prices, change_ms)


def test_a_few_decisions_alike_are_repeated_as_often_as_brings_their_cost_down() -> None:
    steady = Steady()
    decide(steady, 2)
    assert not steady.goes_on(request())
    decide(steady, 1)
    rounds = 0
    while steady.goes_on(request()):
        steady.observe(10, True, outcome(3, 1), 1.5)
        rounds += 1
    assert rounds == 3 and (steady.num, steady.width) == (3, 4), "0.3 of 8 ms, a hundredth of which may go into it"
    decide(steady, 1)
    assert steady.goes_on(request()), "one more look was enough"
    assert not steady.goes_on(request(depth=2)) and not steady.goes_on(request(nodes=2))
    steady.begin()
    assert not steady.goes_on(request()), "another answer"


@pytest.mark.parametrize(
    "change", [{"part": None}, {"part": OTHER}, {"num": 2}, {"num": 5}], ids=["none", "other", "narrower", "wider"]
)
def test_another_decision_ends_it(change: dict[str, Any]) -> None:
    steady = Steady()
    decide(steady, 3)
    decide(steady, 1, **change)
    assert not steady.goes_on(request())


def test_where_deciding_costs_next_to_nothing_every_round_is_decided() -> None:
    steady = Steady()
    decide(steady, 9, ms=0.05)
    assert not steady.goes_on(request())


def test_a_drafter_that_has_no_guess_ends_it() -> None:
    steady = Steady()
    decide(steady, 3)
    steady.observe(10, True, outcome(0, 0), 0.1)
    assert not steady.goes_on(request())


@pytest.mark.parametrize(("accepted", "num"), [((0, 1, 2, 0), 2), ((3, 3, 3, 3), 4), ((0, 0, 0, 0), 1)])
def test_as_many_are_guessed_as_brought_most_in_their_time_or_one_more(accepted: tuple[int, ...], num: int) -> None:
    steady = Steady()
    decide(steady, 3)
    for _ in range(10):
        for count in accepted:
            steady.observe(10, True, outcome(3, count), 1.5)
    decide(steady, 1)
    assert (steady.num, steady.width) == (num, max(num + 1, 3))
    decide(steady, 2)
    assert steady.goes_on(request()), "decisions that are still for the wider passes are no others"
    decide(steady, 3)
    steady.settle(False, prices, change_ms)
    assert steady.num == 3, "of sampled text nothing is known yet"


COSTS = Costs(Curve((1, 2, 3, 4, 8), (0,), ((5.0, 5.1, 5.2, 5.3, 9.0),)), Curve((1, 2), (0,), ((0.2, 0.2),)), 0.1)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_session_repeats_what_it_decided_and_says_the_same(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=150, ignore_eos=True)
    repeated, observe = [0], Steady.observe

    def count(self: Steady, context: int, greedy: bool, outcome: Outcome, draft_ms: float) -> None:
        repeated[0] += 1
        observe(self, context, greedy, outcome, draft_ms)

    monkeypatch.setattr(Steady, "observe", count)
    target, draft = (ReferenceModel(48, seed=5, sharpness=3.0) for _ in range(2))
    target.capabilities = replace(target.capabilities, exact_trees=False)
    lookup, drafter = make_drafter("ngram:min=4", None), make_drafter("draft_model:num=8", draft)
    auto = Scheduled([lookup], [drafter], Experience(COSTS, target.capabilities))
    auto._steady._deciding_ms = 100.0  # as on a slow host
    judged, judge = [0], Guard.observe

    def gained(self: Guard, brought: float, extra_ms: float, plain_ms: float) -> None:
        judged[0] += 1
        judge(self, brought, extra_ms, plain_ms)

    monkeypatch.setattr(Guard, "observe", gained)
    with Session(target, auto) as session:
        answer = session.generate(PROMPT, params)
    assert not auto._steady.rounds, "what an answer's last rounds brought is learned, too"
    guessed = answer.stats.num_rounds - sum(answer.stats.plain_rounds.values())
    assert judged[0] >= guessed - 1, "as of rounds that were decided, but the very last one"
    with Session(ReferenceModel(48, seed=5, sharpness=3.0), make_drafter("nothing", None)) as session:
        assert answer.tokens == session.generate(PROMPT, params).tokens
    assert repeated[0] > 5
    assert "draft_model" in answer.sources
