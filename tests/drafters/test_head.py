"""Drafting with trained heads: the suite with the reference heads, and what is special about them."""

from __future__ import annotations

import numpy as np
import pytest

from localspec.context import Context
from localspec.drafters.guesser import with_confidence
from localspec.drafters.head import HeadDrafter
from localspec.engine.session import Session
from localspec.errors import SettingError
from localspec.protocols import Drafter
from localspec.sampling import SamplingParams
from localspec.testing.drafters import DrafterConformance
from localspec.testing.reference import ReferenceModel
from localspec.testing.reference_head import ReferenceBlockHead, ReferenceHead


class TestHead(DrafterConformance):
    draws = True

    def drafter(self, target: ReferenceModel) -> Drafter:
        return HeadDrafter(ReferenceHead(target), num=4)

    # the suite makes a target for the session and another for the drafter, and a head belongs to one
    def target(self) -> ReferenceModel:
        if not hasattr(self, "_target"):
            self._target = super().target()
        return self._target


class TestTreeOfAHead(TestHead):
    def drafter(self, target: ReferenceModel) -> Drafter:
        return HeadDrafter(ReferenceHead(target), num=9, shape="tree")


class TestBlockHead(TestHead):
    def drafter(self, target: ReferenceModel) -> Drafter:
        return HeadDrafter(ReferenceBlockHead(target))


class TestTreeOfABlockHead(TestHead):
    def drafter(self, target: ReferenceModel) -> Drafter:
        return HeadDrafter(ReferenceBlockHead(target), num=12, shape="tree", min_prob=0.02)


class TestFanOutOfABlockHead(TestHead):
    def drafter(self, target: ReferenceModel) -> Drafter:
        return HeadDrafter(ReferenceBlockHead(target), shape="3-2-1", guess="greedy")


class TestBlockHeadOnADevice(TestHead):
    """Guesses are chained without being read."""

    def drafter(self, target: ReferenceModel) -> Drafter:
        return HeadDrafter(ReferenceBlockHead(target, host_scores=False))


class TestUselessHead(TestHead):
    def drafter(self, target: ReferenceModel) -> Drafter:
        return HeadDrafter(ReferenceHead(target, amount=5.0), num=3)


def test_settings_keep_to_the_heads_levels() -> None:
    """Defaults are the whole block; what goes beyond it is refused, not cut."""
    target = ReferenceModel(32)
    block, deep = ReferenceBlockHead(target, levels=5), ReferenceHead(target)
    assert HeadDrafter(block).num == 5
    assert HeadDrafter(block, num=3).shape.branching == (1,) * 3
    assert HeadDrafter(block, shape="tree").shape.branching == (16,) * 5
    assert HeadDrafter(deep).num == 3
    assert HeadDrafter(deep, num=9).shape.branching == (1,) * 9
    assert HeadDrafter(ReferenceHead(target, levels=2)).shape.branching == (1, 1)
    wrong = ({"num": 6}, {"depth": 6}, {"shape": "tree", "depth": 6}, {"shape": "2-1-1-1-1-1"})
    for settings in wrong:
        with pytest.raises(SettingError, match=r"dspark: this head does not guess that far ahead .*at most 5 levels"):
            HeadDrafter(block, **settings)
    with pytest.raises(SettingError, match="dspark: unknown guess"):
        HeadDrafter(block, guess="wild")


def test_a_head_has_nothing_to_guess_for_before_it_is_attached() -> None:
    drafter = HeadDrafter(ReferenceHead(ReferenceModel(32)))
    context = Context([1, 2])
    drafter.begin(context)
    with pytest.raises(ValueError, match="attach it first"):
        DrafterConformance().propose(drafter, context, 3)


def test_guesses_are_accepted_where_head_and_target_agree() -> None:
    """The features reach the head: fed as the text grows, nothing is lost between rounds."""
    target = ReferenceModel(48, seed=5, context_length=200)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    for head, least in ((ReferenceHead(target, amount=0.0), 3.9), (ReferenceBlockHead(target, amount=0.05), 1.5)):
        with Session(target, HeadDrafter(head, num=3)) as session:
            stats = session.generate([1, 2, 3, 4], params).stats
        assert stats.num_tokens / stats.num_rounds >= least, head.info.kind


@pytest.mark.parametrize("confidence", [0.0, 0.3, 0.95, 1.0])
def test_confidence_moves_the_best_guess_and_what_is_left(confidence: float) -> None:
    """Chances of all tokens still sum to one unless that made another likelier than the best."""
    q = np.array([0.5, 0.3, 0.15, 0.05])
    made = np.exp(with_confidence(np.log(q), confidence))
    assert made[0] == pytest.approx(confidence, abs=1e-6)
    assert (np.diff(made) <= 1e-12).all()
    if confidence >= 0.5:
        assert made.sum() == pytest.approx(1.0, abs=1e-6)
        assert made[1:] == pytest.approx((1 - confidence) * q[1:] / 0.5, abs=1e-6)


def test_confidence_in_a_certain_row_leaves_the_others_as_they_were() -> None:
    made = with_confidence(np.array([0.0, -40.0]), 0.6)
    assert np.exp(made[0]) == pytest.approx(0.6) and made[1] == -40.0
    assert not len(with_confidence(np.zeros(0), 0.6))
