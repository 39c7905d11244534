"""The examination of an architecture finds nothing wrong with the reference, and finds planted faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localspec.errors import UnsupportedModelError
from localspec.host_scores import HostScores
from localspec.protocols import Capabilities, LanguageModel, Rewind, Scores, Step, WidthClass
from localspec.testing.architectures import Finding, examine, table
from localspec.testing.reference import HIDDEN, Cell, ReferenceModel, ReferenceState
from scripts.architectures import write_section

ROUNDS = 30


def reference(kind: type[ReferenceModel] = ReferenceModel, width: int = 1) -> ReferenceModel:
    return kind(64, seed=1, context_length=128, width_class=WidthClass(width))


class Recurrent(ReferenceModel):
    """Every row also depends on a fading sum over all tokens so far, which cannot be rewound but by replay."""

    def __init__(self, vocab_size: int = 64, **settings: object) -> None:
        super().__init__(vocab_size, context_length=128, seed=1)
        self.capabilities: Capabilities = replace(
            self.capabilities, rewind=Rewind.REPLAY, trees=False, limits=("a memory that fades",)
        )

    def open(self) -> RecurrentState:
        self.num_open += 1
        return RecurrentState(self)

    def run(self, state: ReferenceState, step: Step) -> Scores:
        assert isinstance(state, RecurrentState)
        rows = []
        for segment in step.tokens:
            for token in segment.numpy():
                state.see(int(token))
                rows.append(self.head @ state.memory)
        scores = super().run(state, replace(step, rows=None))
        wanted = list(range(step.num_tokens)) if step.rows is None else list(step.rows)
        summed = scores.rows(range(step.num_tokens)) + np.array(rows, np.float32)
        return HostScores(summed[wanted], self.generation)


class RecurrentState(ReferenceState):
    memory = np.zeros(HIDDEN)
    replayed = 0

    @property
    def num_replayed(self) -> int:
        return self.replayed

    def see(self, token: int) -> None:
        assert isinstance(self.model, ReferenceModel)
        self.memory = 0.7 * self.memory + self.model.embedding[token]

    def replay(self) -> None:
        """Here the only snapshot is the empty state."""
        self.memory = np.zeros(HIDDEN)
        for cell in self.committed:
            self.see(cell.token)
        self.replayed += len(self.committed)

    def keep(self, path: Sequence[int]) -> None:
        dropped = len(path) < len(self.pending)
        super().keep(path)
        if dropped:
            self.replay()

    def truncate(self, length: int) -> None:
        super().truncate(length)
        self.replay()

    def fork(self) -> ReferenceState:
        copy = super().fork()
        assert isinstance(copy, RecurrentState)
        copy.memory = self.memory
        return copy


def test_the_reference_is_found_right() -> None:
    found = examine("reference", reference, num_rounds=ROUNDS)
    assert (found.kind, found.num_rounds, found.num_replayed) == ("tree", ROUNDS, 0), found
    assert found.worst < 1e-5  # the rounding of float64 rows to float32


def test_padding_is_respected() -> None:
    """The engine pads below the class; so does the examination."""
    assert examine("padded", lambda: reference(width=3), num_rounds=ROUNDS).kind == "tree"


def test_a_state_that_replays_is_found_right_and_its_tokens_are_counted() -> None:
    found = examine("recurrent", Recurrent, num_rounds=ROUNDS)
    assert (found.kind, found.reason) == ("chain", "a memory that fades"), found
    assert found.num_replayed > 0


# ---------------------------------------------------------------- planted faults


class WrongMask(ReferenceModel):
    """Nodes see their elder siblings too."""

    def visible(self, state: ReferenceState) -> list[Cell]:
        siblings = [
            cell for cell, parent in zip(state.pending, state.parents, strict=False) if parent == state.parents[-1]
        ]
        return super().visible(state) + siblings


class WrongPosition(ReferenceModel):
    """Nodes stand at their number, not at their depth."""

    def position(self, state: ReferenceState) -> int:
        return state.length + len(state.parents) - 1


class DoubledTokenState(ReferenceState):
    """Where nodes are dropped, the last kept one takes the place of the one before it."""

    def keep(self, path: Sequence[int]) -> None:
        dropped = len(path) < len(self.pending)
        super().keep(path)
        if dropped and len(self.committed) > 1:
            self.committed[-2] = self.committed[-1]


class DoubledToken(ReferenceModel):
    def open(self) -> ReferenceState:
        self.num_open += 1
        return DoubledTokenState(self)


class StaleMemoryState(RecurrentState):
    """Drops nodes from the list of tokens, but not from the recurrent memory."""

    def keep(self, path: Sequence[int]) -> None:
        ReferenceState.keep(self, path)


class StaleMemory(Recurrent):
    def open(self) -> RecurrentState:
        self.num_open += 1
        return StaleMemoryState(self)


class StaleAfterTruncateState(RecurrentState):
    """Keeps well; truncating leaves the memory of the longer sequence."""

    def truncate(self, length: int) -> None:
        dropped = bool(self.pending)
        ReferenceState.truncate(self, length)
        if dropped:
            self.replay()


class StaleAfterTruncate(Recurrent):
    def open(self) -> RecurrentState:
        self.num_open += 1
        return StaleAfterTruncateState(self)


class Deaf(ReferenceModel):
    """No row depends on anything but its own token: right, but nothing could ever be seen to go wrong."""

    def visible(self, state: ReferenceState) -> list[Cell]:
        return []


@pytest.mark.parametrize("fault", [WrongMask, WrongPosition, DoubledToken, StaleMemory, StaleAfterTruncate, Deaf])
def test_a_planted_fault_is_found(fault: type[ReferenceModel]) -> None:
    found = examine(fault.__name__, lambda: reference(fault), num_rounds=ROUNDS)
    assert found.kind == "failed", found
    assert ("proves nothing" in found.reason) == (fault is Deaf), found


def test_a_refusal_is_reported_with_its_reason_and_a_crash_with_its_type() -> None:
    def refuse() -> LanguageModel:
        raise UnsupportedModelError("no such layer here")

    def crash() -> LanguageModel:
        raise RuntimeError("fell over")

    assert examine("a", refuse) == Finding("a", "refused", "no such layer here")
    assert examine("b", crash) == Finding("b", "failed", "does not open: RuntimeError: fell over")


def test_the_table_has_a_line_for_each_and_no_stray_bars() -> None:
    text = table([Finding("a", "tree", "", 2e-6, 200, 0), Finding("b", "refused", "x | y\nz")])
    assert text.splitlines()[2:] == ["| a | tree | 2.0e-06 | 200 |  |  |", "| b | refused |  |  |  | x \\| y z |"]


def test_a_section_of_the_page_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    page = tmp_path / "architectures.md"
    write_section(page, "mlx", "first\n")
    write_section(page, "llamacpp", "other\n")
    write_section(page, "mlx", "second\n")
    text = page.read_text()
    assert text.startswith("# Architectures") and "first" not in text
    assert text.endswith("<!-- mlx -->\nsecond\n<!-- /mlx -->\n\n<!-- llamacpp -->\nother\n<!-- /llamacpp -->\n")
