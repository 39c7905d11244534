"""Gemma 4's assistant: layers that ask the target's own keys and values, always from the anchor's position.

Nothing is kept of guesses but their outputs, so a guess costs the same in a tree as in a chain. Layers are mlx-lm's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import gemma4_text

from localspec.errors import HeadFileError, PairMismatchError, UnsupportedModelError
from localspec.formats.gemma_assistant import AssistantConfig
from localspec.formats.head import HeadHeader
from localspec.protocols import HeadInfo, HeadState, Scores, Tokens

from ..border import is_memory_error
from ..cache import BLOCK, Pass
from ..device import builds_attention
from ..grafts import place_positions
from ..memory import rows_in
from ..model import MlxModel
from ..scores import DeviceScores
from ..state import MlxState
from .base import MlxHead, MlxHeadState
from .borrowed import Borrowed
from .features import LastHidden
from .parameters import device_ids, head_info, read_tensors, take_weights

_MOST_GUESSES = 512
_ORDERING = "masked_embedding.token_ordering"


@dataclass(frozen=True, slots=True)
class Cells:
    """A layer's keys and values [1, heads, cells, size] in the target, of which those from `first` on and before `end`
    are seen."""

    keys: mx.array
    values: mx.array
    first: int
    end: int

    def seen_by(self, num_rows: int, current: Pass) -> tuple[mx.array, mx.array, mx.array | None]:
        """Keys and values that attention over so many rows is given, and a mask [rows, cells] where it must leave some
        of them out."""
        begin, end = current.first_shown(self.first, num_rows), current.num_shown(self.end, num_rows)
        end = min(end, self.keys.shape[2])  # of a target that is not given blocks itself
        mask = None
        if current.shows_blocks(num_rows):
            mask = np.zeros((num_rows, end - begin), np.bool_)
            mask[:, self.first - begin : self.end - begin] = True
        keys, values = self.keys[:, :, begin:end], self.values[:, :, begin:end]
        return keys, values, None if mask is None else mx.array(mask)


class _Module(nn.Module):
    def __init__(self, config: AssistantConfig) -> None:
        super().__init__()
        settings = {
            **config.settings,
            "num_kv_shared_layers": len(config.layer_types), "hidden_size_per_layer_input": 0,
            "enable_moe_block": False, "use_double_wide_mlp": False,
        }  # fmt: skip
        args = gemma4_text.ModelArgs.from_dict(settings)
        self.layers = [gemma4_text.DecoderLayer(args, layer) for layer in range(len(config.layer_types))]
        self.norm = nn.RMSNorm(config.hidden, eps=args.rms_norm_eps)
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.pre_projection = nn.Linear(2 * config.target_hidden, config.hidden, bias=False)
        self.post_projection = nn.Linear(config.hidden, config.target_hidden, bias=False)
        if config.num_clusters:
            self.centroids = nn.Linear(config.hidden, config.num_clusters, bias=False)


class AssistantNetwork:
    """The layers, over rows that stand at one position.

    Raises HeadFileError, and PairMismatchError for an assistant of another target.
    weights: by their names in the file.  borrowed: the target's embedding.
    """

    def __init__(self, config: AssistantConfig, weights: dict[str, mx.array], borrowed: Borrowed) -> None:
        for what, got, expected in (
            ("pre_projection.weight reads another hidden size", config.target_hidden, borrowed.hidden_size),
            ("model.embed_tokens.weight has another number of rows", config.vocab, borrowed.vocab_size),
        ):
            if got != expected:
                raise PairMismatchError(f"tensor {what} than the target's", got=got, expected=expected)
        self.config = config
        self.current = Pass(blocks=builds_attention())
        ordering = weights.pop(_ORDERING, None)
        self._clusters = None if ordering is None else ordering.reshape(config.num_clusters, -1).astype(mx.int32)
        try:
            self.module = _Module(config)
        except Exception as error:  # whatever a model file's constructor does with settings that are wrong
            if is_memory_error(error):
                raise
            raise HeadFileError("config.json does not make Gemma 4's layers", got=error) from error
        renamed = {name.removeprefix("model.").removeprefix("masked_embedding."): w for name, w in weights.items()}
        take_weights(self.module, renamed)
        place_positions(self.module, self.current)
        self._borrowed = borrowed
        # keys are the target's, and a copy of them in another type would be made for every guess
        self.module.set_dtype(borrowed.embed(mx.array([0])).dtype)

    def run(self, hidden: mx.array, tokens: mx.array, cells: Mapping[str, Cells], position: int) -> mx.array:
        """[N, E] outputs behind the last norm, from hidden states [N, target's hidden] and ids [N]. cells: what the
        layers of each type see."""
        embedded = self._borrowed.embed(tokens)
        x = self.module.pre_projection(mx.concatenate([embedded, hidden.astype(embedded.dtype)], axis=-1))[None]
        seen = {kind: part.seen_by(x.shape[1], self.current) for kind, part in cells.items()}
        self.current.positions = mx.full((x.shape[1],), position, mx.int32)
        try:
            for layer, kind in zip(self.module.layers, self.config.layer_types, strict=True):
                keys, values, mask = seen[kind]
                x = layer(x, mask, None, shared_kv=(keys, values), offset=position)[0]
        finally:
            self.current.end()
        outputs: mx.array = self.module.norm(x)[0]
        return outputs

    def fed_back(self, outputs: mx.array) -> mx.array:
        """[N, target's hidden] what stands for the hidden states of guesses."""
        hidden: mx.array = self.module.post_projection(outputs)
        return hidden

    def logits(self, outputs: mx.array) -> mx.array:
        """[N, V]; with clusters only the tokens of the best ones can be guessed."""
        if self._clusters is None:
            rows: mx.array = self.module.embed_tokens.as_linear(outputs)
            return rows
        scores = self.module.centroids(outputs)
        best = mx.argpartition(-scores, kth=self.config.num_chosen - 1, axis=-1)[:, : self.config.num_chosen]
        ids = mx.take(self._clusters, best, axis=0).reshape(len(outputs), -1)  # [N, chosen * V / clusters]
        found = (self.module.embed_tokens(ids) @ outputs[:, :, None])[:, :, 0]
        nothing = mx.full((len(outputs), self.config.vocab), -mx.inf, found.dtype)
        return mx.put_along_axis(nothing, ids, found, axis=-1)


class AssistantHead(MlxHead[LastHidden]):
    """`protocols.DraftHead`. sources: layer type -> which of the target's caches holds its keys."""

    def __init__(self, info: HeadInfo, target: MlxModel, network: AssistantNetwork, sources: Mapping[str, int]) -> None:
        super().__init__(info, target)
        self._network: AssistantNetwork | None = network
        self._sources = sources

    def new_companion(self) -> LastHidden:
        """An empty one."""
        return LastHidden(self, self.info.taps)

    def new_state(self, state: MlxState, companion: LastHidden) -> HeadState:
        """Guesses beside a sequence."""
        assert self._network is not None
        return cast("HeadState", AssistantState(self, state, companion, self._network))

    def cells(self, state: MlxState) -> Mapping[str, Cells]:
        """What layers of each type see of a sequence's committed tokens from the position behind them."""
        assert self._network is not None
        caches, config = list(rows_in(state.caches)), self._network.config
        found = {}
        for kind in set(config.layer_types):
            cache = caches[self._sources[kind]]
            if cache.keys is None or cache.values is None or not state.length:
                size = self._network.module.layers[config.layer_types.index(kind)].self_attn.head_dim
                nothing = mx.zeros((1, 1, BLOCK, size))
                found[kind] = Cells(nothing, nothing, 0, 1)
            else:
                first = max(state.length - config.window + 1, 0) if kind == "sliding_attention" else 0
                found[kind] = Cells(mx.array(cache.keys), mx.array(cache.values), first, state.length)
        return found

    def drop_weights(self) -> None:
        """Give the head's own memory back."""
        self._network = None


class AssistantState(MlxHeadState[LastHidden]):
    """`protocols.HeadState`. Rows stay on the device, and a chain is guessed without waiting."""

    def __init__(self, head: AssistantHead, state: MlxState, companion: LastHidden, network: AssistantNetwork) -> None:
        super().__init__(head, state, companion)
        self._network = network
        self._cells: Mapping[str, Cells] = {}
        self._position = 0
        self._outputs: mx.array | None = None  # [1 + guesses, E], the anchor's first

    @property
    def room(self) -> int:
        """How many more guesses can be fed."""
        return _MOST_GUESSES - (0 if self._outputs is None else self._outputs.shape[0] - 1)

    def start(self, anchor: int) -> Scores:
        """Forget earlier guesses; [1, V] what may follow the anchor."""
        self.check_open()
        last = self.companion.log.last()
        if last is None:  # nothing was read since the head was opened
            last = mx.zeros((1, self._network.config.target_hidden))
        self._cells, self._position = self.head.cells(self.state), self.state.length
        self._outputs = None
        return self._scored(last, mx.array([anchor], mx.int32))

    def extend(self, tokens: Tokens, parents: Sequence[int]) -> Scores:
        """Feed guesses; [N, V] what may follow each."""
        self.check_open()
        if self._outputs is None:
            raise ValueError("guesses are fed before the anchor")
        if len(parents) != len(tokens) or not all(-1 <= parent < self._outputs.shape[0] - 1 for parent in parents):
            raise ValueError(f"parents {list(parents)} of {len(tokens)} guesses behind {self._outputs.shape[0] - 1}")
        if len(parents) > self.room:
            raise ValueError(f"{len(parents)} guesses are too many: {self.room} can be fed")
        above = mx.take(self._outputs, mx.array([parent + 1 for parent in parents], mx.int32), axis=0)
        return self._scored(self._network.fed_back(above), device_ids(tokens))

    def confidence(self) -> None:
        """It does not say."""

    def _scored(self, hidden: mx.array, tokens: mx.array) -> Scores:
        outputs = self._network.run(hidden, tokens, self._cells, self._position)
        self._outputs = outputs if self._outputs is None else mx.concatenate([self._outputs, outputs])
        logits = self._network.logits(outputs)
        mx.async_eval(logits, self._outputs)
        return cast("Scores", DeviceScores(logits, self.head.target.ledger))


def build(header: HeadHeader, target: MlxModel) -> AssistantHead:
    """The head beside its target. Raises as `AssistantNetwork`, and UnsupportedModelError for a target whose keys
    cannot be found."""
    config = header.details
    assert isinstance(config, AssistantConfig)
    sources = _sources(target, config)
    network = AssistantNetwork(config, read_tensors(header, config.tensors), target.ends)
    return AssistantHead(head_info(header, network.module, header.taps), target, network, sources)


def _sources(target: MlxModel, config: AssistantConfig) -> dict[str, int]:
    """For each type of layer the cache of the target's last one, which may be another layer's."""
    body: Any = target.network.body
    shared = getattr(body, "previous_kvs", None)
    if shared is None:
        raise UnsupportedModelError(
            "the assistant reads the keys of a Gemma 4, which this target is not", got=target.info.architecture
        )
    sources: dict[str, int] = {}
    for index, layer in enumerate(body.layers):
        sources[layer.layer_type] = shared[index]
    for kind, head_dim in ((kind, _head_dim(config, kind)) for kind in set(config.layer_types)):
        if kind not in sources:
            raise PairMismatchError(f"the target has no layers of type {kind}, which the assistant reads")
        got = body.layers[sources[kind]].self_attn.head_dim
        if got != head_dim:
            raise PairMismatchError(
                f"the target's {kind} keys are of another size than the assistant's", got=got, expected=head_dim
            )
    return sources


def _head_dim(config: AssistantConfig, kind: str) -> int:
    """Head size of its layers of a type."""
    key, default = ("global_head_dim", 512) if kind == "full_attention" else ("head_dim", 256)
    return int(config.settings.get(key) or default)
