"""Where the nodes of a tree stand: a tidy tree, drawn from left to right.

Each subtree is laid out alone and then pushed below its elder siblings until no depth of it touches theirs;
a parent stands in the middle of its children. Source: Reingold and Tilford (1981); the contours are kept as
one interval per depth, which is enough for nodes of equal height.
"""

from __future__ import annotations

from collections.abc import Sequence


def children_of(parents: Sequence[int]) -> list[list[int]]:
    """Per node its children, in order; entry -1 (the last) holds those without a parent."""
    children: list[list[int]] = [[] for _ in range(len(parents) + 1)]
    for node, parent in enumerate(parents):
        children[parent].append(node)
    return children


def tidy_rows(parents: Sequence[int], gap: float = 1.0) -> list[float]:
    """[N] the row of each node, from 0. parents: node 0 is the root (-1), each parent before its children.

    Two nodes of one depth are at least `gap` apart, and stand in the order in which they are numbered within
    their families; edges do not cross.
    """
    children = children_of(parents)
    offset = [0.0] * len(parents)  # from the parent's row
    contours: list[list[tuple[float, float]]] = [[] for _ in parents]  # per depth below: lowest and highest row
    for node in reversed(range(len(parents))):
        family = children[node]
        merged: list[tuple[float, float]] = []
        for child in family:
            own = contours[child]
            shift = max((high - low + gap for (_, high), (low, _) in zip(merged, own, strict=False)), default=0.0)
            offset[child] = shift
            for depth, (low, high) in enumerate(own):
                if depth < len(merged):
                    merged[depth] = (merged[depth][0], high + shift)
                else:
                    merged.append((low + shift, high + shift))
            contours[child] = []
        middle = (offset[family[0]] + offset[family[-1]]) / 2 if family else 0.0
        for child in family:
            offset[child] -= middle
        contours[node] = [(0.0, 0.0), *((low - middle, high - middle) for low, high in merged)]
    rows = [0.0] * len(parents)
    for node, parent in enumerate(parents):
        rows[node] = offset[node] + (rows[parent] if parent >= 0 else 0.0)
    least = min(rows, default=0.0)
    return [row - least for row in rows]
