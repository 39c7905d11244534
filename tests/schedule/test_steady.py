"""Rounds that go on as the last ones did: when, how long, with how many guesses; and that the text stays the same."""

from __future__ import annotations

from collections.abc import Sequence
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
    assert rounds == 5 and (steady.num, steady.width) == (3, 4), "0.3 of 8 ms, of which 0.7% may go into it"
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


def answer(steady: Steady, looks: int, accepted: Sequence[int], dear: float = 0.0) -> list[int]:
    """One answer, from its first look on: how many were guessed in each round that went on. accepted: of three guesses,
    round after round.  dear: milliseconds that another width takes."""
    steady.begin()
    guessed: list[int] = []
    for _ in range(looks):
        steady.decided(PART, 3, 4, 0.4, 8.0)
        if steady.begins:
            steady.settle(True, prices, lambda width: dear * (width != steady._decided[1]))
        while steady.goes_on(request()):
            guessed.append(steady.num)
            steady.observe(10, True, outcome(steady.num, min(accepted[len(guessed) % len(accepted)], steady.num)), 1.5)
    return guessed


def test_another_width_is_paid_over_rounds_and_where_an_answer_begins_over_all_of_it() -> None:
    steady = Steady()
    assert steady.width_for(PART, True, prices, nothing) == 0, "nothing is known"
    few = (0, 1, 2, 0)
    guessed = answer(steady, 30, few, dear=400.0)
    assert set(guessed) == {3}, "what it brings does not pay for it in this answer"
    assert steady.width_for(PART, True, prices, nothing) == 3
    assert steady.width_for(PART, False, prices, nothing) == 0
    steady.begin()
    assert steady.width_for(PART, True, prices, lambda width: 30.0 * (width == 3)) == 3, "paid in many rounds"
    for _ in range(20):
        answer(steady, 3, few, dear=400.0)
    assert steady.width_for(PART, True, prices, lambda width: 30.0 * (width == 3)) == 4, "answers are short now"
    assert answer(Steady(), 30, few, dear=1.0)[-1] == 2


def nothing(width: int) -> float:
    return 0.0


def test_behind_an_answer_of_repeated_rounds_one_look_is_enough() -> None:
    steady = Steady()
    assert len(answer(steady, 3, (3, 1))) == 6
    assert len(answer(steady, 1, (3, 1))) == 6
    steady.decided(None, 0, 1, 0.4, 8.0)
    assert not answer(steady, 2, (3, 1)) and len(answer(steady, 1, (3, 1))) == 0, "the last one ended otherwise"


def test_looks_that_come_out_otherwise_end_it_and_one_alone_does_not() -> None:
    steady = Steady()
    decide(steady, 5)
    assert not steady.has_ended
    steady.decided(None, 0, 1, 0.4, 8.0)
    assert not steady.has_ended
    steady.decided(None, 0, 1, 0.4, 8.0)
    assert steady.has_ended
    decide(steady, 1)
    assert not steady.has_ended
    steady.stop()
    assert steady.has_ended and steady.width_for(PART, True, prices, nothing) == 0


def test_guesses_of_the_last_answer_are_not_made_in_passes_of_this_ones_width() -> None:
    steady = Steady()
    decide(steady, 3, num=5)
    steady.begin()
    decide(steady, 1, num=3)
    assert steady.begins and (steady.num, steady.width) == (3, 4)


def test_what_one_guess_more_would_bring_is_tried_again_ever_more_seldom() -> None:
    steady, two = Steady(), (2, 2, 0, 2)
    assert answer(steady, 30, two)[-1] == 2
    tried = []
    for number in range(64):
        tried += [number] * any(num > 2 for num in answer(steady, 6, two))
    assert 3 <= len(tried) <= 9 and tried[-1] > 20, "the text may be another one"
    assert min(answer(steady, 60, (9,))[-20:]) >= 3, "where they come true more are made"


def test_a_text_that_ends_is_no_limit_and_a_limit_is_one() -> None:
    steady = Steady()
    answer(steady, 12, (9,))
    assert steady.num == 4

    def short() -> None:
        decide(steady, 3)
        assert steady.num == 4
        steady.observe(10, True, outcome(1, 1), 1.5)

    short()
    short()
    answer(steady, 3, (9,))
    assert steady.num == 4, "it makes four elsewhere"
    for _ in range(3):
        short()
    decide(steady, 3)
    assert steady.num == 3, "it makes three at most"


COSTS = Costs(Curve((1, 2, 3, 4, 8), (0,), ((5.0, 5.1, 5.2, 5.3, 9.0),)), Curve((1, 2), (0,), ((0.2, 0.2),)), 0.1)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_session_repeats_what_it_decided_and_says_the_same(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=150, ignore_eos=True)
    repeated, observe = [0], Steady.observe

    def count(self: Steady, *told: Any) -> None:
        repeated[0] += 1
        observe(self, *told)

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
