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
_BUSH_PATHS = ((0, 2), (0, 3, 6), (1, 4), (1, 5))
CONTEXT = 32
"""Tokens of context that the checks need."""

_CLOSE = 1e-2  # standard deviations of a row: what rounding can do, and a wrong token does not


def tree_rows_are_exact(model: LanguageModel) -> bool:
    """Are the rows of a bush, and those after each kept branch, the bits of one-by-one decoding?"""
    ids = _ids(model, 24)
    prefix, nodes, probe = ids[:9], ids[9 : 9 + len(_BUSH)], ids[-2:]
    wanted = [_one_by_one(model, prefix, [*(nodes[node] for node in path), *probe]) for path in _BUSH_PATHS]
    state = model.open()
    try:
        _commit(model, state, prefix)
        for path, want in zip(_BUSH_PATHS, wanted, strict=True):
            rows = _rows(model, state, nodes, _BUSH)[list(path)]
            state.keep(path)
            after = _rows(model, state, probe, chain_parents(state, len(probe)))
            state.truncate(len(prefix))
            if not np.array_equal(np.concatenate([rows, after]), want):
                return False
        return True
    finally:
        state.close()


def replay_difference(model: LanguageModel) -> float:
    """How far rows after rejected guesses are from one-by-one decoding, in standard deviations of a row;
    0.0 for equal bits."""
    ids = _ids(model, 24)
    prefix, tokens = ids[:7], ids[7:20]
    plain = _one_by_one(model, prefix, tokens)
    state = model.open()
    try:
        _commit(model, state, prefix)
        parts, start = [], 0
        for kept in (2, 1, 3, 1, 4, 2):  # each time with two wrong guesses behind
            guesses = [*tokens[start : start + kept], *ids[-2:]]
            parts.append(_rows(model, state, guesses, chain_parents(state, len(guesses)))[:kept])
            state.keep(range(kept))
            start += kept
        state.truncate(len(prefix) + 3)
        _commit(model, state, tokens[3:8])
        parts.append(_rows(model, state, tokens[8:11], chain_parents(state, 3)))
        got = np.concatenate(parts)
    finally:
        state.close()
    want = np.concatenate([plain, plain[8:11]])
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


def _rows(model: LanguageModel, state: SequenceState, ids: Sequence[int], parents: NodeIndices) -> Logits:
    [scores] = model.forward([Step(state, (HostTokens(np.array(ids, np.int32)),), parents)])
    return scores.rows(range(len(ids))).copy()


def _one_by_one(model: LanguageModel, prefix: Sequence[int], ids: Sequence[int]) -> Logits:
    """[T, V] rows of `ids`, each decoded alone but for one token of padding, as plain decoding does it."""
    state = model.open()
    try:
        _commit(model, state, prefix)
        rows = []
        for token in ids:
            step = Step(state, (HostTokens(np.array([token, 0], np.int32)),), chain_parents(state, 2), (0,))
            [scores] = model.forward([step])
            rows.append(scores.rows([0])[0].copy())
            state.keep((0,))
        return np.array(rows)
    finally:
        state.close()
