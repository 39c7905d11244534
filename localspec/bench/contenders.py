"""Who takes part in a speed benchmark: plain decoding, configurations of ours, other libraries."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from enum import Enum
from time import perf_counter
from typing import Protocol

from localspec.bench.runs import Answer
from localspec.bench.workloads import Workload
from localspec.drafters import Nothing
from localspec.engine.session import Session
from localspec.engine.stats import RoundRecord
from localspec.exactness import AUTO as AUTO_EXACT
from localspec.exactness import Mode
from localspec.pair import Pair
from localspec.peers import Peer, PeerRequest
from localspec.sampling import SamplingParams

PLAIN = "plain"
PLAIN_ONE = "plain, width 1"


class Kind(Enum):
    """PLAIN: what speed is measured against.  CONFIG: asked for by name.  GRID: a static configuration of the grid.
    PEER: another library."""

    PLAIN = "plain"
    CONFIG = "config"
    GRID = "grid"
    PEER = "peer"


class Contender(Protocol):
    """One way of decoding."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Kind: ...

    def takes(self, workload: Workload) -> bool:
        """Can it run this workload?"""
        ...

    def answer(self, workload: Workload, tokens: Sequence[int], params: SamplingParams) -> Answer:
        """Answer one prompt, from nothing."""
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


class Own:
    """A configuration of ours. strangers: the pair with a draft model that was trained on something else.

    keep: hold its sessions open, so that it may learn from one answer for the next, as it would for a user. The
    static configurations of a grid have nothing to learn, and would need a cache of the target each.
    exact: what its sessions promise (`localspec.exactness`).
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        drafter: str,
        pair: Pair,
        strangers: Callable[[], Pair],
        *,
        keep: bool = True,
        exact: str = AUTO_EXACT,
    ) -> None:
        self.name, self.kind, self._exact = name, kind, exact
        self._drafter, self._pair, self._strangers, self._keep = drafter, pair, strangers, keep
        self._sessions: dict[bool, Session] = {}

    def takes(self, workload: Workload) -> bool:
        """Any."""
        return True

    def answer(self, workload: Workload, tokens: Sequence[int], params: SamplingParams) -> Answer:
        """Through a session that has forgotten the prompt before."""
        foreign = workload.foreign_draft and self._drafter != Nothing.name
        session = self._sessions.get(foreign)
        if session is None:
            session = (self._strangers() if foreign else self._pair).session(self._drafter, exact=self._exact)
        if self._keep:
            self._sessions[foreign] = session
        try:
            session.reset()
            rounds: list[RoundRecord] = []
            started = perf_counter()
            generation = session.stream(tokens, params, on_round=lambda result: rounds.append(result.record)).result
            elapsed_ms = (perf_counter() - started) * 1e3
        finally:
            if not self._keep:
                session.close()
        stats = generation.stats
        decode_ms = elapsed_ms - stats.prefill_ms  # all that a user waits for, turning tokens into text included
        return Answer(
            num_tokens=stats.num_tokens,
            num_timed=stats.num_tokens,
            decode_ms=decode_ms,
            digest=digest(generation.tokens),
            num_rounds=stats.num_rounds,
            num_drafted=stats.num_drafted,
            num_accepted=stats.num_accepted,
            draft_ms=stats.draft_ms,
            verify_ms=stats.verify_ms,
            host_ms=decode_ms - stats.draft_ms - stats.verify_ms,
            drafted_by_depth=stats.drafted_by_depth,
            accepted_by_depth=stats.accepted_by_depth,
            num_rechecked=stats.num_rechecked,
            recheck_ms=stats.recheck_ms,
            rounds=[_short(one) for one in rounds],
        )

    def close(self) -> None:
        """Close its sessions."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()


def _short(one: RoundRecord) -> list[float]:
    times = (round(ms, 4) for ms in (one.draft_ms, one.verify_ms, one.host_ms))
    return [one.num_nodes, one.num_accepted, one.width, *times]


class Rival:
    """Another library's way of decoding."""

    kind = Kind.PEER

    def __init__(self, peer: Peer, stop_tokens: frozenset[int]) -> None:
        self.name = peer.name
        self._peer, self._stop_tokens = peer, stop_tokens

    def takes(self, workload: Workload) -> bool:
        """All but those that would need another draft model."""
        return not workload.foreign_draft

    def answer(self, workload: Workload, tokens: Sequence[int], params: SamplingParams) -> Answer:
        """What came with the prompt is not timed."""
        stops = frozenset[int]() if params.ignore_eos else self._stop_tokens
        assert params.max_tokens is not None
        answer = self._peer.decode(PeerRequest(tokens, params.max_tokens, params.temperature, params.seed or 0, stops))
        return Answer(
            num_tokens=len(answer.tokens),
            num_timed=answer.num_timed,
            decode_ms=answer.decode_ms,
            digest=digest(answer.tokens),
            num_rounds=answer.num_rounds,
            num_drafted=answer.num_drafted,
        )

    def close(self) -> None:
        """Close the library's model."""
        self._peer.close()


def plain_contenders(pair: Pair, exact: str = AUTO_EXACT) -> list[Contender]:
    """Plain decoding that keeps the promise and, where that is not width 1 alone, width 1 without it, too."""

    def nobody() -> Pair:
        raise AssertionError("plain decoding has no draft model")

    found: list[Contender] = [Own(PLAIN, Kind.PLAIN, Nothing.name, pair, nobody, exact=exact)]
    exactness = pair.exactness(exact)
    if exactness.widths.min_width > 1 or exactness.bound is not None:
        found.append(Own(PLAIN_ONE, Kind.PLAIN, Nothing.name, pair, nobody, exact=Mode.OFF.value))
    return found


def digest(tokens: Sequence[int]) -> str:
    """Short and the same for the same tokens."""
    return f"{zlib.crc32(','.join(map(str, tokens)).encode()):08x}"
