"""The drafter that decides, in whole answers on the reference backend: exact whatever it decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localspec.context import Context
from localspec.drafters import make_drafter
from localspec.engine.session import Session
from localspec.engine.stats import Stats
from localspec.protocols import (
    Drafter,
    DraftRequest,
    HeadInfo,
    HostTokens,
    Outcome,
    Proposal,
    SavedDraft,
    SequenceState,
    WidthClass,
)
from localspec.sampling import Sampler, SamplingParams
from localspec.schedule import scheduled
from localspec.schedule.cost import Costs, Curve, HeadCosts
from localspec.schedule.experience import Experience
from localspec.schedule.heads import pays_to_wait
from localspec.schedule.scheduled import Scheduled
from localspec.testing.reference import ReferenceModel
from localspec.tree.token_tree import TokenTree

PROMPT = [3, 9, 27, 17, 3, 9]


def curve(one: float, slope: float) -> Curve:
    return Curve((1, 2, 64), (0,), ((one, one + slope, one + 63 * slope),))


def session(
    target: ReferenceModel, free: Sequence[Drafter], dear: Sequence[Drafter], costs: Costs, acceptance: str = "walk"
) -> tuple[Session, Experience]:
    experience = Experience(costs, target.capabilities, by_clock=False)
    return Session(target, Scheduled(free, dear, experience), acceptance=acceptance), experience


def answer(one: Session, temperature: float, seed: int = 0, num: int = 60) -> tuple[tuple[int, ...], Stats]:
    params = SamplingParams(temperature=temperature, seed=seed, max_tokens=num, ignore_eos=True)
    result = one.generate(PROMPT, params)
    return result.tokens, result.stats


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("trees", [True, False])
def test_the_text_is_plain_decodings_whatever_is_decided(temperature: float, shape: str, trees: bool) -> None:
    target, draft = ReferenceModel(48, seed=5, sharpness=3.0), ReferenceModel(48, seed=5, sharpness=2.0)
    target.capabilities = replace(target.capabilities, exact_trees=trees)
    for slope in (0.0, 0.3, 30.0):  # verifying is free, cheap, ruinous
        costs = Costs(curve(10.0, slope), curve(0.5, 0.1), 0.1)
        if shape == "tree" and not trees:
            shape = "chain"
        parts = make_drafter(f"ngram:shape={shape}", None), make_drafter(f"draft_model:num=20,shape={shape}", draft)
        with (
            session(target, parts[:1], parts[1:], costs)[0] as one,
            Session(target, make_drafter("nothing", None)) as p,
        ):
            for seed in range(4):
                assert answer(one, temperature, seed)[0] == answer(p, temperature, seed)[0]


def test_dear_passes_are_kept_narrow_and_cheap_ones_are_filled() -> None:
    target, draft = ReferenceModel(48, seed=5, sharpness=3.0), ReferenceModel(48, seed=5, sharpness=3.0)
    lengths = {}
    for slope in (0.01, 4.0, 1000.0):
        with session(
            target, [], [make_drafter("draft_model:num=20", draft)], Costs(curve(10.0, slope), curve(0.01, 0.0), 0.0)
        )[0] as one:
            stats = answer(one, 0.0, num=100)[1]
            lengths[slope] = stats.num_drafted / stats.num_rounds
    assert lengths[0.01] > lengths[4.0] > lengths[1000.0]
    assert lengths[0.01] > 4.0 and lengths[1000.0] < 0.1


class Wrong:
    """Guesses with confidence what is never said."""

    name = "wrong"
    needs_trees = False

    def __init__(self) -> None:
        self.asked = 0

    def attach(self, state: SequenceState) -> None: ...

    def begin(self, context: object) -> None:
        """Nothing to prepare."""

    def propose(self, request: DraftRequest) -> Proposal:
        """The token 0, which `target` below cannot say."""
        self.asked += 1
        num = min(3, request.max_nodes, request.max_depth)
        tokens = (HostTokens(np.zeros(num, np.int32)),) if num else ()
        return Proposal(self.name, tokens, np.arange(-1, num - 1, dtype=np.int32), log_q=(-0.05,) * num)

    def observe(self, outcome: Outcome) -> None:
        """Nothing to learn."""

    def save(self) -> tuple[SavedDraft, ...]:
        return ()

    def restore(self, saved: Sequence[SavedDraft]) -> None: ...

    def close(self) -> None:
        """Nothing to give back."""


def test_a_drafter_that_is_sure_and_wrong_is_soon_left_alone_and_the_answer_says_so() -> None:
    target, wrong = ReferenceModel(48, seed=5, sharpness=3.0), Wrong()
    costs = Costs(curve(10.0, 2.0), curve(1.0, 0.0), 0.0)
    one, _ = session(target, [], [wrong], costs)
    with one:
        params = SamplingParams(max_tokens=400, ignore_eos=True, logit_bias={0: -1e9})
        first = one.generate(PROMPT, params)
        assert first.stats.num_drafted < 80
        one.reset()
        second = one.generate(PROMPT, replace(params, max_tokens=30))
    assert second.stats.num_drafted <= 3
    if not second.stats.num_drafted:
        assert second.plain_because == "no guess was worth its time" or "parked" in str(second.plain_because)
    assert sum(second.stats.plain_rounds.values()) >= 29


def test_a_dear_drafter_that_brings_nothing_is_only_asked_on_credit() -> None:
    """Its guesses are known to be worthless, so none is verified and nothing is lost but the time of asking."""
    target, wrong = ReferenceModel(48, seed=5, sharpness=3.0), Wrong()
    one, _ = session(target, [], [wrong], Costs(curve(10.0, 2.0), curve(1.0, 0.0), 0.0))
    with one:
        params = SamplingParams(max_tokens=300, ignore_eos=True, logit_bias={0: -1e9})
        one.generate(PROMPT, params)
        before = wrong.asked
        one.reset()
        one.generate(PROMPT, params)
    # a hundredth of a token a round against the tenth that asking takes
    assert 1 <= wrong.asked - before <= 45


def tree_of(tokens: Sequence[int]) -> TokenTree:
    return TokenTree.from_parents(np.array(tokens, np.int32), np.arange(-1, len(tokens) - 1, dtype=np.int32))


def request(context: Context) -> DraftRequest:
    return DraftRequest(
        context=context,
        max_nodes=16,
        max_depth=16,
        sampler=Sampler(SamplingParams(), 0),
        stop_tokens=frozenset(),
        begins_early=True,
    )


def test_what_interrupting_plain_decoding_costs_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two plain rounds behind a guess take longer where passes begin early: 1 and 17 of 10 ms."""
    monkeypatch.setattr(scheduled, "perf_counter", lambda: 0.0)  # else a slow machine looks in fewer rounds
    experience = Experience(Costs(curve(10.0, 0.1), None, 0.0), ReferenceModel(48, seed=5).capabilities)
    assert experience.restart_ms(0) == experience.plain_ms(0)
    one, context = Scheduled([], [], experience), Context(PROMPT)
    one.begin(context)
    for number in range(400):
        guessed, verify_ms = ([1], 12.0) if number % 10 == 0 else ([], {1: 11.0, 2: 27.0}.get(number % 10, 10.0))
        one.propose(request(context))
        early = not guessed and number % 10 > 2
        one.observe(Outcome(tree_of(guessed), (), (3,), 1 + len(guessed), verify_ms, begun_early=early))
    assert experience.restart_ms(0) == pytest.approx(18.0, rel=0.1)


