"""Trees, masks and paths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localspec.tree.mask import ancestor_mask, check_path, depths, is_chain
from localspec.tree.token_tree import TokenTree
from localspec.types import NodeIndices


@st.composite
def parents(draw: st.DrawFn) -> NodeIndices:
    size = draw(st.integers(0, 20))
    return np.array([draw(st.integers(-1, node - 1)) for node in range(size)], np.int32)


@given(parents())
def test_the_mask_shows_exactly_the_path(parent: NodeIndices) -> None:
    tree = TokenTree.from_parents(np.arange(len(parent), dtype=np.int32), parent)
    mask = ancestor_mask(parent)
    for node in range(len(parent)):
        path = tree.path(node)
        assert np.flatnonzero(mask[node]).tolist() == path
        assert tree.depth[node] == depths(parent)[node] == len(path) - 1
        check_path(parent, path)
        assert tree.steps()[(int(parent[node]), node)] == node


@given(parents())
def test_children_are_the_inverse_of_parents(parent: NodeIndices) -> None:
    tree = TokenTree.from_parents(np.zeros(len(parent), np.int32), parent)
    found = sorted(child for node in range(-1, len(parent)) for child in tree.children(node))
    assert found == list(range(len(parent)))


def test_what_is_not_a_tree_or_a_path_is_refused() -> None:
    for wrong in ([0], [-1, 2, 1], [-2]):
        with pytest.raises(ValueError, match="not a tree"):
            TokenTree.from_parents(np.zeros(len(wrong), np.int32), np.array(wrong, np.int32))
    with pytest.raises(ValueError, match="not a tree"):
        TokenTree.from_parents(np.zeros(3, np.int32), np.array([-1], np.int32))
    for path in ([1], [0, 2], [3], [-1]):
        with pytest.raises(ValueError, match="not a path"):
            check_path(np.array([-1, 0, 1], np.int32), path)


def test_arrays_are_frozen() -> None:
    tree = TokenTree.from_parents(np.array([4, 5], np.int32), np.array([-1, 0], np.int32), [0.0, -1.0])
    with pytest.raises(ValueError, match="read-only"):
        tree.token[0] = 1
    assert is_chain(tree.parent) and not is_chain(np.array([-1, -1], np.int32))
