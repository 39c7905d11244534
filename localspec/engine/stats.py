"""What a run did, round by round: the numbers behind every claim that is printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from localspec.types import NodeIndices


@dataclass(frozen=True, slots=True)
class RecheckRecord:
    """What guarded decoding did in a round. num: choices that were looked at again.  num_changed: that became others.
    ms: what it took, passes that write the cache again included."""

    num: int = 0
    num_changed: int = 0
    ms: float = 0.0


NOT_RECHECKED = RecheckRecord()


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One round. Times in milliseconds; on a device that works lazily, waiting is counted as verify.

    source: who proposed; `drafted_by_source` and `accepted_by_source` count the nodes of each who guessed.
    accepted_ranks: per accepted node how many siblings stood before it (0: the first guess for its place).
    num_replayed: tokens the target ran again because its state cannot take tokens back.
    drafter_counts: what the drafter counted (`Proposal.counts`).  plain_because: why it proposed nothing.
    """

    source: str
    num_nodes: int
    num_accepted: int
    num_emitted: int
    width: int
    draft_ms: float
    verify_ms: float
    host_ms: float
    drafted_depth: int
    drafted_by_source: Mapping[str, int]
    accepted_by_source: Mapping[str, int]
    accepted_ranks: tuple[int, ...]
    num_replayed: int = 0
    drafter_counts: Mapping[str, int] = field(default_factory=dict)
    plain_because: str = ""
    recheck: RecheckRecord = NOT_RECHECKED


def count_sources(sources: Iterable[str]) -> dict[str, int]:
    """Source -> number of nodes, in order of first appearance."""
    counts: dict[str, int] = {}
    for source in sources:
        counts[source] = counts.get(source, 0) + 1
    return counts


def sibling_ranks(parents: NodeIndices, path: Sequence[int]) -> tuple[int, ...]:
    """Per node of `path` the number of its siblings that stand before it in the tree [N]."""
    if not path:
        return ()
    seen: dict[int, int] = {}  # parent -> children so far
    ranks = []
    for parent in parents[: path[-1] + 1].tolist():
        ranks.append(seen.get(parent, 0))
        seen[parent] = ranks[-1] + 1
    return tuple(ranks[node] for node in path)


@dataclass(slots=True)
class Stats:
    """Sums over the rounds of one answer."""

    num_rounds: int = 0
    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    host_ms: float = 0.0
    prefill_ms: float = 0.0
    num_prefilled: int = 0
    num_reused: int = 0
    num_replayed: int = 0
    num_rechecked: int = 0
    num_changed: int = 0
    recheck_ms: float = 0.0
    drafted_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    drafted_by_source: dict[str, int] = field(default_factory=dict)
    accepted_by_source: dict[str, int] = field(default_factory=dict)
    accepted_by_rank: list[int] = field(default_factory=list)
    widths: dict[int, int] = field(default_factory=dict)
    drafter_counts: dict[str, int] = field(default_factory=dict)
    plain_rounds: dict[str, int] = field(default_factory=dict)  # why nothing was proposed -> rounds

    def add(self, record: RoundRecord) -> None:
        """Count one round."""
        self.num_rounds += 1
        self.num_tokens += record.num_emitted
        self.num_drafted += record.num_nodes
        self.num_accepted += record.num_accepted
        self.draft_ms += record.draft_ms
        self.verify_ms += record.verify_ms
        self.host_ms += record.host_ms
        self.num_replayed += record.num_replayed
        self.num_rechecked += record.recheck.num
        self.num_changed += record.recheck.num_changed
        self.recheck_ms += record.recheck.ms
        self.widths[record.width] = self.widths.get(record.width, 0) + 1
        for counts, depth in (
            (self.drafted_by_depth, record.drafted_depth),
            (self.accepted_by_depth, record.num_accepted),
        ):
            counts.extend([0] * (depth - len(counts)))
            for level in range(depth):
                counts[level] += 1
        for source, amount in record.drafted_by_source.items():
            self.drafted_by_source[source] = self.drafted_by_source.get(source, 0) + amount
            accepted = record.accepted_by_source.get(source, 0)
            self.accepted_by_source[source] = self.accepted_by_source.get(source, 0) + accepted
        for name, amount in record.drafter_counts.items():
            self.drafter_counts[name] = self.drafter_counts.get(name, 0) + amount
        if record.plain_because:
            self.plain_rounds[record.plain_because] = self.plain_rounds.get(record.plain_because, 0) + 1
        for rank in record.accepted_ranks:
            self.accepted_by_rank.extend([0] * (rank + 1 - len(self.accepted_by_rank)))
            self.accepted_by_rank[rank] += 1

    @property
    def num_from_branches(self) -> int:
        """Accepted tokens that were not the first guess for their place: what a chain would have missed."""
        return sum(self.accepted_by_rank[1:])

    @property
    def accepted_length(self) -> float:
        """Tokens emitted per round, the target's own (bonus) token counted."""
        return self.num_tokens / self.num_rounds if self.num_rounds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of drafted tokens that were accepted."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    @property
    def decode_ms(self) -> float:
        """Time spent in rounds."""
        return self.draft_ms + self.verify_ms + self.host_ms + self.recheck_ms

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, prefill excluded."""
        return 1e3 * self.num_tokens / self.decode_ms if self.decode_ms else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Share of rounds that drafted to this depth in which the node at it was accepted."""
        pairs = zip(self.drafted_by_depth, self.accepted_by_depth + [0] * len(self.drafted_by_depth), strict=False)
        return [accepted / drafted for drafted, accepted in pairs]

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "num_rounds": self.num_rounds,
            "num_tokens": self.num_tokens,
            "accepted_length": round(self.accepted_length, 4),
            "num_drafted": self.num_drafted,
            "num_accepted": self.num_accepted,
            "acceptance_rate": round(self.acceptance_rate, 4),
            "acceptance_by_depth": [round(rate, 4) for rate in self.acceptance_by_depth],
            "drafted_by_source": self.drafted_by_source,
            "accepted_by_source": self.accepted_by_source,
            "accepted_by_rank": self.accepted_by_rank,
            "drafter_counts": self.drafter_counts,
            "plain_rounds": self.plain_rounds,
            "tokens_per_second": round(self.tokens_per_second, 2),
            "prefill_ms": round(self.prefill_ms, 3),
            "num_prefilled": self.num_prefilled,
            "num_reused": self.num_reused,
            "num_replayed": self.num_replayed,
            "num_rechecked": self.num_rechecked,
            "num_changed_by_recheck": self.num_changed,
            "draft_ms": round(self.draft_ms, 3),
            "verify_ms": round(self.verify_ms, 3),
            "host_ms": round(self.host_ms, 3),
            "recheck_ms": round(self.recheck_ms, 3),
            "widths": {str(width): count for width, count in sorted(self.widths.items())},
        }
