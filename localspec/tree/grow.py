"""Growing a token tree best-first under a node budget, from one score per edge.

A drafter offers children with the logarithm of the chance that each is accepted if its parent is; the
product along a path is the chance that the path is. The nodes with the best products are the tree whose
expected number of accepted nodes is largest (the set is closed under parents, as products only fall).
A model is asked level by level: `frontier` names the nodes whose children could still get into the tree.
A drafter that knows all edges at once (a block drafter, an n-gram trie) offers them all and is done.

Chain, fixed fan-out and free growth are one setting: how many children a node may have at each depth.
Source: the objective is that of EAGLE-2, OPT-Tree and DDTree; growing exactly level by level is ours.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localspec.tree.token_tree import TokenTree

Scores = NDArray[np.float64]

_ROUNDING = 1e-9


class Grower:
    """A tree in the making. Offered nodes are numbered from 0 in the order of offering; -1 is the anchor.

    max_nodes: the budget.  branching: most children of a node at each depth; its length is the most
    levels: (1,) * 5 is a chain, (3, 2, 1) a fixed fan-out, (16,) * 8 lets the scores decide. Levels that the budget
    does not reach are left out.
    """

    def __init__(self, max_nodes: int, branching: Sequence[int]) -> None:
        self.max_nodes = max_nodes
        self.branching = tuple(branching[: max(max_nodes, 0)])  # a deeper path has more nodes than there may be
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._log_q: list[float] = []
        self._reach: list[float] = []  # log chance that the whole path is accepted
        self._depth: list[int] = []
        self._best: list[float] = []  # heap of the max_nodes best reaches
        self._level_start = 0

    def __len__(self) -> int:
        """Number of nodes offered and not turned away."""
        return len(self._tokens)

    def token(self, node: int) -> int:
        """The token of an offered node."""
        return self._tokens[node]

    def parent(self, node: int) -> int:
        """The parent of an offered node."""
        return self._parents[node]

    def depth(self, node: int) -> int:
        """Where an offered node stands; children of the anchor have depth 0."""
        return self._depth[node]

    def log_q(self, node: int) -> float:
        """Logarithm of the chance that an offered node is accepted if its parent is."""
        return self._log_q[node]

    def reach(self, node: int) -> float:
        """Logarithm of the chance that the whole path to an offered node is accepted."""
        return self._reach[node]

    def path(self, node: int) -> list[int]:
        """Tokens from a child of the anchor down to `node`."""
        tokens: list[int] = []
        while node >= 0:
            tokens.append(self._tokens[node])
            node = self._parents[node]
        return tokens[::-1]

    def offer(self, parent: int, tokens: Sequence[int], log_q: Sequence[float]) -> None:
        """Children of a node, best first, with the logarithm (at most 0) of each one's chance of being accepted
        if the parent is. Those that cannot get into the tree are turned away. Raises ValueError for a
        positive logarithm or an unknown parent."""
        if not -1 <= parent < len(self._tokens):
            raise ValueError(f"node {parent} was not offered")
        depth = self._depth[parent] + 1 if parent >= 0 else 0
        if depth >= len(self.branching):
            return
        above = self._reach[parent] if parent >= 0 else 0.0
        most, best = self.max_nodes, self._best
        floor = self._floor()
        if len(log_q) and log_q[0] <= 0.0 and above + log_q[0] <= floor:
            return  # as it goes for most nodes
        for token, value in zip(tokens[: self.branching[depth]], log_q[: self.branching[depth]], strict=True):
            if value > 0.0:
                if value > _ROUNDING:
                    raise ValueError(f"a chance cannot exceed 1: logarithm {value}")
                value = 0.0
            reach = above + value
            if reach <= floor:
                break  # so are the others, which are no better
            self._tokens.append(token)
            self._parents.append(parent)
            self._log_q.append(value)
            self._reach.append(reach)
            self._depth.append(depth)
            if len(best) < most:
                heapq.heappush(best, reach)
                if len(best) < most:
                    continue
            else:
                heapq.heapreplace(best, reach)
            floor = best[0]

    def frontier(self, most: int | None = None) -> list[int]:
        """The nodes of the newest level that are among the best so far, at most the best `most` of them: those
        whose children are worth asking for. Empty when the tree can no longer change."""
        newest = range(self._level_start, len(self._tokens))
        self._level_start = len(self._tokens)
        if not newest or self._depth[-1] + 1 >= len(self.branching):
            return []
        floor = self._floor()
        nodes = [node for node in newest if self._reach[node] > floor]
        if most is None or len(nodes) <= most:
            return nodes
        return sorted(sorted(nodes, key=lambda node: -self._reach[node])[:most])

    def _floor(self) -> float:
        """A path must beat this chance to get into the tree."""
        if self.max_nodes < 1:
            return math.inf
        return self._best[0] if len(self._best) == self.max_nodes else -math.inf

    def finish(self) -> Grown:
        """The best nodes, parents first."""
        reach = self._reach
        chosen = sorted(sorted(range(len(reach)), key=reach.__getitem__, reverse=True)[: max(self.max_nodes, 0)])
        place = {node: index for index, node in enumerate(chosen)}
        tree = TokenTree.from_parents(
            np.array([self._tokens[node] for node in chosen], np.int32),
            np.array([place.get(self._parents[node], -1) for node in chosen], np.int32),
            [self._log_q[node] for node in chosen],
        )
        return Grown(tree, tuple(chosen))


@dataclass(frozen=True, slots=True)
class Grown:
    """A finished tree. offered: [N] the number under which each node was offered."""

    tree: TokenTree
    offered: tuple[int, ...]


def shape(max_nodes: int, branching: Sequence[int], rank_chances: Sequence[float]) -> TokenTree:
    """The best tree where all that is known of a child is its rank among its siblings: tokens are ranks.

    Its form depends on nothing that is drawn later, which recursive rejection needs. rank_chances: chance
    that the child of rank r is accepted if its parent is and its elder siblings are not taken.
    """
    grower = Grower(max_nodes, branching)
    log_q = np.log(np.asarray(rank_chances, np.float64)).tolist()
    nodes = [-1]
    while nodes:
        for node in nodes:
            grower.offer(node, range(len(log_q)), log_q)
        nodes = grower.frontier()
    return grower.finish().tree


def prune(tree: TokenTree, max_nodes: int) -> tuple[TokenTree, list[int]]:
    """(the best `max_nodes` nodes by chance of the whole path, their old numbers). A tree without scores
    counts every edge as certain, so that shallow and early nodes stay."""
    if len(tree) <= max_nodes:
        return tree, list(range(len(tree)))
    log_q = np.zeros(len(tree)) if tree.log_q is None else np.minimum(tree.log_q, 0.0)
    reach = path_sums(tree, log_q)
    order = np.lexsort((np.arange(len(tree)), tree.depth, -reach))[:max_nodes]
    chosen = sorted(int(node) for node in order)
    place = {node: index for index, node in enumerate(chosen)}
    return (
        TokenTree.from_parents(
            tree.token[chosen],
            np.array([place.get(int(tree.parent[node]), -1) for node in chosen], np.int32),
            None if tree.log_q is None else tree.log_q[chosen].tolist(),
        ),
        chosen,
    )


def path_sums(tree: TokenTree, values: Scores) -> Scores:
    """[N] sum of `values` from a child of the anchor down to each node."""
    sums = np.array(values, np.float64)
    for node, parent in enumerate(tree.parent.tolist()):
        if parent >= 0:
            sums[node] += sums[parent]
    return sums


@dataclass(frozen=True, slots=True)
class Merged:
    """Several trees as one. places: per tree, [N] where its nodes are now.  origin: [M] the first tree that
    has each node."""

    tree: TokenTree
    places: tuple[tuple[int, ...], ...]
    origin: tuple[int, ...]


def merge(trees: Sequence[TokenTree]) -> Merged:
    """All nodes of all trees, no two siblings with the same token; of two scores the better one stands.

    Scores are kept only if all trees that have nodes have them.
    """
    tokens: list[int] = []
    parents: list[int] = []
    log_q: list[float] = []
    origin: list[int] = []
    number: dict[tuple[int, int], int] = {}
    places: list[tuple[int, ...]] = []
    for index, tree in enumerate(trees):
        where: list[int] = []
        scores = [0.0] * len(tree) if tree.log_q is None else tree.log_q.tolist()
        for above, token, value in zip(tree.parent.tolist(), tree.token.tolist(), scores, strict=True):
            parent = where[above] if above >= 0 else -1
            edge = (parent, token)
            if edge not in number:
                number[edge] = len(tokens)
                tokens.append(token)
                parents.append(parent)
                log_q.append(value)
                origin.append(index)
            where.append(number[edge])
            log_q[where[-1]] = max(log_q[where[-1]], value)
        places.append(tuple(where))
    scored = all(tree.log_q is not None for tree in trees if len(tree))
    merged = TokenTree.from_parents(np.array(tokens, np.int32), np.array(parents, np.int32), log_q if scored else None)
    return Merged(merged, tuple(places), tuple(origin))
