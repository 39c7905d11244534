"""What is put off until the target's pass runs is done then, and done whatever happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import sleep
from typing import Any, cast

import numpy as np
import pytest

from localspec.context import Context
from localspec.drafters import make_drafter
from localspec.drafters.combined import Combined
from localspec.engine.session import Session
from localspec.host_scores import HostScores
from localspec.protocols import Drafter, DraftRequest, Scores, Step
from localspec.sampling import Sampler, SamplingParams
from localspec.schedule.asking import Asker, Beside
from localspec.schedule.cost import Costs, Curve
from localspec.schedule.decision import Decision
from localspec.schedule.experience import Experience
from localspec.schedule.learning import Learning
from localspec.schedule.plan import Valuation
from localspec.schedule.scheduled import Scheduled
from localspec.testing.reference import ReferenceModel

PROMPT = [5, 9, 3, 7, 5, 9, 3]
COSTS = Costs(Curve((1, 64), (0,), ((10.0, 12.0),)), Curve((1, 16), (0,), ((0.1, 0.1),)), 0.1)


class Waiting(ReferenceModel):
    """Its rows are there when they are read, as a device's are. log: what happened, in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log: list[str] = []

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        self.log.append("launched")
        found: list[Scores] = []
        for one in super().forward(steps):
            rows = one.rows(range(one.num_rows))

            def fetch(rows: Any = rows) -> Any:
                self.log.append("read")
                return rows

            found.append(HostScores(fetch, num_rows=len(rows)))
        return found


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_learning_waits_for_the_next_pass_and_none_is_lost(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    target, draft = Waiting(48, seed=5, sharpness=3.0), ReferenceModel(48, seed=5, sharpness=3.0)
    learned: list[int] = []
    learn = Learning.learn

    def logged(self: Learning, decision: Any, outcome: Any) -> None:
        target.log.append(f"learned {len(outcome.tree)}")
        learned.append(len(outcome.tokens))
        learn(self, decision, outcome)

    monkeypatch.setattr(Learning, "learn", logged)
    experience = Experience(COSTS, target.capabilities, by_clock=False)
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=60, ignore_eos=True)
    with Session(target, Scheduled([], [make_drafter("draft_model:num=8", draft)], experience)) as session:
        stats = session.generate(PROMPT, params).stats
        rounds = target.log.copy()
        session.reset()
        session.generate(PROMPT, params)
    assert sum(learned) == 120, "every round of both answers, the last ones too"
    late = [
        (before, after)
        for before, now, after in zip(rounds, rounds[1:], rounds[2:], strict=False)
        if now.startswith("learned") and now != "learned 0"
    ]
    assert len(late) > 5 and all(pair == ("launched", "read") for pair in late[:-1])
    assert stats.num_accepted > 10


def test_a_round_that_fails_loses_nothing_that_was_put_off() -> None:
    target, draft = ReferenceModel(48, seed=5, sharpness=3.0), ReferenceModel(48, seed=5, sharpness=3.0)
    experience = Experience(COSTS, target.capabilities, by_clock=False)
    scheduled = Scheduled([], [make_drafter("draft_model:num=8", draft)], experience)
    forward, fails = target.forward, False

    def broken(steps: Sequence[Step]) -> list[Scores]:
        if fails and steps[0].num_tokens > 1:
            raise RuntimeError("no pass")
        return forward(steps)

    target.forward = broken  # type: ignore[method-assign]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    with Session(target, scheduled) as session:
        plain = session.generate(PROMPT, params)
        assert scheduled._unlearned is not None  # of the last round: no pass came behind it
        session.reset()
        fails = True
        with pytest.raises(RuntimeError, match="no pass"):
            session.generate(PROMPT, params)
        fails = False
        session.reset()
        assert np.array_equal(session.generate(PROMPT, params).tokens, plain.tokens)
    assert scheduled._unlearned is None


def test_a_dear_drafter_is_judged_by_what_it_brings_where_lookup_guesses_too() -> None:
    """Elsewhere it brings next to nothing: what counts is what it brings beside a promise of that size."""
    experience = Experience(COSTS, ReferenceModel(48, seed=5).capabilities, by_clock=False)
    record = experience.record("draft_model", True)
    record.usual_value, record.beside = 0.1, [2.0, 0.2]
    assert record.may_beat(0.3, None, trees=False), "2.0 beside a little from lookup"
    assert not record.may_beat(1.0, None, trees=False), "0.2 beside much"
    assert not record.may_beat(0.3, 0.5, trees=False), "another dear one has 0.5 at hand"
    assert record.may_beat(0.0, 0.0, trees=False), "another found nothing, this one mostly something"
    record.usual_value = -0.1
    assert record.may_beat(0.0, None, trees=False), "nobody was asked: the guard decides"
    assert not record.may_beat(0.0, 0.0, trees=False), "where another found nothing it loses"
    for _ in range(400):
        record.may_beat(1.0, None, trees=False)
    assert record.beside[1] > 0.8, "what is left out is hoped for again"


class Building:
    """The draft model, whose first pass takes far longer than all later ones: a device builds its graphs."""

    name = "draft_model"
    needs_trees = False

    def __init__(self, draft: ReferenceModel) -> None:
        self._inner: Any = make_drafter("draft_model:num=4", draft)
        self._calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def propose(self, request: Any) -> Any:
        self._calls += 1
        if self._calls == 1:
            sleep(0.05)
        return self._inner.propose(request)


