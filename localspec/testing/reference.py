"""The definition: a small transformer in numpy that does what the contract says and nothing clever.

Every row is computed alone, in float64, over an explicit list of the cells it may see. So rows do not
depend on what else is in the pass, and any other backend can be compared with this reading of the
contract. Weights are random; `perturbed` gives a drafter that mostly agrees with its target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from localspec.errors import BackendError, ContextFullError
from localspec.host_scores import HostScores
from localspec.protocols import Capabilities, ModelInfo, Rewind, Scores, Step, WidthClass
from localspec.tree.mask import check_path, depths
from localspec.types import NodeIndices, TokenIds

Array = NDArray[np.float64]

HIDDEN, HEADS, HEAD_DIM, LAYERS = 32, 2, 16, 2


@dataclass(frozen=True, slots=True)
class Cell:
    """One token's keys and values, [1, LAYERS, HEADS, HEAD_DIM] each, and its features: the embedding's output,
    then each layer's [LAYERS + 1, HIDDEN]."""

    token: int
    keys: Array
    values: Array
    features: Array


class Companion(Protocol):
    """What goes along with a sequence and sees the features of what is committed to it: a head's part."""

    def feed(self, cells: Sequence[Cell]) -> None:
        """These were committed."""
        ...

    def truncate(self, length: int) -> None:
        """So many committed tokens are left."""
        ...

    def copied(self, state: ReferenceState) -> Companion:
        """An independent copy for a copy of the sequence."""
        ...


class ByteTokenizer:
    """Token v is the byte v; the highest token ends an answer. For vocabularies of 3 to 257 tokens."""

    chat_template: str | None = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    bos: int | None = None

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.stop_tokens = frozenset({num_tokens - 1})
        self.template_tokens: Mapping[str, str] = {"eos_token": "\0"}

    def encode(self, text: str, *, special: bool) -> TokenIds:
        """[T] the UTF-8 bytes, folded into the vocabulary; NUL is the stop token if `special`."""
        stop = self.num_tokens - 1
        raw = text.encode()
        return np.array([stop if special and b == 0 else b % stop for b in raw], np.int32)

    def token_bytes(self, token: int) -> bytes:
        """The byte, or NUL for the stop token."""
        return b"\0" if token == self.num_tokens - 1 else bytes([token])

    def is_special(self, token: int) -> bool:
        """Only the stop token is."""
        return token == self.num_tokens - 1


class ReferenceState:
    """Committed cells in order, then pending cells with their parents."""

    def __init__(self, model: ReferenceModel) -> None:
        self.model = model
        self.committed: list[Cell] = []
        self.pending: list[Cell] = []
        self.parents: list[int] = []
        self.companions: list[Companion] = []
        self.closed = False

    @property
    def length(self) -> int:
        """Number of committed tokens."""
        return len(self.committed)

    @property
    def num_pending(self) -> int:
        """Number of pending nodes."""
        return len(self.pending)

    @property
    def num_replayed(self) -> int:
        """Rewinding is free here."""
        return 0

    def check_open(self) -> None:
        """Raise ValueError once closed."""
        if self.closed:
            raise ValueError("this state is closed")

    def keep(self, path: Sequence[int]) -> None:
        """Commit one path of pending nodes, drop the rest."""
        self.check_open()
        check_path(np.array(self.parents, np.int32), list(path))
        kept = [self.pending[node] for node in path]
        self.committed += kept
        self.pending, self.parents = [], []
        for companion in self.companions:
            companion.feed(kept)

    def truncate(self, length: int) -> None:
        """Drop what is pending and everything from `length` on."""
        self.check_open()
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} tokens to {length}")
        self.pending, self.parents = [], []
        del self.committed[length:]
        for companion in self.companions:
            companion.truncate(length)

    def wait(self) -> None:
        """Passes are run at once."""
        self.check_open()

    def fork(self) -> ReferenceState:
        """A copy of the committed cells."""
        self.check_open()
        if self.pending:
            raise ValueError("cannot fork while nodes are pending")
        return self.save().open()

    def save(self) -> ReferenceSaved:
        """A copy of the committed cells, outside."""
        self.check_open()
        if self.pending:
            raise ValueError("cannot save while nodes are pending")
        apart = ReferenceState(self.model)
        apart.committed = list(self.committed)
        apart.companions = [companion.copied(apart) for companion in self.companions]
        return ReferenceSaved(apart)

    def close(self) -> None:
        """Forget everything."""
        if not self.closed:
            self.closed = True
            self.model.num_open -= 1
            self.committed, self.pending, self.parents, self.companions = [], [], [], []


