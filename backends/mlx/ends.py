"""A target's embedding and output matrix, which heads borrow."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from localspec.errors import UnsupportedModelError

from .border import is_memory_error
from .grafts import FINAL
from .layout import Layout, chain
from .network import Network
from .taps import EMBEDDING, Record

_EMBEDDINGS = (
    "embed_tokens",
    "tok_embeddings",
    "word_embeddings",
    "token_embeddings",
    "embeddings",
    "embed_in",
    "wte",
)  # names that mlx-lm's model files use
_PROBE = (0, 1)


class Ends:
    """Both ends of a network, checked by a pass of two tokens. `hidden_size` is that of its layers, `vocab_size` V.

    Raises UnsupportedModelError where either cannot be told apart from the rest, or where a model does more with them
    than a head could.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._module: Any = network.module
        body = network.body
        if body is None:
            raise UnsupportedModelError("the part of this target before its output matrix cannot be told apart")
        record = self._recorded((EMBEDDING, FINAL))
        self.vocab_size = network.vocab_size
        self.hidden_size = int(record[FINAL].shape[-1])
        self._embedding = _embedding(body)
        self._scale = self._measured_scale(record[EMBEDDING])
        self._check_scores(record[FINAL])

    def check_taps(self, taps: tuple[int, ...]) -> None:
        """Raise UnsupportedModelError unless these taps are read as [1, T, hidden_size]."""
        for tap, value in self._recorded(taps).items():
            if value.shape != (1, len(_PROBE), self.hidden_size):
                raise UnsupportedModelError(
                    f"the target's layer {tap} gives something else than a head reads",
                    got=value.shape,
                    expected=(1, len(_PROBE), self.hidden_size),
                )

    def matrices(self) -> list[mx.array]:
        """The embedding and the output matrix [V, hidden], those that are stored as plain numbers."""
        found = [self._embedding, self._module.get("lm_head")]
        return [module.weight for module in found if module is not None and "scales" not in module]

    def embed(self, ids: mx.array) -> mx.array:
        """[..., hidden] what enters layer 0 for these tokens."""
        rows: mx.array = self._embedding(ids)
        return rows if self._scale == 1.0 else rows * mx.array(self._scale, rows.dtype)

    def score(self, hidden: mx.array) -> mx.array:
        """[N, V] logits of final hidden states [N, hidden], with whatever the model does behind its matrix."""
        self._network.current.hidden = hidden[None]
        try:
            return self._module(mx.zeros((1, 1), mx.int32))[0]  # type: ignore[no-any-return]
        finally:
            self._network.current.end()

    def _recorded(self, taps: tuple[int, ...]) -> Record:
        network, record = self._network, Record()
        network.taps.add(taps)
        try:
            layout = Layout(0, chain(len(_PROBE)), len(_PROBE))
            self._logits = network.run(mx.array(_PROBE, mx.int32), network.caches(), layout, None, record)
        finally:
            network.taps.remove(taps)
        missing = [tap for tap in taps if tap not in record]
        if missing:
            raise UnsupportedModelError(
                "the target's layers are not run as a head needs it", got=f"tap {missing[0]} was not reached"
            )
        return {tap: record[tap] for tap in taps}

    def _measured_scale(self, entered: mx.array) -> float:
        """What the model multiplies embeddings with."""
        rows = self._embedding(mx.array(_PROBE, mx.int32)).astype(mx.float32)
        entered = entered[0].astype(mx.float32)
        if entered.shape != rows.shape:
            raise UnsupportedModelError(
                "this target's layers read something else than its embeddings", got=entered.shape, expected=rows.shape
            )
        scale = float((rows * entered).sum() / mx.maximum((rows * rows).sum(), 1e-20))
        if not float(mx.abs(entered - scale * rows).max()) <= 0.02 * float(mx.abs(entered).max()):
            raise UnsupportedModelError("this target adds something to its embeddings, which a head cannot know")
        return 1.0 if abs(scale - 1.0) < 0.005 else scale

    def _check_scores(self, final: mx.array) -> None:
        try:
            scores = self.score(final[0])
            spread = float(mx.std(self._logits.astype(mx.float32)))
            difference = float(mx.abs((scores - self._logits).astype(mx.float32)).max())
        except Exception as error:  # whatever a model file does without its caches
            if is_memory_error(error):
                raise
            raise UnsupportedModelError("this target's output matrix cannot be used alone", got=error) from error
        if not difference <= 0.05 * spread:
            raise UnsupportedModelError("this target's output matrix cannot be used alone", got=f"off by {difference}")


def _embedding(body: nn.Module) -> Any:
    for name in _EMBEDDINGS:
        found = body.get(name)
        if isinstance(found, nn.Module):
            return found
    raise UnsupportedModelError("this target's embedding is not known", expected=f"one of {', '.join(_EMBEDDINGS)}")
