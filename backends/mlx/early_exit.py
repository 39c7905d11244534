"""The target's own first layers as its drafter: layers 0 to k - 1, then the target's final norm and output matrix.

Nothing is trained and nothing is loaded. What those layers remember of committed tokens is the target's own keys and
values, which they read where they are; rows of guesses are written behind them and count for nothing once a pass is
over, so that the target's next pass writes its own there. Source: the idea is self-speculative decoding (Zhang et al.,
2023; LayerSkip, Elhoushi et al., 2024, trains targets for it); sharing the target's rows with trees of guesses is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import get_total_parameters

from localspec.errors import SettingError, UnsupportedModelError
from localspec.protocols import HeadInfo, HeadState, Scores, SequenceState, Tokens
from localspec.types import NodeIndices

from .border import is_memory_error
from .cache import TreeCache
from .layout import Layout, chain
from .model import MlxModel
from .scores import DeviceScores, DeviceTokens
from .state import MlxState
from .taps import Record

_PROBE = (0, 1, 2)
_SHARE = 0.5  # of the layers, where nobody says how many
_TOLERANCE = 1e-2  # of the hidden states' spread: kernels may round otherwise


class EarlyExit:
    """`protocols.DraftHead`. Raises SettingError for layers that there are not, UnsupportedModelError where a part of
    the target cannot be run alone."""

    def __init__(self, target: MlxModel, layers: int | None) -> None:
        network = target.network
        if network.replays:
            raise UnsupportedModelError(
                "early exit reads and forgets rows of the target's memory, and part of this one depends on the path",
                got="; ".join(network.limits),
                fix="Use another drafter, e.g. --draft self.",
            )
        every = list(network.module.layers)
        layers = max(1, round(_SHARE * len(every))) if layers is None else layers
        if not 1 <= layers < len(every):
            raise SettingError("early exit: layers out of range", got=layers, expected=f"1 to {len(every) - 1}")
        self.target = target
        self.layers = layers
        self._network = network
        self._owner, self._name = _holder(network.module, every)
        self._check(every)
        spared = sum(int(get_total_parameters(layer)) for layer in every[layers:])
        self.info = HeadInfo(
            name=f"{target.info.name}, {layers} of {len(every)} layers",
            path=target.info.path,
            kind="early_exit",
            num_parameters=target.info.num_parameters - spared,
            taps=(),
            trees=target.capabilities.trees,
        )
        self._closed = False

    def open(self, state: SequenceState) -> HeadState:
        """Guesses beside a sequence; its memory is the target's, so nothing is ever missing. Raises ValueError for a
        sequence of another model, or once closed."""
        if self._closed:
            raise ValueError("this head is closed")
        if not isinstance(state, MlxState) or state.owner is not self.target:
            raise ValueError("a state of another model was given")
        state.check_open()
        return cast("HeadState", EarlyExitState(self, state))

    def close(self) -> None:
        """There is nothing to give back."""
        self._closed = True

    def run(self, ids: mx.array, caches: Sequence[Any], layout: Layout, record: Record | None = None) -> mx.array:
        """[T, V] lazy logits of one pass over ids [T] through the first layers, which write their rows."""
        with self._first_layers():
            return self._network.run(ids, list(caches[: self.layers]), layout, None, record)

    @contextmanager
    def _first_layers(self) -> Iterator[None]:
        """The model has no other layers meanwhile. Heads may have wrapped some since it was opened."""
        every = self._owner[self._name]
        self._owner[self._name] = every[: self.layers]
        try:
            yield
        finally:
            self._owner[self._name] = every

    def _check(self, every: Sequence[nn.Module]) -> None:
        """Do the first layers alone give what they give in the whole model, and the end something behind them?"""
        network, last = self._network, self.layers - 1
        whole, part = Record(), Record()
        layout = Layout(0, chain(len(_PROBE)), len(_PROBE))
        caches = network.caches()
        if len(caches) != len(every) or not all(isinstance(cache, TreeCache) for cache in caches):
            raise UnsupportedModelError(
                "early exit needs keys and values of each layer", got=f"{len(caches)} caches of {len(every)} layers"
            )
        network.taps.add([last])
        try:
            network.run(mx.array(_PROBE, mx.int32), caches, layout, None, whole)
            logits = self.run(mx.array(_PROBE, mx.int32), network.caches(), layout, part)
            difference = float(mx.abs(whole[last] - part[last]).astype(mx.float32).max())
            spread = float(mx.std(whole[last].astype(mx.float32)))
            right = logits.shape == (len(_PROBE), network.vocab_size) and not bool(mx.isnan(logits).any())
        except Exception as error:  # whatever a model file does with fewer layers than it was written for
            if is_memory_error(error):
                raise
            raise UnsupportedModelError(
                f"{self.target.info.name} does not run with its first {self.layers} layers alone",
                got=f"{type(error).__name__}: {error}",
                fix="Try other numbers of layers, or another drafter.",
            ) from error
        finally:
            network.taps.remove([last])
        if not (right and difference <= _TOLERANCE * spread):
            raise UnsupportedModelError(
                f"the first {self.layers} layers of {self.target.info.name} give something else alone",
                got=f"a difference of {difference:.2g}",
                expected=f"at most {_TOLERANCE * spread:.2g}",
            )


class EarlyExitState:
    """`protocols.HeadState`: guesses as rows behind the sequence's own, in the caches of the first layers."""

    num_missing = 0

    def __init__(self, head: EarlyExit, state: MlxState) -> None:
        self.head = head
        self.state = state
        self._parents: list[int] | None = None  # of the anchor and the guesses, the anchor being number 0
        self._closed = False

    @property
    def room(self) -> int:
        """How many more guesses can be fed."""
        used = self.state.length + self.state.num_pending + len(self._parents or [0])
        return max(self.head.target.info.context_length - used, 0)

    def start(self, anchor: int) -> Scores:
        """[1, V] behind the anchor."""
        self._check_open()
        if not 0 <= anchor < self.head.target.vocab_size:
            raise ValueError(f"anchor {anchor}: not a token of the target")
        self._parents = []
        return self._run(mx.array([anchor], mx.int32), [-1])

    def extend(self, tokens: Tokens, parents: Sequence[int]) -> Scores:
        """[N, V] behind the guesses. Raises ValueError before `start`, and for parents that there are not."""
        self._check_open()
        if self._parents is None:
            raise ValueError("nothing was started")
        if len(tokens) != len(parents):
            raise ValueError(f"{len(tokens)} tokens with {len(parents)} parents")
        number = len(self._parents) - 1
        for place, parent in enumerate(parents):
            if not -1 <= parent < number + place:
                raise ValueError(f"parents {list(parents)}: each must be -1 or the number of an earlier guess")
        if not self.head.info.trees and list(parents) != list(range(number - 1, number - 1 + len(parents))):
            raise ValueError(f"parents {list(parents)}: this target takes chains only")
        ids = tokens.array if isinstance(tokens, DeviceTokens) else mx.array(np.asarray(tokens.numpy(), np.int32))
        return self._run(ids, [parent + 1 for parent in parents])

    def confidence(self) -> None:
        """It does not say."""
        self._check_open()

    def close(self) -> None:
        """Forget the guesses."""
        self._closed, self._parents = True, None

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this head's state is closed")
        self.state.check_open()

    def _run(self, ids: mx.array, parents: list[int]) -> Scores:
        """Scores of new nodes, whose rows stand behind committed and pending ones and those of earlier guesses."""
        assert self._parents is not None
        state, earlier = self.state, len(self._parents)
        self._parents += parents
        pending = state.parents
        ours = np.array([-1 if parent < 0 else parent + len(pending) for parent in self._parents], np.int32)
        layout = Layout(state.length, _joined(pending, ours), len(parents))
        caches = [cast("TreeCache", cache) for cache in state.caches[: self.head.layers]]
        before = state.length + len(pending)
        try:
            for cache in caches:
                cache.num_rows = before + earlier
            logits = self.head.run(ids, state.caches, layout)
        finally:
            for cache in caches:
                cache.num_rows = before
        mx.async_eval(logits, *(array for cache in caches for array in cache.arrays()))
        return cast("Scores", DeviceScores(logits, self.head.target.ledger))


def _joined(pending: NodeIndices, ours: NodeIndices) -> NodeIndices:
    return np.concatenate([pending, ours]) if len(pending) else ours


def _holder(module: nn.Module, layers: Sequence[nn.Module]) -> tuple[Any, str]:
    """(the module that has the list of layers, its name there). Raises UnsupportedModelError."""
    for owner in module.modules():
        for name, children in owner.items():
            if isinstance(children, list) and len(children) == len(layers) and children[0] is layers[0]:
                return owner, name
    raise UnsupportedModelError("the target's layers are not in one list, so a part of them cannot be run")
