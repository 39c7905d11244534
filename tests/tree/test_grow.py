"""Growing, pruning and merging against slow readings of what they promise."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localspec.tree.grow import Grower, Grown, merge, path_sums, prune, shape
from localspec.tree.mask import ancestor_mask, check_path, depths
from localspec.tree.token_tree import TokenTree

Trie = dict[tuple[int, ...], float]
"""Path of tokens -> logarithm of its last edge's chance."""


@st.composite
def tries(draw: st.DrawFn) -> Trie:
    """All edges that a drafter could offer, up to depth 4."""
    trie: Trie = {}
    paths: list[tuple[int, ...]] = [()]
    for path in paths:
        if len(path) == 4 or len(paths) > 60:
            continue
        count = draw(st.integers(0, 4))
        weights = draw(st.lists(st.floats(0.01, 1.0), min_size=count, max_size=count))
        for token, weight in enumerate(sorted(weights, reverse=True)):
            trie[*path, token] = math.log(weight / max(sum(weights), 1.0))
            paths.append((*path, token))
    return trie


@st.composite
def trees(draw: st.DrawFn, scored: bool | None = None) -> TokenTree:
    size = draw(st.integers(0, 16))
    parents = [draw(st.integers(max(-1, node - 5), node - 1)) for node in range(size)]
    tokens, used = [], set()
    for parent in parents:  # siblings carry different tokens
        token = draw(st.integers(0, 5))
        while (parent, token) in used:
            token += 1
        used.add((parent, token))
        tokens.append(token)
    with_scores = draw(st.booleans()) if scored is None else scored
    log_q = [draw(st.floats(-5, 0)) for _ in range(size)] if with_scores else None
    return TokenTree.from_parents(np.array(tokens, np.int32), np.array(parents, np.int32), log_q)


def children(trie: Trie, path: tuple[int, ...]) -> tuple[list[int], list[float]]:
    below = sorted((-value, key[-1]) for key, value in trie.items() if key[:-1] == path)
    return [token for _, token in below], [-value for value, _ in below]


def grown(trie: Trie, max_nodes: int, branching: tuple[int, ...]) -> tuple[Grown, int]:
    """(the tree, how many nodes were expanded)."""
    grower = Grower(max_nodes, branching)
    nodes, expanded = [-1], 0
    while nodes:
        for node in nodes:
            grower.offer(node, *children(trie, tuple(grower.path(node))))
        nodes = grower.frontier()
        expanded += len(nodes)
    return grower.finish(), expanded


def paths_of(tree: TokenTree) -> list[tuple[int, ...]]:
    return [tuple(tree.token[tree.path(node)].tolist()) for node in range(len(tree))]


@given(tries(), st.integers(0, 12))
def test_the_grown_tree_has_the_best_total_chance_of_any(trie: Trie, max_nodes: int) -> None:
    """Slow reference: the chance of every path of the whole trie, sorted."""
    result, _ = grown(trie, max_nodes, (4,) * 4)
    chances = {path: math.exp(sum(trie[path[: i + 1]] for i in range(len(path)))) for path in trie}
    best = sorted(chances.values(), reverse=True)[:max_nodes]
    assert sum(chances[path] for path in paths_of(result.tree)) == pytest.approx(sum(best))
    assert len(result.tree) == len(best) == len(set(paths_of(result.tree)))
    assert result.tree.log_q is not None
    assert result.tree.log_q.tolist() == pytest.approx([trie[path] for path in paths_of(result.tree)])


@given(tries(), st.integers(1, 12), st.integers(1, 4), st.integers(1, 4))
def test_branching_bounds_children_and_levels(trie: Trie, max_nodes: int, width: int, levels: int) -> None:
    tree = grown(trie, max_nodes, (width,) * levels)[0].tree
    assert len(tree) <= max_nodes and int(tree.depth.max(initial=-1)) < levels
    assert all(len(tree.children(node)) <= width for node in range(-1, len(tree)))


@given(tries(), st.integers(1, 12))
def test_a_branching_of_one_is_the_chain_of_best_children(trie: Trie, num: int) -> None:
    tree = grown(trie, num, (1,) * num)[0].tree
    want: tuple[int, ...] = ()
    while len(want) < num and (found := children(trie, want)[0]):
        want = (*want, found[0])
    assert tuple(tree.token.tolist()) == want and tree.parent.tolist() == list(range(-1, len(want) - 1))


