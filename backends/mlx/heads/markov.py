"""What a DSpark head adds to a slot's logits once the token before it is chosen (DeepSpec's three Markov heads)."""

from __future__ import annotations

import mlx.core as mx

from localspec.formats.block_tensors import BlockDetails

from .tensors import Weights


class Markov:
    """kind: vanilla, gated or rnn. `rank` is the size of a token's entry, and of the RNN's memory."""

    def __init__(self, details: BlockDetails, weights: Weights) -> None:
        name = f"{details.logits_prefix}markov_head"
        self._kind = details.markov
        self.rank = details.markov_rank
        self._entries = weights.take(f"{name}.markov_w1.weight")
        self._output = weights.linear(f"{name}.markov_w2")
        self._gate = weights.linear(f"{name}.gate_proj") if self._kind == "gated" else None
        self._joint = weights.linear(f"{name}.joint_proj") if self._kind == "rnn" else None

    def entries(self, tokens: mx.array) -> mx.array:
        """[N, rank] of the tokens before N slots."""
        return self._entries[tokens]

    def bias(self, entries: mx.array, hidden: mx.array, memory: mx.array | None) -> tuple[mx.array, mx.array | None]:
        """([N, draft vocabulary] to add, [N, rank] the memory behind these slots). hidden: [N, hidden] of the slots;
        memory: [N, rank] before them, None at the anchor or where there is none."""
        if self._gate is not None:
            gate = mx.sigmoid(self._gate(mx.concatenate([hidden, entries], axis=-1)))
            return self._output(gate * entries), None
        if self._joint is not None:
            memory = mx.zeros_like(entries) if memory is None else memory
            joined = self._joint(mx.concatenate([memory, entries, hidden], axis=-1))
            gate, candidate, output = mx.split(joined, 3, axis=-1)
            gate = mx.sigmoid(gate)
            return self._output(mx.tanh(output)), gate * memory + (1.0 - gate) * mx.tanh(candidate)
        return self._output(entries), None
