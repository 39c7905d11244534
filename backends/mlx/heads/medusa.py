"""Medusa: heads side by side over the last hidden state, each for a token further ahead.

Source: Cai et al., Medusa (2024); FasterDecoding/Medusa medusa_model.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from localspec.errors import HeadFileError, PairMismatchError
from localspec.formats.head import HeadHeader
from localspec.formats.medusa import MedusaConfig
from localspec.protocols import HeadInfo, HeadState, Scores, Tokens

from ..model import MlxModel
from ..scores import DeviceScores
from ..state import MlxState
from .base import MlxHead, MlxHeadState
from .borrowed import Borrowed
from .features import LastHidden
from .parameters import head_info, read_tensors, take_weights

_MOST_GUESSES = 512


class _Residual(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = x + nn.silu(self.linear(x))
        return y


class _Head(nn.Module):
    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        self.blocks = [_Residual(config.hidden) for _ in range(config.num_blocks)]
        if config.own_head:
            self.projection = nn.Linear(config.hidden, config.vocab, bias=False)


class _Module(nn.Module):
    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        self.heads = [_Head(config) for _ in range(config.num_heads)]


class MedusaNetwork:
    """Head i guesses the token i + 1 places behind the anchor.

    Raises HeadFileError, and PairMismatchError for heads of another target.

    weights: by their names in the file.  borrowed: the target's output matrix, for heads that have none.
    """

    def __init__(self, config: MedusaConfig, weights: dict[str, mx.array], borrowed: Borrowed) -> None:
        if config.hidden != borrowed.hidden_size:
            raise PairMismatchError(
                "tensor 0.0.linear.weight reads another hidden size than the target's",
                got=config.hidden,
                expected=borrowed.hidden_size,
            )
        if config.own_head and config.vocab > borrowed.vocab_size:
            raise HeadFileError(
                f"tensor 0.{config.num_blocks}.weight has more rows than the target has tokens",
                got=config.vocab,
                expected=f"at most {borrowed.vocab_size}",
            )
        self.module = _Module(config)
        take_weights(self.module, {_renamed(config, name): value for name, value in weights.items()})
        self.hidden_size = config.hidden
        self._config, self._borrowed = config, borrowed
        self._dtype = self.module.heads[0].blocks[0].linear.weight.dtype

    def rows(self, hidden: mx.array) -> mx.array:
        """[heads, V] logits behind a last hidden state [1, hidden], behind the target's final norm."""
        hidden = hidden.astype(self._dtype)
        rows = []
        for head in self.module.heads:
            x = hidden
            for block in head.blocks:
                x = block(x)
            rows.append(head.projection(x) if self._config.own_head else self._borrowed.score(x))
        stacked = mx.concatenate(rows)
        missing = self._borrowed.vocab_size - stacked.shape[1]  # padding of the target's output matrix
        return mx.pad(stacked, [(0, 0), (0, missing)], constant_values=-mx.inf) if missing else stacked


def _renamed(config: MedusaConfig, name: str) -> str:
    """This module's parameter for a tensor `{head}.{block}.linear.{weight, bias}` or `{head}.{blocks}.weight`."""
    head, block, *rest = name.removeprefix(config.prefix).split(".")
    if rest == ["weight"]:
        return f"heads.{head}.projection.weight"
    return f"heads.{head}.blocks.{block}.{'.'.join(rest)}"


class MedusaHead(MlxHead[LastHidden]):
    """`protocols.DraftHead`."""

    def __init__(self, info: HeadInfo, target: MlxModel, network: MedusaNetwork) -> None:
        super().__init__(info, target)
        self._network: MedusaNetwork | None = network

    def new_companion(self) -> LastHidden:
        """An empty one."""
        return LastHidden(self, self.info.taps)

    def new_state(self, state: MlxState, companion: LastHidden) -> HeadState:
        """Guesses beside a sequence."""
        assert self._network is not None
        return MedusaState(self, state, companion, self._network)

    def drop_weights(self) -> None:
        """Give the heads' memory back."""
        self._network = None


class MedusaState(MlxHeadState[LastHidden]):
    """`protocols.HeadState`. All rows are there after `start`; a guess picks that of its depth, whatever it is."""

    def __init__(self, head: MedusaHead, state: MlxState, companion: LastHidden, network: MedusaNetwork) -> None:
        super().__init__(head, state, companion)
        self._network = network
        self._rows: mx.array | None = None
        self._depths: list[int] = []  # of the guesses; the anchor's children stand at 0

    @property
    def room(self) -> int:
        """How many more guesses can be fed."""
        return _MOST_GUESSES - len(self._depths)

    def start(self, anchor: int) -> Scores:
        """Forget earlier guesses; [1, V] what may follow the anchor."""
        self.check_open()
        last = self.companion.log.last()
        if last is None:  # nothing was read since the head was opened
            last = mx.zeros((1, self._network.hidden_size))
        self._rows, self._depths = self._network.rows(last), []
        mx.async_eval(self._rows)
        return self._scores([0])

    def extend(self, tokens: Tokens, parents: Sequence[int]) -> Scores:
        """Feed guesses; [N, V] what may follow each. Raises ValueError behind the last level."""
        self.check_open()
        if self._rows is None:
            raise ValueError("guesses are fed before the anchor")
        if len(parents) != len(tokens) or not all(-1 <= parent < len(self._depths) for parent in parents):
            raise ValueError(f"parents {list(parents)} of {len(tokens)} guesses behind {len(self._depths)}")
        if len(parents) > self.room:
            raise ValueError(f"{len(parents)} guesses are too many: {self.room} can be fed")
        depths = [0 if parent < 0 else self._depths[parent] + 1 for parent in parents]
        if max(depths, default=0) > self._rows.shape[0] - 2:
            raise ValueError(f"a guess at depth {max(depths)}: there are {self._rows.shape[0]} heads")
        self._depths += depths
        return self._scores([depth + 1 for depth in depths])

    def confidence(self) -> None:
        """It does not say."""

    def _scores(self, levels: Sequence[int]) -> Scores:
        assert self._rows is not None
        rows = mx.take(self._rows, mx.array(list(levels), mx.int32), axis=0)
        return cast("Scores", DeviceScores(rows, self.head.target.ledger))


def build(header: HeadHeader, target: MlxModel) -> MedusaHead:
    """The heads beside their target. Raises as `MedusaNetwork`, and UnsupportedModelError for a target that cannot be
    read."""
    config = header.details
    assert isinstance(config, MedusaConfig)
    network = MedusaNetwork(config, read_tensors(header, config.tensors), target.ends)
    info = head_info(header, network.module, header.taps, levels=config.num_heads)
    return MedusaHead(info, target, network)
