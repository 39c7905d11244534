"""The host's own time per round, measured in whole rounds of the target in use."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter

import numpy as np

from localspec.context import Context
from localspec.engine.round import Lane, Room, run_round
from localspec.protocols import (
    DraftRequest,
    HostTokens,
    LanguageModel,
    Outcome,
    Proposal,
    SavedDraft,
    SequenceState,
    require_rewind,
)
from localspec.sampling import Sampler, SamplingParams
from localspec.verify import make_acceptance

_NUM = 3
_LONGEST = 0.5  # seconds
_MOST_ROUNDS = 20


class _Fixed:
    """A drafter that costs nothing: always the same chain."""

    name = "fixed"
    needs_trees = False

    def __init__(self, tokens: list[int]) -> None:
        self._proposal = Proposal(
            self.name, (HostTokens(np.array(tokens, np.int32)),), np.arange(-1, len(tokens) - 1, dtype=np.int32)
        )

    def attach(self, state: SequenceState) -> None: ...

    def begin(self, context: Context) -> None: ...

    def propose(self, request: DraftRequest) -> Proposal:
        return self._proposal

    def observe(self, outcome: Outcome) -> None: ...

    def save(self) -> tuple[SavedDraft, ...]:
        return ()

    def restore(self, saved: Sequence[SavedDraft]) -> None: ...

    def close(self) -> None: ...


def round_overhead(model: LanguageModel) -> float:
    """Milliseconds per greedy round besides the passes of target and draft model: proposing, choosing, keeping. One
    sequence of the model must be free. Takes half a second at most, or two rounds.
    Raises UnsupportedModelError where tokens cannot be taken back."""
    require_rewind(model)
    num = min(_NUM, model.capabilities.max_width - 1)
    anchor, *guesses = np.random.default_rng(0).integers(0, model.tokenizer.num_tokens, 1 + num).tolist()
    context = Context([anchor])
    state = model.open()
    rule, sampler = make_acceptance("walk"), Sampler(SamplingParams(temperature=0.0), 0)
    lane = Lane(state, context, _Fixed(guesses), sampler, rule, frozenset())
    own_ms, end = list[float](), perf_counter() + _LONGEST
    try:
        while len(own_ms) < 2 or (len(own_ms) < _MOST_ROUNDS and perf_counter() < end):
            if state.length + num + 2 > model.info.context_length:
                state.truncate(0)
                context.truncate(1)
            [result] = run_round(model, [lane], [Room(num, num)])
            own_ms.append(result.record.draft_ms + result.record.host_ms)
    finally:
        state.close()
    return median(own_ms[1:] or own_ms)
