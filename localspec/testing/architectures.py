"""Is a model's every row right, and is its memory right after whatever was dropped?

    finding = examine("qwen3_next", lambda: open_it())
    print(table([finding]))

For random weights of any architecture, on any backend: contract only. Text proves little here, since
random weights write nonsense; so rows are compared, and a model whose rows would not notice a lost or a
doubled token is called a failure, because nothing could be proved with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from localspec.engine.width import pad
from localspec.errors import UnsupportedModelError
from localspec.protocols import HostTokens, LanguageModel, Rewind, SequenceState, Step, chain_parents
from localspec.testing.reference import random_tree
from localspec.tree.token_tree import TokenTree
from localspec.types import Logits, NodeIndices

TOLERANCE = 1e-3
"""Largest allowed difference of two logits, in standard deviations of the row. Rounding in float32 stays
below 1e-4 of one; what a lost, doubled or wrong token does must be seen at SENSITIVITY first."""

SENSITIVITY = 10.0
"""A wrong token must move a row by this many tolerances, or the model is too dull to be examined."""

_PREFIX = 13  # tokens before the rows that are compared: longer than the windows of tiny models
_CHECK_EVERY = 5  # rounds between two comparisons with a fresh prefill


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one architecture.

    kind: "tree" (rows of any tree and the memory after any path are right), "chain" (the same of chains),
    "refused" (the backend will not open it) or "failed".  reason: why not "tree".  worst: largest difference
    seen, in standard deviations of the row.  num_rounds: random rounds survived.  num_replayed: tokens run
    again in them because others were dropped.
    """

    name: str
    kind: str
    reason: str = ""
    worst: float = 0.0
    num_rounds: int = 0
    num_replayed: int = 0


class MismatchError(AssertionError):
    """Two rows that should be equal are not."""


def examine(
    name: str,
    open_model: Callable[[], LanguageModel],
    *,
    num_rounds: int = 200,
    seed: int = 0,
    max_length: int = 60,
    tolerance: float = TOLERANCE,
    own_rows: Callable[[Sequence[int]], Logits] | None = None,
) -> Finding:
    """Open a model, judge it and close it. Whatever it raises becomes "failed", with the message.

    own_rows: ids [T] to the rows [T, V] that the runtime gives without this backend, to compare with.
    max_length: the committed tokens stay below it; longer than any window or chunk of the model, please.
    tolerance: in standard deviations of a row; TOLERANCE is right for float32.
    """
    try:
        model = open_model()
    except UnsupportedModelError as error:
        return Finding(name, "refused", str(error))
    except Exception as error:  # one architecture must not end the examination of the others
        return Finding(name, "failed", f"does not open: {type(error).__name__}: {error}")
    if model.capabilities.rewind is Rewind.NEVER:
        model.close()
        return Finding(name, "refused", "; ".join(model.capabilities.limits) or "takes no token back")
    examination = _Examination(model, np.random.default_rng(seed), max_length, tolerance)
    kind, reason = "chain", "; ".join(model.capabilities.limits)
    if model.capabilities.trees and model.capabilities.exact_trees:
        kind = "tree"
    try:
        examination.check_sensitivity()
        examination.check_rows()
        if own_rows is not None:
            examination.check_own_rows(own_rows)
        examination.check_rounds(num_rounds)
    except Exception as error:
        label = "" if isinstance(error, MismatchError) else f"{type(error).__name__}: "
        kind, reason = "failed", f"{label}{error}"
    finally:
        model.close()
    return Finding(name, kind, reason, examination.worst, examination.num_rounds, examination.num_replayed)


