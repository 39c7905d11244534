"""A token tree as flat frozen arrays: the interchange form of everything that guesses or verifies.

Nodes are numbered so that a parent comes before its children; the anchor (the last emitted token)
is not a node but the root above all of them, written as parent -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from localspec.tree.mask import depths
from localspec.types import NodeIndices, Probabilities, TokenIds


@dataclass(frozen=True, slots=True)
class TokenTree:
    """token, parent, depth [N] (children of the anchor have depth 0) and log_q [N] or None."""

    token: TokenIds
    parent: NodeIndices
    depth: NodeIndices
    log_q: Probabilities | None = None

    @classmethod
    def from_parents(cls, token: TokenIds, parent: NodeIndices, log_q: Sequence[float] | None = None) -> TokenTree:
        """Build from tokens and parents. Raises ValueError unless each parent comes before its child."""
        token = np.asarray(token, np.int32)
        parent = np.asarray(parent, np.int32)
        if token.shape != parent.shape or not all(-1 <= above < node for node, above in enumerate(parent.tolist())):
            raise ValueError(f"not a tree: {len(token)} tokens, parents {parent.tolist()}")
        depth = depths(parent)
        quantities = None if log_q is None else np.asarray(log_q, np.float64)
        for array in (token, parent, depth, quantities):
            if array is not None:
                array.flags.writeable = False
        return cls(token, parent, depth, quantities)

    def only(self, nodes: Sequence[int]) -> TokenTree:
        """These nodes alone, ascending, parents included."""
        if len(nodes) == len(self):
            return self
        place = {node: index for index, node in enumerate(nodes)}
        above, chosen = self.parent.tolist(), list(nodes)
        parents = np.array([place.get(above[node], -1) for node in chosen], np.int32)
        log_q = None if self.log_q is None else self.log_q[chosen]
        return TokenTree(self.token[chosen], parents, self.depth[chosen], log_q)

    def __len__(self) -> int:
        return len(self.token)

    def children(self, node: int) -> list[int]:
        """Children of a node (-1: of the anchor), in order."""
        return [int(i) for i in np.flatnonzero(self.parent == node)]

    def steps(self) -> dict[tuple[int, int], int]:
        """(node, token) -> the first child of `node` (-1: the anchor) that carries `token`."""
        pairs = zip(self.parent.tolist(), self.token.tolist(), strict=True)
        found: dict[tuple[int, int], int] = {}
        for child, pair in enumerate(pairs):
            found.setdefault(pair, child)
        return found

    def path(self, node: int) -> list[int]:
        """Nodes from a child of the anchor down to `node`."""
        nodes: list[int] = []
        while node >= 0:
            nodes.append(node)
            node = int(self.parent[node])
        return nodes[::-1]
