"""Passes that begin before the last token is read: the same text, the same state, fewer idle moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from localspec.context import Context
from localspec.drafters import Nothing
from localspec.engine.round import Lane, Room, run_round
from localspec.engine.session import Session
from localspec.errors import BackendError
from localspec.protocols import (
    Drafter,
    DraftRequest,
    HostTokens,
    Outcome,
    Proposal,
    SavedDraft,
    Scores,
    SequenceState,
    Step,
    WidthClass,
)
from localspec.sampling import Sampler, SamplingParams
from localspec.testing.reference import ReferenceModel
from localspec.verify import Walk

GREEDY = SamplingParams(max_tokens=30, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, seed=4, max_tokens=30, ignore_eos=True)


class Lazy(ReferenceModel):
    """Answers as a lazy device does, and remembers what was asked; fails at pass number `fail_at`."""

    fail_at = -1
    widths: list[int]

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        if len(self.widths) == self.fail_at:
            self.fail_at = -1
            raise BackendError("planted")
        self.widths.append(sum(step.num_tokens for step in steps))
        return super().forward(steps)


def lazy(*, width_class: WidthClass | None = None, host_scores: bool = False) -> Lazy:
    model = Lazy(64, seed=3, context_length=120, width_class=width_class, host_scores=host_scores)
    model.widths = []
    return model


class Moody:
    """Guesses in some rounds and not in others, rightly and wrongly; remembers whose pass had begun early."""

    name = "moody"
    needs_trees = False

    def __init__(self, busy: Sequence[bool]) -> None:
        self.busy, self.round = busy, 0
        self.early: list[bool] = []
        self.plain: list[bool] = []

    def attach(self, state: SequenceState) -> None: ...

    def begin(self, context: Context) -> None: ...

    def propose(self, request: DraftRequest) -> Proposal:
        self.round += 1
        if not self.busy[self.round % len(self.busy)] or not min(request.max_nodes, request.max_depth):
            return Proposal(self.name)
        guess = np.array([self.round % 60], np.int32)
        return Proposal(self.name, (HostTokens(guess),), np.array([-1], np.int32))

    def observe(self, outcome: Outcome) -> None:
        self.early.append(outcome.begun_early)
        self.plain.append(not len(outcome.tree))

    def save(self) -> tuple[SavedDraft, ...]:
        return ()

    def restore(self, saved: Sequence[SavedDraft]) -> None: ...

    def close(self) -> None: ...


def tokens(
    model: ReferenceModel, drafter: Drafter, params: SamplingParams, prompt: Sequence[int] = (1, 2, 3)
) -> object:
    with Session(model, drafter) as session:
        result = session.generate([1, 2, 3], params)
        assert session._state.num_pending == 0 and session._state.length == len(session.tokens) - 1
        return result.tokens, result.finish_reason


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, replace(SAMPLED, stop_tokens=frozenset(range(20)))])
@pytest.mark.parametrize("width_class", [None, WidthClass(3, 8)])
def test_the_text_is_that_of_a_device_that_waits(params: SamplingParams, width_class: WidthClass | None) -> None:
    want = tokens(lazy(width_class=width_class, host_scores=True), Nothing(), params)
    for busy in ([False], [True], [False, False, False, True], [False] * 9 + [True] * 2):
        assert tokens(lazy(width_class=width_class), Moody(busy), params) == want


def test_plain_decoding_is_one_pass_ahead_and_one_pass_dearer() -> None:
    waiting, ahead = lazy(host_scores=True), lazy()
    tokens(waiting, Nothing(), GREEDY)
    tokens(ahead, Nothing(), GREEDY)
    assert len(ahead.widths) == len(waiting.widths)  # the last round knows that it is the last
    stopped = replace(GREEDY, max_tokens=None, stop_tokens=frozenset(range(1, 64, 2)))
    waiting, ahead = lazy(host_scores=True), lazy()
    assert tokens(waiting, Nothing(), stopped) == tokens(ahead, Nothing(), stopped)
    assert len(ahead.widths) <= len(waiting.widths) + 1  # a stop token was not foreseen


def test_a_pass_begins_early_behind_two_rounds_without_guesses_only() -> None:
    drafter = Moody([False, False, False, False, True])
    tokens(lazy(), drafter, GREEDY)
    assert any(drafter.early)
    for index, early in enumerate(drafter.early):
        quiet = index >= 2 and drafter.plain[index - 2] and drafter.plain[index - 1]
        assert early == (quiet and drafter.plain[index])


def test_what_is_read_later_is_not_overwritten() -> None:
    """Scores may be stale after the next pass, so log-probabilities, penalties and truncation wait."""
    for params in (
        replace(GREEDY, logprobs=2),
        replace(SAMPLED, top_k=5),
        replace(GREEDY, repetition_penalty=1.2),
        replace(SAMPLED, logit_bias={3: 1.0}),
    ):
        drafter = Moody([False])
        assert tokens(lazy(), drafter, params) == tokens(lazy(host_scores=True), Nothing(), params)
        assert not any(drafter.early)


def test_a_pass_that_fails_leaves_the_lane_as_it_was() -> None:
    model = lazy()
    state, context = model.open(), Context([5])
    lane = Lane(state, context, Nothing(), Sampler(GREEDY, 0), Walk(), frozenset())
    seen = []
    for fail_at in (0, 2, 3, 5):
        model.fail_at = fail_at
        while model.fail_at == fail_at:
            before = (state.length, len(context))
            try:
                run_round(model, [lane], [Room(4, 4)])
            except BackendError:
                assert (state.length, len(context), state.num_pending) == (*before, 0)
                seen.append(fail_at)
    run_round(model, [lane], [Room(4, 4)])
    assert seen == [0, 2, 3, 5]
    want = ReferenceModel(64, seed=3, context_length=120)
    with Session(want, Nothing()) as session:
        assert session.generate([5], GREEDY).tokens[: len(context) - 1] == tuple(context.tokens[1:].tolist())


def test_an_answer_that_ends_early_leaves_nothing_behind() -> None:
    model = lazy()
    with Session(model, Nothing()) as session:
        want = session.generate([1, 2, 3], GREEDY).tokens
        stream = session.stream([1, 2, 3], GREEDY)
        for count, _ in enumerate(stream):
            if count == 5:
                stream.cancel()
        assert stream.result.finish_reason == "cancelled" and session._state.num_pending == 0
        dropped = iter(session.stream([1, 2, 3], GREEDY))
        next(dropped), next(dropped), next(dropped)
        assert session.generate([1, 2, 3], GREEDY).tokens == want
        text = session.generate([1, 2, 3], GREEDY).text
        halted = session.generate([1, 2, 3], replace(GREEDY, stop=(text[10:13],)))
        assert halted.finish_reason == "stop" and session._state.length == len(session.tokens) - 1


def test_lanes_begin_together_or_not_at_all() -> None:
    model = lazy()
    lanes = []
    for prompt, drafter in (([1], Moody([False])), ([7], Moody([False] * 6 + [True]))):
        lanes.append(Lane(model.open(), Context(prompt), drafter, Sampler(SAMPLED, 4), Walk(), frozenset()))
    while len(lanes[0].context) < 25:
        run_round(model, lanes, [Room(4, 4)] * 2)
    assert isinstance(lanes[0].drafter, Moody) and any(lanes[0].drafter.early)
    assert not all(early for _, early in pairwise(lanes[0].drafter.early))
    lanes[1].early.drop(lanes[1].state)
    for _ in range(3):  # the other one leaves
        run_round(model, lanes[:1], [Room(4, 4)])
    with Session(lazy(host_scores=True), Nothing()) as session:
        for lane in lanes:
            want = session.generate(lane.context.tokens[:1].tolist(), SAMPLED).tokens
            assert want[: len(lane.context) - 1] == tuple(lane.context.tokens[1:31].tolist())
