"""Several drafters that run networks: who is asked, what each costs, and what that costs in the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localspec.drafters import make_drafter
from localspec.drafters.head import HeadDrafter
from localspec.engine.session import Session
from localspec.engine.stats import Stats
from localspec.protocols import Drafter, DraftRequest, HostTokens, Outcome, Proposal, SavedDraft, SequenceState
from localspec.sampling import SamplingParams
from localspec.schedule import store
from localspec.schedule.acceptance import Reliability
from localspec.schedule.cost import Costs, Curve, HeadCosts
from localspec.schedule.experience import Experience
from localspec.schedule.heads import assumed_heads, measure_heads
from localspec.schedule.router import Trials
from localspec.schedule.scheduled import Scheduled
from localspec.testing.reference import Array, ReferenceModel
from localspec.testing.reference_head import ReferenceBlockHead, ReferenceHead, ReferenceHeadState
from localspec.tree.token_tree import TokenTree

PROMPT = [3, 9, 27, 17, 3, 9]
TARGET = ReferenceModel(48, seed=5, sharpness=3.0, context_length=2000)


def flat(ms: float, slope: float = 0.0) -> Curve:
    return Curve((1, 64), (0,), ((ms, ms + 63 * slope),))


def costs(heads: Mapping[str, HeadCosts], draft: Curve | None = None) -> Costs:
    return Costs(flat(10.0, 0.2), draft, 0.0, heads=heads)


CHEAP = HeadCosts(flat(0.5), flat(0.01))


def answer(session: Session, num: int = 200, temperature: float = 0.0) -> tuple[tuple[int, ...], Stats]:
    result = session.generate(PROMPT, SamplingParams(temperature=temperature, seed=1, max_tokens=num, ignore_eos=True))
    return result.tokens, result.stats


class Oracle:
    """Guesses the next tokens of a known text, right from `good_from` to `good_to` and wrong elsewhere, and says that
    it is right."""

    needs_trees = False

    def __init__(self, name: str, text: Sequence[int], good_from: int = 0, good_to: int = 10**9) -> None:
        self.name = name
        self._text, self._good = list(text), range(good_from, good_to)
        self.asked: list[int] = []

    def attach(self, state: SequenceState) -> None: ...

    def begin(self, context: object) -> None: ...

    def propose(self, request: DraftRequest) -> Proposal:
        place = len(request.context)
        self.asked.append(place)
        num = min(4, request.max_nodes, request.max_depth)
        right = [self._text[place + i] if place + i < len(self._text) else 0 for i in range(num)]
        guess = right if place in self._good else [(token + 1) % 48 for token in right]
        tokens = (HostTokens(np.array(guess, np.int32)),) if num else ()
        return Proposal(self.name, tokens, np.arange(-1, num - 1, dtype=np.int32), log_q=(-0.1,) * num)

    def observe(self, outcome: Outcome) -> None: ...

    def save(self) -> tuple[SavedDraft, ...]:
        return ()

    def restore(self, saved: Sequence[SavedDraft]) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def text() -> list[int]:
    with Session(TARGET, make_drafter("nothing", None)) as session:
        return [*PROMPT, *answer(session, 500)[0]]


def route(dear: Sequence[Drafter], table: Costs, num: int, temperature: float = 0.0) -> tuple[tuple[int, ...], Stats]:
    experience = Experience(table, TARGET.capabilities, by_clock=False)
    with Session(TARGET, Scheduled([], dear, experience)) as session:
        return answer(session, num, temperature)


def test_the_one_that_is_right_is_asked_and_the_other_only_tried(text: list[int]) -> None:
    good, bad = Oracle("dspark", text), Oracle("eagle3", text, 0, 0)
    tokens, stats = route([bad, good], costs({"dspark": CHEAP, "eagle3": CHEAP}), 400)
    assert list(tokens) == text[len(PROMPT) : len(PROMPT) + 400]
    assert len(good.asked) > 0.9 * stats.num_rounds
    assert 4 <= len(bad.asked) < 0.3 * stats.num_rounds
    assert stats.accepted_length > 4.0


def test_where_the_text_changes_hands_change_too(text: list[int]) -> None:
    """One is right in the first half, the other in the second: nobody is told."""
    first, second = Oracle("dspark", text, 0, 250), Oracle("eagle3", text, 250)
    _, stats = route([first, second], costs({"dspark": CHEAP, "eagle3": CHEAP}), 490)
    late = [place for place in second.asked if place > 350]
    assert len(late) > 2 * len([place for place in first.asked if place > 350])
    assert stats.accepted_length > 3.0


def test_the_cheaper_of_two_equals_is_asked(text: list[int]) -> None:
    cheap, dear = Oracle("dspark", text), Oracle("eagle3", text)
    route([dear, cheap], costs({"dspark": CHEAP, "eagle3": HeadCosts(flat(6.0), flat(6.0))}), 300)
    assert len(cheap.asked) > 3 * len(dear.asked)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("acceptance", ["walk", "rejection"])
def test_a_fleet_says_what_plain_decoding_says(temperature: float, acceptance: str) -> None:
    """Draft model, two heads and lookup together; under rejection at least without an error."""
    target = ReferenceModel(48, seed=5, sharpness=3.0, context_length=300)
    table = costs({"dspark": CHEAP, "eagle3": HeadCosts(flat(0.5), flat(0.5))}, flat(0.5))
    dear = [
        make_drafter("draft_model:num=12,shape=tree", target.perturbed(0.3)),
        HeadDrafter(ReferenceBlockHead(target), num=16, shape="tree"),
        HeadDrafter(ReferenceHead(target), num=6),
    ]
    experience = Experience(table, target.capabilities, by_clock=False)
    scheduled = Scheduled([make_drafter("ngram:min=1", None)], dear, experience)
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=80, ignore_eos=True)
    with (
        Session(target, scheduled, acceptance=acceptance) as one,
        Session(target, make_drafter("nothing", None)) as plain,
    ):
        made = one.generate(PROMPT, params)
        assert made.stats.num_tokens == 80
        if acceptance == "walk" or not temperature:
            assert made.tokens == plain.generate(PROMPT, params).tokens
        assert made.stats.num_rounds < 80


def test_levels_that_cost_nothing_are_grown_and_dear_ones_are_not() -> None:
    """The same head and the same target; only what another level takes differs."""
    drafted = {}
    for name, extend in (("free", 0.001), ("dear", 20.0)):
        target = ReferenceModel(48, seed=5, sharpness=3.0, context_length=300)
        head = ReferenceBlockHead(target, amount=0.05)
        experience = Experience(
            costs({"dspark": HeadCosts(flat(0.1), flat(extend))}), target.capabilities, by_clock=False
        )
        with Session(target, Scheduled([], [HeadDrafter(head, num=24, shape="tree")], experience)) as session:
            stats = answer(session, 80)[1]
        drafted[name] = stats.num_drafted / stats.num_rounds
    assert drafted["free"] > 1.5 * drafted["dear"]


def test_a_trial_waits_for_what_it_costs() -> None:
    trials = Trials()
    for _ in range(4):
        assert trials.is_due(0.1)
        trials.observe(2.0)
    waited = [trials.is_due(0.1) for _ in range(400)]  # 0.2 tokens each, a hundredth put aside a round
    assert 15 <= sum(waited) <= 21
    assert not any(waited[:19])


def test_what_was_left_out_for_long_is_tried_a_few_times_for_nothing() -> None:
    trials = Trials()
    for _ in range(20):
        trials.observe(5.0)
    assert not trials.is_due(0.1)
    trials.again()
    assert [trials.is_due(0.1) for _ in range(6)] == [True] * 4 + [False] * 2


def test_guesses_deep_in_the_tree_are_corrected_by_their_depth() -> None:
    """What is said is right for children of the anchor and three times too much one level below."""
    reliability, rng = Reliability(), np.random.default_rng(0)
    tree = TokenTree.from_parents(np.array([1, 2], np.int32), np.array([-1, 0], np.int32), [math.log(0.9)] * 2)
    for _ in range(800):
        tokens = (1, 2, 5) if rng.random() < 0.3 else (1, 7)
        reliability.observe(tree, tokens if rng.random() < 0.9 else (7,))
    assert reliability.chances([math.log(0.9)], [0])[0] == pytest.approx(0.9, abs=0.08)
    assert reliability.chances([math.log(0.9)], [1])[0] == pytest.approx(0.3, abs=0.08)


def test_heads_are_measured_where_a_sequence_is_free_and_assumed_where_not() -> None:
    target = ReferenceModel(48, context_length=200)
    heads = [ReferenceHead(target), ReferenceBlockHead(target)]
    found = measure_heads(target, heads, seconds=0.0)
    assert target.num_open == 0
    assert set(found) == {"eagle3", "dspark"}
    for one in found.values():
        assert one.start.contexts == (64,) and one.extend.widths == (1, 2, 4, 8)
        assert HeadCosts.from_dict(one.as_dict()) == one
    guessed = assumed_heads(heads, 10.0, target.info.num_parameters)
    assert guessed["dspark"].extend.at(1, 0) < 0.1 * guessed["dspark"].start.at(1, 0)


class Noting(ReferenceHead):
    """Remembers how many rows it was asked for behind each other guess."""

    def __init__(self, target: ReferenceModel) -> None:
        super().__init__(target)
        self.num_rows = 0

    def row(self, beside: ReferenceHeadState, token: int, hidden: Array, depth: int) -> Array:
        self.num_rows += 1
        return super().row(beside, token, hidden, depth)


@pytest.mark.parametrize("steps", [(), (1, 16)])
def test_what_guesses_of_a_head_need_is_built_when_its_times_are_known_already(
    steps: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where each process must build something; times that were stored are used as they are."""
    monkeypatch.setattr(store, "_automatic", True)
    target = ReferenceModel(48, context_length=200)
    for role in ("target", "head"):
        (tmp_path / role).write_bytes(b"weights")
    target.info = replace(target.info, path=tmp_path / "target")
    target.capabilities = replace(target.capabilities, width_steps=steps)
    head = Noting(target)
    head.info = replace(head.info, path=tmp_path / "head")
    first = store.load_or_measure(target, folder=tmp_path, heads=[head])
    assert head.num_rows > 0
    head.num_rows = 0
    again = store.load_or_measure(target, folder=tmp_path, heads=[head])
    assert again.heads == first.heads and target.num_open == 0
    assert head.num_rows == (4 + sum((1, 2, 4, 8)) if steps else 0), (
        "the anchor's row each time, and those of its guesses"
    )
