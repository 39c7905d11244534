"""Heads that rest while another drafter guesses better: when, for how long, and that no text changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from localspec.drafters import make_drafter
from localspec.drafters.head import HeadDrafter
from localspec.drafters.nothing import Nothing
from localspec.engine.session import Session
from localspec.engine.slots import Slots
from localspec.protocols import Outcome, Proposal, SequenceState
from localspec.sampling import SamplingParams
from localspec.schedule.cost import Costs, HeadCosts
from localspec.schedule.experience import Experience
from localspec.schedule.listening import Hearing, Listening
from localspec.schedule.scheduled import Scheduled
from localspec.testing.reference import ReferenceModel
from localspec.testing.reference_head import ReferenceHead
from tests.schedule.test_router import flat

PROMPT = [3, 9, 27, 17, 3, 9]
DEAR = HeadCosts(flat(4.0), flat(4.0))


class Ear(HeadDrafter):
    """Notes for which answers it was attached (how many tokens were there), and None where it was not."""

    def __init__(self, target: ReferenceModel, amount: float) -> None:
        super().__init__(ReferenceHead(target, amount=amount), num=4)
        self.target = target
        self.answers: list[int | None] = []

    def attach(self, state: SequenceState, *, whole: bool = True) -> None:
        super().attach(state, whole=whole)
        self.answers.append(state.length)

    def detach(self) -> None:
        super().detach()
        self.answers[-1] = None


def run(hearing: Hearing, state: SequenceState, rounds: Sequence[str], name: str = "eagle3") -> bool:
    """An answer whose rounds these drafters guessed in; was it listened to?"""
    hearing.attach(state)
    heard = name in {part.name for part in hearing.able}
    for one in rounds:
        path = (0,) if one else ()
        hearing.observe(Proposal("auto", sources=(one,)), Outcome(Proposal("").tree(), path, (1,)), ())
    return heard


@pytest.fixture
def listening() -> dict[str, Listening]:
    return {}


@pytest.fixture
def hearing(listening: dict[str, Listening]) -> Hearing:
    target = ReferenceModel(48, seed=5, context_length=300)
    draft = ReferenceModel(48, seed=5)
    return Hearing(listening, [make_drafter("draft_model", draft), HeadDrafter(ReferenceHead(target))])


@pytest.fixture
def state(hearing: Hearing) -> SequenceState:
    head = hearing._dear[1]
    assert isinstance(head, HeadDrafter) and isinstance(head.head, ReferenceHead)
    return head.head.target.open()


OTHER, OWN, NOBODY = ["draft_model"] * 20, ["eagle3"] * 4 + ["draft_model"] * 16, [""] * 20


def test_it_rests_ever_longer_behind_answers_in_vain(hearing: Hearing, state: SequenceState) -> None:
    heard = [run(hearing, state, OTHER) for _ in range(150)]
    tries = [number for number, one in enumerate(heard) if one]
    assert tries == [0, 1, 4, 9, 18, 35, 68, 133], "two at first, then behind 2, 4, 8, 16, 32, 64 answers"


def test_one_that_is_of_use_never_rests_and_one_that_becomes_so_does_no_more(
    hearing: Hearing, state: SequenceState
) -> None:
    assert all(run(hearing, state, OWN) for _ in range(10))
    heard = [run(hearing, state, OTHER) for _ in range(4)]
    assert heard == [True, True, False, False]
    assert all(run(hearing, state, OWN) for _ in range(10)), "the try was of use"


def test_where_no_other_is_of_use_either_it_listens(
    hearing: Hearing, state: SequenceState, listening: dict[str, Listening]
) -> None:
    assert all(run(hearing, state, NOBODY) for _ in range(10)), "nothing says that another would do instead"
    assert [run(hearing, state, OTHER) for _ in range(3)] == [True, True, False]
    assert not run(hearing, state, NOBODY), "that it is another text shows in this one"
    assert run(hearing, state, NOBODY) and listening["eagle3"].is_try


def test_short_answers_say_nothing_but_pass(hearing: Hearing, state: SequenceState) -> None:
    assert all(run(hearing, state, OTHER[:5]) for _ in range(5))
    assert [run(hearing, state, OTHER) for _ in range(3)] == [True, True, False]
    assert [run(hearing, state, OTHER[:5]) for _ in range(2)] == [False, True]


def test_being_attached_again_in_an_answer_changes_nothing(hearing: Hearing, state: SequenceState) -> None:
    heard = []
    for _ in range(5):
        hearing.attach(state)
        heard.append(run(hearing, state, OTHER))
    assert heard == [True, True, False, False, True]


def test_several_sessions_learn_together() -> None:
    """Old bugs: one that was of use did not end the rest that another session's answer had begun; sessions that ended
    alike made it as long as if they had been one behind the other."""
    one = Listening()
    for _ in range(8):
        one.heard(0.0, 1.0)
    assert (one.in_vain, one.left) == (2, 2)
    one.rested(1.0)
    one.rested(1.0)
    assert one.is_on and one.is_back
    one.is_back = False
    one.rested(1.0)
    assert not one.is_back, "it is back already"
    one.heard(0.0, 1.0)
    assert one.left == 4
    one.heard(0.5, 1.0)
    assert one == Listening(0, 0)


def test_what_is_remembered_is_bounded() -> None:
    assert Listening(-3, 10**9) == Listening(0, 64)
    one = Listening()
    for _ in range(100):
        one.left = 0
        one.heard(0.0, 1.0)
    assert (one.in_vain, one.left) == (64, 64)


# ---------------------------------------------------------------- in sessions


def fleet(head: HeadCosts, amount: float, *, draft_ms: float = 0.5, draft_seed: int = 5) -> tuple[Scheduled, Ear]:
    """A draft model, which is right with seed 5, and a head that errs by so much."""
    target = ReferenceModel(48, seed=5, sharpness=3.0, context_length=2000)
    draft = ReferenceModel(48, seed=draft_seed, sharpness=3.0, context_length=2000)
    table = Costs(flat(10.0, 0.2), flat(draft_ms), 0.0, heads={"eagle3": head})
    ear = Ear(target, amount)
    experience = Experience(table, target.capabilities, by_clock=False)
    return Scheduled([], [make_drafter("draft_model:num=4", draft), ear], experience), ear


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_worse_head_is_left_out_and_the_text_stays_plain_decodings(temperature: float) -> None:
    scheduled, ear = fleet(DEAR, 3.0)
    target, experience = ear.target, scheduled.experience
    with Session(target, scheduled) as session, Session(target, Nothing()) as plain:
        for number in range(10):
            params = SamplingParams(temperature=temperature, seed=number, max_tokens=60, ignore_eos=True)
            session.reset()
            plain.reset()
            assert session.generate(PROMPT, params).tokens == plain.generate(PROMPT, params).tokens
    heard = [one is not None for one in ear.answers]
    assert heard == [True] * 2 + [False] * 2 + [True] + [False] * 4 + [True]
    again = Experience(experience.live.costs, target.capabilities)
    again.recall(experience.as_dict())
    assert again.listening == {"eagle3": Listening(4, 8)}
    experience.listening["eagle3"].left = 0
    again.recall(experience.as_dict())
    assert again.listening == {"eagle3": Listening(4, 0, is_back=True)}, "to be tried next"


def test_a_better_head_is_listened_to() -> None:
    scheduled, ear = fleet(HeadCosts(flat(0.01), flat(0.01)), 0.0, draft_ms=2.0, draft_seed=77)
    with Session(ear.target, scheduled) as session:
        for _ in range(6):
            session.reset()
            session.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True))
    assert None not in ear.answers


def test_a_try_in_a_long_conversation_reads_nothing_again() -> None:
    scheduled, ear = fleet(DEAR, 3.0)
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    with Session(ear.target, scheduled) as session:
        prompt = list(PROMPT)
        for number in range(6):
            result = session.generate(prompt, params)
            assert (result.stats.num_reused > 0) == (number > 0)
            prompt = [*session.tokens.tolist(), 5, 6]
    assert ear.answers[2:4] == [None, None] and ear.answers[4], "attached again where tokens are, which stay"


def test_a_slot_attaches_its_drafter_before_every_turn() -> None:
    """A server keeps drafters between turns; what they hear is decided for each."""
    scheduled, ear = fleet(DEAR, 3.0)
    slots = Slots(ear.target, 1, 1 << 20)
    try:
        for _ in range(3):
            slot = slots.take(np.array(PROMPT, np.int32))
            slot.draft_with("auto", lambda: scheduled)
            slots.give_back(slot, np.array(PROMPT, np.int32))
        assert len(ear.answers) == 3
        slot = slots.take(np.array(PROMPT, np.int32))
        scheduled.experience.listening["eagle3"].left = 2
        slot.draft_with("auto", lambda: scheduled)
        assert ear.answers[3:] == [None]
        slots.give_back(slot, np.array(PROMPT, np.int32))
    finally:
        slots.close()


def test_a_head_that_rests_takes_nothing_from_another_drafter_of_the_same_head() -> None:
    """Old bug: swapped in behind such an answer it raised ValueError, its part of the sequence having been closed."""
    scheduled, ear = fleet(DEAR, 3.0)
    fixed = HeadDrafter(ear.head, num=4)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    with Session(ear.target, fixed) as session, Session(ear.target, Nothing()) as plain:
        texts = [plain.generate(PROMPT, params).tokens, session.generate(PROMPT, params).tokens]
        scheduled.experience.listening["eagle3"].left = 3
        for drafter in (scheduled, fixed, scheduled, fixed):
            session.use(drafter)
            result = session.generate(PROMPT, params)
            texts.append(result.tokens)
            assert result.stats.num_drafted > 0
    assert len(set(texts)) == 1
    scheduled.close()
