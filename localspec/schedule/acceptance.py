"""How often guesses come true: what a drafter says of its edges, corrected by what became of them.

Only edges whose parent was accepted are observed, and then all siblings are: one came true, or none. That
sample is unbiased whatever the tree's form was. Estimates start from what the drafter says (optimistic where it
says nothing, or deep levels would never be tried) and follow the text by forgetting old rounds.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from localspec.tree.token_tree import TokenTree

_CHANCES = (0.01, 0.03, 0.08, 0.16, 0.28, 0.42, 0.56, 0.7, 0.82, 0.91, 0.965, 0.99)
"""Where the correction is tabulated: chances as drafters state them."""
_LOGS = tuple(math.log(chance) for chance in _CHANCES)
_TRUST = 15.0  # observations that a drafter's own word is worth
_MEMORY = 300.0  # observations per table entry, then older ones count half
_OPTIMISM = 0.8  # assumed chance of an edge of a drafter that estimates none
_UNSCORED_MEMORY = 60.0
_QUICKLY = 0.25  # by how much of an error the chances of unscored edges are shifted, in natural logarithms of odds
_UNSHIFTED = 0.98  # of that, each time
_DEEPEST = 12  # depths beyond share a correction
_UNSEEN = 0.97  # of what is known of a depth, each time that nothing was guessed there
_DEPTH_TRUST = 12.0  # expected acceptances before a depth's own correction outweighs none
_DEPTH_MEMORY = 150.0
_LEAD_MEMORY = 0.995  # an edge
_KEPT, _DEPTH_KEPT = 60.0, 20.0  # observations, of an entry and of a depth, that outlive the process
_LEAST = 1e-3  # chance that anything has, or does not
_MOST_LEAD = 20.0  # in natural logarithms of a chance


class Reliability:
    """Calibration of one drafter: stated chance -> observed share, corrected once more by depth, and for drafters that
    state none the share by depth.

    Deep guesses follow from shallower ones that came true, so a drafter may be right to another degree there than
    its word says everywhere (one that never saw the guesses between, say). Each depth's correction is a factor, learned
    behind those above it; it is used as long as it has foretold what came better than the table alone, for a drafter
    that reads its own guesses is only made less certain by it. Source of calibrating depth after depth: DSpark's
    sequential temperature scaling.
    """

    def __init__(self) -> None:
        self._seen = [0.0] * len(_CHANCES)
        self._true = [0.0] * len(_CHANCES)
        self._table = list(_CHANCES)
        self._depth_seen: list[float] = []
        self._depth_true: list[float] = []
        self._shift = 0.0  # of unscored edges, lately
        self._expected = [0.0] * (_DEEPEST + 1)
        self._came = [0.0] * (_DEEPEST + 1)
        self._lead = 0.0  # of the depths' corrections over none, by what came

    def as_dict(self) -> dict[str, Any]:
        """For `recall`."""
        return {
            "seen": self._seen,
            "true": self._true,
            "depth_seen": self._depth_seen,
            "depth_true": self._depth_true,
            "expected": self._expected,
            "came": self._came,
            "lead": self._lead,
        }

    def recall(self, data: Mapping[str, Any]) -> None:
        """Go on from what `as_dict` gave, which counts as a few observations. Raises KeyError, TypeError and ValueError
        for anything else."""
        size = len(_CHANCES)
        self._seen, self._true = _capped(data["seen"], data["true"], _KEPT, size)
        self._depth_seen, self._depth_true = _capped(data["depth_seen"], data["depth_true"], _DEPTH_KEPT)
        self._expected, self._came = _capped(data["expected"], data["came"], _KEPT, _DEEPEST + 1)
        self._lead = float(data["lead"])
        for entry in range(size):
            self._tabulate(entry)

    def chances(self, log_q: Iterable[float], depths: Iterable[int] | None = None) -> list[float]:
        """[N] chance that an edge with such a logarithm of a chance comes true if its parent does; at a depth (0: child
        of the anchor), where that is known."""
        found = list(map(self._tabulated, log_q))
        if depths is not None and self._lead > 0.0:
            factors = [self._factor(depth) for depth in range(_DEEPEST + 1)]
            pairs = zip(found, depths, strict=True)
            found = [min(chance * factors[min(depth, _DEEPEST)], 1.0) for chance, depth in pairs]
        return found

    def _factor(self, depth: int) -> float:
        """By how much guesses at a depth come true more often than the table says."""
        place = min(depth, _DEEPEST)
        return (self._came[place] + _DEPTH_TRUST) / (self._expected[place] + _DEPTH_TRUST)

    def _tabulated(self, log_q: float) -> float:
        place = bisect_left(_LOGS, log_q)
        table = self._table
        if place == 0:
            return table[0] * math.exp(log_q - _LOGS[0])
        if place == len(_LOGS):
            return table[-1]
        share = (log_q - _LOGS[place - 1]) / (_LOGS[place] - _LOGS[place - 1])
        return table[place - 1] + share * (table[place] - table[place - 1])

    def chance_at(self, depth: int) -> float:
        """The same for an only child at a depth (0: child of the anchor) of which nothing was said. What is known of
        depths is learned slowly, from all texts; that this one is easier, or harder, shows at all depths alike."""
        usual = self._usual_at(depth)
        return usual / (usual + (1.0 - usual) * math.exp(-self._shift))

    def _usual_at(self, depth: int) -> float:
        if depth >= len(self._depth_seen):
            return _OPTIMISM if not self._depth_seen else max(self._usual_at(len(self._depth_seen) - 1), 0.3)
        return (self._depth_true[depth] + 2.0 * _OPTIMISM) / (self._depth_seen[depth] + 2.0)

    def observe(self, tree: TokenTree, tokens: Sequence[int]) -> None:
        """Learn from what followed. tree: all that was guessed, verified or not.  tokens: what was emitted."""
        parents, guessed = tree.parent.tolist(), tree.token.tolist()
        log_q = None if tree.log_q is None else tree.log_q.tolist()
        above = -1
        for depth, token in enumerate(tokens):
            children = [node for node, parent in enumerate(parents) if parent == above]
            if not children:
                self._forget(depth)
                return
            right = [node for node in children if guessed[node] == token]
            if log_q is not None:
                said = [self._tabulated(log_q[node]) for node in children]
                self._compare(depth, zip(said, [node in right for node in children], strict=True))
                self._count_edges(depth, sum(said), bool(right))
                for node in children:
                    self._count(log_q[node], node in right)
            self._count_depth(depth, children[0] in right)
            if not right:
                return
            above = right[0]

    def _compare(self, depth: int, edges: Iterable[tuple[float, bool]]) -> None:
        """Which foretold better what became of all children of a node: the table, or the table and the depth?
        edges: the table's chances, and whether they came true."""
        factor = self._factor(depth)
        for table, came_true in edges:
            depths = min(max(table * factor, _LEAST), 1.0 - _LEAST)
            table = min(max(table, _LEAST), 1.0 - _LEAST)
            news = math.log(depths / table) if came_true else math.log((1.0 - depths) / (1.0 - table))
            self._lead = max(-_MOST_LEAD, min(_LEAD_MEMORY * (self._lead + news), _MOST_LEAD))

    def _count_edges(self, depth: int, expected: float, came_true: bool) -> None:
        """All children of one node: what the table expects of them together, and whether one came true."""
        place = min(depth, _DEEPEST)
        self._expected[place] += expected
        self._came[place] += came_true
        if self._expected[place] > _DEPTH_MEMORY:
            self._expected[place] /= 2.0
            self._came[place] /= 2.0

    def _count(self, log_q: float, came_true: bool) -> None:
        """Shared by the two nearest entries, by nearness."""
        place = bisect_left(_LOGS, log_q)
        if place == 0 or place == len(_LOGS):
            shares = [(min(place, len(_LOGS) - 1), 1.0)]
        else:
            share = (log_q - _LOGS[place - 1]) / (_LOGS[place] - _LOGS[place - 1])
            shares = [(place - 1, 1.0 - share), (place, share)]
        for entry, weight in shares:
            self._seen[entry] += weight
            self._true[entry] += weight * came_true
            if self._seen[entry] > _MEMORY:
                self._seen[entry] /= 2.0
                self._true[entry] /= 2.0
            self._tabulate(entry)

    def _tabulate(self, entry: int) -> None:
        self._table[entry] = (self._true[entry] + _TRUST * _CHANCES[entry]) / (self._seen[entry] + _TRUST)

    def _forget(self, depth: int) -> None:
        """Nothing was guessed from here on. A few bad rounds would otherwise shut a depth out for good: what is never
        guessed is never found to come true."""
        for place in range(depth, len(self._depth_seen)):
            self._depth_seen[place] *= _UNSEEN
            self._depth_true[place] *= _UNSEEN

    def _count_depth(self, depth: int, came_true: bool) -> None:
        self._shift = _UNSHIFTED * self._shift + _QUICKLY * (came_true - self.chance_at(depth))
        while len(self._depth_seen) <= depth:
            self._depth_seen.append(0.0)
            self._depth_true.append(0.0)
        self._depth_seen[depth] += 1.0
        self._depth_true[depth] += came_true
        if self._depth_seen[depth] > _UNSCORED_MEMORY:
            self._depth_seen[depth] /= 2.0
            self._depth_true[depth] /= 2.0


def _capped(
    seen: Sequence[float], true: Sequence[float], most: float, length: int | None = None
) -> tuple[list[float], list[float]]:
    """Sums of what was seen and what came of it, with their ratio, as if no more than so much had been seen."""
    if len(seen) != len(true) or (length is not None and len(seen) != length):
        raise ValueError(f"{len(seen)} and {len(true)} sums, expected {length or 'as many'}")
    kept = [min(1.0, most / max(float(one), _LEAST)) for one in seen]
    return (
        [share * float(one) for share, one in zip(kept, seen, strict=True)],
        [share * float(one) for share, one in zip(kept, true, strict=True)],
    )
