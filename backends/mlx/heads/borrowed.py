"""What a head uses of its target's."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx


class Borrowed(Protocol):
    """A target's embedding and output matrix."""

    @property
    def hidden_size(self) -> int:
        """Width of a hidden state of its layers."""
        ...

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    def embed(self, ids: mx.array) -> mx.array:
        """[..., hidden] what enters layer 0 for these tokens."""
        ...

    def score(self, hidden: mx.array) -> mx.array:
        """[N, V] logits of final hidden states [N, hidden]."""
        ...
