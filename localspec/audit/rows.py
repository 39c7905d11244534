"""The target's rows of logits for one text, computed in several ways. What they differ by is the rounding that a
difference between two texts may be put down to; rows of a tree must not differ by more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from localspec.engine.width import pad
from localspec.protocols import HostTokens, LanguageModel, Step, chain_parents
from localspec.types import Logits, NodeIndices, TokenIds

_WIDTHS = (2, 3, 4, 6, 8, 12, 16, 24, 32)
_LENGTH = 24  # tokens whose rows are compared, per text
_CONTEXT = 160  # tokens of a text, those included
_CHUNK = 512
# Two children of the anchor, each with a line below it and siblings on the way; children in both orders.
_TREE = np.array([-1, -1, 0, 1, 0, 2, 3, 3, 5, 6, 8, 9], np.int32)


@dataclass(slots=True)
class Comparison:
    """One way against the narrowest pass of the width class. worst: the largest difference of two logits."""

    way: str
    num_rows: int = 0
    num_equal: int = 0
    num_other_best: int = 0
    worst: float = 0.0

    def add(self, found: Logits, want: Logits) -> None:
        """Count rows [T, V]."""
        apart = np.abs(found - want).max(axis=1)
        self.num_rows += len(found)
        self.num_equal += int(np.count_nonzero(apart == 0))
        self.num_other_best += int(np.count_nonzero(found.argmax(axis=1) != want.argmax(axis=1)))
        self.worst = max(self.worst, float(apart.max(initial=0.0)))

    def line(self) -> str:
        """How many differ, and by how much."""
        return f"{self.num_rows - self.num_equal} of {self.num_rows} differ, by up to {self.worst:.2g}"


@dataclass(slots=True)
class RowReport:
    """inside: other widths of the class.  alone: width 1, where the class begins later.  trees: nodes of a tree, and
    rows after one of its paths was kept; None where the target verifies no trees."""

    inside: Comparison = field(default_factory=lambda: Comparison("other widths of the class"))
    alone: Comparison | None = None
    trees: Comparison | None = None
    widths: tuple[int, ...] = ()

    @property
    def exact(self) -> bool:
        """Are the class and its trees what they are said to be?"""
        return self.inside.worst == 0.0 and (self.trees is None or self.trees.worst == 0.0)

    @property
    def rounding(self) -> float:
        """The largest difference that width alone made, trees not counted."""
        return max(self.inside.worst, self.alone.worst if self.alone is not None else 0.0)

    @property
    def comparisons(self) -> list[Comparison]:
        """Those that were made."""
        return [part for part in (self.inside, self.alone, self.trees) if part is not None]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "exact": self.exact, "rounding": self.rounding}


def measure_rows(model: LanguageModel, texts: Sequence[TokenIds], seed: int = 0) -> RowReport:
    """Compare the ways on the last tokens of each text. Needs one free sequence.

    Texts of fewer than two tokens say nothing and are left out.
    """
    allowed = model.capabilities
    low, high = allowed.width_class.min_width, allowed.width_class.max_width or allowed.max_width
    widths = tuple(width for width in _WIDTHS if low < width <= min(high, allowed.max_width))
    report = RowReport(widths=widths)
    if low > 1:
        report.alone = Comparison("width 1")
    trees = allowed.trees and allowed.exact_trees and len(_TREE) + 1 <= min(high, allowed.max_width)
    if trees:
        report.trees = Comparison("trees")
    rng = np.random.default_rng(seed)
    for text in texts:
        ids = text[-_CONTEXT:]
        start = max(1, len(ids) - _LENGTH)
        if start >= len(ids):
            continue
        with Prefix(model, ids[:start]) as prefix:
            want = prefix.rows(ids[start:], low)
            for width in widths:
                report.inside.add(prefix.rows(ids[start:], width), want)
            if report.alone is not None:
                report.alone.add(prefix.rows(ids[start:], 1, padded=False), want)
        if report.trees is not None:
            _compare_tree(model, ids, report.trees, rng)
    return report


class Prefix:
    """Committed tokens in a state of their own, behind which texts are scored and taken back. Needs one sequence."""

    def __init__(self, model: LanguageModel, ids: TokenIds) -> None:
        self._model, self._length = model, len(ids)
        self.state = model.open()
        for place in range(0, len(ids), _CHUNK):
            piece = ids[place : place + _CHUNK]
            step = Step(self.state, (HostTokens(piece),), chain_parents(self.state, len(piece)), ())
            model.forward([pad(step, model.capabilities.width_class)])
            self.state.keep(range(len(piece)))

    def __enter__(self) -> Prefix:
        return self

    def __exit__(self, *_: object) -> None:
        self.state.close()

    def rows(self, ids: TokenIds, width: int = 8, *, padded: bool = True) -> Logits:
        """[T, V] rows after each token of `ids`, in passes of `width` tokens; they are taken back.

        padded: widen passes that lie below the width class.
        """
        found = []
        for place in range(0, len(ids), width):
            piece = ids[place : place + width]
            found.append(self.tree(piece, chain_parents(self.state, len(piece)), padded=padded))
            self.state.keep(range(len(piece)))
        self.state.truncate(self._length)
        return np.concatenate(found)

    def tree(self, ids: TokenIds, parents: NodeIndices, *, padded: bool = True) -> Logits:
        """[T, V] rows of one pass, whose nodes are then pending."""
        step = Step(self.state, (HostTokens(ids),), parents)
        [scores] = self._model.forward([pad(step, self._model.capabilities.width_class) if padded else step])
        return np.array(scores.rows(range(len(ids))))


def _compare_tree(model: LanguageModel, ids: TokenIds, trees: Comparison, rng: np.random.Generator) -> None:
    """A tree below the last token of `ids`, and what follows when its deepest path is kept."""
    tokens = rng.choice(model.tokenizer.num_tokens, len(_TREE), replace=False).astype(np.int32)
    paths = [_path(node) for node in range(len(_TREE))]
    deepest = max(paths, key=len)
    with Prefix(model, ids[:-1]) as prefix:
        parents = np.concatenate([[-1], _TREE + 1]).astype(np.int32)
        found = prefix.tree(np.concatenate([ids[-1:], tokens]), parents)
        prefix.state.keep([0, *(node + 1 for node in deepest)])
        after = prefix.tree(ids[:2], chain_parents(prefix.state, 2))
    with Prefix(model, ids[:-1]) as prefix:
        for path in (path for path in paths if path[-1] not in _TREE):  # one for each leaf
            want = prefix.rows(np.concatenate([ids[-1:], tokens[path]]))
            trees.add(found[[0, *(node + 1 for node in path)]], want)
        kept = prefix.rows(np.concatenate([ids[-1:], tokens[deepest], ids[:2]]))
        trees.add(after, kept[-2:])


def _path(node: int) -> list[int]:
    """From a child of the anchor down to `node`."""
    path = [node]
    while _TREE[path[0]] >= 0:
        path.insert(0, int(_TREE[path[0]]))
    return path
