"""A trace in words and numbers: one line per round, and the sums."""

from __future__ import annotations

from localspec.engine.stats import Stats
from localspec.trace.record import Round


def round_line(entry: Round) -> str:
    """What happened in a round, and what it cost."""
    parts = [f"{_count(len(entry.nodes), 'node')}, depth {entry.depth}"] if entry.nodes else ["nothing guessed"]
    parts += [f"{len(entry.path)} accepted, {len(entry.emitted)} emitted"]
    times = f"draft {entry.draft_ms:.1f} ms, verify {entry.verify_ms:.1f} ms, host {entry.host_ms:.1f} ms"
    parts += [times, f"{entry.width} wide"]
    if entry.num_replayed:
        parts.append(f"{_count(entry.num_replayed, 'token')} run again")
    if entry.recheck.num:
        outcome = "changed" if entry.recheck.num_changed else "confirmed"
        parts.append(f"last token re-checked and {outcome}, {entry.recheck.ms:.1f} ms")
    return " · ".join(parts)


def stats_lines(stats: Stats) -> list[tuple[str, str]]:
    """(label, value) of everything there is to say about all rounds."""
    lines = [
        ("rounds", f"{stats.num_rounds}, {_count(stats.num_tokens, 'token')}"),
        ("per round", f"{stats.accepted_length:.2f} tokens (bonus counted)"),
    ]
    if stats.num_drafted:
        lines.append(("accepted", f"{stats.num_accepted} of {_count(stats.num_drafted, 'guess', 'guesses')}"))
        lines.append(("by depth", " ".join(f"{rate:.0%}" for rate in stats.acceptance_by_depth)))
        by_source = [
            f"{source} {stats.accepted_by_source.get(source, 0)} of {drafted}"
            for source, drafted in stats.drafted_by_source.items()
        ]
        lines.append(("by source", ", ".join(by_source)))
    if stats.num_from_branches:
        lines.append(("by guess", branches(stats)))
    if stats.decode_ms:
        shares = [(stats.draft_ms, "draft"), (stats.verify_ms, "verify"), (stats.host_ms, "host")]
        shares += [(stats.recheck_ms, "re-check")] if stats.recheck_ms else []
        times = ", ".join(f"{name} {time:.0f} ms ({time / stats.decode_ms:.0%})" for time, name in shares)
        lines.append(("time", times))
    if stats.num_rechecked:
        lines.append(("re-checked", f"{_count(stats.num_rechecked, 'choice')}, {stats.num_changed} changed"))
    if stats.num_replayed:
        lines.append(
            ("run again", f"{_count(stats.num_replayed, 'token')} (the model's state cannot take tokens back)")
        )
    return lines


def branches(stats: Stats) -> str:
    """How many accepted tokens were the first guess for their place, the second, and so on."""
    first, *others = stats.accepted_by_rank
    return f"{first} were the first for their place, " + ", ".join(
        f"{amount} the {_ordinal(rank)}" for rank, amount in enumerate(others, start=2) if amount
    )


def _ordinal(number: int) -> str:
    names = {2: "second", 3: "third", 4: "fourth", 5: "fifth"}
    return names.get(number, f"{number}th")


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
