"""Beginning the next pass before the last token is read.

On a device that works lazily, waiting for a token, choosing and building the next pass leave it idle between two
passes. Where the target's choice is made on the device and nothing is guessed, the next pass needs no host: it runs
whatever token comes out. So behind a round without guesses, if the round before had none either, the next one is
expected to have none, and its pass begins at once. If that was wrong (a drafter proposes something, the answer ends)
the pass is dropped; its node is pending, so dropping it costs nothing but the device's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from localspec.engine.width import pad
from localspec.protocols import Capabilities, LanguageModel, Proposal, Rewind, Scores, SequenceState, Step, Tokens

if TYPE_CHECKING:
    from localspec.engine.round import Lane


@dataclass(slots=True)
class Early:
    """One lane's next pass. scores: of the anchor to come, None if the pass has not begun.  width: its tokens.
    quiet: rounds in a row, up to the last one, in which nothing was guessed."""

    scores: Scores | None = None
    width: int = 0
    quiet: int = 0

    def drop(self, state: SequenceState) -> None:
        """Forget the pass, if it has begun."""
        if self.scores is not None:
            self.scores = None
            state.keep(())


def may_begin(capabilities: Capabilities, lane: Lane) -> bool:
    """Can this lane's next token be run without having been read? Log-probabilities are read from scores, which
    another pass may overwrite."""
    lazy = not capabilities.host_scores and capabilities.rewind is Rewind.FREE
    return lazy and lane.acceptance.chooses_winners(lane.sampler) and lane.sampler.params.logprobs is None


def take(lanes: Sequence[Lane], proposals: Sequence[Proposal]) -> tuple[list[Scores], int] | None:
    """(scores per lane, tokens in the pass), if the pass of this round has begun and is the one that is wanted. Else
    what has begun is dropped."""
    taken = [lane.early.scores for lane in lanes if lane.early.scores is not None]
    if len(taken) == len(lanes) and not any(proposal.num_nodes for proposal in proposals):
        for lane in lanes:
            lane.early.scores = None
        return taken, sum(lane.early.width for lane in lanes)
    for lane in lanes:
        lane.early.drop(lane.state)
    return None


def begin(model: LanguageModel, lanes: Sequence[Lane], winners: Sequence[Tokens], widths: Sequence[int]) -> None:
    """Commit the anchors and start the pass over the tokens that will follow them. widths: per lane, at least."""
    steps = []
    for lane, token, width in zip(lanes, winners, widths, strict=True):
        lane.state.keep([0])
        step = Step(lane.state, (token,), np.array([-1], np.int32))
        steps.append(pad(step, lane.widths or model.capabilities.width_class, width))
    for lane, step, scores in zip(lanes, steps, model.forward(steps), strict=True):
        lane.early.scores, lane.early.width = scores, step.num_tokens