class Unread(Wrong):
    """Guesses that are still on a device: no chances, and fewer than the built widths have room for."""

    def propose(self, request: DraftRequest) -> Proposal:
        return replace(super().propose(request), log_q=None)


def test_a_chain_that_nobody_has_read_is_padded_to_a_width_that_is_built() -> None:
    target = ReferenceModel(48, seed=5)
    target.capabilities = replace(target.capabilities, width_steps=(1, 8))
    flat = Costs(Curve((1, 8), (0,), ((10.0, 10.1),)), curve(0.01, 0.0), 0.0)
    one, context = Scheduled([], [Unread()], Experience(flat, target.capabilities, by_clock=False)), Context(PROMPT)
    one.begin(context)
    proposal = one.propose(request(context))
    assert (proposal.num_nodes, proposal.width) == (3, 8)


@pytest.mark.parametrize(
    ("extend_ms", "one_pass", "pays"), [(0.2, True, True), (0.8, True, False), (0.2, False, False)]
)
def test_a_tree_is_waited_for_where_its_levels_take_little(extend_ms: float, one_pass: bool, pays: bool) -> None:
    costs = Costs(curve(10.0, 0.0), heads={"dspark": HeadCosts(curve(1.0, 0.0), curve(extend_ms, 0.0))})
    info = HeadInfo("head", Path("head"), "dspark", 1, (1,), levels=7, one_pass=one_pass, confident=False)
    assert pays_to_wait(info, costs) is pays


def test_under_rejection_nothing_that_was_drawn_is_taken_back() -> None:
    """The law stays the target's only if what is verified does not depend on what was drawn."""
    target, draft = ReferenceModel(48, seed=5, sharpness=2.0), ReferenceModel(48, seed=5, sharpness=1.0)
    costs = Costs(curve(10.0, 1.0), curve(0.5, 0.0), 0.1)
    drafter = make_drafter("draft_model:num=6", draft)
    seen: list[tuple[int, int]] = []

    class Watched(Scheduled):
        def propose(self, request: DraftRequest) -> Proposal:
            proposal = super().propose(request)
            seen.append((proposal.num_nodes, 0 if proposal.laws is None else len(proposal.laws)))
            return proposal

    experience = Experience(costs, target.capabilities, by_clock=False)
    with Session(target, Watched([], [drafter], experience), acceptance="rejection") as one:
        answer(one, 1.0)
    assert any(nodes for nodes, _ in seen) and all(nodes == laws for nodes, laws in seen)


