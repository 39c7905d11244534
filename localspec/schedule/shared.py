"""One budget for all lanes of a round: their nodes compete for places in the pass by what each is expected to bring.

The more lanes there are, the dearer a place is and the fewer guesses pay; where none does the round is plain
decoding of all. Source: DSpark's scheduler; with the walk rule the search may look at everything that was guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from localspec.protocols import Load, Outcome, Proposal
from localspec.schedule.experience import Experience
from localspec.schedule.live import MOST_NODES
from localspec.schedule.plan import Valuation
from localspec.schedule.scheduled import LOOKING

Gather = Callable[[Sequence[Callable[[], Proposal]]], list[Proposal]]
"""Runs several drafters' work and returns what each proposed (`engine.gather`)."""


class SharedBudget:
    """One round of `lanes` sequences. Only what drafters left open (`Proposal.reach`) is cut: who was told how much to
    guess is obeyed.

    together: they run as one pass, each as wide as the widest.  context: committed tokens, the mean of all.
    gather: runs drafters side by side, so that their passes are shared, too; None: one after another.
    """

    def __init__(
        self, experience: Experience, lanes: int, context: int, *, together: bool, gather: Gather | None = None
    ) -> None:
        self._experience, self._context = experience, context
        self._together, self._gather = together, gather
        priced = lanes if together else 1
        self.load = Load(priced, 1 if gather is None else priced, experience.wants_plain(priced), LOOKING)
        self._prices = Valuation(experience.live, experience.rate(context, priced), context, MOST_NODES, priced)
        experience.lately = self.load

    def ask(self, works: Sequence[Callable[[], Proposal]]) -> list[Proposal]:
        """All drafters' proposals."""
        return [work() for work in works] if self._gather is None else self._gather(works)

    def settle(self, proposals: Sequence[Proposal]) -> tuple[list[tuple[int, ...] | None], int]:
        """Per lane the nodes that are verified (None: all), and the width of each lane's part of the pass."""
        ranked = [None if one.reach is None else _ranked(one.reach) for one in proposals]
        if not self._together or len(proposals) == 1:
            best = [
                None if order is None else self._prices.best([one.reach[node] for node in order])  # type: ignore[index]
                for one, order in zip(proposals, ranked, strict=True)
            ]
            widths = {choice.width for choice in best if choice is not None}
            kept = [
                None if order is None or choice is None else tuple(sorted(order[: choice.nodes]))
                for order, choice in zip(ranked, best, strict=True)
            ]
            return kept, widths.pop() if len(widths) == 1 else 0
        told = max((one.num_nodes for one in proposals if one.reach is None), default=0)
        reaches = [
            [] if order is None else [one.reach[node] for node in order]  # type: ignore[index]
            for one, order in zip(proposals, ranked, strict=True)
        ]
        choice = self._prices.best_together(reaches, told)
        return [None if order is None else tuple(sorted(order[: choice.nodes])) for order in ranked], choice.width

    def observe(self, outcomes: Sequence[Outcome], round_ms: float) -> None:
        """What the round emitted and took."""
        experience, lanes = self._experience, self.load.lanes
        width = outcomes[0].width // len(outcomes)
        if self._together or len(outcomes) == 1:
            experience.live.observe_verify(width, self._context, outcomes[0].verify_ms, lanes)
        tokens = sum(len(outcome.tokens) for outcome in outcomes)
        plain = not any(len(outcome.tree) for outcome in outcomes)
        experience.observe(tokens, round_ms, plain=plain, lanes=lanes)


def _ranked(reach: Sequence[float]) -> list[int]:
    """Nodes, best first; a parent before its children, whose chance is never larger."""
    return sorted(range(len(reach)), key=lambda node: -reach[node])
