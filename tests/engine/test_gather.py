"""Several drafters' passes run as one, in an order that is always the same, and their failures stay theirs."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from localspec.engine.gather import Gathered
from localspec.protocols import HostTokens, Scores, Step, chain_parents
from localspec.testing.reference import ReferenceModel


class Counting(ReferenceModel):
    """Notes how many steps each forward had."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[int] = []

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        self.passes.append(len(steps))
        return super().forward(steps)


def write(model: Gathered | ReferenceModel, prompt: Sequence[int], count: int, trail: list[int]) -> list[int]:
    """Greedy text of `count` tokens; each one's number is left on the trail when it is read."""
    state = model.open()
    try:
        tokens, text = list(prompt), list[int]()
        for _ in range(count):
            step = Step(
                state, (HostTokens(np.array(tokens, np.int32)),), chain_parents(state, len(tokens)), (len(tokens) - 1,)
            )
            [scores] = model.forward([step])
            tokens = [int(scores.argmax().numpy()[0])]
            state.keep(range(state.num_pending))
            text += tokens
            trail.append(len(prompt))
        return text
    finally:
        state.close()


@pytest.fixture
def model() -> Counting:
    return Counting()


def test_passes_are_gathered_and_each_gets_its_own_rows(model: Counting) -> None:
    gathered = Gathered(model, 3)
    prompts = [[1, 2], [3, 4, 5], [6]]
    want = [write(model, prompt, 4, []) for prompt in prompts]
    model.passes.clear()
    trail: list[int] = []
    try:
        got = gathered.run([lambda prompt=prompt: write(gathered, prompt, 4, trail) for prompt in prompts])  # type: ignore[misc]
    finally:
        gathered.close()
    assert got == want
    assert model.passes == [3, 3, 3, 3]
    assert trail == [2, 3, 1] * 4, "tasks did not take turns"


def test_tasks_of_unlike_length_end_when_they_are_done(model: Counting) -> None:
    gathered = Gathered(model, 3)
    try:
        works = [lambda count=count: write(gathered, [1, count], count, []) for count in (0, 1, 3)]
        assert [len(text) for text in gathered.run(works)] == [0, 1, 3]
        assert model.passes == [2, 1, 1]
        assert gathered.run([lambda: 5]) == [5]
    finally:
        gathered.close()


def test_a_long_prompt_goes_alone(model: Counting) -> None:
    """Others would be padded to it; scores that were not read yet are not overwritten by it."""
    gathered = Gathered(model, 2)
    prompts = [[1, 2], list(range(30))]
    want = [write(model, prompt, 2, []) for prompt in prompts]
    model.passes.clear()
    try:
        assert gathered.run([lambda prompt=prompt: write(gathered, prompt, 2, []) for prompt in prompts]) == want  # type: ignore[misc]
        assert model.passes == [1, 2, 1]
    finally:
        gathered.close()


def test_what_fails_is_raised_after_all_have_ended(model: Counting) -> None:
    gathered = Gathered(model, 2)
    ended: list[str] = []

    def fails() -> None:
        raise KeyError("mine")

    def works() -> None:
        write(gathered, [1, 2], 2, [])
        ended.append("works")

    try:
        with pytest.raises(KeyError, match="mine"):
            gathered.run([fails, works])
        assert ended == ["works"]
        assert model.num_open == 0
    finally:
        gathered.close()


def test_a_failing_pass_fails_all_who_asked_for_it(model: Counting) -> None:
    before = threading.active_count()
    gathered = Gathered(model, 2)
    state = model.open()
    closed = model.open()
    closed.close()

    def ask(which: object) -> None:
        step = Step(which, (HostTokens(np.array([1], np.int32)),), np.array([-1], np.int32))  # type: ignore[arg-type]
        gathered.forward([step])

    try:
        with pytest.raises(ValueError, match="closed"):
            gathered.run([lambda: ask(state), lambda: ask(closed)])
        assert threading.active_count() <= before + 2
    finally:
        gathered.close()
        state.close()


def test_outside_of_tasks_it_is_the_model(model: Counting) -> None:
    gathered = Gathered(model, 1)
    assert write(gathered, [1, 2, 3], 3, []) == write(model, [1, 2, 3], 3, [])
    assert gathered.vocab_size == model.vocab_size and gathered.info is model.info
    gathered.close()