def test_sessions_of_a_pair_learn_together() -> None:
    target, draft = ReferenceModel(48, seed=5, sharpness=3.0), ReferenceModel(48, seed=5, sharpness=2.0)
    costs = Costs(curve(10.0, 1.0), curve(0.5, 0.0), 0.1)
    experience = Experience(costs, target.capabilities, by_clock=False)
    for _ in range(2):
        with Session(target, Scheduled([], [make_drafter("draft_model:num=6", draft)], experience)) as one:
            answer(one, 0.0)
    seen = sum(experience.record("draft_model", greedy=True).reliability._seen)
    with Session(target, Scheduled([], [make_drafter("draft_model:num=6", draft)], experience)) as one:
        answer(one, 0.0)
    assert sum(experience.record("draft_model", greedy=True).reliability._seen) > seen > 0


def test_a_pass_is_padded_where_a_wider_one_is_quicker() -> None:
    target = ReferenceModel(48, seed=5)
    falling = Curve((1, 2, 3, 4, 64), (0,), ((27.0, 38.0, 46.0, 20.0, 2000.0),))
    with session(target, [make_drafter("ngram:num=2", None)], [], Costs(falling, None, 0.0))[0] as one:
        stats = answer(one, 0.0)[1]
    assert set(stats.widths) == {4}


def test_a_table_that_is_wrong_about_plain_decoding_is_found_out() -> None:
    """The table says 50 ms for every width; in truth plain decoding takes 10 and anything wider 45, for which two
    tokens do not pay. Clocks are played: the rounds' times are given to `observe`."""
    target = ReferenceModel(48, seed=5)
    wrong = Curve((1, 2, 64), (0,), ((50.0, 50.0, 50.0),))
    drafter = Wrong()
    scheduled = Scheduled([drafter], [], Experience(Costs(wrong, None, 0.0), target.capabilities))
    context = Context(PROMPT)
    scheduled.begin(context)
    sampler = Sampler(SamplingParams(), 0)
    guessing: list[bool] = []
    for _ in range(300):
        request = DraftRequest(context=context, max_nodes=8, max_depth=8, sampler=sampler, stop_tokens=frozenset())
        tree = scheduled.propose(request).tree()
        guessing.append(len(tree) > 0)
        path = (0,) if len(tree) else ()
        tokens = (*tree.token[list(path)].tolist(), 7)
        context.extend(tokens)
        width = 1 + len(tree)
        scheduled.observe(Outcome(tree, path, tokens, width, 45.0 if width > 1 else 10.0))
    assert not any(guessing[:3]) and any(guessing)
    assert sum(guessing[20:]) < 20


def test_plain_decoding_is_judged_by_rounds_that_did_not_wait() -> None:
    """On a device whose passes begin early a plain round takes 6 ms, but 10 when it stands alone: guesses that bring
    a token for 8 ms more are worth it against the second and not against the first."""
    target = ReferenceModel(48, seed=5)
    table = Curve((1, 2, 64), (0,), ((10.0, 18.0, 100.0),))
    experience = Experience(Costs(table, None, 0.0), target.capabilities)
    scheduled = Scheduled([Wrong()], [], experience)
    context = Context(PROMPT)
    scheduled.begin(context)
    sampler = Sampler(SamplingParams(), 0)
    quiet = 0
    for _ in range(200):
        request = DraftRequest(
            context=context, max_nodes=8, max_depth=8, sampler=sampler, stop_tokens=frozenset(), begins_early=True
        )
        tree = scheduled.propose(request).tree()
        early = not len(tree) and quiet >= 2
        quiet = 0 if len(tree) else quiet + 1
        context.extend((7,))
        ms = 18.0 + len(tree) if len(tree) else 6.0 if early else 10.0
        scheduled.observe(Outcome(tree, (), (7,), 1 + len(tree), ms, early))
    assert experience.plain_ms(256) == pytest.approx(6.0, rel=0.05)


def test_the_last_token_of_an_answer_is_decoded_in_the_width_of_the_others() -> None:
    """Old error: it leaves no room for guesses, so its pass was the narrowest one, and behind it nothing was recorded
    that the next answer's passes need."""
    target = ReferenceModel(48, seed=5)
    target.capabilities = replace(target.capabilities, width_class=WidthClass(3, 4))
    experience = Experience(Costs(Curve((3, 4), (0,), ((5.3, 5.8),)), None, 0.0), target.capabilities)
    one, context = Scheduled([], [], experience), Context(PROMPT)
    one.begin(context)
    one.propose(request(context))
    for number, width in enumerate([3] * 12 + [4] * 12 + [3] * 12 + [4] * 12):
        place = experience.live.ran(width)
        ms = {3: 5.3, 4: 5.8}[width] + (1.4, 3.4, 0.0)[min(place, 2)]
        experience.live.observe_verify(width, number, ms, place=place)
    proposal = one.propose(replace(request(context), max_depth=0))
    assert (proposal.num_nodes, proposal.width) == (0, 4)
    one._steady._alike = 3
    one.observe(Outcome(tree_of([]), (), (3,), 4, 5.8))
    assert one._steady._alike == 3, "nothing was decided, so nothing came out otherwise"
    assert one.propose(replace(request(context), max_nodes=0, max_depth=0)).width <= 1, "no more than has room"
