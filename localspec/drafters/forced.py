"""Guessing what a grammar forces: keys of a JSON object, the frame of a tool call. Costs no model pass.

Where the grammar allows one way to write the next bytes only, the tokens are known beforehand and the target must
choose them. Source: fast-forward tokens of llguidance; here they are guesses like any other and verified like them, so
they need no case of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localspec.context import Context
from localspec.protocols import DraftRequest, HostTokens, Outcome, Proposal, SavedDraft, SequenceState


class Forced:
    """A chain of the tokens that the request's grammar forces; nothing without one."""

    name = "grammar"
    needs_trees = False

    def attach(self, state: SequenceState) -> None:
        """The target's states are not read."""

    def begin(self, context: Context) -> None:
        """Nothing to read: the grammar comes with each request."""

    def propose(self, request: DraftRequest) -> Proposal:
        """As much as is forced and fits."""
        constraint = request.sampler.constraint
        if constraint is None:
            return Proposal(self.name, because="there is no grammar")
        tokens = constraint.forced(request.context.output)[: min(request.max_nodes, request.max_depth)]
        parents = np.arange(-1, len(tokens) - 1, dtype=np.int32)
        return Proposal(self.name, (HostTokens(tokens),), parents, log_q=(0.0,) * len(tokens))

    def observe(self, outcome: Outcome) -> None:
        """Nothing to learn."""

    def save(self) -> tuple[SavedDraft, ...]:
        """No model has read anything."""
        return ()

    def restore(self, saved: Sequence[SavedDraft]) -> None:
        """Nothing of it is needed."""

    def close(self) -> None:
        """Nothing to give back."""