def test_what_is_done_once_counts_as_a_little_more_than_usual() -> None:
    """Some first passes of 50 ms would otherwise park a drafter of 0.8 ms before it showed what it is worth."""
    target, draft = ReferenceModel(48, seed=5, sharpness=3.0), ReferenceModel(48, seed=5, sharpness=3.0)
    costs = Costs(Curve((1, 64), (0,), ((10.0, 10.5),)), Curve((1, 16), (0,), ((0.2, 0.2),)), 0.1)
    experience = Experience(costs, target.capabilities)
    scheduled = Scheduled([], [cast(Drafter, Building(draft))], experience)
    for _ in range(3):  # else the first rounds are plain
        experience.observe(1, 10.0, plain=True)
    with Session(target, scheduled) as session:
        session.generate(PROMPT, SamplingParams(max_tokens=2, ignore_eos=True))
    [asked] = scheduled._decision.asked
    assert 0.0 < asked.ms <= 2.0 * experience.times("draft_model").prices(0, 1).chain(4)


class PutsOff:
    """Lookup that puts something off in every round."""

    needs_trees = False

    def __init__(self, name: str) -> None:
        self._inner: Any = make_drafter("ngram", None)
        self.name, self.asked, self.done = name, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _do(self) -> None:
        self.done += 1

    def propose(self, request: Any) -> Any:
        self.asked += 1
        return replace(self._inner.propose(request), meanwhile=self._do)


@pytest.mark.parametrize("scheduled", [True, False])
def test_what_each_of_several_drafters_puts_off_is_done(scheduled: bool) -> None:
    target, parts = ReferenceModel(48, seed=5, sharpness=3.0), (PutsOff("one"), PutsOff("other"))
    drafters = cast(tuple[Drafter, Drafter], parts)
    experience = Experience(COSTS, target.capabilities, by_clock=False)
    drafter: Drafter = Scheduled(drafters, [], experience) if scheduled else Combined(drafters)
    with Session(target, drafter) as session:
        session.generate(PROMPT, SamplingParams(max_tokens=40, ignore_eos=True))
    for part in parts:
        assert part.asked > 5 and part.done == part.asked


class LooksUp:
    """Lookup that says when it was asked."""

    def __init__(self, log: list[str]) -> None:
        self._inner: Any = make_drafter("ngram:min=1", None)
        self.name, self.log = "ngram", log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def propose(self, request: Any) -> Any:
        self.log.append("looked up")
        return self._inner.propose(request)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_while_a_drafters_first_pass_runs_others_look_things_up(temperature: float) -> None:
    texts, orders = [], []
    for ahead in ((), ("draft_model",)):
        target, draft = ReferenceModel(48, seed=5, sharpness=3.0), Waiting(48, seed=5, sharpness=3.0)
        lookup, drafter = cast(Drafter, LooksUp(draft.log)), make_drafter("draft_model:num=8", draft)
        experience = Experience(COSTS, target.capabilities, by_clock=False)
        with Session(target, Scheduled([lookup], [drafter], experience, ahead=ahead)) as session:
            params = SamplingParams(temperature=temperature, seed=3, max_tokens=120, ignore_eos=True)
            texts.append(session.generate(PROMPT, params).tokens)
        places = [place for place, what in enumerate(draft.log) if what == "looked up"]
        orders.append([tuple(draft.log[place - 1 : place + 2]) for place in places[2:]])
    assert texts[0] == texts[1]
    hidden = ("launched", "looked up", "read")
    assert hidden not in orders[0] and orders[1].count(hidden) > 4


@pytest.mark.parametrize("known", [False, True])
def test_so_they_do_in_an_answers_first_round_where_it_is_known_who_guesses(known: bool) -> None:
    target, draft = ReferenceModel(48, seed=5, sharpness=3.0), Waiting(48, seed=5, sharpness=3.0)
    lookup, drafter = cast(Drafter, LooksUp(draft.log)), make_drafter("draft_model:num=8", draft)
    experience = Experience(COSTS, target.capabilities, by_clock=False)
    scheduled = Scheduled([lookup], [drafter], experience, ahead=("draft_model",))
    if known:
        scheduled._steady.usual = drafter
    with Session(target, scheduled) as session:
        session.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
        del draft.log[:]
        session.reset()
        session.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    first = draft.log.index("looked up")
    assert (draft.log[first - 1 : first + 2] == ["launched", "looked up", "read"]) is known, draft.log


@pytest.mark.parametrize(("name", "calls"), [("draft_model:num=2", True), ("ngram:min=1", False)])
def test_what_was_done_meanwhile_is_not_a_drafters_own_time(name: str, calls: bool) -> None:
    target, draft = ReferenceModel(48, seed=5, sharpness=3.0), ReferenceModel(48, seed=5, sharpness=3.0)
    drafter = make_drafter(name, draft)
    experience = Experience(COSTS, target.capabilities)
    asker = Asker(experience, [], [drafter])
    asker.turn(Context(np.array(PROMPT * 4, np.int32)))
    request = DraftRequest(
        context=asker.context,
        max_nodes=4,
        max_depth=4,
        sampler=Sampler(SamplingParams(), 0),
        stop_tokens=frozenset(),
    )
    work = Beside(lambda: sleep(0.2))
    prices = Valuation(experience.live, 0.1, 28, 4)
    asked = asker.ask(drafter, Decision(), request, prices, meanwhile=work)
    assert asked.proposal.num_nodes and asked.ms < 200.0
    assert (work.ms >= 190.0) == calls
    work()
    done = work.ms
    work()
    assert done >= 190.0 and work.ms == done, "once, whoever does it"
