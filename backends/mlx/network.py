"""An mlx-lm model made ready for speculation: its caches planned, its modules grafted, and both checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from localspec.errors import ModelFileError

from .cache import Pass, TreeCache
from .device import builds_attention
from .grafts import Body, place_positions, wrap_body
from .layout import Layout
from .memory import planned, states_in
from .selfcheck import SelfCheck, refuse_broken, small_budgets
from .taps import Record, Taps
from .together import JointCache, JointLayout


class Network:
    """Runs passes. `vocab_size` is V; the rest is what the self-check found.

    replays: part of the memory depends on the path, so it is rewound by snapshot and replay.  trees: may nodes
    have siblings?  width_one_differs: in the last bits.  same_bits: does a replay give the bits of the chain?
    limits: why something is missing.  notes: for people.
    Raises UnsupportedModelError for a model that does not run here, or not as it must.
    """

    def __init__(self, module: nn.Module) -> None:
        refuse_broken(module)
        self.module: Any = module
        self.current = Pass()
        self.notes: list[str] = []
        self.limits: list[str] = []
        caches = self.caches()
        if not caches:
            raise ModelFileError("the model has no layers", got=0, expected="at least 1")
        kinds = sorted({type(state).__name__ for state in states_in(caches)})
        self.replays = bool(kinds)
        place_positions(module, self.current)
        self._graft = wrap_body(module, self.current)
        self.taps = Taps(module, self.current)
        self.vocab_size, self.same_bits, self.trees = 0, True, False
        with small_budgets(module):
            self.current.blocks = builds_attention() and SelfCheck(self).takes_blocks()
            self._check(SelfCheck(self), ", ".join(kinds))

    def caches(self) -> list[Any]:
        """Empty caches for one sequence."""
        return [planned(cache, self.current) for cache in make_prompt_cache(self.module)]

    def run(
        self,
        ids: mx.array,
        caches: list[Any],
        layout: Layout,
        rows: tuple[int, ...] | None,
        record: Record | None = None,
    ) -> mx.array:
        """[R, V] lazy logits of the wanted rows of one pass over ids [T]; fills `record` with taps [1, T, hidden]."""
        self.current.begin(layout, rows)
        self.current.record = record
        try:
            logits: mx.array = self.module(ids[None], cache=caches)[0]
            if self._graft is None and rows is not None:
                logits = mx.take(logits, mx.array(rows, mx.int32), axis=0)
            return logits
        finally:
            self.current.end()

    @property
    def body(self) -> nn.Module | None:
        """The part before the output matrix; None where it could not be told apart."""
        if self._graft is None:
            return None
        owner, name = self._graft
        return owner[name].inner  # type: ignore[no-any-return]

    @property
    def can_join(self) -> bool:
        """Could several sequences go into one pass? Only the self-check knows whether they may."""
        return self.trees and all(isinstance(cache, TreeCache) for cache in self.caches())

    def run_together(
        self,
        ids: mx.array,
        caches: Sequence[list[Any]],
        layouts: Sequence[Layout],
        record: Record | None = None,
    ) -> mx.array:
        """[B, T, V] lazy logits of one pass over ids [B, T], each with caches and a layout of its own; fills `record`
        with the taps [B, T, hidden]."""
        self.current.begin(JointLayout(layouts), None)
        self.current.record = record
        try:
            joined = [JointCache(lanes) for lanes in zip(*caches, strict=True)]
            return self.module(ids, cache=joined)  # type: ignore[no-any-return]
        finally:
            self.current.end()

    def _check(self, check: SelfCheck, kinds: str) -> None:
        self.vocab_size = self._check_rows(check)
        self.width_one_differs = check.chain()
        if self.replays:
            self.same_bits = check.replay() and not self.width_one_differs
            self.limits.append(f"part of the memory depends on the path by which it was reached ({kinds})")
            self.notes.append(f"Chains only, and kept tokens are replayed when guesses are dropped: {self.limits[0]}.")
            return
        why = check.tree()
        self.trees = why is None
        if why is not None:
            self.limits.append(why)
            self.notes.append(f"No token trees: {why}.")

    def _check_rows(self, check: SelfCheck) -> int:
        """V; takes the body's graft out again where it does not select rows before the head."""
        num_rows, vocab_size = check.shape()
        if self._graft is not None and num_rows != 1:
            owner, name = self._graft
            body = owner[name]
            assert isinstance(body, Body)
            owner[name] = body.inner
            self._graft = None
            self.notes.append("The head computes every row: the part before it could not be told apart.")
        return vocab_size
