"""Where nothing is found nobody looks in every round: what looking takes stays a small share, and nothing is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from localspec.constraint import Grammar
from localspec.context import Context
from localspec.drafters import make_drafter
from localspec.engine.session import Session
from localspec.protocols import DraftRequest, HostTokens, Load, Outcome, Proposal
from localspec.sampling import Sampler, SamplingParams
from localspec.schedule.cost import Costs, Curve
from localspec.schedule.experience import Experience
from localspec.schedule.rest import LookTime, Rest
from localspec.schedule.scheduled import Scheduled
from localspec.testing.reference import ReferenceModel
from tests.schedule.test_scheduled import PROMPT, Wrong

GREEDY = Sampler(SamplingParams(), 0)


class Seldom(Wrong):
    """Guesses only in some rounds of being asked, and then what is said."""

    name = "seldom"

    def __init__(self, found: Sequence[int] = ()) -> None:
        super().__init__()
        self.found = frozenset(found)
        self.rounds: list[int] = []
        self.round = 0

    def propose(self, request: DraftRequest) -> Proposal:
        self.rounds.append(self.round)
        if self.round not in self.found:
            return Proposal(self.name)
        return Proposal(
            self.name, (HostTokens(np.full(4, 7, np.int32)),), np.arange(-1, 3, dtype=np.int32), log_q=(-0.01,) * 4
        )


class Known(LookTime):
    """A look takes so long, whatever the clock says."""

    def __init__(self, ms: float) -> None:
        super().__init__()
        self.ms = ms

    def observe(self, ms: float) -> None:
        """Nothing to learn."""


def played(drafter: Seldom, look_ms: float, num: int, **changes: object) -> Experience:
    """So many rounds of plain passes of 10 ms; the first three look at plain decoding itself."""
    curve = Curve((1, 2, 64), (0,), ((10.0, 12.0, 30.0),))
    experience = Experience(Costs(curve, None, 0.0), ReferenceModel(48, seed=5).capabilities)
    experience.look = Known(look_ms)
    scheduled, context = Scheduled([drafter], [], experience), Context(PROMPT)
    scheduled.begin(context)
    request = DraftRequest(context=context, max_nodes=8, max_depth=8, sampler=GREEDY, stop_tokens=frozenset())
    request = replace(request, **changes)  # type: ignore[arg-type]
    for drafter.round in range(num):
        tree = scheduled.propose(request).tree()
        tokens = (*tree.token.tolist(), 9)
        context.extend(tokens)
        scheduled.observe(Outcome(tree, tuple(range(len(tree))), tokens, 1 + len(tree), 10.0 + 0.5 * len(tree)))
    return experience


def test_fruitless_looks_become_rare_as_far_as_they_cost() -> None:
    drafter = Seldom()
    played(drafter, 0.05, 60)  # half a hundredth of a pass
    assert drafter.rounds == list(range(3, 60))
    drafter = Seldom()
    played(drafter, 0.45, 60)  # four hundredths: six rounds without one
    assert drafter.rounds == [3, 4, 5, *range(12, 60, 7)]
    drafter = Seldom()
    played(drafter, 50.0, 60)
    assert drafter.rounds == [3, 4, 5, 18, 31, 44, 57]


def test_what_is_found_is_looked_for_in_every_round_again() -> None:
    drafter = Seldom(found=range(19, 25))
    played(drafter, 0.45, 40)
    assert drafter.rounds == [3, 4, 5, 12, *range(19, 28), 34]


def test_rounds_without_a_look_are_learned_from() -> None:
    """Speed, plain decoding's own, and the credit of whoever is parked."""
    drafter, parked = Seldom(), Wrong()
    experience = played(drafter, 0.45, 200)
    assert experience.rate(256) == pytest.approx(0.1, rel=0.01)
    assert experience.plain_ms(256) == pytest.approx(10.0, rel=0.01)
    record = experience.record(parked.name, True)
    record.guard.parked = True
    one, context = Scheduled([drafter], [parked], experience), Context(PROMPT)
    one.begin(context)
    before = parked.asked
    request = DraftRequest(context=context, max_nodes=8, max_depth=8, sampler=GREEDY, stop_tokens=frozenset())
    for _ in range(600):
        tree = one.propose(request).tree()
        context.append(9)
        one.observe(Outcome(tree, (), (9,), 1 + len(tree), 10.0))
    assert parked.asked > before