def test_only_nodes_that_may_still_matter_are_expanded() -> None:
    grower = Grower(3, (4, 4, 4))
    grower.offer(-1, [7, 8, 9, 6], [math.log(p) for p in (0.6, 0.2, 0.1, 0.05)])
    assert [grower.token(node) for node in grower.frontier()] == [7, 8]  # what follows 9 cannot beat 9
    grower.offer(0, [5, 4], [math.log(0.9), math.log(0.01)])
    grower.offer(1, [3], [math.log(0.1)])
    tree = grower.finish().tree
    assert paths_of(tree) == [(7,), (8,), (7, 5)]


def test_impossible_offers_are_refused() -> None:
    grower = Grower(3, (2, 2))
    with pytest.raises(ValueError, match="exceed 1"):
        grower.offer(-1, [1], [0.1])
    with pytest.raises(ValueError, match="was not offered"):
        grower.offer(0, [1], [-1.0])
    grower.offer(-1, [1, 2], [0.0, -math.inf])
    assert grower.finish().tree.token.tolist() == [1]  # what cannot be accepted is no guess


@given(st.integers(0, 40), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_a_fixed_form_is_full_and_ranks_start_at_the_best(max_nodes: int, branching: list[int]) -> None:
    tree = shape(max_nodes, branching, (0.6, 0.2, 0.1, 0.05))
    whole = sum(math.prod(branching[: level + 1]) for level in range(len(branching)))
    assert len(tree) == min(max_nodes, whole)
    for node in range(-1, len(tree)):
        assert tree.token[tree.children(node)].tolist() == list(range(len(tree.children(node))))


@given(trees(), st.integers(0, 16))
def test_pruning_keeps_the_best_prefix_closed_set(tree: TokenTree, max_nodes: int) -> None:
    pruned, kept = prune(tree, max_nodes)
    assert len(pruned) == min(max_nodes, len(tree)) == len(kept)
    assert set(paths_of(pruned)) <= set(paths_of(tree))
    assert pruned.token.tolist() == tree.token[kept].tolist()
    values = np.zeros(len(tree)) if tree.log_q is None else np.asarray(tree.log_q)
    reach = np.exp(path_sums(tree, values))
    assert float(reach[kept].sum()) == pytest.approx(float(np.sort(reach)[::-1][:max_nodes].sum()))


@given(st.lists(trees(scored=True), max_size=4))
def test_merging_is_the_union_of_paths_with_the_better_score(parts: list[TokenTree]) -> None:
    merged = merge(parts)
    union = {path for part in parts for path in paths_of(part)}
    assert sorted(paths_of(merged.tree)) == sorted(union)  # sorted lists: no path twice
    for part, places in zip(parts, merged.places, strict=True):
        assert [paths_of(merged.tree)[place] for place in places] == paths_of(part)
    for node, path in enumerate(paths_of(merged.tree)):
        offers = [
            (index, float(part.log_q[paths_of(part).index(path)]))
            for index, part in enumerate(parts)
            if part.log_q is not None and path in paths_of(part)
        ]
        assert merged.tree.log_q is not None
        assert float(merged.tree.log_q[node]) == max(value for _, value in offers)
        assert merged.origin[node] == offers[0][0]


@given(st.lists(trees(), min_size=1, max_size=3))
def test_scores_survive_merging_only_where_all_have_them(parts: list[TokenTree]) -> None:
    scored = all(part.log_q is not None for part in parts if len(part))
    assert (merge(parts).tree.log_q is not None) == scored


@given(trees())
def test_mask_positions_and_paths_agree_with_a_walk_up(tree: TokenTree) -> None:
    """Slow reference: follow parents by hand."""
    mask = ancestor_mask(tree.parent)
    for node in range(len(tree)):
        above, seen = node, {node}
        while tree.parent[above] >= 0:
            above = int(tree.parent[above])
            seen.add(above)
        assert set(np.flatnonzero(mask[node]).tolist()) == seen
        assert depths(tree.parent)[node] == len(seen) - 1
        path = tree.path(node)
        check_path(tree.parent, path)
        assert all(a < b for a, b in pairwise(path))
        for wrong in (path[1:], [*path, node], [*path[:-1], len(tree)]):
            if wrong:
                with pytest.raises(ValueError, match="not a path"):
                    check_path(tree.parent, wrong)
