"""What is kept of earlier sequences: the longest beginning is found, within a budget, and nothing is mixed up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from localspec.context import Context
from localspec.drafters import Combined, DraftModel, Ngram
from localspec.engine.prefill import read_chunk
from localspec.engine.slots import WORTH_COPYING, Slot, Slots
from localspec.errors import BackendError, OutOfMemoryError
from localspec.protocols import Drafter, Scores, Step
from localspec.testing.reference import ReferenceModel, ReferenceSaved, ReferenceState
from localspec.types import TokenIds

PLENTY = 1 << 24


def ids(*tokens: int) -> TokenIds:
    return np.array(tokens, np.int32)


def spread(start: int, count: int) -> TokenIds:
    return np.arange(start, start + count, dtype=np.int32) % 60


@pytest.fixture
def model() -> ReferenceModel:
    return ReferenceModel()


def read(
    model: ReferenceModel, slots: Slots, prompt: TokenIds, running: Sequence[tuple[Slot, TokenIds]] = ()
) -> tuple[Slot, int]:
    """A slot that holds all of the prompt but its last token; and how much of that it had."""
    slot = slots.take(prompt, running)
    found = slot.state.length
    while read_chunk(model, slot.state, prompt):
        pass
    assert [cell.token for cell in slot.state.committed] == prompt[:-1].tolist()  # type: ignore[attr-defined]
    return slot, found


def answered(model: ReferenceModel, slots: Slots, prompt: TokenIds) -> int:
    """Read a prompt and give the slot back; how much of it was there."""
    slot, found = read(model, slots, prompt)
    slots.give_back(slot, prompt)
    return found


def test_a_slot_keeps_what_its_last_request_left(model: ReferenceModel) -> None:
    slots = Slots(model, 2, 0)
    assert answered(model, slots, spread(0, 20)) == 0
    assert answered(model, slots, np.concatenate([spread(0, 20), ids(50, 51)])) == 19
    assert answered(model, slots, np.concatenate([spread(0, 10), ids(50)])) == 10
    slots.close()
    assert model.num_open == 0


def test_what_another_request_displaces_is_copied_out_and_found_again(model: ReferenceModel) -> None:
    slots = Slots(model, 1, PLENTY)
    first, second = spread(0, 60), spread(7, 60)
    answered(model, slots, first)
    assert answered(model, slots, second) == 0
    assert slots.num_kept == 1 and slots.num_bytes > 0
    assert answered(model, slots, np.concatenate([first, ids(3)])) == 59
    assert answered(model, slots, np.concatenate([second, ids(3)])) == 59
    slots.close()


def test_short_beginnings_are_not_worth_a_copy(model: ReferenceModel) -> None:
    slots = Slots(model, 1, PLENTY)
    answered(model, slots, spread(0, WORTH_COPYING))
    answered(model, slots, spread(9, 20))
    assert slots.num_kept == 0
    slots.close()


def test_a_beginning_of_what_is_kept_is_not_kept_twice(model: ReferenceModel) -> None:
    slots = Slots(model, 1, PLENTY)
    other = spread(30, 70)
    for length in (50, 60, 70):
        answered(model, slots, spread(0, length))
        answered(model, slots, other)
    assert slots.num_kept == 2
    slots.close()


def test_copies_stay_within_the_budget_least_recently_used_out_first(model: ReferenceModel) -> None:
    slots = Slots(model, 1, PLENTY)
    answered(model, slots, spread(0, 50))
    answered(model, slots, spread(10, 50))
    each = slots.num_bytes
    slots.close()
    slots = Slots(model, 1, 2 * each + each // 2)
    for start in (0, 10, 20, 30):  # three are displaced, two have room
        answered(model, slots, spread(start, 50))
        assert slots.num_bytes <= 2.5 * each
    assert slots.num_kept == 2
    assert answered(model, slots, np.concatenate([spread(20, 50), ids(1)])) == 49
    assert answered(model, slots, np.concatenate([spread(0, 50), ids(1)])) == 0
    slots.close()


def test_a_running_neighbour_lends_its_beginning(model: ReferenceModel) -> None:
    slots = Slots(model, 2, 0)
    prompt = spread(0, 60)
    first, _ = read(model, slots, prompt)
    second, found = read(model, slots, np.concatenate([prompt[:50], ids(1, 2)]), [(first, prompt)])
    assert found == 50
    assert [cell.token for cell in first.state.committed] == prompt[:-1].tolist()  # type: ignore[attr-defined]
    slots.give_back(second, prompt[:50])
    slots.give_back(first, prompt)
    slots.close()


def test_new_requests_sit_side_by_side(model: ReferenceModel) -> None:
    """Unless a beginning is worth more than that."""
    slots = Slots(model, 5, 0)
    taken = [slots.take(spread(number, 40)) for number in range(5)]
    for number in (4, 1, 3, 0, 2):
        while read_chunk(model, taken[number].state, spread(number, 40)):
            pass
        slots.give_back(taken[number], spread(number, 40))
    first = slots.take(spread(50, 5))
    second, third = slots.take(spread(52, 5)), slots.take(spread(54, 5))
    places = sorted(slot.place for slot in (first, second, third))
    assert places == list(range(places[0], places[0] + 3))
    free = next(place for place in (0, 4) if place not in places)
    assert slots.take(spread(free, 50)).place == free
    slots.close()


def test_a_discarded_slot_starts_anew(model: ReferenceModel) -> None:
    slots = Slots(model, 1, PLENTY)
    slot, _ = read(model, slots, spread(0, 40))
    slots.discard(slot)
    assert answered(model, slots, spread(0, 40)) == 0
    slots.close()


def test_random_use_never_mixes_anything_up(model: ReferenceModel) -> None:
    """Any order of prompts over few beginnings; `read` compares the tokens of the state each time."""
    rng = np.random.default_rng(0)
    slots = Slots(model, 3, 300_000)
    busy: list[tuple[Slot, TokenIds]] = []
    for _ in range(60):
        if busy and (len(busy) == 3 or rng.random() < 0.5):
            slot, tokens = busy.pop(int(rng.integers(0, len(busy))))
            if rng.random() < 0.2:
                slots.discard(slot)
            else:
                slots.give_back(slot, tokens)
            continue
        start = spread(int(rng.integers(0, 3)), int(rng.integers(1, 80)))
        prompt = np.concatenate([start, rng.integers(0, 60, int(rng.integers(1, 20)), dtype=np.int32)])
        busy.append((read(model, slots, prompt, busy)[0], prompt))
        assert slots.num_bytes <= 300_000
    slots.close()
    assert model.num_open == 0


def test_more_slots_than_sequences_are_refused(model: ReferenceModel) -> None:
    with pytest.raises(BackendError):
        Slots(model, 17, 0)
    assert model.num_open == 0


# ---------------------------------------------------------------- what draft models have read


class Draft(ReferenceModel):
    """A draft model that counts what it reads, and may find no room."""

    num_read = 0
    is_full = False

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        self.num_read += sum(step.num_tokens for step in steps)
        return super().forward(steps)

    def open(self) -> ReferenceState:
        return _Reluctant(self) if self.is_full else super().open()


class _Reluctant(ReferenceState):
    """A sequence of which no copy can be made."""

    def save(self) -> ReferenceSaved:
        raise OutOfMemoryError("no room for a copy")


def drafted(
    model: ReferenceModel,
    slots: Slots,
    prompt: TokenIds,
    make: Callable[[], Drafter],
    running: Sequence[tuple[Slot, TokenIds]] = (),
) -> Slot:
    """A slot in which target and drafter have read the prompt."""
    slot, _ = read(model, slots, prompt, running)
    slot.draft_with("", make)
    assert slot.drafter is not None and slot.drafts == ()
    slot.drafter.begin(Context(prompt))
    return slot


@pytest.mark.parametrize("combined", [False, True])
def test_what_a_draft_model_has_read_is_copied_out_and_found_again(model: ReferenceModel, combined: bool) -> None:
    draft = Draft()

    def make() -> Drafter:
        return Combined([Ngram(), DraftModel(draft)]) if combined else DraftModel(draft)

    slots = Slots(model, 1, PLENTY)
    first, second = spread(0, 60), spread(7, 60)
    for prompt in (first, second):
        slots.give_back(drafted(model, slots, prompt, make), prompt)
    assert draft.num_read == 2 * 59
    assert 0 < slots.draft_bytes < slots.num_bytes
    for prompt in (first, second):
        again = np.concatenate([prompt, ids(3, 4)])
        slots.give_back(drafted(model, slots, again, make), again)
    assert draft.num_read == 2 * 59 + 2 * 2
    slots.close()
    assert draft.num_open == 0


def test_another_drafter_goes_on_from_what_the_same_model_has_read(model: ReferenceModel) -> None:
    draft = Draft()
    slots = Slots(model, 1, PLENTY)
    first, second = spread(0, 60), spread(7, 60)
    slots.give_back(drafted(model, slots, first, lambda: DraftModel(draft)), first)
    slot, _ = read(model, slots, second)
    slot.draft_with("lookup", Ngram)
    slots.give_back(slot, second)
    slot, _ = read(model, slots, first)
    slot.draft_with("tree", lambda: DraftModel(draft, shape="tree"))
    assert slot.drafter is not None
    slot.drafter.begin(Context(first))
    assert draft.num_read == 59
    slots.close()
    assert draft.num_open == 0


def test_a_running_neighbour_lends_what_its_draft_model_has_read(model: ReferenceModel) -> None:
    draft = Draft()
    slots = Slots(model, 2, 0)
    prompt = spread(0, 60)
    first = drafted(model, slots, prompt, lambda: DraftModel(draft))
    drafted(model, slots, np.concatenate([prompt[:50], ids(1, 2)]), lambda: DraftModel(draft), [(first, prompt)])
    assert draft.num_read == 59 + 1
    slots.close()


def test_copies_of_both_models_share_one_budget(model: ReferenceModel) -> None:
    """Where only the target's has room, it alone is kept."""
    draft = Draft()

    slots = Slots(model, 1, PLENTY)
    for start in (0, 10):
        slots.give_back(drafted(model, slots, spread(start, 50), lambda: DraftModel(draft)), spread(start, 50))
    both, drafts = slots.num_bytes, slots.draft_bytes
    slots.close()
    for budget, kept, with_drafts in ((2 * both + 1, 2, True), (2 * both - 1, 1, True), (both - 1, 2, False)):
        slots = Slots(model, 1, budget)
        for start in (0, 10, 20, 30):
            slots.give_back(drafted(model, slots, spread(start, 50), lambda: DraftModel(draft)), spread(start, 50))
            assert slots.num_bytes <= budget
        assert (slots.num_kept, slots.draft_bytes) == (kept, kept * drafts if with_drafts else 0)
        slots.close()
    assert draft.num_open == model.num_open == 0


def test_a_draft_models_part_that_finds_no_room_is_left_out(model: ReferenceModel) -> None:
    draft = Draft()
    draft.is_full = True
    slots = Slots(model, 1, PLENTY)
    for start in (0, 7):
        slots.give_back(drafted(model, slots, spread(start, 60), lambda: DraftModel(draft)), spread(start, 60))
    assert slots.num_kept == 1 and slots.num_bytes > 0 == slots.draft_bytes
    slots.close()
