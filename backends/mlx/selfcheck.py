"""What a loaded network is asked before anything is promised: the only way to know that an architecture's
positions, masks and states go through what was set into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from localspec.errors import UnsupportedModelError
from localspec.types import NodeIndices

from .border import is_memory_error
from .layout import Layout, chain
from .memory import copied, restore, rows_in, snapshot, states_in

if TYPE_CHECKING:
    from .network import Network

_PREFIX = (0, 1, 2, 3, 4, 5)  # more tokens than a short convolution sees
_CHAIN = (1, 2)
_OTHER = 3  # a token that the chain does not have
_TREE = np.array([-1, -1, 1], np.int32)
_SHIFT = 2**17  # positions; beyond where models start to rescale

# Sparse attention picks cells only where there are more than its budget, far more than a check can run: so it
# gets a small one meanwhile. By the names that mlx-lm's model files give it.
_BUDGETS = {"index_topk": 4, "index_topk_blocks": 2, "index_block_size": 2}

# Found broken in mlx-lm 0.32.2 by scripts/architectures.py, and not to be run even for a check.
_BROKEN = {
    "phi3small": "it adds a mask of truth values to its scores, so tokens see later ones, and on the CPU of mlx 0.32.4 "
    "a pass corrupts the process's memory",
}


def refuse_broken(module: object) -> None:
    """Raise UnsupportedModelError for a model file that is known not to work."""
    name = type(module).__module__.rpartition(".")[2]
    if name in _BROKEN:
        raise UnsupportedModelError(f"mlx-lm's {name} does not work", got=_BROKEN[name])


@contextmanager
def small_budgets(module: Any) -> Iterator[None]:
    """Let sparse attention run out of its budget within a few tokens."""
    changed = [
        (child, name, value)
        for child in module.modules()
        for name, value in vars(child).items()
        if name in _BUDGETS and isinstance(value, int) and value > _BUDGETS[name]
    ]
    try:
        for child, name, _ in changed:
            setattr(child, name, _BUDGETS[name])
        yield
    finally:
        for child, name, value in changed:
            setattr(child, name, value)


class SelfCheck:
    """Compares rows of a few tokens. Differences are judged against the spread of a row's logits."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def takes_blocks(self) -> bool:
        """Do rows stay the same where attention is given whole blocks of cells? Some models make masks of their own."""
        current = self._network.current
        rows = []
        try:
            for current.blocks in (False, True):
                caches = self._network.caches()
                self._run(caches, 0, _PREFIX)
                rows.append(self._run(caches, len(_PREFIX), _CHAIN))
            self._rows = rows[0]
            return self._difference(rows[1]) <= _allowed(rows[1])
        except Exception as error:  # whatever a model file does here; without blocks it is asked again
            if is_memory_error(error):
                raise
            return False
        finally:
            current.blocks = False

    def shape(self) -> tuple[int, int]:
        """(rows, V) of a pass of two tokens of which one row is wanted. Raises UnsupportedModelError if it fails."""
        try:
            logits = self._run(self._network.caches(), 0, _CHAIN, wanted=(1,))
            mx.eval(logits)
        except Exception as error:  # whatever a model file does here
            if is_memory_error(error):
                raise
            message = f"{type(error).__name__}: {error}"
            raise UnsupportedModelError("mlx-lm does not run this model here", got=message) from error
        num_rows, vocab_size = logits.shape
        return num_rows, vocab_size

    def chain(self) -> bool:
        """Are the rows of a chain those of its tokens decoded one by one? True where width one has other bits.

        Refused where more than rounding differs: what stands beside a token would change its row.
        """
        self._caches = self._network.caches()
        self._run(self._caches, 0, _PREFIX)
        self._rows = self._run(self._fork(), len(_PREFIX), _CHAIN)
        caches = self._fork()
        alone = [self._run(caches, len(_PREFIX) + i, (token,)) for i, token in enumerate(_CHAIN)]
        self._require_same(mx.concatenate(alone), "decoded one by one")
        return not bool(mx.array_equal(alone[0][0], self._rows[0]))

    def replay(self) -> bool:
        """Does putting a snapshot back, and running kept tokens again, lead where the chain led? False where the
        bits are others, which they are where a scan runs otherwise over several tokens than over one.
        """
        caches, num_rows = self._fork(), len(_PREFIX)
        states, rows = list(states_in(caches)), list(rows_in(caches))
        taken = snapshot(states)
        exact = True
        for dropped in (_OTHER, _OTHER, _OTHER), (_CHAIN[0], _OTHER), _PREFIX:
            self._run(caches, num_rows, dropped)
            restore(states, taken)
            for cache in rows:
                cache.num_rows = num_rows
            fork = [copied(cache) for cache in caches]
            first = self._run(fork, num_rows, _CHAIN[:1])
            again = mx.concatenate([first, self._run(fork, num_rows + 1, _CHAIN[1:])])
            self._require_same(again, "run again from a snapshot")
            exact = exact and bool(mx.array_equal(again, self._rows))
        caches = self._network.caches()
        for start in range(0, len(_PREFIX), 2):
            self._run(caches, start, _PREFIX[start : start + 2])
        rows_then = self._run(caches, len(_PREFIX), _CHAIN)
        self._require_same(rows_then, "prefilled in other parts")
        return exact and bool(mx.array_equal(rows_then, self._rows))

    def tree(self) -> str | None:
        """Are the rows of a tree those of chains? None, or why not.

        The tree runs twice, the second time with an offset that is far off: a model to which this makes a
        difference uses positions outside its rotary embeddings, so it would place tree nodes wrongly.
        """
        current = self._network.current
        for shift in (0, _SHIFT):
            try:
                current.shift = shift
                rows = self._run(self._fork(), len(_PREFIX), (_OTHER, *_CHAIN), _TREE)[1:]
                difference = self._difference(rows)
            except Exception as error:  # whatever a model file does with vectors of positions
                if is_memory_error(error):
                    raise
                return f"the model's attention does not take them ({error})"
            finally:
                current.shift = 0
            if not difference <= (1e-3 if rows.dtype == mx.float32 else 0.1):
                where = (
                    "positions are used outside its embeddings of them" if shift else "masks or positions are its own"
                )
                return f"a tree's rows are not those of chains ({difference:.2g} of a row's spread): {where}"
        return None

    def together(self) -> float | None:
        """How far rows of two sequences in one pass are from those of each alone, in spreads of a row (0.0 for equal
        bits); None where they cannot be run so."""
        network = self._network
        longer, shorter = network.caches(), network.caches()
        lengths = (len(_PREFIX), 2)
        try:
            for caches, length in ((longer, lengths[0]), (shorter, lengths[1])):
                self._run(caches, 0, _PREFIX[:length])
            alone = [
                self._run([copied(cache) for cache in caches], length, _CHAIN)
                for caches, length in ((longer, lengths[0]), (shorter, lengths[1]))
            ]
            layouts = [Layout(length, chain(len(_CHAIN)), len(_CHAIN)) for length in lengths]
            rows = network.run_together(mx.array([_CHAIN, _CHAIN], mx.int32), [longer, shorter], layouts)
            want = mx.stack(alone)
            if rows.shape != want.shape:
                return None
            return float(mx.abs(rows - want).max()) / float(mx.std(want))
        except Exception as error:  # whatever a model file does with several sequences
            if is_memory_error(error):
                raise
            return None

    # ------------------------------------------------------------ helpers

    def _fork(self) -> list[Any]:
        return [copied(cache) for cache in self._caches]

    def _run(
        self,
        caches: list[Any],
        num_committed: int,
        ids: tuple[int, ...],
        parents: NodeIndices | None = None,
        wanted: tuple[int, ...] | None = None,
    ) -> mx.array:
        layout = Layout(num_committed, chain(len(ids)) if parents is None else parents, len(ids))
        return self._network.run(mx.array(ids, mx.int32), caches, layout, wanted)

    def _difference(self, rows: mx.array) -> float:
        return float(mx.abs(rows - self._rows).max()) / float(mx.std(self._rows))

    def _require_same(self, rows: mx.array, how: str) -> None:
        """In 16 bits rounding alone may move a logit a good way; a lost token moves it by its whole spread."""
        difference, allowed = self._difference(rows), _allowed(rows)
        if not difference <= allowed:
            raise UnsupportedModelError(
                f"rows of this model depend on more than their tokens: {how}, they differ",
                got=f"{difference:.2g} of a row's spread",
                expected=f"at most {allowed:g}",
                fix="mlx-lm's model file computes it so; try the llamacpp backend.",
            )


def _allowed(rows: mx.array) -> float:
    """The difference that rounding may make, in a row's spread."""
    return 1e-3 if rows.dtype == mx.float32 else 0.5
