"""What an acceptance rule is given and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from localspec.context import Context
from localspec.protocols import Proposal, Scores, Tokens
from localspec.sampling import Sampler
from localspec.tree.token_tree import TokenTree
from localspec.types import Logits


@dataclass(slots=True)
class Trial:
    """One verified proposal. scores: row 0 is the anchor's, row i + 1 that of node i.

    host_scores: rows are free to read one by one (`Capabilities.host_scores`).
    """

    proposal: Proposal
    scores: Scores
    context: Context
    sampler: Sampler
    stop_tokens: frozenset[int]
    host_scores: bool
    _rows: Logits | None = field(default=None, init=False)
    _winners: Tokens | None = field(default=None, init=False)

    def winners(self) -> Tokens:
        """[N + 1] the target's choice behind the anchor and each node, made where the scores are; does not wait. For
        samplers that are plain: their choice needs no history."""
        if self._winners is None:
            if self.sampler.is_greedy:
                self._winners = self.scores.argmax()
            else:
                positions = len(self.context) + np.concatenate([np.zeros(1, np.int32), self.proposal.depth() + 1])
                self._winners = self.scores.winners(self.sampler.params.temperature, self.sampler.keys(positions))
        return self._winners

    def row_reader(self) -> Callable[[int], Logits]:
        """From row number to logits [V]: views where they lie on the host, else one transfer of all."""
        scores = self.scores
        if self.host_scores:
            return lambda row: scores.rows((row,))[0]
        if self._rows is None:
            self._rows = scores.rows(range(scores.num_rows))
        rows = self._rows
        return lambda row: rows[row]


@dataclass(frozen=True, slots=True)
class Verdict:
    """path: accepted nodes, root side first.  tokens: theirs, then the one that the target adds.

    A stop token ends the walk where it is chosen, so it is always the last token and never a node.
    """

    tree: TokenTree
    path: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """[len(tokens)] the row that decided each token."""
        return (0, *(node + 1 for node in self.path))


class Acceptance(Protocol):
    """A rule that turns a trial into a verdict."""

    @property
    def name(self) -> str: ...

    @property
    def needs_law(self) -> bool:
        """Must drafters *draw* from a distribution they know?"""
        ...

    def chooses_winners(self, sampler: Sampler) -> bool:
        """Is what it emits behind an accepted node always that node's `Trial.winners`?"""
        ...

    def accept(self, trial: Trial) -> Verdict:
        """Decide. The trial's context is left as it was found."""
        ...
