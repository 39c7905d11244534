"""What is verified of everything that was guessed in a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import itemgetter

from localspec.protocols import DraftRequest, HostTokens, Proposal
from localspec.schedule.asking import Asker, products
from localspec.schedule.decision import Asked, Decision, counted
from localspec.schedule.opinions import Opinion, Opinions
from localspec.schedule.plan import Valuation
from localspec.tree.grow import merge
from localspec.tree.token_tree import TokenTree


class Choosing:
    """For one session. name: of the drafter that proposes it."""

    def __init__(self, name: str, asker: Asker) -> None:
        self._name, self._asker = name, asker

    def choose(self, decision: Decision, request: DraftRequest, prices: Valuation) -> Proposal:
        """What is worth verifying of everything that was guessed."""
        guessing = [one for one in decision.asked if one.proposal.num_nodes]
        counts = counted(decision.asked)
        if not guessing:
            return Proposal(self._name, counts=counts, width=plain_width(prices, request))
        if len(guessing) > 1 and request.trees and all(one.tree is not None for one in guessing):
            return self._merged(decision, guessing, prices, request, counts)
        chosen = max(guessing, key=lambda one: one.value(prices))
        if chosen.tree is None:  # still on the device, and no longer than pays
            chosen.used = True
            decision.expected = sum(chosen.reach)
            width = min(prices.width(chosen.proposal.num_nodes), request.max_nodes + 1)
            return replace(chosen.proposal, counts=counts, width=max(width, chosen.proposal.width))
        return self._cut(decision, chosen.tree, chosen.reach, [chosen] * len(chosen.tree), prices, request, counts)

    def _merged(
        self,
        decision: Decision,
        guessing: Sequence[Asked],
        prices: Valuation,
        request: DraftRequest,
        counts: Mapping[str, int],
    ) -> Proposal:
        free = self._asker.free_names
        merged = merge([one.tree for one in guessing if one.tree is not None])
        said = [
            (one.name in free, Opinion(places, one.chances, self._asker.record(one.name, decision).dissent))
            for one, places in zip(guessing, merged.places, strict=True)
        ]
        # who runs a network read more than who looks up
        opinions = Opinions(merged.tree, [opinion for _, opinion in sorted(said, key=itemgetter(0))])
        decision.opinions = opinions
        reach = products(merged.tree, opinions.chances)
        owners = [guessing[index] for index in merged.origin]
        return self._cut(decision, merged.tree, reach, owners, prices, request, counts)

    def _cut(
        self,
        decision: Decision,
        tree: TokenTree,
        reach: list[float],
        owners: Sequence[Asked],
        prices: Valuation,
        request: DraftRequest,
        counts: Mapping[str, int],
    ) -> Proposal:
        """The best nodes, as many as pay; all of them where others choose, for whom they are marked. A child never
        reaches further than its parent, so parents are kept."""
        if decision.load is not None:
            decision.open = reach, list(owners)
            log_q = None if tree.log_q is None else tuple(tree.log_q.tolist())
            sources = tuple(owner.proposal.source for owner in owners)
            tokens = (HostTokens(tree.token),)
            return Proposal(
                self._name, tokens, tree.parent, log_q=log_q, sources=sources, counts=counts, reach=tuple(reach)
            )
        order = sorted(range(len(reach)), key=reach.__getitem__, reverse=True)
        choice = prices.best([reach[node] for node in order])
        kept = sorted(order[: choice.nodes])
        decision.expected = sum(reach[node] for node in kept)
        width = min(choice.width, request.max_nodes + 1)
        if not kept:
            return Proposal(self._name, counts=counts, width=width)
        for node in kept:
            owners[node].used = True
        sources = tuple(owners[node].proposal.source for node in kept)
        return Proposal.of_tree(self._name, tree.only(kept), sources=sources, counts=counts, width=width)


def plain_width(prices: Valuation, request: DraftRequest) -> int:
    """Of a pass over nothing but the last token."""
    return min(prices.best(()).width, request.max_nodes + 1)
