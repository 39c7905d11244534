"""A drafter of one's own, run on the bundled pair: the text stays that of plain decoding.

The same prompt is answered with `AfterAnchor` and with the null drafter, greedily and at temperature
0.8 with one seed. Prints both accepted lengths (the bonus token counted); fails if a text differs or if
no guess was accepted. `docs/writing-a-drafter.md` explains the class.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

import localspec
from localspec.context import Context
from localspec.drafters import Nothing
from localspec.protocols import Drafter, DraftRequest, HostTokens, Outcome, Proposal, SavedDraft, SequenceState


class AfterAnchor:
    """Guesses that what followed the anchor before follows it again.

    Each different token that did becomes a branch, the latest first: at most `branches` of them, each
    with up to `num` tokens.
    """

    name = "after_anchor"
    needs_trees = False

    def __init__(self, *, num: int = 4, branches: int = 2) -> None:
        self.num = num
        self.branches = branches

    def attach(self, state: SequenceState) -> None:
        """The target's states are not read."""

    def begin(self, context: Context) -> None:
        """Nothing is remembered between rounds, so there is nothing to prepare."""

    def propose(self, request: DraftRequest) -> Proposal:
        """A tree within the request's budget."""
        tokens = request.context.tokens
        branches = self.branches if request.trees else 1
        starts = np.flatnonzero(tokens[:-1] == request.context.anchor) + 1
        ids: list[int] = []
        parents: list[int] = []
        firsts: set[int] = set()
        for start in starts[::-1].tolist():
            room = min(self.num, request.max_depth, request.max_nodes - len(ids))
            if room < 1 or len(firsts) == branches:
                break
            branch = tokens[start : start + room].tolist()
            if branch[0] not in firsts:
                firsts.add(branch[0])
                parents += [-1, *range(len(ids), len(ids) + len(branch) - 1)]
                ids += branch
        return Proposal(self.name, (HostTokens(np.array(ids, np.int32)),), np.array(parents, np.int32))

    def observe(self, outcome: Outcome) -> None:
        """The context has the emitted tokens already; nothing else is kept."""

    def save(self) -> tuple[SavedDraft, ...]:
        """No model has read anything."""
        return ()

    def restore(self, saved: Sequence[SavedDraft]) -> None:
        """Nothing of it is needed."""

    def close(self) -> None:
        """Nothing to give back."""


def answer(pair: localspec.Pair, drafter: Drafter, params: localspec.SamplingParams) -> localspec.Generation:
    prompt = "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return a - b\n\n\ndef multiply(a, b):\n"
    with localspec.Session(pair.target, drafter) as session:
        return session.generate(prompt, params)


def main() -> None:
    with localspec.open_pair() as pair:
        for temperature in (0.0, 0.8):
            params = localspec.SamplingParams(temperature=temperature, seed=7, max_tokens=48)
            plain = answer(pair, Nothing(), params)
            drafted = answer(pair, AfterAnchor(), params)
            if drafted.tokens != plain.tokens:
                sys.exit(f"temperature {temperature}: the texts differ")
            if drafted.stats.num_accepted == 0:
                sys.exit(f"temperature {temperature}: no guess was accepted")
            print(drafted.text)
            print(
                f"temperature {temperature}: {len(plain.tokens)} equal tokens, "
                f"accepted length {drafted.stats.accepted_length:.2f} (plain {plain.stats.accepted_length:.2f})"
            )


if __name__ == "__main__":
    main()
