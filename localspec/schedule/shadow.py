"""Trying a drafter without verifying anything: its guesses are compared with what plain decoding then says.

Verifying guesses that most likely are wrong costs a wide pass, and on a device the pass that had begun. What they would
have been worth shows without it, a few tokens later, for no more than the drafter's own time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from localspec.protocols import Proposal
from localspec.tree.token_tree import TokenTree


@dataclass(slots=True)
class Shadow:
    """Guesses of one drafter that nobody verifies.

    proposal: all of them, perhaps still on a device.  kept: nodes that would have been verified; None: all.
    extra_ms: what the round would have taken longer than a plain one.
    """

    name: str
    proposal: Proposal
    kept: Collection[int] | None
    extra_ms: float
    tokens: list[int] = field(default_factory=list)
    """What was emitted since."""
    _tree: TokenTree | None = None

    @property
    def tree(self) -> TokenTree:
        """The guesses. May wait for the device."""
        if self._tree is None:
            self._tree = self.proposal.tree()
        return self._tree

    def follow(self, tokens: Sequence[int]) -> int | None:
        """Tokens were emitted; how many guesses in a row would have been accepted, None while that is open."""
        self.tokens += tokens
        steps, node, depth = self.tree.steps(), -1, 0
        for count, token in enumerate(self.tokens):
            child = steps.get((node, token))
            if child is None:
                return depth
            if self.kept is None or child in self.kept:
                depth = count + 1
            node = child
        return None if self.tree.children(node) else depth