def table(findings: Iterable[Finding]) -> str:
    """A Markdown table, one line per architecture."""
    lines = [
        "| architecture | kind | largest difference (std of the row) | rounds | tokens replayed | why |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for found in findings:
        worst = f"{found.worst:.1e}" if found.num_rounds or found.worst else ""
        numbers = [str(number) if number else "" for number in (found.num_rounds, found.num_replayed)]
        reason = " ".join(found.reason.split()).replace("|", "\\|")
        lines.append(f"| {found.name} | {found.kind} | {worst} | {numbers[0]} | {numbers[1]} | {reason} |")
    return "\n".join(lines) + "\n"


class _Examination:
    """The checks of one model, and what they saw."""

    def __init__(self, model: LanguageModel, rng: np.random.Generator, max_length: int, tolerance: float) -> None:
        self._model = model
        self._rng = rng
        self._max_length = min(max_length, model.info.context_length - 16)
        self._tolerance = tolerance
        self.worst = 0.0
        self.num_rounds = 0
        self.num_replayed = 0

    # ------------------------------------------------------------ helpers

    def _tokens(self, count: int) -> list[int]:
        return [int(t) for t in self._rng.integers(0, self._model.tokenizer.num_tokens, count)]

    def _run(
        self, state: SequenceState, ids: Sequence[int], parents: NodeIndices, rows: tuple[int, ...] | None = None
    ) -> Logits:
        step = Step(state, (HostTokens(np.array(ids, np.int32)),), parents, rows)
        [scores] = self._model.forward([pad(step, self._model.capabilities.width_class)])
        return scores.rows(range(scores.num_rows)).copy()

    def _commit(self, state: SequenceState, ids: Sequence[int]) -> None:
        if ids:
            self._run(state, ids, chain_parents(state, len(ids)), ())
            state.keep(range(len(ids)))

    def _close(self, state: SequenceState) -> None:
        self.num_replayed += state.num_replayed
        state.close()

    def _row(self, ids: Sequence[int]) -> Logits:
        """[V] the row after a fresh prefill of all but the last token."""
        state = self._model.open()
        try:
            self._commit(state, ids[:-1])
            return np.asarray(self._run(state, ids[-1:], chain_parents(state, 1), (0,))[0])
        finally:
            state.close()

    def _one_by_one(self, prefix: Sequence[int], ids: Sequence[int]) -> Logits:
        """[T, V] the rows of `ids`, decoded one at a time behind `prefix`."""
        state = self._model.open()
        try:
            self._commit(state, prefix)
            rows = []
            for token in ids:
                rows.append(self._run(state, [token], chain_parents(state, 1), (0,))[0])
                state.keep((0,))
            return np.array(rows)
        finally:
            state.close()

    def _compare(self, got: Logits, want: Logits, what: str) -> None:
        difference = distance(got, want)
        self.worst = max(self.worst, difference)
        if not difference <= self._tolerance:
            raise MismatchError(f"{what}: rows differ by {difference:.2g} standard deviations")

    # ------------------------------------------------------------ checks

    def check_sensitivity(self) -> None:
        """Would a wrong token be noticed? A lost, a doubled and a changed one, near and some way back.

        Each at two lengths, of which the better counts: behind the border of a chunk nothing is seen.
        """
        seen = {"a lost token": 0.0, "a doubled token": 0.0, "a token changed": 0.0, "one changed four back": 0.0}
        for length in (_PREFIX + 5, _PREFIX + 10):
            ids = self._tokens(length)
            right = self._row(ids)
            other = (ids[-2] + 1 + int(self._rng.integers(0, 3))) % self._model.tokenizer.num_tokens
            wrong = {
                "a lost token": [*ids[:-2], ids[-1]],
                "a doubled token": [*ids[:-1], ids[-2], ids[-1]],
                "a token changed": [*ids[:-2], other, ids[-1]],
                "one changed four back": [*ids[:-5], (ids[-5] + 1) % self._model.tokenizer.num_tokens, *ids[-4:]],
            }
            for fault, tokens in wrong.items():
                seen[fault] = max(seen[fault], distance(self._row(tokens), right))
        for fault, difference in seen.items():
            if not difference > SENSITIVITY * self._tolerance:
                raise MismatchError(f"proves nothing: {fault} moves a row by {difference:.2g} standard deviations only")

    def check_rows(self) -> None:
        """Rows of chains, of chains grown in two passes, and of trees are those of one-by-one decoding."""
        prefix = self._tokens(_PREFIX)
        state = self._model.open()
        try:
            self._commit(state, prefix)
            for size in (1, 2, 3, 5, 9):
                ids = self._tokens(size)
                want = self._one_by_one(prefix, ids)
                self._compare(self._run(state, ids, chain_parents(state, size)), want, f"chain of {size}")
                state.keep(())
                self._compare(self._grown(state, ids), want, f"chain of {size} in parts")
                state.keep(())
            if self._model.capabilities.trees:
                for size in (3, 6, 10):
                    self._check_tree(state, prefix, random_tree(self._rng, size))
        finally:
            self._close(state)

    def _grown(self, state: SequenceState, ids: Sequence[int]) -> Logits:
        """[T, V] a chain's rows from several passes, none so narrow that padding would hang in between."""
        least = self._model.capabilities.width_class.min_width
        rows: list[Logits] = []
        while ids:
            count = least if len(ids) >= 2 * least else len(ids)
            rows.append(self._run(state, ids[:count], chain_parents(state, count)))
            ids = ids[count:]
        return np.concatenate(rows)

    def _check_tree(self, state: SequenceState, prefix: list[int], parents: NodeIndices) -> None:
        ids = self._tokens(len(parents))
        got = self._run(state, ids, parents)
        state.keep(())
        tree = TokenTree.from_parents(np.array(ids, np.int32), parents)
        for node in range(len(tree)):
            if not tree.children(node):
                path = tree.path(node)
                want = self._one_by_one(prefix, [ids[i] for i in path])
                self._compare(got[path], want, f"tree {parents.tolist()}, path {path}")

    def check_own_rows(self, own_rows: Callable[[Sequence[int]], Logits]) -> None:
        """The rows of a chain, prefilled and in one pass, are those of the runtime itself."""
        ids = self._tokens(self._max_length)
        state = self._model.open()
        try:
            half = self._max_length // 2
            self._commit(state, ids[:half])
            got = self._run(state, ids[half:], chain_parents(state, len(ids) - half))
            self._compare(got, own_rows(ids)[half:], "the runtime's own rows")
        finally:
            self._close(state)

    def check_rounds(self, num_rounds: int) -> None:
        """Propose, keep, truncate and fork at random; the state is that of a fresh prefill."""
        state, tokens = self._model.open(), list[int]()
        try:
            for turn in range(num_rounds):
                state = self._round(state, tokens)
                if turn % _CHECK_EVERY == _CHECK_EVERY - 1 or turn == num_rounds - 1:
                    self._check_future(state, tokens, f"round {turn}")
                self.num_rounds += 1
        finally:
            self._close(state)

    def _round(self, state: SequenceState, tokens: list[int]) -> SequenceState:
        """One random round; `tokens` are brought up to date. Returns the state to go on with."""
        self._propose_and_keep(state, tokens)
        action = int(self._rng.integers(0, 6))
        if len(tokens) > self._max_length - 8:
            action = int(self._rng.integers(0, 2))
        if action == 0:  # anywhere
            del tokens[int(self._rng.integers(0, len(tokens) + 1)) :]
            state.truncate(len(tokens))
        elif action == 1:  # a little, as a stop string does it, and with nodes pending
            self._run(state, self._tokens(2), chain_parents(state, 2), ())
            del tokens[max(0, len(tokens) - int(self._rng.integers(0, 5))) :]
            state.truncate(len(tokens))
        elif action == 2:  # the fork goes on, or the original does after the fork has written
            fork, other = state.fork(), list(tokens)
            if self._rng.integers(0, 2):
                self._propose_and_keep(fork, other)
                self._close(fork)
            else:
                self._propose_and_keep(state, other)
                self._close(state)
                return fork
        return state

    def _propose_and_keep(self, state: SequenceState, tokens: list[int]) -> None:
        size = int(self._rng.integers(1, 7))
        trees = self._model.capabilities.trees
        parents = random_tree(self._rng, size) if trees else chain_parents(state, size)
        ids = self._tokens(size)
        self._run(state, ids, parents, ())
        if state.num_pending == size and self._rng.integers(0, 2):  # unpadded: grow it further
            more = int(self._rng.integers(1, 4))
            above = size - 1 if not trees else int(self._rng.integers(-1, size))
            parents = np.concatenate([parents, chain_parents(state, more, above)])
            ids += self._tokens(more)
            self._run(state, ids[size:], parents[size:], ())
        tree = TokenTree.from_parents(np.array(ids, np.int32), parents)
        path = tree.path(int(self._rng.integers(-1, len(tree))))
        state.keep(path)
        tokens += [ids[node] for node in path]

    def _check_future(self, state: SequenceState, tokens: list[int], what: str) -> None:
        if (state.length, state.num_pending) != (len(tokens), 0):
            raise MismatchError(
                f"{what}: {state.length} tokens and {state.num_pending} pending, not {len(tokens)} and 0"
            )
        [probe] = self._tokens(1)
        got = self._run(state, [probe], chain_parents(state, 1), (0,))
        state.keep(())
        self._compare(got[0], self._row([*tokens, probe]), what)


def distance(got: Logits, want: Logits) -> float:
    """Largest difference of two logits over the standard deviation of their row; infinite where one is not a number."""
    got, want = np.atleast_2d(np.asarray(got, np.float64)), np.atleast_2d(np.asarray(want, np.float64))
    if got.shape != want.shape:
        raise MismatchError(f"rows of shapes {got.shape} and {want.shape}")
    spread = want.std(axis=1)
    worst = np.abs(got - want).max(axis=1, initial=0.0)
    if not (np.isfinite(got).all() and np.isfinite(want).all() and (spread > 0).all()):
        return float("inf")
    return float((worst / spread).max(initial=0.0))
