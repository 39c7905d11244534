"""One budget for many lanes: guesses compete, and the more lanes there are the fewer pay."""

from __future__ import annotations

import numpy as np
import pytest

from localspec.protocols import HostTokens, Outcome, Proposal
from localspec.schedule.cost import Costs, Curve
from localspec.schedule.experience import Experience
from localspec.schedule.live import LiveCosts
from localspec.schedule.shared import SharedBudget
from localspec.testing.reference import ReferenceModel
from localspec.tree.token_tree import TokenTree

FLAT_THEN_STEEP = Curve((1, 2, 16, 64), (0,), ((10.0, 10.0, 12.0, 60.0),))


def experience() -> Experience:
    return Experience(Costs(FLAT_THEN_STEEP, None, 0.0), ReferenceModel().capabilities, by_clock=False)


def chain(*reach: float) -> Proposal:
    """A chain whose nodes are reached with these chances, left open."""
    parents = np.arange(-1, len(reach) - 1, dtype=np.int32)
    return Proposal("test", (HostTokens(np.zeros(len(reach), np.int32)),), parents, reach=reach)


def settle(proposals: list[Proposal], *, together: bool = True) -> list[int]:
    """How many nodes of each are verified."""
    shared = SharedBudget(experience(), len(proposals), 0, together=together)
    kept, _ = shared.settle(proposals)
    return [one.num_nodes if nodes is None else len(nodes) for one, nodes in zip(proposals, kept, strict=True)]


def test_speculation_fades_as_load_grows() -> None:
    guess = chain(0.6, 0.4, 0.25, 0.15, 0.1)
    kept = [settle([guess] * lanes)[0] for lanes in (1, 4, 16, 32)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[2] and kept[-1] == 0


def test_a_lane_of_good_guesses_may_be_longer_than_its_neighbours() -> None:
    """All are padded to the widest, so it must pay for all; then the others' next guesses come along for nothing."""
    good, poor = chain(0.99, 0.98, 0.97), chain(0.2, 0.01, 0.001)
    alone = settle([good])[0]
    assert alone == 3
    assert settle([good, poor])[0] == 3
    assert settle([good] + [poor] * 15)[0] < 3


def test_who_was_told_how_much_to_guess_is_obeyed() -> None:
    told = Proposal("told", (HostTokens(np.zeros(4, np.int32)),), np.arange(-1, 3, dtype=np.int32))
    kept = settle([told, chain(0.05, 0.02, 0.01, 0.005, 0.001)])
    assert kept[0] == 4
    assert kept[1] == 4, "places that are padded anyway are free"


def test_apart_each_lane_decides_for_itself() -> None:
    guess = chain(0.6, 0.4, 0.25, 0.15, 0.1)
    assert settle([guess] * 16, together=False) == settle([guess]) * 16


def test_the_best_of_a_tree_is_kept_with_its_parents() -> None:
    parents = np.array([-1, 0, 0, 1], np.int32)
    tree = Proposal("test", (HostTokens(np.arange(4, dtype=np.int32)),), parents, reach=(0.9, 0.9, 0.01, 0.9))
    kept, _ = SharedBudget(experience(), 2, 0, together=True).settle([tree, tree])
    assert kept == [(0, 1, 3)] * 2
    only = tree.only(kept[0] or ())
    assert only.parents.tolist() == [-1, 0, 1] and only.tree().token.tolist() == [0, 1, 3]


def test_loads_are_learned_apart() -> None:
    """A pass of 16 lanes that turns out slow makes no pass of one lane look slow."""
    live = LiveCosts(Costs(FLAT_THEN_STEEP, None, 0.0), ReferenceModel().capabilities.width_class, 64, optimism=1.0)
    before = live.verify_ms(2, 0)
    for _ in range(20):
        live.observe_verify(2, 0, 500.0, lanes=16)
    assert live.verify_ms(2, 0, 16) > 60.0
    assert live.verify_ms(2, 0) == before


def test_a_shared_budget_learns_once_per_round() -> None:
    own = Experience(Costs(FLAT_THEN_STEEP, None, 0.0), ReferenceModel().capabilities)
    tree = TokenTree.from_parents(np.zeros(0, np.int32), np.zeros(0, np.int32))
    for _ in range(50):
        shared = SharedBudget(own, 4, 0, together=True)
        outcome = Outcome(tree, (), (1,), 8, 20.0)
        shared.observe([outcome] * 4, 20.0)
    assert own.rate(0, 4) == pytest.approx(4 / 20.0, rel=0.2)
    assert own.plain_ms(0, 4) == pytest.approx(20.0, rel=0.2)
