"""How a drafter's guesses spread: a chain, a fixed fan-out, or a tree that the scores decide."""

from __future__ import annotations

import math
from dataclasses import dataclass

from localspec.errors import SettingError

MOST_NODES = 256
MOST_CHILDREN = 16
_CHAIN, _TREE = "chain", "tree"
_DEFAULT_NUM = {_CHAIN: 3, _TREE: 16}
_TREE_DEPTH = 12


@dataclass(frozen=True, slots=True)
class Shape:
    """num: most nodes.  branching: most children of a node at each depth.  by_score: do the scores decide
    which nodes exist? Otherwise the form is known before any token is."""

    num: int
    branching: tuple[int, ...]
    by_score: bool

    @property
    def is_chain(self) -> bool:
        """At most one child per node."""
        return max(self.branching) == 1

    def cut(self, levels: int) -> Shape:
        """The same with at most so many levels; a form without scores loses the nodes below them."""
        branching = self.branching[:levels]
        num = self.num if self.by_score else min(self.num, _whole(branching))
        return Shape(num, branching, self.by_score)

    @classmethod
    def parse(cls, drafter: str, text: str, num: int, depth: int) -> Shape:
        """From settings as users write them: `chain`, `tree` or a fan-out such as `3-2-1`; num and depth 0
        mean the default. Raises SettingError."""
        if not 0 <= num <= MOST_NODES:
            raise SettingError(f"{drafter}: num out of range", got=num, expected=f"1 to {MOST_NODES}, or 0: default")
        if not 0 <= depth <= MOST_NODES:
            raise SettingError(
                f"{drafter}: depth out of range", got=depth, expected=f"1 to {MOST_NODES}, or 0: default"
            )
        if text in _DEFAULT_NUM:
            nodes = num or _DEFAULT_NUM[text]
            if text == _CHAIN:
                return cls(nodes, (1,) * min(nodes, depth or nodes), by_score=False)
            return cls(nodes, (MOST_CHILDREN,) * min(nodes, depth or _TREE_DEPTH), by_score=True)
        return cls._fan_out(drafter, text, num, depth)

    @classmethod
    def _fan_out(cls, drafter: str, text: str, num: int, depth: int) -> Shape:
        parts = text.split("-")
        fan_out = tuple(int(part) for part in parts if part.isdecimal())
        if len(fan_out) < len(parts) or not all(1 <= part <= MOST_CHILDREN for part in fan_out):
            raise SettingError(
                f"{drafter}: unknown shape",
                got=text,
                expected=f"chain, tree, or children per level from 1 to {MOST_CHILDREN}, such as 3-2-1",
            )
        fan_out = fan_out[: depth or len(fan_out)]
        whole = _whole(fan_out)
        if not num and whole > MOST_NODES:
            raise SettingError(
                f"{drafter}: the fan-out has too many nodes",
                got=whole,
                expected=f"at most {MOST_NODES}",
                fix="Write fewer levels, or cut it with num.",
            )
        return cls(num or whole, fan_out, by_score=False)


def _whole(fan_out: tuple[int, ...]) -> int:
    """Nodes of a fan-out that is complete."""
    return sum(math.prod(fan_out[: level + 1]) for level in range(len(fan_out)))
