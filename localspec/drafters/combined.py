"""Several drafters whose guesses are merged into one tree, so that each node is verified once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from localspec.context import Context
from localspec.errors import SettingError
from localspec.protocols import Drafter, DraftRequest, Outcome, Proposal, SavedDraft, SequenceState, in_turn
from localspec.tree.grow import merge, prune
from localspec.tree.token_tree import TokenTree

_UNSCORED = -0.7
"""Logarithm of the assumed chance of an edge (one half) whose drafter does not estimate it."""


class Combined:
    """Asks all `parts`, merges what they guess and keeps the best nodes that fit.

    A node that several guessed counts as the first one's. Where only chains can be verified, the first part
    that guesses anything is taken. Raises SettingError for fewer than two parts.
    """

    def __init__(self, parts: Sequence[Drafter]) -> None:
        if len(parts) < 2:
            raise SettingError("a combination needs at least two drafters", got=len(parts))
        self.parts = tuple(parts)

    @property
    def name(self) -> str:
        """The parts' names, joined by plus signs."""
        return "+".join(part.name for part in self.parts)

    @property
    def needs_trees(self) -> bool:
        """Two guesses seldom agree, so their union is a tree."""
        return True

    def attach(self, state: SequenceState) -> None:
        """The sequence, for all."""
        for part in self.parts:
            part.attach(state)

    def begin(self, context: Context) -> None:
        """A new turn, for all."""
        for part in self.parts:
            part.begin(context)

    def propose(self, request: DraftRequest) -> Proposal:
        """The union of all guesses. Under rejection the laws of different drafters cannot be mixed, so there,
        too, the first part that guesses anything is taken."""
        proposals = [part.propose(request) for part in self.parts]
        counts = Counter[str]()
        for proposal in proposals:
            counts.update(proposal.counts)
        guessing = [proposal for proposal in proposals if proposal.num_nodes]
        later = in_turn(proposal.meanwhile for proposal in proposals)
        if not guessing:
            return Proposal(self.name, counts=counts, meanwhile=later)
        if len(guessing) == 1 or not request.trees or request.needs_law:
            return replace(guessing[0], counts=counts, meanwhile=later)
        merged = merge([_scored(proposal.tree()) for proposal in guessing])
        tree, kept = prune(merged.tree, request.max_nodes)
        sources = tuple(guessing[merged.origin[node]].source for node in kept)
        return Proposal.of_tree(self.name, tree, sources=sources, counts=counts).later(later)

    def observe(self, outcome: Outcome) -> None:
        """The outcome, for all."""
        for part in self.parts:
            part.observe(outcome)

    def save(self) -> tuple[SavedDraft, ...]:
        """What any of them has."""
        return tuple(one for part in self.parts for one in part.save())

    def restore(self, saved: Sequence[SavedDraft]) -> None:
        """To each what it can use."""
        for part in self.parts:
            part.restore(saved)

    def close(self) -> None:
        """Close all."""
        for part in self.parts:
            part.close()


def _scored(tree: TokenTree) -> TokenTree:
    if tree.log_q is not None:
        return tree
    return TokenTree.from_parents(tree.token, tree.parent, [_UNSCORED] * len(tree))
