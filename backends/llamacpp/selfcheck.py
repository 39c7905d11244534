"""What a model's own rows say about a promise, asked once at load with a dozen short passes.

llama.cpp's kernels and its recurrent memory differ between architectures and devices; a promise about
bits, or about taking tokens back, is only worth something if this very model was seen to keep it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localspec.protocols import HostTokens, LanguageModel, SequenceState, Step, chain_parents
from localspec.types import Logits, NodeIndices

_BUSH = np.array([-1, -1, 0, 0, 1, 1, 3], np.int32)
_BUSH_PATHS = ((0, 3, 6), (1, 5))
CONTEXT = 32
"""Tokens of context that the checks need."""

_CLOSE = 1e-2  # standard deviations of a row: what rounding can do, and a wrong token does not


def tree_difference(model: LanguageModel) -> float:
    """How far the rows of a bush, and those after each kept branch, are from a chain's, in standard deviations of a
    row; 0.0 for equal bits."""
    ids = _ids(model, 24)
    prefix, nodes, probe = ids[:9], ids[9 : 9 + len(_BUSH)], ids[-2:]
    state, worst = model.open(), 0.0
    try:
        _commit(model, state, prefix)
        for path in _BUSH_PATHS:
            chain = [*(nodes[node] for node in path), *probe]
            want = _rows(model, state, chain, chain_parents(state, len(chain)))
            state.keep(())
            rows = _rows(model, state, nodes, _BUSH)[list(path)]
            state.keep(path)
            after = _rows(model, state, probe, chain_parents(state, len(probe)))
            state.truncate(len(prefix))
            worst = max(worst, _distance(np.concatenate([rows, after]), want))
        return worst
    finally:
        state.close()


def batch_difference(model: LanguageModel) -> float:
    """How far the rows of two sequences in one pass are from those of each alone, in standard deviations of a row; 0.0
    for equal bits."""
    ids = _ids(model, 24)
    parts = ((ids[:9], ids[9:12]), (ids[12:17], ids[17:22]))
    states, want = [], []
    try:
        for prefix, tokens in parts:
            state = model.open()
            states.append(state)
            _commit(model, state, prefix)
            want.append(_rows(model, state, tokens, chain_parents(state, len(tokens))))
            state.keep(())
        steps = [
            Step(state, (HostTokens(np.array(tokens, np.int32)),), chain_parents(state, len(tokens)))
            for state, (_, tokens) in zip(states, parts, strict=True)
        ]
        got = [scores.rows(range(scores.num_rows)).copy() for scores in model.forward(steps)]
    finally:
        for state in states:
            state.close()
    return _distance(np.concatenate(got), np.concatenate(want))


def replay_difference(model: LanguageModel) -> float:
    """How far rows after tokens were taken back are from a chain's that never were, in standard deviations of a
    row; 0.0 for equal bits."""
    ids = _ids(model, 24)
    prefix, tokens, wrong = ids[:7], ids[7:16], ids[-2:]
    state, parts, start = model.open(), list[Logits](), 0
    try:
        _commit(model, state, prefix)
        for num_kept, guesses in ((2, wrong), (1, wrong[:1]), (1, wrong[:1]), (3, wrong), (2, wrong)):
            chain = [*tokens[start : start + num_kept], *guesses]
            parts.append(_rows(model, state, chain, chain_parents(state, len(chain)), num_kept))
            state.keep(range(num_kept))
            start += num_kept
        state.truncate(len(prefix) + 3)
        parts.append(_rows(model, state, tokens[3:], chain_parents(state, len(tokens) - 3)))
        state.truncate(0)
        got = np.concatenate(parts)
        _commit(model, state, prefix)
        plain = _rows(model, state, tokens, chain_parents(state, len(tokens)))
    finally:
        state.close()
    return _distance(got, np.concatenate([plain, plain[3:]]))


def _distance(got: Logits, want: Logits) -> float:
    if np.array_equal(got, want):
        return 0.0
    worst = float((np.abs(got - want).max(axis=1) / want.std(axis=1)).max())
    return worst if np.isfinite(worst) and worst > 0 else float("inf")


def is_rounding(difference: float) -> bool:
    """Could rounding alone explain it?"""
    return difference <= _CLOSE


def _ids(model: LanguageModel, count: int) -> list[int]:
    """Tokens spread over the vocabulary, no two neighbours alike."""
    size = model.tokenizer.num_tokens
    return [(index * 7919 + 13) % size for index in range(1, count + 1)]


def _commit(model: LanguageModel, state: SequenceState, ids: Sequence[int]) -> None:
    step = Step(state, (HostTokens(np.array(ids, np.int32)),), chain_parents(state, len(ids)), ())
    model.forward([step])
    state.keep(range(len(ids)))


def _rows(
    model: LanguageModel, state: SequenceState, ids: Sequence[int], parents: NodeIndices, count: int | None = None
) -> Logits:
    """[N, V] the first `count` rows, or all."""
    rows = None if count is None else tuple(range(count))
    [scores] = model.forward([Step(state, (HostTokens(np.array(ids, np.int32)),), parents, rows)])
    return scores.rows(range(scores.num_rows)).copy()
