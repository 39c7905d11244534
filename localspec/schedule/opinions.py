"""Several drafters about the same place: their guesses in one tree, and the chances of those.

Each drafter's chances were corrected by what became of all its guesses, but what it says where another, which is
trusted more, expects something else comes true far less often: of the words that lookup guessed beside those of a draft
model 28% were expected and 6% came (docs/log.md). So the one trusted most keeps its chances, and what the next adds
shares what the first leaves open. How much of that it deserves is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from localspec.tree.token_tree import TokenTree

_FADING = 0.98  # of a tally, in a round in which nothing could be seen


class _Tally:
    """Accepted tokens, or places: what was expected and what came, older ones counting less.

    trust: what must have been expected before what came outweighs the expectation.  memory: beyond it all counts half.
    """

    def __init__(self, trust: float, memory: float) -> None:
        self._trust, self._memory = trust, memory
        self.expected = self.came = 0.0

    @property
    def factor(self) -> float:
        """What came over what was expected."""
        return (self.came + self._trust) / (self.expected + self._trust)

    def recall(self, expected: float, came: float) -> None:
        """Go on from these sums."""
        self.expected, self.came = float(expected), float(came)

    def observe(self, expected: float, came: float) -> None:
        """Once more. expected: before the factor."""
        self.expected += expected
        self.came += came
        if self.expected > self._memory:
            self.expected /= 2.0
            self.came /= 2.0

    def fade(self) -> None:
        """A round in which nothing could be seen."""
        self.expected *= _FADING
        self.came *= _FADING


class Dissent(_Tally):
    """How often what a drafter adds to the guesses of those trusted more comes true, over what was left open for it:
    what its share of the rest is multiplied by. One place where it differed is observed at a time."""

    def __init__(self) -> None:
        super().__init__(1.0, 30.0)


class Hindsight(_Tally):
    """What came of a drafter's guesses where they were chosen, over what was expected of them there, lately: what the
    chances of its paths are multiplied by, never more than 1.

    They are chosen, and nobody else is asked, where they promise much, so often where they promise too much; and what
    was learned of lookup on code is too much for prose. How reliable it is in general is learned slowly, from all that
    it says; this follows the text, and fades while nothing is chosen.
    """

    def __init__(self, trust: float = 3.0, memory: float = 14.0) -> None:
        super().__init__(trust, memory)

    @classmethod
    def of_network(cls) -> Hindsight:
        """The same for a drafter that runs one. What it says of itself holds for most texts, and of a factor that is
        never more than 1 chance makes a penalty: the more so the quicker it follows."""
        return cls(15.0, 40.0)

    @property
    def factor(self) -> float:
        """As of any tally, at most 1."""
        return min(super().factor, 1.0)


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one drafter says of a merged tree. places: [N] where its nodes are.  chances: [N] of their edges."""

    places: Sequence[int]
    chances: Sequence[float]
    dissent: Dissent


class Opinions:
    """The chances of a merged tree, and what they teach."""

    def __init__(self, tree: TokenTree, opinions: Sequence[Opinion]) -> None:
        """opinions: the most trusted first."""
        self._tree = tree
        self._added: dict[int, list[tuple[Dissent, float, list[int]]]] = {}
        self.chances = [0.0] * len(tree)
        """[N] of each edge."""
        parents = tree.parent.tolist()
        said: dict[int, list[tuple[Dissent, dict[int, float]]]] = {}
        for opinion in opinions:
            here: dict[int, dict[int, float]] = {}
            for place, chance in zip(opinion.places, opinion.chances, strict=True):
                here.setdefault(parents[place], {})[place] = chance
            for parent, children in here.items():
                said.setdefault(parent, []).append((opinion.dissent, children))
        for parent, all_said in said.items():
            self._settle(parent, all_said)

    def _settle(self, parent: int, said: Sequence[tuple[Dissent, dict[int, float]]]) -> None:
        """The chances of one node's children."""
        chances, (_, named) = self.chances, said[0]
        left, known = 1.0 - sum(named.values()), set(named)
        for place, chance in named.items():
            chances[place] = chance
        for dissent, children in said[1:]:
            added = [place for place in children if place not in known]
            if not added:
                continue
            rest = max(1.0 - sum(chance for place, chance in children.items() if place in known), 1e-6)
            known.update(added)
            shares = [max(left, 0.0) * min(children[place] / rest, 1.0) for place in added]
            for place, share in zip(added, shares, strict=True):
                chances[place] = min(share * dissent.factor, children[place])
                left -= chances[place]
            self._added.setdefault(parent, []).append((dissent, sum(shares), added))

    def observe(self, tokens: Sequence[int]) -> None:
        """Learn from what was emitted: of every place on its path where someone differed."""
        guessed, parents = self._tree.token.tolist(), self._tree.parent.tolist()
        above = -1
        for token in tokens:
            came = next((n for n, p in enumerate(parents) if p == above and guessed[n] == token), None)
            for dissent, expected, added in self._added.get(above, ()):
                dissent.observe(expected, came in added)
            if came is None:
                return
            above = came
