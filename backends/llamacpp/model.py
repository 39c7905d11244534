"""A GGUF model behind the contract: what `forward` does with steps, plans and passes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from localspec.errors import BackendError, ContextFullError
from localspec.host_scores import HostScores
from localspec.protocols import Capabilities, HostTokens, ModelInfo, Scores, Step, chain_parents
from localspec.types import Logits, TokenIds

from . import native
from .memory import Memory, Pass, Rows, State
from .native import Context
from .state import LlamaState
from .streams import SLACK, joined
from .tokenizer import LlamaTokenizer
from .weights import Weights

_MOST_SCORED = 64  # tokens of a pass all of whose rows are computed though some are wanted; wider ones read prompts


class LlamaModel:
    """`LanguageModel` over llama.cpp. Owns the weights and all contexts."""

    def __init__(self, weights: Weights, memory: Memory, info: ModelInfo, capabilities: Capabilities) -> None:
        self.weights, self.memory = weights, memory
        self.info, self.capabilities = info, capabilities
        self.vocab_size = weights.vocab_size
        self.tokenizer = LlamaTokenizer(weights)
        self._closed = False
        self._generation = [0]
        self._min_outputs = capabilities.width_class.min_width
        # a GPU's kernels change with the rows of the last layer, too, and what was built for a pass can be used
        # again only for one that scores as many
        self._scores_all = int(dict(info.options).get("gpu_layers", 0)) > 0

    def open(self) -> State:
        """A new, empty sequence. Raises BackendError when all are in use."""
        if self._closed:
            raise ValueError("this model is closed")
        return self.memory.open()

    def settle_taps(self) -> None:
        """Keep hidden states in every pass where that changes rows: what is marked for the host cannot be computed
        together with what follows it. Elsewhere only while a head listens. For a model without open sequences."""
        state = self.open()
        try:
            count = min(max(self.capabilities.width_class.min_width, 2), self.info.context_length)
            step = Step(state, (HostTokens(np.arange(count, dtype=np.int32)),), chain_parents(state, count))
            rows = []
            for always in (False, True):
                self.memory.always_listen(always)
                [scores] = self.forward([step])
                rows.append(scores.rows(range(count)).copy())
                state.truncate(0)
            self.memory.always_listen(not np.array_equal(rows[0], rows[1]))
        finally:
            state.close()

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        """Run the steps: as one pass where sequences are streams of one context, else each in its own.

        Raises ContextFullError if a sequence would outgrow the context, BackendError if llama.cpp
        fails, ValueError for steps that break the contract; in each case no step has happened.
        """
        states = [self._own(step) for step in steps]
        if len(states) > 1 and len({id(state) for state in states}) < len(states):
            raise ValueError("a state may have one step per forward")
        try:
            for state, step in zip(states, steps, strict=True):
                tokens, outputs = _gathered(step)
                state.plan(tokens, step.parents, outputs)
            self._generation[0] += 1
            if self.capabilities.batches and _are_alike([step.num_tokens for step in steps]):
                rows = self._in_one_pass(states)
            else:
                rows = [state.run(partial(self._in_one_context, state.cache.context)) for state in states]
        except BaseException:
            for state in states:
                state.undo()
            raise
        for state in states:
            state.commit()
        return [HostScores(part.fetch, self._generation, num_rows=part.count) for part in rows]

    def _own(self, step: Step) -> State:
        """The step's state, checked. Raises ContextFullError, ValueError."""
        state = step.state
        if not isinstance(state, State) or state.cache.memory is not self.memory:
            raise ValueError("this state belongs to another model")
        state.check_open()
        room = self.info.context_length - state.length - state.num_pending
        if step.num_tokens > room:
            raise ContextFullError(
                "the context is full",
                got=f"{step.num_tokens} more tokens",
                expected=f"at most {room} of {self.info.context_length}",
                fix="Load the model with a larger context, or start a new conversation.",
            )
        return state

    # ------------------------------------------------------------ one pass

    def _in_one_pass(self, states: Sequence[State]) -> list[Rows]:
        """Per state [N, V] its scored rows, of a pass in which each is as wide as the widest."""
        streams = [state for state in states if isinstance(state, LlamaState)]
        context, count = streams[0].cache.context, len(streams)
        whole, places = joined(streams, self.capabilities.width_class.min_width)
        width = len(whole.tokens) // count
        columns = np.arange(len(whole.tokens)).reshape(count, width)
        num_parts = -(-width * count // min(context.max_batch, context.max_outputs))
        cuts = [width * part // num_parts for part in range(num_parts + 1)]
        number = np.cumsum(whole.outputs) - 1  # of a token's row
        rows: Logits | None = None if num_parts == 1 else np.zeros((int(number[-1]) + 1, self.vocab_size), np.float32)
        for start, end in pairwise(cuts):
            chosen = columns[:, start:end].reshape(-1)
            part = whole.part(chosen)
            found = self._decode(context, part).fetch()
            if whole.features is not None and part.features is not None:
                whole.features[chosen] = part.features
            if rows is None:
                rows = found
            else:
                rows[number[chosen[whole.outputs[chosen] == 1]]] = found
        for state, place in zip(streams, places, strict=True):
            state.drop_padding()
            if state.recording is not None and whole.features is not None:
                state.recording.fill(whole.features[place])
        assert rows is not None
        return [
            _ready(rows[number[place[0]] + 1 - whole.outputs[place[0]] : number[place[-1]] + 1]) for place in places
        ]

    def _in_one_context(self, context: Context, whole: Pass) -> Rows:
        """[N, V] scored rows of a pass, cut into as many decodes as it takes."""
        cuts = _cuts(whole.outputs, context.longest, self.capabilities.max_width)
        if len(cuts) == 1:
            return self._decode(context, whole.part(slice(*cuts[0])))
        parts = [self._decode(context, whole.part(slice(start, end))).fetch().copy() for start, end in cuts]
        return _ready(np.concatenate([np.zeros((0, self.vocab_size), np.float32), *parts]))

    def _decode(self, context: Context, part: Pass) -> Rows:
        """[N, V] scored rows of one decode. On a device it may still run: llama.cpp waits when its output is read."""
        outputs = part.outputs
        count = int(np.count_nonzero(outputs))
        wanted = None
        # one token of which no row is wanted, too: a draft model reads such between its guesses, and all shall be alike
        if self._scores_all and count < len(outputs) <= (_MOST_SCORED if count else 1):
            wanted, outputs, count = outputs.nonzero()[0], np.ones_like(outputs), len(outputs)
        extra = self._widen(outputs) if count == 1 else None
        native.forget_errors()
        context.listen(part.features is not None)
        code = context.decode(part.tokens, part.positions, part.ids, outputs)
        if code:
            if not np.all((part.tokens >= 0) & (part.tokens < self.vocab_size)):  # looked at only once it failed
                raise ValueError(f"token ids outside 0 to {self.vocab_size - 1}")
            raise BackendError(
                f"llama.cpp could not run the pass: {native.quoted(native.complaints())}", got=f"code {code}"
            )
        if part.features is not None:
            context.fill_later(part.features)
        if wanted is not None:
            prefix = not len(wanted) or int(wanted[-1]) + 1 == len(wanted)  # padding stands behind: no need to copy
            chosen = slice(len(wanted)) if prefix else wanted
            return Rows(len(wanted), lambda: context.logits(count)[chosen])
        if extra is None:
            return Rows(count, lambda: context.logits(count))
        return Rows(1, lambda: context.logits(2)[1 - extra : 2 - extra])

    def _widen(self, outputs: NDArray[np.int8]) -> int | None:
        """Score a second token where only one is wanted; 1 if it comes after that one, 0 if before.

        The last layer runs on scored tokens only: a single one would leave the width class there,
        however wide the pass is.
        """
        if self._min_outputs < 2 or len(outputs) < 2:
            return None
        only = int(outputs.argmax())
        comes_after = only + 1 < len(outputs)
        outputs[only + 1 if comes_after else only - 1] = 1
        return int(comes_after)

    def close(self) -> None:
        """Free context and weights. Twice does nothing."""
        self._closed = True
        self._generation[0] += 1
        self.memory.close()
        self.weights.close()


def _ready(logits: Logits) -> Rows:
    """Rows that have been read."""
    return Rows(len(logits), lambda: logits)


def _gathered(step: Step) -> tuple[TokenIds, NDArray[np.int8]]:
    """[T] tokens of a step, and 1 for those whose rows are wanted. Raises ValueError for misfits."""
    segments = [segment.numpy() for segment in step.tokens]
    tokens = segments[0] if len(segments) == 1 else np.concatenate([np.zeros(0, np.int32), *segments])
    if len(tokens) != step.num_tokens:
        raise ValueError(f"a step has {len(tokens)} tokens but {step.num_tokens} parents")
    if step.rows is None:
        return tokens, np.ones(step.num_tokens, np.int8)
    rows = list(step.rows)
    if rows and (rows[0] < 0 or rows[-1] >= step.num_tokens or rows != sorted(set(rows))):
        raise ValueError(f"rows {step.rows} of {step.num_tokens} tokens: not ascending, or out of range")
    outputs = np.zeros(step.num_tokens, np.int8)
    outputs[rows] = 1
    return tokens, outputs


def _are_alike(widths: Sequence[int]) -> bool:
    """Do several steps go well into one pass, in which each is as wide as the widest?"""
    return len(widths) > 1 and min(widths) > 0 and max(widths) - min(widths) < SLACK


def _cuts(outputs: NDArray[np.int8], max_batch: int, max_outputs: int) -> list[tuple[int, int]]:
    """(start, end) of the decodes that make up a pass: as few as possible and of equal size, for a
    short last one could fall out of the width class."""
    total = len(outputs)
    largest = max_batch if int(outputs.sum()) <= max_outputs else min(max_batch, max_outputs)
    if total <= largest:
        return [(0, total)] if total else []
    count = -(-total // largest)
    return [(total * part // count, total * (part + 1) // count) for part in range(count)]
