"""`LanguageModel` over one mlx-lm model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import mlx.core as mx
import numpy as np

from localspec.errors import BackendError, ContextFullError
from localspec.protocols import Capabilities, ModelInfo, Rewind, Scores, Step
from localspec.types import NodeIndices

from .border import translated
from .companion import Owner
from .device import replay_class, width_class, width_steps
from .ends import Ends
from .layout import Layout
from .network import Network
from .replay_state import ReplayState
from .scores import DeviceScores, DeviceTokens, Ledger
from .state import MlxState
from .taps import Record
from .tokenizer import MlxTokenizer

_MOST_TOGETHER = 128  # tokens of each sequence in a pass that several share
_CHUNK = 512  # tokens per pass; a longer step is cut, which bounds the memory of its activations


class MlxModel:
    """Steps run one after the other; passes are started at once and waited for only when read."""

    def __init__(
        self, network: Network, info: ModelInfo, tokenizer: MlxTokenizer, num_sequences: int, ledger: Ledger
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.vocab_size = network.vocab_size
        self.capabilities = Capabilities(
            rewind=Rewind.REPLAY if network.replays else Rewind.FREE,
            trees=network.trees,
            max_width=min(_CHUNK, info.context_length),
            num_sequences=num_sequences,
            width_class=replay_class(network.same_bits) if network.replays else width_class(network.width_one_differs),
            host_scores=False,
            width_steps=width_steps(),
            limits=tuple(network.limits),
        )
        self._network: Network | None = network
        self.ledger = ledger
        self._open: set[MlxState] = set()

    @property
    def num_syncs(self) -> int:
        """How often the host has waited for the device, over all models of this backend."""
        return self.ledger.num_syncs

    @property
    def network(self) -> Network:
        """What runs the passes. Raises ValueError once closed."""
        if self._network is None:
            raise ValueError("this model is closed")
        return self._network

    # ------------------------------------------------------------ states

    def open(self) -> MlxState:
        """A new, empty sequence. Raises BackendError when all are in use."""
        network = self.network
        if len(self._open) >= self.capabilities.num_sequences:
            limit = self.capabilities.num_sequences
            raise BackendError("too many open sequences", got=limit + 1, expected=f"at most {limit}")

        def on_close() -> None:
            self._open.discard(state)

        if network.replays:
            state: MlxState = ReplayState(network.caches(), self._run_again, self, self._fork, on_close)
        else:
            state = MlxState(network.caches(), self, self._fork, on_close)
        self._open.add(state)
        return state

    def _fork(self, state: MlxState) -> MlxState:
        copy = self.open()
        copy.copy_from(state)
        return copy

    def _run_again(self, ids: mx.array, caches: list[Any], layout: Layout) -> None:
        """A pass whose logits nobody wants; being lazy, they are not computed."""
        self.network.run(ids, caches, layout, None)

    # ------------------------------------------------------------ heads

    @property
    def is_closed(self) -> bool:
        """Were the weights given back?"""
        return self._network is None

    @cached_property
    def ends(self) -> Ends:
        """The embedding and the output matrix, for heads. Raises UnsupportedModelError where there is no telling."""
        return Ends(self.network)

    def drop_companions(self, head: Owner) -> None:
        """A head follows no sequence any more."""
        for state in self._open:
            companion = state.companions.of(head)
            if companion is not None:
                state.companions.remove(companion)

    def close(self) -> None:
        """Close all states and give the weights back."""
        for state in tuple(self._open):
            state.close()
        if self._network is not None:
            self._network = None
            self.__dict__.pop("ends", None)
            mx.clear_cache()

    # ------------------------------------------------------------ forward

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        """Run all steps; lazy scores in their order.

        Raises ContextFullError before anything changes, BackendError if the runtime fails (all
        sequences are then as before), ValueError for malformed steps.
        """
        network = self.network
        states = [self._own(step) for step in steps]
        if len(set(states)) != len(states):
            raise ValueError("two steps for one sequence in one forward")
        for step, state in zip(steps, states, strict=True):
            self._check(step, state)
        before = [state.num_pending for state in states]
        try:
            with translated("the forward pass"):
                # Begun apart, so that whoever reads them need not wait for this pass, and while the host builds it.
                mx.async_eval(*(part.array for step in steps for part in step.tokens if isinstance(part, DeviceTokens)))
                if self.capabilities.batches and _are_alike([step.num_tokens for step in steps]):
                    return self._run_together(network, steps, states)
                return [self._run(network, step, state) for step, state in zip(steps, states, strict=True)]
        except Exception:
            for state, num_pending in zip(states, before, strict=True):
                state.forget(num_pending)
            raise

    def _run(self, network: Network, step: Step, state: MlxState) -> Scores:
        """One step, in chunks; the rows that are wanted of each chunk, joined."""
        ids = _joined(step)
        wanted = range(step.num_tokens) if step.rows is None else step.rows
        parts = []
        state.note(step.tokens)
        for start in range(0, step.num_tokens, _CHUNK):
            end = min(start + _CHUNK, step.num_tokens)
            rows = tuple(row - start for row in wanted if start <= row < end)
            every = len(rows) == end - start
            first, layout = state.num_pending, state.add(step.parents[start:end])
            wanted_rows = None if every or not rows else rows
            if state.companions:
                record: Record = {}
                logits = network.run(ids[start:end], state.caches, layout, wanted_rows, record)
                state.companions.record(first, ids[start:end], network.taps.of(record, 0))
            else:
                logits = network.run(ids[start:end], state.caches, layout, wanted_rows)
            if rows:
                parts.append(logits)
            if end < step.num_tokens:
                self.ledger.fetch(*state.arrays(), *parts)
        # Started now, so that the device works while the host prepares the next pass. Caches are
        # part of it: an unread pass must not pile up as an unevaluated graph.
        mx.async_eval(*state.arrays(), *parts)
        scores = mx.concatenate(parts) if len(parts) > 1 else parts[0] if parts else mx.zeros((0, self.vocab_size))
        return cast("Scores", DeviceScores(scores, self.ledger))

    def _run_together(self, network: Network, steps: Sequence[Step], states: Sequence[MlxState]) -> list[Scores]:
        """All steps as one pass, each as wide as the widest; the padding's rows are dropped."""
        width = max(self.capabilities.width_class.min_width, *(step.num_tokens for step in steps))
        ids, layouts, numbers = [], [], []
        for step, state in zip(steps, states, strict=True):
            missing = width - step.num_tokens
            numbers.append(state.num_pending + step.num_tokens)
            state.note(step.tokens)
            state.add(step.parents)
            padding = np.arange(numbers[-1] - 1, numbers[-1] - 1 + missing, dtype=np.int32)
            layouts.append(state.add(padding).widened(width))
            ids.append(mx.pad(_joined(step), (0, missing)))
        record: Record | None = {} if any(state.companions for state in states) else None
        logits = network.run_together(mx.stack(ids), [state.caches for state in states], layouts, record)
        scores = []
        for index, (step, state) in enumerate(zip(steps, states, strict=True)):
            state.forget(numbers[index])
            if record is not None and state.companions:
                real = (index, slice(step.num_tokens))
                features = network.taps.of(record, real)
                state.companions.record(numbers[index] - step.num_tokens, ids[index][: step.num_tokens], features)
            wanted = list(range(step.num_tokens)) if step.rows is None else list(step.rows)
            scores.append(mx.take(logits[index], mx.array(wanted, mx.int32), axis=0))
        mx.async_eval(*(array for state in states for array in state.arrays()), *scores)
        return [cast("Scores", DeviceScores(rows, self.ledger)) for rows in scores]

    def _own(self, step: Step) -> MlxState:
        state = step.state
        if not isinstance(state, MlxState) or state.owner is not self:
            raise ValueError("a state of another model was given")
        state.check_open()
        return state

    def _check(self, step: Step, state: MlxState) -> None:
        """Everything that must hold before anything changes."""
        num_tokens = sum(len(segment) for segment in step.tokens)
        if num_tokens != step.num_tokens:
            raise ValueError(f"{num_tokens} tokens with {step.num_tokens} parents")
        _check_parents(step.parents, state.num_pending, self.capabilities.trees)
        rows = step.rows or ()
        if any(b <= a for a, b in pairwise(rows)) or (rows and not 0 <= rows[0] <= rows[-1] < num_tokens):
            raise ValueError(f"rows {rows} of {num_tokens} tokens: not ascending, or out of range")
        for segment in step.tokens:
            if not isinstance(segment, DeviceTokens):
                ids = segment.numpy()
                if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
                    raise ValueError(f"token ids outside 0..{self.vocab_size - 1}: {int(ids.min())}..{int(ids.max())}")
        room = self.info.context_length - state.length - state.num_pending
        if num_tokens > room:
            raise ContextFullError("context full", got=f"{num_tokens} more tokens", expected=f"at most {room}")


def _are_alike(widths: Sequence[int]) -> bool:
    """Do several steps go well into one pass, in which each is as wide as the widest?"""
    return len(widths) > 1 and min(widths) > 0 and max(widths) <= _MOST_TOGETHER


def _check_parents(parents: NodeIndices, num_pending: int, trees: bool) -> None:
    numbers = np.arange(num_pending, num_pending + len(parents))
    if not trees and np.any(parents != numbers - 1):
        raise ValueError(f"parents {parents.tolist()}: this model takes chains only, each node below the one before")
    if np.any(parents < -1) or np.any(parents >= numbers):
        raise ValueError(f"parents {parents.tolist()}: each must be -1 or smaller than the node's own number")


def _joined(step: Step) -> mx.array:
    """[T] ids on the device; those that are there already stay there."""
    parts = [
        segment.array if isinstance(segment, DeviceTokens) else mx.array(np.asarray(segment.numpy(), np.int32))
        for segment in step.tokens
    ]
    if len(parts) == 1:
        return parts[0]
    return mx.concatenate(parts) if parts else mx.zeros(0, mx.int32)
