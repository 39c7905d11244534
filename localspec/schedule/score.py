"""What a table of costs is worth before anything was drafted: tokens per second under a plain model of acceptance.

Used to compare runtime options, which change costs and not what is accepted. A plan that knows a text's own
acceptance decides otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from localspec.exactness import Bound
from localspec.protocols import Capabilities, WidthClass
from localspec.schedule.cost import Costs, Curve
from localspec.tree.grow import shape
from localspec.tree.mask import is_chain
from localspec.tree.token_tree import TokenTree

RANK_CHANCES = (0.7, 0.12, 0.05, 0.03)
"""Chance that the best, second, ... guess for a place is taken if its parent is. Assumed: about what the bundled draft
model has on code at temperature 0, siblings with the gains of coupled guessing."""

LOOKUP_CHANCE = 0.4
"""The same for guesses that cost nothing, where there is no draft model."""

_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)
_MOST_LEVELS = 8


@dataclass(frozen=True, slots=True)
class Best:
    """The best shape of a round. tokens_per_second: with it; plain_tokens_per_second: one token per round, padded into
    the width class.  num_nodes: 0 where plain is best.  expected: tokens per round, the bonus counted."""

    tokens_per_second: float
    plain_tokens_per_second: float
    num_nodes: int
    depth: int
    is_tree: bool
    expected: float

    def __str__(self) -> str:
        if not self.num_nodes:
            return "plain"
        kind = f"tree of {self.num_nodes}, {self.depth} deep" if self.is_tree else f"chain of {self.num_nodes}"
        return f"{kind} ({self.expected:.2f} tokens a round)"


def best(costs: Costs, known: Capabilities, *, context: int = 256) -> Best:
    """The best chain, or tree where the target verifies trees exactly, at a context. Widths stay in its class."""
    widest = min(known.max_width, known.width_class.max_width or known.max_width, costs.target.widths[-1])

    def verify_ms(width: int) -> float:
        return costs.target.at(max(width, known.width_class.min_width), context) + costs.overhead_ms

    plain = 1e3 / verify_ms(1)
    found = Best(plain, plain, 0, 0, False, 1.0)
    trees = known.trees and known.exact_trees and costs.draft is not None
    chances = RANK_CHANCES if costs.draft is not None else (LOOKUP_CHANCE,)
    for size in (size for size in _SIZES if size < widest):
        for levels in range(1, min(size, _MOST_LEVELS) + 1) if trees else (size,):
            form = _form(size, levels, chances if trees else chances[:1])
            if len(form.tree) < size:
                continue
            ms = verify_ms(1 + size) + (0.0 if costs.draft is None else _draft_ms(costs.draft, form.tree, context))
            if 1e3 * form.expected / ms > found.tokens_per_second:
                found = Best(1e3 * form.expected / ms, plain, size, form.depth, form.is_tree, form.expected)
    return found


def loss_by_guarding(costs: Costs, known: Capabilities, bound: Bound, *, context: int = 256) -> str:
    """Why guarded decoding would be slower than plain decoding at width 1; empty if it is not expected to be.

    A re-check is a pass over a block at most, and as many choices need one as in the target's own text.
    """
    free = best(costs, replace(known, width_class=WidthClass()), context=context)
    recheck_ms = costs.target.at(bound.block, context) + costs.overhead_ms
    guarded = 1.0 / (1.0 / free.tokens_per_second + bound.share_close * recheck_ms * 1e-3)
    if guarded >= free.plain_tokens_per_second:
        return ""
    return (
        f"rows change with the width here, {bound.share_close:.0%} of choices would be re-checked, and so guesses are "
        f"expected to give {guarded:.0f} tokens/s against {free.plain_tokens_per_second:.0f} without. `localspec tune` "
        "looks for widths that give equal rows; --exact guarded speculates all the same, --exact off without a promise"
    )


@dataclass(frozen=True, slots=True)
class _Form:
    """A tree of the best nodes, and how many tokens a round with it emits on average."""

    tree: TokenTree
    expected: float
    depth: int
    is_tree: bool


@lru_cache(maxsize=512)
def _form(size: int, levels: int, chances: tuple[float, ...]) -> _Form:
    tree = shape(size, (len(chances),) * levels, chances)
    return _Form(tree, 1.0 + _accepted(tree), int(tree.depth.max()) + 1, not is_chain(tree.parent))


def _accepted(tree: TokenTree) -> float:
    """Expected number of accepted nodes: each is with the chance of its whole path."""
    assert tree.log_q is not None
    reach = [0.0] * len(tree)
    for node, parent in enumerate(tree.parent.tolist()):
        reach[node] = float(tree.log_q[node]) + (reach[parent] if parent >= 0 else 0.0)
    return float(np.exp(reach).sum())


def _draft_ms(curve: Curve, tree: TokenTree, context: int) -> float:
    """One pass per level, over those of its nodes that have children; the first over the anchor."""
    parents = {parent for parent in tree.parent.tolist() if parent >= 0}
    widths = np.bincount(tree.depth[sorted(parents)]).tolist() if parents else []
    return curve.at(1, context) + sum(curve.at(int(width), context) for width in widths)