@dataclass(frozen=True, slots=True)
class ReferenceSaved:
    """Cells that a state had committed, in a state that is not among the open ones."""

    state: ReferenceState

    @property
    def num_bytes(self) -> int:
        """Of keys and values."""
        return sum(cell.keys.nbytes + cell.values.nbytes for cell in self.state.committed)

    def open(self) -> ReferenceState:
        """A new sequence with these cells, and what goes along with them."""
        state = self.state.model.open()
        state.committed = list(self.state.committed)
        state.companions = [companion.copied(state) for companion in self.state.companions]
        return state


class ReferenceModel:
    """A `LanguageModel` of LAYERS layers with rotary positions and random weights.

    vocab_size: V.  seed: of the weights.  sharpness: larger makes rows more certain.
    width_class: pretended, so that padding can be tested where it changes nothing.
    """

    def __init__(
        self,
        vocab_size: int = 64,
        *,
        seed: int = 0,
        sharpness: float = 4.0,
        context_length: int = 512,
        width_class: WidthClass | None = None,
        host_scores: bool = True,
    ) -> None:
        rng = np.random.default_rng(seed)

        def matrix(*shape: int) -> Array:
            return np.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]))

        self.vocab_size = vocab_size
        self.embedding = rng.normal(size=(vocab_size, HIDDEN))
        width = HEADS * HEAD_DIM
        self.query, self.key, self.value = (matrix(LAYERS, width, HIDDEN) for _ in range(3))
        self.output = matrix(LAYERS, HIDDEN, width)
        self.up, self.down = matrix(LAYERS, 2 * HIDDEN, HIDDEN), matrix(LAYERS, HIDDEN, 2 * HIDDEN)
        self.head = matrix(vocab_size, HIDDEN) * sharpness
        self.frequencies = 100.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
        self.tokenizer = ByteTokenizer(vocab_size)
        self.num_open = 0
        self.generation = [0]
        self.capabilities = Capabilities(
            rewind=Rewind.FREE,
            trees=True,
            max_width=4096,
            num_sequences=16,
            width_class=width_class or WidthClass(1, None, "every row is computed alone"),
            host_scores=host_scores,
        )
        self.info = ModelInfo(
            name="reference",
            path=Path("reference"),
            architecture="reference",
            quantization="F64",
            num_parameters=self.embedding.size + self.head.size,
            context_length=context_length,
            trained_context_length=context_length,
            device="numpy",
            backend="reference",
        )

    def perturbed(self, amount: float, seed: int = 1) -> ReferenceModel:
        """A drafter: the same weights, the head disturbed by `amount` of its own size."""
        other = ReferenceModel(self.vocab_size, context_length=self.info.context_length)
        for name in ("embedding", "query", "key", "value", "output", "up", "down"):
            setattr(other, name, getattr(self, name))
        noise = np.random.default_rng(seed).normal(size=self.head.shape)
        other.head = self.head + amount * float(self.head.std()) * noise
        return other

    def open(self) -> ReferenceState:
        """A new, empty sequence."""
        if self.num_open >= self.capabilities.num_sequences:
            raise BackendError(
                "too many open sequences", got=self.num_open + 1, expected=self.capabilities.num_sequences
            )
        self.num_open += 1
        return ReferenceState(self)

    def close(self) -> None:
        """Nothing to give back."""

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        """Each new token alone, in order."""
        for step in steps:
            state = self._own(step.state)
            room = self.info.context_length - state.length - state.num_pending
            if step.num_tokens > room:
                raise ContextFullError("context full", got=step.num_tokens, expected=f"at most {room} more tokens")
        self.generation[0] += 1
        return [self.run(self._own(step.state), step) for step in steps]

    def _own(self, state: object) -> ReferenceState:
        assert isinstance(state, ReferenceState) and state.model is self
        state.check_open()
        return state

    def run(self, state: ReferenceState, step: Step) -> Scores:
        """One step: each token alone, in order."""
        ids = [int(token) for segment in step.tokens for token in segment.numpy()]
        wanted = range(step.num_tokens) if step.rows is None else step.rows
        rows = np.zeros((len(wanted), self.vocab_size), np.float32)
        for index, (token, parent) in enumerate(zip(ids, step.parents.tolist(), strict=True)):
            state.parents.append(parent)
            hidden, cell = self.compute(token, self.position(state), self.visible(state))
            state.pending.append(cell)
            if index in wanted:
                rows[list(wanted).index(index)] = self.head @ normed(hidden)
        return HostScores(rows, self.generation)

    def position(self, state: ReferenceState) -> int:
        """Where the newest node stands."""
        return state.length + int(depths(np.array(state.parents, np.int32))[-1])

    def visible(self, state: ReferenceState) -> list[Cell]:
        """The cells that the newest node sees, itself excluded: committed ones, then its ancestors."""
        ancestors: list[Cell] = []
        node = state.parents[-1]
        while node >= 0:
            ancestors.append(state.pending[node])
            node = state.parents[node]
        return state.committed + ancestors[::-1]

    def compute(self, token: int, position: int, cells: list[Cell]) -> tuple[Array, Cell]:
        """(hidden [HIDDEN], own cell) of one token."""
        hidden = self.embedding[token].copy()
        shape = (1, LAYERS, HEADS, HEAD_DIM)
        own = Cell(token, np.zeros(shape), np.zeros(shape), np.zeros((LAYERS + 1, HIDDEN)))
        own.features[0] = hidden
        keys = np.concatenate([*(cell.keys for cell in cells), own.keys])
        values = np.concatenate([*(cell.values for cell in cells), own.values])
        angle = position * self.frequencies
        cos, sin = np.cos(angle), np.sin(angle)
        for layer in range(LAYERS):
            x = normed(hidden)
            query, key, value = (
                (weights[layer] @ x).reshape(HEADS, HEAD_DIM) for weights in (self.query, self.key, self.value)
            )
            query = _rotated(query, cos, sin)
            own.keys[0, layer] = keys[-1, layer] = _rotated(key, cos, sin)
            own.values[0, layer] = values[-1, layer] = value
            weights = np.einsum("hd,thd->ht", query, keys[:, layer]) / np.sqrt(HEAD_DIM)
            weights = np.exp(weights - weights.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            hidden = hidden + self.output[layer] @ np.einsum("ht,thd->hd", weights, values[:, layer]).reshape(-1)
            hidden = hidden + self.down[layer] @ np.tanh(self.up[layer] @ normed(hidden))
            own.features[layer + 1] = hidden
        return hidden, own


def _rotated(x: Array, cos: Array, sin: Array) -> Array:
    first, second = x[:, : HEAD_DIM // 2], x[:, HEAD_DIM // 2 :]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=1)


def normed(x: Array) -> Array:
    """Of length one per dimension."""
    return np.asarray(x / np.sqrt(np.add.reduce(x * x) / len(x) + 1e-6))


def random_tree(rng: np.random.Generator, num_nodes: int) -> NodeIndices:
    """[N] parents of a random tree, chains and bushes alike."""
    return np.array([int(rng.integers(max(-1, node - 4), node)) for node in range(num_nodes)], np.int32)
