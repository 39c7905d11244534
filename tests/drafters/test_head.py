"""Drafting with trained heads: the suite with the reference heads, and what is special about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from localspec.context import Context
from localspec.drafters.guesser import with_confidence
from localspec.drafters.head import HeadDrafter
from localspec.drafters.nothing import Nothing
from localspec.engine.prefill import read_chunk
from localspec.engine.session import Session
from localspec.engine.slots import Slots
from localspec.errors import SettingError
from localspec.protocols import Drafter, DraftRequest
from localspec.sampling import Sampler, SamplingParams
from localspec.testing.drafters import DrafterConformance
from localspec.testing.reference import ReferenceModel
from localspec.testing.reference_head import ReferenceBlockHead, ReferenceHead
from localspec.tree.grow import Grower


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


def test_what_a_block_head_says_is_read_where_somebody_asks_how_far_to_guess() -> None:
    """On a device, too: else its confidence would be of no use to a plan. Nobody asks: nothing is waited for."""

    class Two:
        """A budget of two levels."""

        def __init__(self) -> None:
            self.asked = 0

        def expand(self, grower: Grower, nodes: Sequence[int]) -> list[int]:
            self.asked += 1
            return list(nodes) if self.asked < 2 else []

    suite = DrafterConformance()
    target = ReferenceModel(48, seed=5, context_length=160)
    drafter = HeadDrafter(ReferenceBlockHead(target, host_scores=False))
    context = suite.begun(target, drafter, [1, 2, 3, 4])
    request = DraftRequest(
        context=context, max_nodes=9, max_depth=9, sampler=Sampler(SamplingParams(), 1), stop_tokens=frozenset()
    )
    unread = drafter.propose(request)
    assert unread.num_nodes == 5 and unread.log_q is None
    read = drafter.propose(replace(request, budget=Two()))
    assert read.num_nodes == 2 and read.log_q is not None
    assert read.tree().token.tolist() == unread.tree().token[:2].tolist()


# ---------------------------------------------------------------- in sessions and slots


def test_a_head_that_is_swapped_in_has_the_conversation_read_again() -> None:
    """The next answer's prompt counts as prefilled, the head guesses as if it had been there all along, the text is
    plain decoding's."""
    target = ReferenceModel(48, seed=5, context_length=300)
    params = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.7, seed=2)
    head = ReferenceHead(target, amount=0.05)
    drafter = HeadDrafter(head, num=3)
    with Session(target, Nothing()) as session, Session(target, HeadDrafter(head, num=3)) as other:
        first = session.generate([1, 2, 3, 4], params)
        session.use(drafter)
        prompt = [*session.tokens.tolist(), 5, 6]
        second = session.generate(prompt, params)
        assert second.stats.num_reused == 0 and second.stats.num_prefilled == len(prompt) - 1
        assert other.generate([1, 2, 3, 4], params).tokens == first.tokens
        usual = other.generate(prompt, params)
        assert usual.tokens == second.tokens
        assert (usual.stats.num_rounds, usual.stats.num_accepted) == (
            second.stats.num_rounds,
            second.stats.num_accepted,
        )
        session.use(Nothing())  # the head goes on listening
        session.generate([*prompt, 7], params)
        session.use(drafter)
        third = session.generate([*session.tokens.tolist(), 8], params)
        assert third.stats.num_reused > len(prompt)
    drafter.close()


def test_a_head_that_hears_nothing_for_a_while_comes_back_with_or_without_what_it_missed() -> None:
    """What it guesses then is poorer, the text is not; attached as usual it has all of it read again."""
    target = ReferenceModel(48, seed=5, context_length=300)
    state, drafter = target.open(), HeadDrafter(ReferenceHead(target), num=3)
    prompt = np.arange(40, dtype=np.int32)
    drafter.attach(state)
    while state.length < 20:
        read_chunk(target, state, prompt, 10)
    drafter.detach()
    drafter.detach()
    read_chunk(target, state, prompt, 10)
    drafter.attach(state, whole=False)
    assert state.length == 30
    context = Context(prompt[:31])
    drafter.begin(context)
    sampler = Sampler(SamplingParams(temperature=0.0), 0)
    request = DraftRequest(context=context, max_nodes=3, max_depth=3, sampler=sampler, stop_tokens=frozenset())
    assert drafter.propose(request).num_nodes == 3
    drafter.attach(state, whole=False)
    assert state.length == 30
    drafter.attach(state)
    assert state.length == 0
    drafter.close()
    state.close()


def test_a_slot_whose_head_missed_something_reads_it_again() -> None:
    """Copies bring the head along; what was read without it is not trusted."""
    target = ReferenceModel(48, seed=5, context_length=300)
    head = ReferenceHead(target)
    slots = Slots(target, 2, 1 << 30)
    try:
        prompt = np.arange(40, dtype=np.int32)
        with_head = slots.take(prompt)
        with_head.use(HeadDrafter(head), "head")
        while read_chunk(target, with_head.state, prompt):
            pass
        longer = np.concatenate([prompt, prompt[:5]])
        copied = slots.take(longer, [(with_head, prompt)])  # the head's part comes along, and nobody uses it yet
        assert copied.state.length == 39
        copied.use(HeadDrafter(head), "head")
        assert copied.state.length == 39
        copied.use(None)
        while read_chunk(target, copied.state, longer):
            pass
        copied.use(HeadDrafter(head), "head")
        assert copied.state.length == 0
    finally:
        slots.close()
