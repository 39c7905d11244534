"""Cutting what a drafter guessed against the grammar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import compress

import numpy as np

from localspec.context import Context
from localspec.protocols import DraftRequest, HostTokens, Proposal
from localspec.tree.token_tree import TokenTree

CUT = "against_grammar"
"""Name under which cut nodes are counted (`Proposal.counts`)."""


def obey(proposal: Proposal, request: DraftRequest) -> Proposal:
    """The proposal without the nodes that the grammar of `request.sampler` forbids, and what hangs from them: no rule
    could accept them. Drawn guesses (`Proposal.laws`) stay as they are, because a draw must not be taken back.
    """
    if request.sampler.constraint is None or not proposal.num_nodes or proposal.laws is not None:
        return proposal
    tree = proposal.tree()
    kept = _allowed(tree, request)
    if len(kept) == len(tree):
        return proposal
    place = {node: index for index, node in enumerate(kept)}
    log_q, sources = proposal.log_q, proposal.sources
    return replace(
        proposal,
        tokens=(HostTokens(tree.token[kept]),),
        parents=np.array([place.get(int(tree.parent[node]), -1) for node in kept], np.int32),
        log_q=None if log_q is None else tuple(log_q[node] for node in kept),
        sources=None if sources is None else tuple(sources[node] for node in kept),
        counts={**proposal.counts, CUT: proposal.counts.get(CUT, 0) + len(tree) - len(kept)},
        because="" if kept else "the grammar forbids what was guessed",
    )


def _allowed(tree: TokenTree, request: DraftRequest) -> list[int]:
    """Nodes that the grammar allows, ascending."""
    constraint, context = request.sampler.constraint, request.context
    assert constraint is not None
    kept: list[int] = []
    for parent in (-1, *range(len(tree))):
        children = tree.children(parent)
        if not children or (parent >= 0 and parent not in kept):
            continue
        with _behind(context, tree, parent):
            allowed = constraint.allows(context.output, [int(tree.token[child]) for child in children])
        kept += compress(children, allowed)
    return sorted(kept)


@contextmanager
def _behind(context: Context, tree: TokenTree, node: int) -> Iterator[None]:
    """The context as it would be behind a node."""
    path: list[int] = []
    while node >= 0:
        path.append(int(tree.token[node]))
        node = int(tree.parent[node])
    mark = len(context)
    try:
        context.extend(reversed(path))
        yield
    finally:
        context.truncate(mark)