@pytest.mark.parametrize("ends", ["begin", "close"])
def test_the_last_rounds_without_a_look_are_learned_of_before_the_next_answer(ends: str) -> None:
    """Old bug: they were taken for that one's first pass."""
    drafter = Seldom()
    curve = Curve((1, 2, 64), (0,), ((10.0, 12.0, 30.0),))
    experience = Experience(Costs(curve, None, 0.0), ReferenceModel(48, seed=5).capabilities)
    experience.look = Known(50.0)
    scheduled, context = Scheduled([drafter], [], experience), Context(PROMPT)
    scheduled.begin(context)
    request = DraftRequest(context=context, max_nodes=8, max_depth=8, sampler=GREEDY, stop_tokens=frozenset())
    places: list[int | None] = []
    observe = experience.live.observe_verify

    def told(*args: Any, **more: Any) -> None:
        places.append(more["place"])
        observe(*args, **more)

    experience.live.observe_verify = told  # type: ignore[method-assign]
    for _ in range(12):
        tree = scheduled.propose(request).tree()
        context.append(9)
        scheduled.observe(Outcome(tree, (), (9,), 1, 10.0))
    assert places == [0, 1, 2, 3, 4, 5], "three that see plain decoding, and three looks"
    scheduled.begin(context) if ends == "begin" else scheduled.close()
    assert len(places) == 7 and places[-1] is not None and places[-1] > 1


def test_a_look_that_runs_a_model_is_not_counted() -> None:
    """Its drafter says of each place anew what it is worth; it was asked because that is expected to pay."""
    drafter = Seldom()
    experience = Experience(Costs(Curve((1, 2), (0,), ((10.0, 12.0),)), None, 0.0), ReferenceModel(48).capabilities)
    experience.look = Known(50.0)
    scheduled, context = Scheduled([], [drafter], experience), Context(PROMPT)
    scheduled.begin(context)
    request = DraftRequest(context=context, max_nodes=8, max_depth=8, sampler=GREEDY, stop_tokens=frozenset())
    for drafter.round in range(30):
        experience.record(drafter.name, True).usual_value = 1.0
        tree = scheduled.propose(request).tree()
        context.append(9)
        scheduled.observe(Outcome(tree, (), (9,), 1 + len(tree), 10.0))
    assert drafter.rounds == list(range(3, 30))


def test_shared_rounds_and_grammars_are_looked_at_every_time() -> None:
    drafter = Seldom()
    played(drafter, 50.0, 40, load=Load(lanes=2))
    assert drafter.rounds == list(range(40))
    drafter = Seldom()
    target = ReferenceModel(16)
    grammar = Grammar.regex(r"[\x00-\x0a]{30}")
    experience = Experience(Costs(Curve((1, 2), (0,), ((10.0, 10.5),)), None, 0.0), target.capabilities)
    experience.look = Known(50.0)
    with Session(target, Scheduled([drafter], [], experience)) as one:
        result = one.generate([1, 2, 3], SamplingParams(max_tokens=30, grammar=grammar))
    assert len(drafter.rounds) >= result.stats.num_rounds - 4


def test_a_pass_that_does_not_fit_any_more_is_not_asked_for() -> None:
    """The last rounds of an answer have room for fewer tokens than plain decoding's padding."""
    target, drafter = ReferenceModel(48, seed=5), Seldom()
    experience = Experience(Costs(Curve((1, 2, 8), (0,), ((10.0, 9.0, 5.0),)), None, 0.0), target.capabilities)
    experience.look = Known(50.0)
    with (
        Session(target, Scheduled([drafter], [], experience)) as one,
        Session(target, make_drafter("nothing", None)) as plain,
    ):
        params = SamplingParams(max_tokens=50, ignore_eos=True)
        result = one.generate(PROMPT, params)
        assert result.tokens == plain.generate(PROMPT, params).tokens
    assert len(drafter.rounds) < 20
    assert result.plain_because == "no guess was worth its time"


def test_one_stall_does_not_stop_the_looking() -> None:
    look = LookTime()
    for ms in (0.1, 0.1, 0.1, 400.0, *(0.1,) * 20):
        look.observe(ms)
    assert look.ms < 0.2


def test_an_answer_begins_with_looks() -> None:
    rest, look = Rest(), Known(50.0)
    for _ in range(3):
        rest.looked(found=False, ms=None, look=look, plain_ms=10.0)
    assert rest.is_on
    rest.begin()
    assert not rest.is_on
    rest.looked(found=False, ms=None, look=look, plain_ms=10.0)
    assert not rest.is_on
