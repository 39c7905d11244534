"""The walk: the target samples, the draft only guesses (`docs/exactness.md`).

At each node the target's own token is x = argmax_v [log p(v) + g(seed, position, v)], which depends on
nothing a drafter did; the walk steps into the child that carries x, if there is one. So the emitted
text is that of plain decoding with the same seed for every tree. Where rows are only near those that decide
(guarded decoding) it ends at the first x that is not certain. Source: ours, from the Gumbel-max
trick; the coupling of guesses is that of Daliri, Musco and Suresh (2024).
"""

from __future__ import annotations

from collections.abc import Callable

from localspec.sampling import Sampler, is_clear
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
        is_certain = True
        node: int | None = -1
        try:
            while node is not None:
                token, is_certain = choose(node + 1)
                tokens.append(token)
                ends = token in trial.stop_tokens or not is_certain
                node = None if ends else steps.get((node, token))
                if node is not None:
                    path.append(node)
                    context.append(token)
        finally:
            context.truncate(mark)
        return Verdict(tree, tuple(path), tuple(tokens), doubtful=not is_certain)


def _chooser(trial: Trial) -> Callable[[int], tuple[int, bool]]:
    """From row to the target's token, and whether it is certain. Asked before the tree is fetched: one wait then
    serves both."""
    sampler, context, tolerance = trial.sampler, trial.context, trial.tolerance
    if sampler.is_plain and not trial.host_scores:
        return _device_chooser(trial)
    read = trial.row_reader()
    if tolerance is None:
        return lambda row: (sampler.choose(read(row), context), True)
    return lambda row: sampler.decide(read(row), context, tolerance)


def _device_chooser(trial: Trial) -> Callable[[int], tuple[int, bool]]:
    """All rows are decided where they lie; only the tokens cross, and with a tolerance the two best of each."""
    if trial.tolerance is None:
        winners = trial.winners().numpy()
        return lambda row: (int(winners[row]), True)
    temperature, bound = trial.sampler.params.temperature, trial.tolerance.difference
    ids, values = trial.best_two().numpy()
    return lambda row: (int(ids[row, 0]), is_clear(values[row], temperature, bound))
