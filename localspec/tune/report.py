"""What `localspec tune` says."""

from __future__ import annotations

from localspec.schedule.classes import Classes
from localspec.schedule.score import LOOKUP_CHANCE, RANK_CHANCES
from localspec.tune.options import described
from localspec.tune.result import CONTEXT, Candidate, Result

_SHOWN = (1, 2, 4, 8, 16, 32)


def text_of(result: Result) -> str:
    """Markdown: the sets of options, the winner, its width classes."""
    pair = f"{result.target} with {result.draft}" if result.draft else f"{result.target} without a draft model"
    winner = result.winner
    lines = [
        f"{pair} on {result.runtime}, {winner.device}; measured {result.date} in {result.seconds:.0f} s",
        "",
        _assumption(result),
        "",
        "| options | tokens/s | plain | best round | ms by width " + " / ".join(map(str, _SHOWN)) + " |",
        "|---|---|---|---|---|",
        *(_row(one, one is winner) for one in sorted(result.candidates, key=lambda one: -one.worth)),
        "",
        *_words(winner),
    ]
    if len(result.candidates) > 1:
        lines.append(f"best: {described(winner.options)} (over a text of which half is as assumed, and half plain)")
    if result.joined is not None:
        lines.append(_advice(result.joined))
    return "\n".join(lines)


def _advice(one: Candidate) -> str:
    """What is not chosen by itself, for it rounds otherwise."""
    assert one.best is not None
    return (
        f"with --flash-attention --cache-type bf16 the class is {one.width_class}: {one.speed:.0f} tokens/s, plain "
        f"{one.best.plain_tokens_per_second:.0f}. Keys and values are then rounded to 8 bits instead of 11, so it is "
        "used only where both options are given."
    )


def _assumption(result: Result) -> str:
    if result.draft is None:
        return f"tokens/s are predicted, if each guess is accepted with a chance of {LOOKUP_CHANCE}; {_where()}"
    ranks = ", ".join(map(str, RANK_CHANCES))
    return f"tokens/s are predicted, if the first, second, ... guess for a place is accepted by {ranks}; {_where()}"


def _where() -> str:
    return f"{CONTEXT} tokens of context"


def _row(one: Candidate, won: bool) -> str:
    name = described(one.options) + (" (best)" if won else "" if one.is_finalist else " (in short)")
    if one.costs is None or one.best is None:
        return f"| {described(one.options)} | - | - | failed: {one.failed} | - |"
    curve = one.costs.target
    ms = " / ".join(f"{curve.at(width, CONTEXT):.1f}" for width in _SHOWN if width <= curve.widths[-1])
    return f"| {name} | {one.speed:.0f} | {one.best.plain_tokens_per_second:.0f} | {one.best} | {ms} |"


def _words(one: Candidate) -> list[str]:
    """What was found of the width classes, what they cost, and how sure the times are."""
    assert one.costs is not None and one.width_class is not None and one.classes is not None
    lines = [f"NOTE: {one.contradiction}"] if one.contradiction else []
    lines.append(f"widths of bit-identical rows: {_groups(one.classes)}; the target stays in {one.width_class}")
    outside = one.classes.against(one.width_class)
    for width, found in list(outside.items())[:1]:  # width 1, or of a class that is width 1 alone the next one
        if found.num_rows:
            lines.append(
                f"width {width} would have said something else in {found.other_best:.1%} of rows "
                f"({found.num_other_best} of {found.num_rows}, random tokens); its logits differ by up to "
                f"{found.largest:.2g}"
            )
    if one.plain_ratio is not None:
        lines.append(f"a plain pass in this class takes {one.plain_ratio:.2f} times as long as one of width 1")
    lines += _free(one) + _guarded(one)
    lines.append(f"the host's own time: {one.costs.overhead_ms:.2f} ms a round; {'; '.join(one.costs.notes)}")
    return lines


def _free(one: Candidate) -> list[str]:
    """What the class costs, against passes of any width."""
    if one.free is None or one.best is None:
        return []
    free, own = one.free, one.best
    line = f"with passes of any width (--exact off): {free.tokens_per_second:.0f} tokens/s by {free}, plain "
    line += f"{free.plain_tokens_per_second:.0f}; the class has {own.tokens_per_second / free.tokens_per_second:.0%}"
    return [line + f" of that, plain {own.plain_tokens_per_second / free.plain_tokens_per_second:.0%}"]


def _guarded(one: Candidate) -> list[str]:
    """What guarded decoding would re-check."""
    if one.bound is None:
        return []
    bound, (rows, other) = one.bound, one.bound.width_one
    line = f"guarded decoding (--exact guarded) re-checks choices nearer than {bound.tolerance.difference:.2g}: about "
    line += f"{bound.share_close:.0%} in the model's own text, temperatures 0 and 1; there width 1 would have said "
    return [line + f"something else than the reference in {other} of {rows} rows"]


def _groups(found: Classes) -> str:
    return str(found) if found.contexts else "not compared"
