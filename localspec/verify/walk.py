"""The walk: the target samples, the draft only guesses (`docs/exactness.md`).

At each node the target's own token is x = argmax_v [log p(v) + g(seed, position, v)], which depends on
nothing a drafter did; the walk steps into the child that carries x, if there is one. So the emitted
text is that of plain decoding with the same seed for every tree. Source: ours, from the Gumbel-max
trick; the coupling of guesses is that of Daliri, Musco and Suresh (2024).
"""

from __future__ import annotations

from collections.abc import Callable

from localspec.sampling import Sampler
from localspec.verify.trial import Trial, Verdict


class Walk:
    """The default rule. Exact for any drafter, at any temperature, token for token."""

    name = "walk"
    needs_law = False

    def chooses_winners(self, sampler: Sampler) -> bool:
        """Unless the choice depends on the history."""
        return sampler.is_plain

    def accept(self, trial: Trial) -> Verdict:
        """Follow the target's own tokens down the tree."""
        choose = _chooser(trial)
        tree, context = trial.proposal.tree(), trial.context
        steps = tree.steps()
        mark = len(context)
        path: list[int] = []
        tokens: list[int] = []
        node: int | None = -1
        try:
            while node is not None:
                token = choose(node + 1)
                tokens.append(token)
                node = None if token in trial.stop_tokens else steps.get((node, token))
                if node is not None:
                    path.append(node)
                    context.append(token)
        finally:
            context.truncate(mark)
        return Verdict(tree, tuple(path), tuple(tokens))


def _chooser(trial: Trial) -> Callable[[int], int]:
    """From row to the target's token. Asked before the tree is fetched: one wait then serves both."""
    sampler, context = trial.sampler, trial.context
    if sampler.is_plain and not trial.host_scores:
        winners = trial.winners().numpy()
        return lambda row: int(winners[row])
    read = trial.row_reader()
    return lambda row: sampler.choose(read(row), context)
