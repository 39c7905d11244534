"""`Scores` over logits in host memory: what every backend answers with whose logits lie there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from localspec.errors import StaleScoresError
from localspec.protocols import HostTokens
from localspec.ranking import gumbel_argmax, row_top
from localspec.types import Logits, NoiseKeys, TokenIds


@dataclass(frozen=True, slots=True)
class HostTop:
    """`Top` on the host: ids and values [N, k]."""

    ids: TokenIds
    values: Logits

    @property
    def tokens(self) -> HostTokens:
        """[N * k] row by row."""
        return HostTokens(self.ids.reshape(-1))

    def numpy(self) -> tuple[TokenIds, Logits]:
        """Ids and values."""
        return self.ids, self.values


class HostScores:
    """The scores of one step, [N, V].

    logits: or what fetches them, once, when they are first read: a pass on a device may still run until then, with
    num_rows for how many there will be.
    `generation` is a one-element list that the model increments per forward: the buffer behind
    `logits` is its, and is overwritten then.
    """

    __slots__ = ("_born", "_fetch", "_generation", "_logits", "num_rows")

    def __init__(
        self, logits: Logits | Callable[[], Logits], generation: list[int] | None = None, *, num_rows: int | None = None
    ) -> None:
        self._logits = None if callable(logits) else logits
        self._fetch = logits if callable(logits) else None
        if num_rows is None:
            if callable(logits):
                raise ValueError("rows that are yet to be fetched need their number: num_rows")
            num_rows = len(logits)
        self.num_rows = num_rows
        """N."""
        self._generation = generation if generation is not None else [0]
        self._born = self._generation[0]

    def _fresh(self) -> Logits:
        if self._generation[0] != self._born:
            raise StaleScoresError(
                "scores were read after the model's next forward pass",
                fix="Read what is needed before calling forward again.",
            )
        if self._logits is None:
            assert self._fetch is not None
            self._logits = self._fetch()
        return self._logits

    def argmax(self) -> HostTokens:
        """[N] best token of each row."""
        return HostTokens(self._fresh().argmax(axis=1).astype(np.int32))

    def winners(self, temperature: float, keys: NoiseKeys) -> HostTokens:
        """[N] sampled token of each row."""
        rows = self._fresh()
        chosen = [gumbel_argmax(row, temperature, (int(k[0]), int(k[1]))) for row, k in zip(rows, keys, strict=True)]
        return HostTokens(np.array(chosen, np.int32))

    def top(self, k: int, temperature: float = 0.0, keys: NoiseKeys | None = None) -> HostTop:
        """The k best tokens of each row, best first, ties by lower id."""
        rows = self._fresh()
        k = min(k, rows.shape[1])
        tops = [
            row_top(row, k, temperature, None if keys is None else (int(keys[i, 0]), int(keys[i, 1])))
            for i, row in enumerate(rows)
        ]
        return HostTop(
            np.array([ids for ids, _ in tops], np.int32).reshape(len(rows), k),
            np.array([values for _, values in tops], np.float32).reshape(len(rows), k),
        )

    def rows(self, indices: Sequence[int]) -> Logits:
        """[len(indices), V]; a view where one row is asked."""
        rows = self._fresh()
        return rows[indices[0] : indices[0] + 1] if len(indices) == 1 else rows[list(indices)]
