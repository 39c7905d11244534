"""The contract of a constraint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from localspec.types import BoolMask, TokenIds


class Constraint(Protocol):
    """Which tokens may follow. What it answers depends on nothing but the output that it is asked about: the tokens
    of the answer so far, in any order of asking, so that every node of a tree is judged by its own history.

    It serves one answer at a time and one thread at a time. `mask`, `allows` and `forced` raise GrammarError where
    following the grammar became too costly; from then on nothing counts as complete.
    """

    def mask(self, output: TokenIds) -> BoolMask:
        """[V] the tokens that may follow; none where the output breaks the grammar. Must not be written to."""
        ...

    def allows(self, output: TokenIds, tokens: Sequence[int]) -> list[bool]:
        """The same of a few tokens, which is cheaper."""
        ...

    def forced(self, output: TokenIds) -> TokenIds:
        """[T] tokens that follow in any case, as far as that is known; often none."""
        ...

    def complete(self, output: TokenIds) -> bool:
        """May the answer end here?"""
        ...

    def accepts(self, text: str) -> bool:
        """Is this a whole answer, however it is cut into tokens?"""
        ...
