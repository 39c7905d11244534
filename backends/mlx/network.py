"""An mlx-lm model made ready for trees: its caches planned, its modules grafted, and both checked."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from localspec.errors import ModelFileError, UnsupportedModelError
from localspec.types import NodeIndices

from .border import is_memory_error
from .cache import Pass, TreeCache
from .grafts import Body, place_ropes, wrap_body
from .layout import Layout

_PROBE_PREFIX, _PROBE_CHAIN = 3, (1, 2)  # tokens of the self-check
_PROBE_SHIFT = 2**17  # positions; beyond where models start to rescale
_PROBE_TREE = np.array([-1, -1, 1], np.int32)


class Network:
    """Runs passes. `trees`, `width_one_differs` and `notes` are what the self-check found; `vocab_size` is V.

    Raises UnsupportedModelError for a model whose memory is not plain keys and values.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self._current = Pass()
        self._windows = _plan_caches(module)
        place_ropes(module, self._current)
        self._graft = wrap_body(module, self._current)
        self.notes: list[str] = []
        self.vocab_size = self._check_rows()
        self.trees, self.width_one_differs = self._check_nodes()

    def caches(self) -> list[TreeCache]:
        """Empty caches for one sequence."""
        return [TreeCache(self._current, window) for window in self._windows]

    def run(self, ids: mx.array, caches: list[TreeCache], layout: Layout, rows: tuple[int, ...] | None) -> mx.array:
        """[R, V] lazy logits of the wanted rows of one pass over ids [T]."""
        self._current.begin(layout, rows)
        try:
            logits: mx.array = self._module(ids[None], cache=caches)[0]
            if self._graft is None and rows is not None:
                logits = mx.take(logits, mx.array(rows, mx.int32), axis=0)
            return logits
        finally:
            self._current.end()

    # ------------------------------------------------------------ checks at load

    def _check_rows(self) -> int:
        """V; takes the body's graft out again where it does not select rows before the head."""
        logits = self._probe(self.caches(), 0, _chain(2), _PROBE_CHAIN, rows=(1,))
        if self._graft is not None and logits.shape[0] != 1:
            owner, name = self._graft
            body = owner[name]
            assert isinstance(body, Body)
            owner[name] = body.inner
            self._graft = None
            self.notes.append("The head computes every row: the part before it could not be told apart.")
        return int(logits.shape[-1])

    def _check_nodes(self) -> tuple[bool, bool]:
        """(trees, width one differs): is a token's row what it is when decoded alone, as a node of a tree
        and merely with another token behind it?

        The only way to know that an architecture's positions and masks go through our grafts. The tree
        runs twice, the second time with an offset that is far off: a model to which this makes a
        difference uses positions outside its rotary embeddings, so it would place tree nodes wrongly.
        """
        caches = self.caches()
        self._probe(caches, 0, _chain(_PROBE_PREFIX), tuple(range(_PROBE_PREFIX)))
        forks = [[cache.copy() for cache in caches] for _ in range(3)]
        chain = self._probe(caches, _PROBE_PREFIX, _chain(2), _PROBE_CHAIN)
        alone = self._probe(forks[2], _PROBE_PREFIX, _chain(1), _PROBE_CHAIN[:1])
        differs = not bool(mx.array_equal(alone[0], chain[0]))
        for fork, shift in zip(forks, (0, _PROBE_SHIFT), strict=False):
            try:
                self._current.shift = shift
                tree = self._probe(fork, _PROBE_PREFIX, _PROBE_TREE, (_PROBE_CHAIN[0] + 2, *_PROBE_CHAIN))[1:]
                worst, spread = float(mx.abs(tree - chain).max()), float(mx.std(chain))
            except Exception as error:  # whatever a model file does with vectors of positions
                if is_memory_error(error):
                    raise
                self.notes.append(f"No token trees: the model's attention does not take them ({error}).")
                return False, differs
            finally:
                self._current.shift = 0
            if not worst <= _tolerance(chain.dtype) * spread:
                self.notes.append(f"No token trees: their rows differ from rows decoded alone by {worst:.2g}.")
                return False, differs
        return True, differs

    def _probe(
        self,
        caches: list[TreeCache],
        num_committed: int,
        parents: NodeIndices,
        ids: tuple[int, ...],
        rows: tuple[int, ...] | None = None,
    ) -> mx.array:
        return self.run(mx.array(ids, mx.int32), caches, Layout(num_committed, parents, len(parents)), rows)


def _chain(num_tokens: int) -> NodeIndices:
    return np.arange(-1, num_tokens - 1, dtype=np.int32)


def _tolerance(dtype: mx.Dtype) -> float:
    """In standard deviations of a row's logits: rounding is below, a wrong position above."""
    return 1e-3 if dtype == mx.float32 else 0.1


def _plan_caches(module: nn.Module) -> list[int | None]:
    """Per cache that the model wants, its window or None. Told by the caches' types, not by names."""
    windows: list[int | None] = []
    for cache in make_prompt_cache(module):
        kind = type(cache)
        if kind is KVCache:
            windows.append(None)
        elif kind is RotatingKVCache and cache.keep == 0:
            windows.append(cache.max_size)
        else:
            raise UnsupportedModelError(
                "the mlx backend cannot rewind this model's memory",
                got=kind.__name__,
                expected="KVCache or RotatingKVCache in every layer",
                fix="Recurrent, chunked and combined caches are not supported yet; try the llamacpp backend.",
            )
    if not windows:
        raise ModelFileError("the model has no layers", got=0, expected="at least 1")
    return windows
