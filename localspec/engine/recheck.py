"""The rows that decide where a choice is too close: guarded decoding's reference.

A row depends on the width of its own pass and, through keys and values in the cache, on the widths of all passes
before it. So a reference row must come from a state of known making. Here the answer is cut into blocks of a fixed
number of tokens, counted from the end of what was prefilled; a finished block is written by one pass over the whole
of it, and the row in question comes from one pass over its block's tokens up to it, padded to the same width. That
makes the row a function of prompt and tokens alone, whatever wrote the cache before, and it costs a pass or two.

If every row that is used lies within the tolerance of the reference row, then a choice that is clear by more than
the tolerance is the reference row's choice, too, and one that is not is made by the reference row. So each
token is the reference's, in plain decoding as under speculation. Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from localspec.context import Context
from localspec.engine.stats import RecheckRecord
from localspec.engine.width import pad
from localspec.exactness import Bound
from localspec.protocols import HostTokens, LanguageModel, SequenceState, Step, WidthClass, chain_parents
from localspec.sampling import Sampler
from localspec.types import Logits, TokenIds
from localspec.verify import Verdict


@dataclass(frozen=True, slots=True)
class Decided:
    """A verdict whose tokens are certain. row: [V] the reference row of the last one, where that was asked."""

    verdict: Verdict
    row: Logits | None
    record: RecheckRecord


class Recheck:
    """The reference of one sequence for one answer, made when all of the prompt but its last token is in the state."""

    def __init__(self, model: LanguageModel, state: SequenceState, bound: Bound) -> None:
        self.tolerance = bound.tolerance
        self._model, self._state, self._block = model, state, bound.block
        self._loose = bound.loose
        self._settled = state.length

    def needs_state(self, context: Context, verdict: Verdict) -> bool:
        """Will `finish` write the end of the sequence again? Nothing may be pending then."""
        return verdict.doubtful or len(context) + len(verdict.path) - self._settled > self._loose

    def finish(self, context: Context, sampler: Sampler, verdict: Verdict) -> Decided:
        """The verdict with its last token decided.

        context: up to the anchor; left as it was found.  The state holds anchor and path before and afterwards; if a
        pass fails it may be shorter.
        """
        started = perf_counter()
        writes, mark = self.needs_state(context, verdict), len(context)
        context.extend(verdict.tokens[:-1])
        row, token = None, verdict.tokens[-1]
        try:
            if verdict.doubtful:
                row = self._run(context.tokens, scored=True)
                token = sampler.choose(row, context)
            elif writes:
                self._run(context.tokens, scored=False)
        finally:
            context.truncate(mark)
        record = RecheckRecord(
            int(verdict.doubtful), int(token != verdict.tokens[-1]), (perf_counter() - started) * 1e3
        )
        return Decided(replace(verdict, tokens=(*verdict.tokens[:-1], token)), row, record)

    def _run(self, tokens: TokenIds, *, scored: bool) -> Logits:
        """Write all tokens again from the last finished block on; [V] the row of the last one, if it is wanted."""
        ids = tokens.copy()
        self._state.truncate(self._settled)
        row = np.zeros(0, np.float32)
        while self._state.length < len(ids):
            piece = ids[self._settled : self._settled + self._block]
            is_last = self._settled + len(piece) == len(ids)
            rows = (len(piece) - 1,) if scored and is_last else ()
            step = Step(self._state, (HostTokens(piece),), chain_parents(self._state, len(piece)), rows)
            [scores] = self._model.forward([pad(step, WidthClass(self._block, self._block))])
            if rows:
                row = np.array(scores.rows((0,))[0])
            self._state.keep(range(len(piece)))
            if len(piece) == self._block:
                self._settled += self._block
        return row
