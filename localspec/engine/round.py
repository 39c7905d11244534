"""The only loop body: propose, verify, accept, commit. Plain decoding is the null drafter in it.

A round may carry several lanes (sequences); all are verified in one pass. The target is p, drafters
are q; whatever the drafters do, the acceptance rule alone decides what is emitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from localspec.context import Context
from localspec.engine import early
from localspec.engine.recheck import Recheck
from localspec.engine.stats import NOT_RECHECKED, RecheckRecord, RoundRecord, count_sources, sibling_ranks
from localspec.engine.width import pad
from localspec.protocols import (
    Drafter,
    DraftRequest,
    HostTokens,
    LanguageModel,
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
    """What one lane got out of a round. anchor: the token all guesses hang from.  sources: [N] who guessed."""

    verdict: Verdict
    record: RoundRecord
    logprobs: tuple[TokenLogprob, ...] | None
    anchor: int
    sources: tuple[str, ...]


def run_round(model: LanguageModel, lanes: Sequence[Lane], rooms: Sequence[Room]) -> list[RoundResult]:
    """One round of all lanes. rooms: per lane, how much may be proposed at most.

    If a pass or a rule raises, every lane is left as it was before the round; if a re-check does, no lane's context has
    changed, but their states may be shorter than before, or longer by what was accepted.
    """
    started = perf_counter()
    anchors = [lane.context.anchor for lane in lanes]
    replayed = [lane.state.num_replayed for lane in lanes]
    lengths = [lane.state.length for lane in lanes]
    try:
        trees = model.capabilities.trees and model.capabilities.exact_trees
        may_begin = [early.may_begin(model.capabilities, lane) for lane in lanes]
        proposals = [
            _propose(lane, room, trees, begins) for lane, room, begins in zip(lanes, rooms, may_begin, strict=True)
        ]
        drafted = perf_counter()
        taken = early.take(lanes, proposals)
        passes = taken or _verified(model, _steps(model, lanes, proposals))
        verified = perf_counter()
        on_host = model.capabilities.host_scores
        trials = [
            Trial(proposal, scores, lane.context, lane.sampler, lane.stop_tokens, on_host, _tolerance(lane))
            for lane, proposal, (scores, _) in zip(lanes, proposals, passes, strict=True)
        ]
        begun = all(may_begin) and _foreseen(lanes, proposals, rooms)
        if begun:
            widths = [min(proposal.width, room.nodes) for proposal, room in zip(proposals, rooms, strict=True)]
            early.begin(model, lanes, [trial.choose_early() for trial in trials], widths)
        verdicts = [lane.acceptance.accept(trial) for lane, trial in zip(lanes, trials, strict=True)]
        if not on_host:  # a lazy device is waited for in `accept`
            verified = perf_counter()
        logprobs = [_logprobs(trial, verdict) for trial, verdict in zip(trials, verdicts, strict=True)]
    except BaseException:
        for lane, length in zip(lanes, lengths, strict=True):
            lane.early.scores = None
            lane.state.keep(())
            if lane.state.length > length:  # the anchor, if the next pass had begun
                lane.state.truncate(length)
        raise
    width, verify_ms = sum(width for _, width in passes), (verified - drafted) * 1e3
    for lane, verdict in zip(lanes, verdicts, strict=True):
        if not begun:
            lane.state.keep([0, *(node + 1 for node in verdict.path)])
        lane.early.quiet = 0 if len(verdict.tree) else lane.early.quiet + 1
    rechecks = [_rechecked(lane, index, verdicts, logprobs) for index, lane in enumerate(lanes)]
    for lane, verdict in zip(lanes, verdicts, strict=True):
        lane.context.extend(verdict.tokens)
        outcome = Outcome(verdict.tree, verdict.path, verdict.tokens, width, verify_ms, taken is not None)
        lane.drafter.observe(outcome)
    host_ms = (perf_counter() - verified) * 1e3 - sum(recheck.ms for recheck in rechecks)
    times = ((drafted - started) * 1e3, verify_ms, host_ms)
    results = []
    for index, (lane, proposal, verdict) in enumerate(zip(lanes, proposals, verdicts, strict=True)):
        sources = proposal.sources or (proposal.source,) * proposal.num_nodes
        num_replayed = lane.state.num_replayed - replayed[index]
        record = _record(proposal, sources, verdict, width, times, num_replayed, rechecks[index])
        results.append(RoundResult(verdict, record, logprobs[index], anchors[index], sources))
    return results


def _verified(model: LanguageModel, steps: Sequence[Step]) -> list[tuple[Scores, int]]:
    """(scores, width) of each step."""
    return [(scores, step.num_tokens) for scores, step in zip(model.forward(steps), steps, strict=True)]


def _foreseen(lanes: Sequence[Lane], proposals: Sequence[Proposal], rooms: Sequence[Room]) -> bool:
    """Is another round to come, and will it most likely guess nothing in any lane, as this one and the last?"""
    return all(
        room.depth > 0 and lane.early.quiet > 0 and not proposal.num_nodes
        for lane, proposal, room in zip(lanes, proposals, rooms, strict=True)
    )


def _propose(lane: Lane, room: Room, trees: bool, begins_early: bool) -> Proposal:
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
    for name, values in (("log_q", proposal.log_q), ("sources", proposal.sources)):
        if values is not None and len(values) != proposal.num_nodes:
            raise ValueError(f"drafter {proposal.source!r} gave {len(values)} {name} for {proposal.num_nodes} nodes")
    return proposal


def _steps(model: LanguageModel, lanes: Sequence[Lane], proposals: Sequence[Proposal]) -> list[Step]:
    """Anchor and nodes of each lane, none narrower than the width class."""
    steps = []
    for lane, proposal in zip(lanes, proposals, strict=True):
        anchor = HostTokens(np.array([lane.context.anchor], np.int32))
        parents = np.concatenate([np.array([-1], np.int32), proposal.parents + 1])
        step = Step(lane.state, (anchor, *proposal.tokens), parents)
        steps.append(pad(step, lane.widths or model.capabilities.width_class, proposal.width))
    return steps


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
