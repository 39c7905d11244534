"""What an acceptance rule is given and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from localspec.context import Context
from localspec.protocols import Proposal, Scores, Tokens, Top
from localspec.sampling import Sampler, Tolerance
from localspec.tree.token_tree import TokenTree
from localspec.types import Logits, NoiseKeys


@dataclass(slots=True)
class Trial:
    """One verified proposal. scores: row 0 is the anchor's, row i + 1 that of node i.

    host_scores: rows are free to read one by one (`Capabilities.host_scores`).
    tolerance: how far the rows may be from those that decide; None: these rows decide.
    """

    proposal: Proposal
    scores: Scores
    context: Context
    sampler: Sampler
    stop_tokens: frozenset[int]
    host_scores: bool
    tolerance: Tolerance | None = None
    _rows: Logits | None = field(default=None, init=False)
    _winners: Tokens | None = field(default=None, init=False)
    _best_two: Top | None = field(default=None, init=False)

    def winners(self) -> Tokens:
        """[N + 1] the target's choice behind the anchor and each node, made where the scores are; does not wait. For
        samplers that are plain: their choice needs no history."""
        if self._winners is None:
            keys, temperature = self._keys(), self.sampler.params.temperature
            self._winners = self.scores.argmax() if keys is None else self.scores.winners(temperature, keys)
            if self.tolerance is not None:  # asked for now, as another pass may run before it is read
                self.best_two()
        return self._winners

    def best_two(self) -> Top:
        """The two best tokens of each row and what they were ranked by, noise included; does not wait. For plain
        samplers, too."""
        if self._best_two is None:
            self._best_two = self.scores.top(2, self.sampler.params.temperature, self._keys())
        return self._best_two

    def _keys(self) -> NoiseKeys | None:
        """[N + 1, 2] the noise of anchor and nodes; None at temperature 0."""
        if self.sampler.is_greedy:
            return None
        positions = len(self.context) + np.concatenate([np.zeros(1, np.int32), self.proposal.depth() + 1])
        return self.sampler.keys(positions)

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
    doubtful: the last token is chosen so narrowly that another row has to decide (`Trial.tolerance`).
    """

    tree: TokenTree
    path: tuple[int, ...]
    tokens: tuple[int, ...]
    doubtful: bool = False

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
