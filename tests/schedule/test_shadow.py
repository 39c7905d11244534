"""A drafter that is expected to lose is tried without verifying anything, and comes back when its guesses come true."""

from __future__ import annotations

import numpy as np
import pytest

from localspec.context import Context
from localspec.drafters import make_drafter
from localspec.engine.session import Session
from localspec.protocols import DraftRequest, HostTokens, Outcome, Proposal
from localspec.sampling import Sampler, SamplingParams
from localspec.schedule.cost import Costs, Curve
from localspec.schedule.experience import Experience
from localspec.schedule.scheduled import Scheduled
from localspec.schedule.shadow import Shadow
from localspec.testing.reference import ReferenceModel
from tests.schedule.test_scheduled import PROMPT, Wrong, answer, curve, session


def shadow(tokens: list[int], parents: list[int]) -> Shadow:
    return Shadow(Proposal("x", (HostTokens(np.array(tokens, np.int32)),), np.array(parents, np.int32)))


def test_a_chain_is_followed_until_it_is_wrong_or_at_its_end() -> None:
    one = shadow([4, 5, 6], [-1, 0, 1])
    assert not one.follow([4])
    assert not one.follow([5])
    assert one.follow([6]) and one.path() == [0, 1, 2]
    one = shadow([4, 5, 6], [-1, 0, 1])
    assert not one.follow([4, 5])  # another drafter's guesses were accepted meanwhile
    assert one.follow([7]) and one.path() == [0, 1]
    one = shadow([4], [-1])
    assert one.follow([5]) and one.path() == []


def test_a_tree_is_followed_along_what_came_true() -> None:
    one = shadow([4, 5, 6, 7], [-1, -1, 1, 2])
    assert not one.follow([5])
    assert one.follow([6, 7]) and one.path() == [1, 2, 3]


class Sevens(Wrong):
    """Always guesses sevens, and is sure; a chain whose chances nobody knows, if `silent`."""

    name = "sevens"

    def __init__(self, silent: bool = False) -> None:
        super().__init__()
        self.silent = silent

    def propose(self, request: DraftRequest) -> Proposal:
        self.asked += 1
        num = min(4, request.max_nodes, request.max_depth)
        known = None if self.silent else (-0.05,) * num
        tokens = (HostTokens(np.full(num, 7, np.int32)),) if num else ()
        return Proposal(self.name, tokens, np.arange(-1, num - 1, dtype=np.int32), log_q=known)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("parked", [False, True])
def test_it_comes_back_when_the_text_changes(silent: bool, parked: bool) -> None:
    """Nines for a long while, then sevens. Passes of 10 ms, of 14 with guesses."""
    costs = Costs(Curve((1, 2, 8), (0,), ((10.0, 14.0, 14.0),)), curve(1.0, 0.0), 0.0)
    experience = Experience(costs, ReferenceModel(48, seed=5).capabilities, by_clock=False)
    drafter = Sevens(silent)
    scheduled, context = Scheduled([], [drafter], experience), Context(PROMPT)
    scheduled.begin(context)
    request = DraftRequest(
        context=context, max_nodes=7, max_depth=7, sampler=Sampler(SamplingParams(), 0), stop_tokens=frozenset()
    )
    guesses: list[int] = []
    asked: list[int] = []
    for number in range(1600):
        said = 9 if number < 800 else 7
        tree = scheduled.propose(request).tree()
        path = tuple(range(len(tree))) if said == 7 else ()
        tokens = (*(said for _ in path), said)
        context.extend(tokens)
        scheduled.observe(Outcome(tree, path, tokens, 1 + len(tree), 14.0 if len(tree) else 10.0))
        guesses.append(len(tree))
        asked.append(drafter.asked)
        if number == 400 and parked:
            experience.record(drafter.name, True).guard.parked = True
    assert not any(guesses[200:800])  # what is tried is not verified
    assert 1 <= asked[799] - asked[300] <= 100
    assert sum(map(bool, guesses[1000:])) > 450


def test_lookup_comes_back_soon_although_networks_are_left_out_beside_it() -> None:
    """It costs next to nothing to try: a text that begins to repeat itself need not wait for it as for the others."""
    costs = Costs(Curve((1, 2, 16), (0,), ((10.0, 14.0, 20.0),)), curve(1.0, 0.0), 0.0)
    experience = Experience(costs, ReferenceModel(600, seed=5).capabilities, by_clock=False)
    lookup, others = make_drafter("suffix", None), [Sevens(), Sevens(silent=True)]
    others[1].name = "other sevens"
    scheduled, context = Scheduled([lookup], others, experience), Context(PROMPT)
    scheduled.begin(context)
    for one in scheduled.parts:
        experience.record(one.name, True).guard.parked = True
    request = DraftRequest(
        context=context, max_nodes=15, max_depth=15, sampler=Sampler(SamplingParams(), 0), stop_tokens=frozenset()
    )
    new = np.random.default_rng(4).permutation(np.arange(20, 520)).tolist()
    said = iter([*new[:400], *new[300:400], *new[300:400]])
    back = 0
    for number in range(500):
        tree = scheduled.propose(request).tree()
        if len(tree) and not back:
            back = number
            break
        token = next(said)
        context.extend((token,))
        scheduled.observe(Outcome(tree, (), (token,), 1, 10.0))
    assert 400 < back <= 420


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_text_is_plain_decodings_while_drafters_are_tried(temperature: float) -> None:
    target, draft = ReferenceModel(48, seed=5, sharpness=3.0), ReferenceModel(48, seed=9, sharpness=3.0)
    costs = Costs(curve(10.0, 2.0), curve(1.0, 0.0), 0.1)
    free, dear = make_drafter("suffix", None), make_drafter("draft_model:num=20", draft)
    with session(target, [free], [dear], costs)[0] as one, Session(target, make_drafter("nothing", None)) as plain:
        for seed in range(6):
            assert answer(one, temperature, seed, 150)[0] == answer(plain, temperature, seed, 150)[0]
