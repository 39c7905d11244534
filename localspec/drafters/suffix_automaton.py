"""A suffix automaton of one conversation: which of its substrings occurred before, how often, and where last.

Tokens are added at the end in amortised constant time and taken back, newest first, for what adding them took.
A state stands for all substrings that end at the same places; the longest suffix of the text that occurred before is
kept at hand. Source: the automaton and its online construction are Blumer et al. (1985); counting while it grows and
taking tokens back are ours.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_NONE = -1
_ROOT = 0


@dataclass(frozen=True, slots=True)
class Place:
    """A substring: the state that it belongs to, and its length."""

    state: int
    length: int


@dataclass(frozen=True, slots=True)
class _Step:
    """What adding a token changed, besides its own state. ends: of the counted states, where they ended before."""

    match: Place
    last: int
    edges: list[tuple[int, int]]  # (state, what its edge led to before, or _NONE)
    split: int  # the state that a copy was made of, or _NONE
    ends: list[int]


class SuffixAutomaton:
    """Substrings of up to `depth` tokens are counted. Counts of longer ones are too low: nobody asks for them, and a
    text that repeats one token for ever would make each addition as long as itself."""

    def __init__(self, depth: int = 64) -> None:
        self.depth = depth
        self.tokens: list[int] = []
        self.match = Place(_ROOT, 0)
        """The longest suffix, of at most `depth` tokens, that occurred before."""
        self._edges: list[dict[int, int]] = [{}]
        self._link = [_NONE]  # to the state of the longest suffix that ends at more places
        self._length = [0]  # of a state's longest substring
        self._count = [0]  # of places where it ends
        self._end = [0]  # number of tokens up to the latest of these
        self._last = _ROOT
        self._steps: list[_Step] = []

    def __len__(self) -> int:
        return len(self.tokens)

    # ------------------------------------------------------------ asking

    def count(self, place: Place) -> int:
        """How often a substring occurs; that at the text's end is counted."""
        return self._count[place.state]

    def end(self, state: int) -> int:
        """Number of tokens up to the end of the latest occurrence."""
        return self._end[state]

    def likeliest(self, place: Place, most: int) -> dict[int, int]:
        """Token -> how often a substring with it occurs, for the `most` frequent tokens that ever followed, and of
        equally frequent ones the latest; best first."""
        count, end, edges = self._count, self._end, self._edges[place.state]
        if len(edges) > 1:
            states = heapq.nlargest(most, edges.items(), key=lambda edge: (count[edge[1]], end[edge[1]]))
        else:
            states = list(edges.items())
        return {token: count[state] for token, state in states}

    def follow(self, place: Place, token: int) -> Place | None:
        """The substring with one more token, its beginning cut where it grows too long to be counted; None if it never
        occurred."""
        state = self._edges[place.state].get(token)
        return None if state is None else self._cut(state, place.length + 1)

    def shorter(self, place: Place) -> Place | None:
        """The longest suffix of a substring that occurs more often; None behind the empty one."""
        state = self._link[place.state]
        return None if state < 0 else Place(state, self._length[state])

    def _cut(self, state: int, length: int) -> Place:
        if length > self.depth:
            length = self.depth
            while self._length[self._link[state]] >= length:
                state = self._link[state]
        return Place(state, length)

    # ------------------------------------------------------------ growing

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens at the end."""
        for token in tokens:
            self._append(token)

    def _append(self, token: int) -> None:
        before, last = self.match, self._last
        match = self._matched(token)
        edges: list[tuple[int, int]] = []
        split = self._grow(token, edges)
        if split == match.state:  # what occurred again is the copy, not what it was copied from
            match = Place(len(self._link) - 1, match.length)
        self.match = match
        self.tokens.append(token)
        self._steps.append(_Step(before, last, edges, split, self._count_match()))

    def _matched(self, token: int) -> Place:
        """The longest suffix that occurred before, once `token` is added; in the automaton as it is without it."""
        state, length = self.match.state, self.match.length
        edges = self._edges
        while token not in edges[state]:
            state = self._link[state]
            if state < 0:
                return Place(_ROOT, 0)
            length = self._length[state]
        return self._cut(edges[state][token], length + 1)

    def _grow(self, token: int, changed: list[tuple[int, int]]) -> int:
        """Add the new text's state; the state that was split for it, or _NONE. changed: gets the edges that did."""
        edges, link, length = self._edges, self._link, self._length
        own = self._new({}, _ROOT, len(self.tokens) + 1, 1, len(self.tokens) + 1)
        state = self._last
        self._last = own
        while state >= 0 and token not in edges[state]:
            edges[state][token] = own
            changed.append((state, _NONE))
            state = link[state]
        if state < 0:
            return _NONE
        other = edges[state][token]
        if length[state] + 1 == length[other]:
            link[own] = other
            return _NONE
        copy = self._new(dict(edges[other]), link[other], length[state] + 1, self._count[other], self._end[other])
        while state >= 0 and edges[state].get(token) == other:
            edges[state][token] = copy
            changed.append((state, other))
            state = link[state]
        link[other] = link[own] = copy
        return other

    def _new(self, edges: dict[int, int], link: int, length: int, count: int, end: int) -> int:
        self._edges.append(edges)
        self._link.append(link)
        self._length.append(length)
        self._count.append(count)
        self._end.append(end)
        return len(self._link) - 1

    def _count_match(self) -> list[int]:
        """The match and all its suffixes occurred once more, at the end; where they ended before."""
        ends = []
        state = self.match.state
        while state > _ROOT:
            ends.append(self._end[state])
            self._count[state] += 1
            self._end[state] = len(self.tokens)
            state = self._link[state]
        return ends

    # ------------------------------------------------------------ taking back

    def truncate(self, length: int) -> None:
        """Take back the tokens from `length` on."""
        while len(self.tokens) > length:
            self._take_back()

    def _take_back(self) -> None:
        token, step = self.tokens.pop(), self._steps.pop()
        state = self.match.state
        for end in step.ends:
            self._count[state] -= 1
            self._end[state] = end
            state = self._link[state]
        for state, target in reversed(step.edges):
            if target == _NONE:
                del self._edges[state][token]
            else:
                self._edges[state][token] = target
        if step.split != _NONE:
            self._link[step.split] = self._link[-1]
        size = len(self._link) - (2 if step.split != _NONE else 1)
        columns: Sequence[list[int] | list[dict[int, int]]] = (
            self._edges,
            self._link,
            self._length,
            self._count,
            self._end,
        )
        for column in columns:
            del column[size:]
        self.match, self._last = step.match, step.last
