"""What is kept of earlier sequences: the longest beginning is found, within a budget, and nothing is mixed up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from localspec.engine.prefill import read_chunk
from localspec.engine.slots import WORTH_COPYING, Slot, Slots
from localspec.errors import BackendError
from localspec.testing.reference import ReferenceModel
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
