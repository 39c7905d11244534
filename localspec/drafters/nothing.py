"""The null drafter: plain decoding is this one in the same loop as all others."""

from __future__ import annotations

from collections.abc import Sequence

from localspec.context import Context
from localspec.protocols import DraftRequest, Outcome, Proposal, SavedDraft, SequenceState


class Nothing:
    """Guesses nothing, so every round emits the target's next token.

    name: of the drafter in whose place it stands, where no pass may be wide enough for a guess.
    """

    name = "nothing"
    needs_trees = False

    def __init__(self, name: str = name) -> None:
        self.name = name

    def attach(self, state: SequenceState) -> None:
        """The target's states are not read."""

    def begin(self, context: Context) -> None:
        """Nothing to prepare."""

    def propose(self, request: DraftRequest) -> Proposal:
        """An empty proposal."""
        return Proposal(self.name)

    def observe(self, outcome: Outcome) -> None:
        """Nothing to learn."""

    def save(self) -> tuple[SavedDraft, ...]:
        """No model has read anything."""
        return ()

    def restore(self, saved: Sequence[SavedDraft]) -> None:
        """Nothing of it is needed."""

    def close(self) -> None:
        """Nothing to give back."""
