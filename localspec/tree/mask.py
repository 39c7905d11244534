"""What each node may see and where it stands, from parents alone."""

from __future__ import annotations

import numpy as np

from localspec.types import BoolMask, NodeIndices


def ancestor_mask(parents: NodeIndices) -> BoolMask:
    """[N, N] true where the column is the row's ancestor or the row itself."""
    size = len(parents)
    mask = np.zeros((size, size), np.bool_)
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0:
            mask[node] = mask[parent]
        mask[node, node] = True
    return mask


def depths(parents: NodeIndices) -> NodeIndices:
    """[N] distance below the root; its children have depth 0."""
    result: list[int] = []
    for parent in parents.tolist():
        result.append(result[parent] + 1 if parent >= 0 else 0)
    return np.array(result, np.int32)


def is_chain(parents: NodeIndices) -> bool:
    """True if every node is the parent of the next."""
    return bool(np.array_equal(parents, np.arange(-1, len(parents) - 1)))


def check_path(parents: NodeIndices, path: list[int]) -> None:
    """Raise ValueError unless `path` runs from a child of the root down, parent by parent."""
    above = -1
    for node in path:
        if not 0 <= node < len(parents) or int(parents[node]) != above:
            raise ValueError(f"not a path: {path} with parents {parents.tolist()}")
        above = node
