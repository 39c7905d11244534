"""Passes of random tokens through a model, by its contract alone: what measuring times and compares.

Random tokens, not one repeated: experts, caches and sparse layers would otherwise see a load that no text makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np

from localspec.protocols import HostTokens, LanguageModel, Rewind, Scores, SequenceState, Step, chain_parents
from localspec.types import Logits, TokenIds

_FIRST_CHUNK, _CHUNK = 64, 256  # the first one tells what the others will take

Clock = Callable[[], float]
"""Seconds, from any start."""


class Passes:
    """One sequence of a model that is made longer and passed over. Close it, or use it with `with`."""

    def __init__(self, model: LanguageModel, seed: int = 0, clock: Clock = perf_counter) -> None:
        self.model = model
        self._rng = np.random.default_rng(seed)
        self._clock = clock
        self._state = model.open()

    @property
    def state(self) -> SequenceState:
        """The sequence."""
        return self._state

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self._state.length

    def grow(self, length: int, until: float = float("inf")) -> bool:
        """Commit random tokens up to `length`. Stops, with False, where the rest would take beyond `until`."""
        first, started = self.length, self._clock()
        while self.length < length:
            now, done = self._clock(), self.length - first
            if now + (now - started) / max(done, 1) * (length - self.length) > until:
                return False
            ids = self.random(min(_CHUNK if done else _FIRST_CHUNK, length - self.length))
            _fetch(self.model, self._forward(ids, (len(ids) - 1,)))  # a lazy device has done it then
            self._state.keep(range(len(ids)))
        return True

    def time(self, width: int) -> float:
        """Milliseconds of a pass over `width` tokens, all rows scored, until a best token is on the host.
        Afterwards the sequence is as before (one token longer where tokens cannot be taken back)."""
        ids = self.random(width)
        started = self._clock()
        _fetch(self.model, self._forward(ids, None))
        elapsed = self._clock() - started
        self._state.keep((0,) if self.model.capabilities.rewind is Rewind.NEVER else ())
        return max(elapsed * 1e3, 1e-6)  # a coarse clock may not have moved

    def walk(self, ids: TokenIds, width: int, look: Callable[[int, Scores], None]) -> None:
        """Decode [T] tokens in passes of `width`, each committed (a rest that is narrower is left out), and take
        them back. look: called with the place of a pass's first token in `ids` and its scores."""
        start = self.length
        for place in range(0, len(ids) - width + 1, width):
            scores = self._forward(ids[place : place + width], None)
            look(place, scores)
            self._state.keep(range(width))
        self._state.truncate(start)

    def walk_trees(self, ids: TokenIds, width: int, look: Callable[[int, Scores], None]) -> None:
        """As `walk`, in passes of which every second node is a guess that is dropped again: half as many tokens each.
        The rows shown are those of `ids`."""
        start, step = self.length, width // 2
        for place in range(0, len(ids) - step + 1, step):
            nodes = np.stack([ids[place : place + step], self.random(step)], axis=1).reshape(-1)
            above = np.arange(-2, 2 * step - 2, 2, dtype=np.int32)
            parents = np.maximum(np.repeat(above, 2), -1)
            chosen = tuple(range(0, 2 * step, 2))
            [scores] = self.model.forward([Step(self._state, (HostTokens(nodes),), parents, chosen)])
            look(place, scores)
            self._state.keep(chosen)
        self._state.truncate(start)

    def write(self, count: int, rng: np.random.Generator) -> tuple[TokenIds, Logits]:
        """([count] tokens, [count, V] the rows behind them) of a text that the model writes at width 1 and temperature
        1, the first token a random one; taken back."""
        start, token = self.length, self.random(1)
        ids, rows = [], []
        for _ in range(count):
            scores = self._forward(token, None)
            rows.append(np.array(scores.rows((0,))[0]))
            self._state.keep((0,))
            ids.append(token)
            best = int((rows[-1] + rng.gumbel(size=len(rows[-1])))[: self.model.tokenizer.num_tokens].argmax())
            token = np.array([best], np.int32)
        self._state.truncate(start)
        return np.concatenate(ids), np.stack(rows)

    def truncate(self, length: int) -> None:
        """Drop committed tokens from `length` on."""
        self._state.truncate(length)

    def random(self, count: int) -> TokenIds:
        """[count] random ids."""
        return self._rng.integers(0, self.model.tokenizer.num_tokens, count, dtype=np.int32)

    def close(self) -> None:
        """Give the sequence back."""
        self._state.close()

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forward(self, ids: TokenIds, rows: Sequence[int] | None) -> Scores:
        wanted = None if rows is None else tuple(rows)
        [scores] = self.model.forward(
            [Step(self._state, (HostTokens(ids),), chain_parents(self._state, len(ids)), wanted)]
        )
        return scores


def _fetch(model: LanguageModel, scores: Scores) -> None:
    """What a round reads at least: every row's best token where the device decides, else one row, for the walk
    reads rows in host memory only as far as guesses are right."""
    if model.capabilities.host_scores:
        scores.rows((0,)).argmax()
    else:
        scores.argmax().numpy()
