"""The only loop body: propose, verify, accept, commit. Plain decoding is the null drafter in it.

A round may carry several lanes (sequences); all are verified in one pass. The target is p, drafters
are q; whatever the drafters do, the acceptance rule alone decides what is emitted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Protocol

import numpy as np

from localspec.constraint import obey
from localspec.context import Context
from localspec.engine import early
from localspec.engine.recheck import Recheck
from localspec.engine.stats import NOT_RECHECKED, RecheckRecord, RoundRecord, count_sources, sibling_ranks
from localspec.engine.width import pad, pass_width
from localspec.protocols import (
    Drafter,
    DraftRequest,
    HostTokens,
    LanguageModel,
    Load,
    Outcome,
    Proposal,
    Scores,
    SequenceState,
    Step,
    WidthClass,
)
from localspec.ranking import top_ids
from localspec.sampling import Sampler, Tolerance, log_softmax_at
from localspec.tree.mask import is_chain
from localspec.types import Logits
from localspec.verify import Acceptance, Trial, Verdict

_WAITED = 5e-5  # seconds; reading takes less where nothing is waited for
_MOST_DRAWN = 128  # positions in a round whose noise is drawn ahead; more would push out what was drawn (`noise.py`)


@dataclass(frozen=True, slots=True)
class Lane:
    """One sequence's part in its rounds. `state` holds the context but for its last token, the anchor.

    widths: what its passes are padded into [default: the model's class].  recheck: decides what is too close to call
    (guarded decoding); None: every row decides.  early: the next pass, where it has begun. Whoever ends a lane, or
    touches its state between rounds, drops it.
    """

    state: SequenceState
    context: Context
    drafter: Drafter
    sampler: Sampler
    acceptance: Acceptance
    stop_tokens: frozenset[int]
    widths: WidthClass | None = None
    recheck: Recheck | None = None
    early: early.Early = field(default_factory=early.Early)


@dataclass(frozen=True, slots=True)
class Room:
    """How much may be proposed for a lane: nodes in the tree, and tokens on its longest path."""

    nodes: int
    depth: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the model's own distribution, and the best alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What one lane got out of a round. anchor: the token all guesses hang from.  sources: [N] who guessed.
    failure: what went wrong when the lane's outcome was committed; its state is then of no use any more."""

    verdict: Verdict
    record: RoundRecord
    logprobs: tuple[TokenLogprob, ...] | None
    anchor: int
    sources: tuple[str, ...]
    failure: Exception | None = None


class Shared(Protocol):
    """What lanes have in common: one pass. Tells drafters how many they are, and settles what is verified of all."""

    @property
    def load(self) -> Load:
        """For the requests to drafters."""
        ...

    def ask(self, works: Sequence[Callable[[], Proposal]]) -> list[Proposal]:
        """Let all drafters work, one after another or side by side; their proposals in order."""
        ...

    def settle(self, proposals: Sequence[Proposal]) -> tuple[list[tuple[int, ...] | None], int]:
        """Per lane the nodes of its proposal that are verified (None: all); and how wide each lane's part of the pass
        is at least."""
        ...

    def observe(self, outcomes: Sequence[Outcome], round_ms: float) -> None:
        """What became of all of them, and how long the round took."""
        ...


def run_round(
    model: LanguageModel, lanes: Sequence[Lane], rooms: Sequence[Room], shared: Shared | None = None
) -> list[RoundResult]:
    """One round of all lanes. rooms: per lane, how much may be proposed at most.  shared: settles what lanes verify
    of their proposals; without it each drafter decides for itself.

    If a drafter, a pass or a rule raises, every lane is left as it was before the round. A lane that fails after
    that, when its last token is re-checked or its outcome committed, does so alone: see `RoundResult.failure`.
    """
    started = perf_counter()
    anchors = [lane.context.anchor for lane in lanes]
    replayed = [lane.state.num_replayed for lane in lanes]
    lengths = [lane.state.length for lane in lanes]
    try:
        trees = model.capabilities.trees and model.capabilities.exact_trees
        # where rounds are shared lanes come and go, so no pass is begun ahead
        may_begin = [shared is None and early.may_begin(model.capabilities, lane) for lane in lanes]
        load = None if shared is None else shared.load
        works = [
            partial(_propose, lane, room, trees, begins, load)
            for lane, room, begins in zip(lanes, rooms, may_begin, strict=True)
        ]
        proposals = [work() for work in works] if shared is None else shared.ask(works)
        kept: list[tuple[int, ...] | None] = [None] * len(lanes)
        if shared is not None:
            kept, at_least = shared.settle(proposals)
            proposals = [
                replace(one if nodes is None else one.only(nodes), width=max(one.width, at_least))
                for one, nodes in zip(proposals, kept, strict=True)
            ]
        drafted = perf_counter()
        taken = early.take(lanes, proposals)
        if taken is None:
            steps = _steps(model, lanes, proposals)
            scores, width = model.forward(steps), pass_width(model.capabilities, steps)
        else:
            scores, width = taken
        on_host = model.capabilities.host_scores
        verify_ms = _wait(model, lanes, proposals, scores, drafted)
        trials = [
            Trial(proposal, rows, lane.context, lane.sampler, lane.stop_tokens, on_host, _tolerance(lane))
            for lane, proposal, rows in zip(lanes, proposals, scores, strict=True)
        ]
        begun = all(may_begin) and _foreseen(lanes, proposals, rooms)
        if begun:
            widths = [min(proposal.width, room.nodes) for proposal, room in zip(proposals, rooms, strict=True)]
            early.begin(model, lanes, [trial.choose_early() for trial in trials], widths)
        verdicts = [lane.acceptance.accept(trial) for lane, trial in zip(lanes, trials, strict=True)]
        if not on_host:  # a lazy device is waited for in `accept`
            verify_ms = (perf_counter() - drafted) * 1e3
        logprobs = [_logprobs(trial, verdict) for trial, verdict in zip(trials, verdicts, strict=True)]
    except BaseException:
        for lane, length in zip(lanes, lengths, strict=True):
            lane.early.scores = None
            lane.state.keep(())
            if lane.state.length > length:  # the anchor, if the next pass had begun
                lane.state.truncate(length)
        raise
    verified = drafted + verify_ms * 1e-3
    committed = []
    for index, (lane, nodes) in enumerate(zip(lanes, kept, strict=True)):
        about = _Pass(width, verify_ms, taken is not None, begun, nodes)
        committed.append(_commit(lane, index, verdicts, logprobs, about))
    if shared is not None:
        shared.observe([outcome for outcome, _, _ in committed], (perf_counter() - started) * 1e3)
    host_ms = (perf_counter() - verified) * 1e3 - sum(recheck.ms for _, recheck, _ in committed)
    times = ((drafted - started) * 1e3, verify_ms, host_ms)
    results = []
    for index, (lane, proposal) in enumerate(zip(lanes, proposals, strict=True)):
        sources = proposal.sources or (proposal.source,) * proposal.num_nodes
        num_replayed = lane.state.num_replayed - replayed[index]
        _, recheck, failure = committed[index]
        record = _record(proposal, sources, verdicts[index], width, times, num_replayed, recheck)
        results.append(RoundResult(verdicts[index], record, logprobs[index], anchors[index], sources, failure))
    return results


def _wait(
    model: LanguageModel, lanes: Sequence[Lane], proposals: Sequence[Proposal], scores: Sequence[Scores], drafted: float
) -> float:
    """Do what was put off until now, then wait for the scores where they come to the host by themselves; milliseconds
    of the pass, which began at `drafted`."""
    launched = perf_counter()
    for proposal in proposals:
        if proposal.meanwhile is not None:
            proposal.meanwhile()
    if model.capabilities.runs_ahead:
        _draw_ahead(lanes, proposals, model.vocab_size)
    free = perf_counter()
    if model.capabilities.host_scores:
        for one in scores:
            one.rows((0,))
    done = perf_counter()
    own = 0.0 if done - free > _WAITED else free - launched  # the pass was over before, so that was no part of it
    return (done - drafted - own) * 1e3


def _draw_ahead(lanes: Sequence[Lane], proposals: Sequence[Proposal], vocab_size: int) -> None:
    """The noise that choosing the tokens of this pass and guessing the next ones will ask for: the host has nothing
    else to do while a device runs the pass, and noise depends on positions alone."""
    left = _MOST_DRAWN
    for lane, proposal in zip(lanes, proposals, strict=True):
        levels = int(proposal.depth().max(initial=-1)) + 1
        count = min(2 * (levels + 1), left)
        left -= count
        lane.sampler.draw_ahead(len(lane.context), count, vocab_size)


@dataclass(frozen=True, slots=True)
class _Pass:
    """What a lane's outcome says of its pass. begun: the next one has begun, so the anchor is committed."""

    width: int
    verify_ms: float
    begun_early: bool
    begun: bool
    kept: tuple[int, ...] | None


def _commit(
    lane: Lane,
    index: int,
    verdicts: list[Verdict],
    logprobs: list[tuple[TokenLogprob, ...] | None],
    about: _Pass,
) -> tuple[Outcome, RecheckRecord, Exception | None]:
    """Have a lane's last token decided where its own row could not, and commit what was accepted; and what went
    wrong, if anything did: other lanes are committed nevertheless."""
    recheck, failure = NOT_RECHECKED, None
    try:
        if not about.begun:
            lane.state.keep([0, *(node + 1 for node in verdicts[index].path)])
        recheck = _rechecked(lane, index, verdicts, logprobs)
    except Exception as error:
        failure = error
    verdict = verdicts[index]
    outcome = Outcome(
        verdict.tree, verdict.path, verdict.tokens, about.width, about.verify_ms, about.begun_early, about.kept
    )
    if failure is None:
        try:
            lane.early.quiet = 0 if len(verdict.tree) else lane.early.quiet + 1
            lane.context.extend(verdict.tokens)
            lane.drafter.observe(outcome)
        except Exception as error:
            failure = error
    return outcome, recheck, failure


def _foreseen(lanes: Sequence[Lane], proposals: Sequence[Proposal], rooms: Sequence[Room]) -> bool:
    """Is another round to come, and will it most likely guess nothing in any lane, as this one and the last?"""
    return all(
        room.depth > 0 and lane.early.quiet > 0 and not proposal.num_nodes
        for lane, proposal, room in zip(lanes, proposals, rooms, strict=True)
    )


def _propose(lane: Lane, room: Room, trees: bool, begins_early: bool, load: Load | None) -> Proposal:
    """The drafter's proposal, held to the request: no drafter may widen a pass or draw in secret."""
    request = DraftRequest(
        context=lane.context,
        max_nodes=room.nodes,
        max_depth=room.depth,
        sampler=lane.sampler,
        stop_tokens=lane.stop_tokens,
        trees=trees,
        needs_law=lane.acceptance.needs_law,
        begins_early=begins_early,
        load=load,
    )
    proposal = lane.drafter.propose(request)
    if proposal.num_nodes > room.nodes:
        raise ValueError(f"drafter {proposal.source!r} proposed {proposal.num_nodes} nodes, at most {room.nodes} fit")
    levels = int(proposal.depth().max(initial=-1)) + 1
    if proposal.width > room.nodes + 1:
        raise ValueError(f"drafter {proposal.source!r} asked for {proposal.width} tokens, {room.nodes + 1} fit")
    if levels > room.depth:
        raise ValueError(f"drafter {proposal.source!r} proposed {levels} levels, at most {room.depth} fit")
    if sum(len(segment) for segment in proposal.tokens) != proposal.num_nodes:
        raise ValueError(f"drafter {proposal.source!r} proposed tokens and parents of different number")
    if not (trees or is_chain(proposal.parents)):
        raise ValueError(f"drafter {proposal.source!r} proposed a tree, and this target verifies chains only")
    if proposal.laws is not None and len(proposal.laws) != proposal.num_nodes:
        raise ValueError(f"drafter {proposal.source!r} gave {len(proposal.laws)} laws for {proposal.num_nodes} nodes")
    for name, values in (("log_q", proposal.log_q), ("sources", proposal.sources), ("reach", proposal.reach)):
        if values is not None and len(values) != proposal.num_nodes:
            raise ValueError(f"drafter {proposal.source!r} gave {len(values)} {name} for {proposal.num_nodes} nodes")
    return obey(proposal, request)


def _steps(model: LanguageModel, lanes: Sequence[Lane], proposals: Sequence[Proposal]) -> list[Step]:
    """Anchor and nodes of each lane, none narrower than the width class. Where they run as one pass the backend sees
    to that."""
    steps = []
    for lane, proposal in zip(lanes, proposals, strict=True):
        anchor = HostTokens(np.array([lane.context.anchor], np.int32))
        parents = np.concatenate([np.array([-1], np.int32), proposal.parents + 1])
        step = Step(lane.state, (anchor, *proposal.tokens), parents)
        steps.append(step)
    batched = model.capabilities.batches and len(steps) > 1
    return [
        pad(step, WidthClass() if batched else lane.widths or model.capabilities.width_class, proposal.width)
        for step, lane, proposal in zip(steps, lanes, proposals, strict=True)
    ]


def _tolerance(lane: Lane) -> Tolerance | None:
    return None if lane.recheck is None else lane.recheck.tolerance


def _rechecked(
    lane: Lane, index: int, verdicts: list[Verdict], logprobs: list[tuple[TokenLogprob, ...] | None]
) -> RecheckRecord:
    """Have a lane's last token decided, in `verdicts` and `logprobs`, where its own row could not."""
    if lane.recheck is None:
        return NOT_RECHECKED
    if lane.recheck.is_due(lane.context, verdicts[index]):
        lane.early.drop(lane.state)
    decided = lane.recheck.finish(lane.context, lane.sampler, verdicts[index])
    verdicts[index] = decided.verdict
    known, count = logprobs[index], lane.sampler.params.logprobs
    if decided.row is not None and known is not None and count is not None:
        logprobs[index] = (*known[:-1], _token_logprob(decided.row, decided.verdict.tokens[-1], count))
    return decided.record


def _logprobs(trial: Trial, verdict: Verdict) -> tuple[TokenLogprob, ...] | None:
    count = trial.sampler.params.logprobs
    if count is None:
        return None
    read = trial.row_reader()
    return tuple(
        _token_logprob(read(row), token, count) for row, token in zip(verdict.rows, verdict.tokens, strict=True)
    )


def _token_logprob(row: Logits, token: int, count: int) -> TokenLogprob:
    best = [int(i) for i in top_ids(row, count)] if count else []
    values = log_softmax_at(row, [token, *best])
    return TokenLogprob(token, values[0], tuple(zip(best, values[1:], strict=True)))


def _record(
    proposal: Proposal,
    sources: tuple[str, ...],
    verdict: Verdict,
    width: int,
    times: tuple[float, float, float],
    num_replayed: int,
    recheck: RecheckRecord,
) -> RoundRecord:
    return RoundRecord(
        source=proposal.source,
        num_nodes=len(sources),
        num_accepted=len(verdict.path),
        num_emitted=len(verdict.tokens),
        width=width,
        draft_ms=times[0],
        verify_ms=times[1],
        host_ms=times[2],
        drafted_depth=int(verdict.tree.depth.max(initial=-1)) + 1,
        drafted_by_source=count_sources(sources),
        accepted_by_source=count_sources(sources[node] for node in verdict.path),
        accepted_ranks=sibling_ranks(verdict.tree.parent, verdict.path),
        num_replayed=num_replayed,
        drafter_counts=proposal.counts,
        plain_because=proposal.because,
        recheck=recheck,
    )
