"""Classical acceptance: exact in distribution, not token for token.

Chain rule of Leviathan et al. (2023) and Chen et al. (2023): a token x drawn from the drafter's law q
is accepted with probability min(1, p(x) / q(x)); otherwise the target's law p becomes the residual
norm(max(p - q, 0)) and a token is drawn from it. A drafter that does not know its law is a point mass
(q(x) = 1). Siblings are tried in order against the residual of the one before, which is exact if each
was drawn from the law the proposal names for it. Temperature 0: p is a point mass, so the rule accepts
exactly the target's own token and the text equals plain decoding.

p is the target's law, q the drafter's; both after the sampling settings.
"""

from __future__ import annotations

import numpy as np

from localspec import noise
from localspec.noise import Purpose
from localspec.sampling import Law, Sampler, nothing_left
from localspec.verify.trial import Trial, Verdict


class Rejection:
    """The ratio test. Needs drafters that draw; what is verified must not depend on tokens drawn."""

    name = "rejection"
    needs_law = True

    def chooses_winners(self, sampler: Sampler) -> bool:
        """It draws from laws on the host."""
        return False

    def accept(self, trial: Trial) -> Verdict:
        """Test the drafted tokens one by one, then draw one from what is left."""
        read, sampler, context = trial.row_reader(), trial.sampler, trial.context
        tree, laws = trial.proposal.tree(), trial.proposal.laws
        mark = len(context)
        path: list[int] = []
        tokens: list[int] = []
        node = -1
        try:
            while True:
                p = sampler.law(read(node + 1), context)
                if not len(p.ids):
                    raise nothing_left()
                accepted = None
                for attempt, child in enumerate(tree.children(node)):
                    x = int(tree.token[child])
                    q = laws[child] if laws is not None else Law(np.array([x], np.int32), np.ones(1))
                    coin = noise.uniform(sampler.seed, Purpose.ACCEPT, len(context), attempt)
                    if coin * q.probability(x) < p.probability(x):
                        accepted = child
                        break
                    p = residual(p, q)
                if accepted is None:
                    tokens.append(draw(p, sampler, len(context), Purpose.RESIDUAL))
                    break
                tokens.append(int(tree.token[accepted]))
                if tokens[-1] in trial.stop_tokens:
                    break
                path.append(accepted)
                context.append(tokens[-1])
                node = accepted
        finally:
            context.truncate(mark)
        return Verdict(tree, tuple(path), tuple(tokens))


def residual(p: Law, q: Law) -> Law:
    """norm(max(p - q, 0)) over p's candidates; p itself where rounding left nothing."""
    order = np.argsort(q.ids)
    place = np.minimum(np.searchsorted(q.ids, p.ids, sorter=order), len(q.ids) - 1)
    same = q.ids[order[place]] == p.ids
    left = np.maximum(p.probs - np.where(same, q.probs[order[place]], 0.0), 0.0)
    total = left.sum()
    return Law(p.ids, left / total) if total > 0.0 else p


def draw(law: Law, sampler: Sampler, position: int, purpose: Purpose) -> int:
    """A token from a law, by the noise of (seed, purpose, position)."""
    with np.errstate(divide="ignore"):
        scores = np.log(law.probs) + noise.gumbel(noise.key(sampler.seed, purpose, position), law.ids)
    return int(law.ids[int(scores.argmax())])
