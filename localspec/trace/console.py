"""A trace on the terminal: the rounds as a table, one of them as a tree.

Everything can be read without colour: the taken path is ticked, the target's own token is marked with a plus.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from localspec.errors import TraceFileError
from localspec.trace.file import Trace
from localspec.trace.layout import children_of
from localspec.trace.record import Round
from localspec.trace.summary import round_line, stats_lines
from localspec.trace.svg import odds_text, svg
from localspec.trace.text import head, quoted, tail

_MOST_ROUNDS = 40  # in the table
_TAKEN, _BONUS, _MISSED = "bold green", "bold yellow", "dim"
_TREE = {True: ("├─ ", "└─ ", "│  ", "✓"), False: ("|- ", "`- ", "|  ", "*")}  # by: can the terminal show them?


def show_trace(trace: Trace, number: int | None, picture: Path | None) -> None:
    """Print an overview, or the round of that number; write `picture`, an SVG of the round that is shown.

    Raises SettingError for a round that is not there, TraceFileError if the picture cannot be written.
    """
    chosen = trace.telling() if number is None else trace.round(number)
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    if number is None:
        _overview(console, trace)
    if chosen is not None:
        drawing = round_text(chosen, trace.text_before(chosen), len(trace.rounds), _shows_lines(console))
        console.print(drawing)
    if trace.note:
        console.print(f"note: {trace.note}", style="dim")
    if picture is not None:
        if chosen is None:
            raise TraceFileError("there is no round to draw")
        try:
            picture.write_text(svg(chosen, trace.text_before(chosen)), encoding="utf-8")
        except OSError as error:
            raise TraceFileError(f"cannot write {picture}", got=error.strerror) from None
        console.print(f"wrote {picture} (round {chosen.number})")


def _shows_lines(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _overview(console: Console, trace: Trace) -> None:
    header = trace.header
    pair = header.target if header.draft is None else f"{header.target} with {header.draft}"
    temperature = header.sampling.get("temperature")
    console.print(f"{pair} on {header.backend}, {header.device}")
    seed = f"seed {header.seed}" if header.seed is not None else "a new seed for each answer"
    rules = f"{header.acceptance} · exact {header.exact}"
    console.print(f"drafter {header.drafter} · {rules} · temperature {temperature!r} · {seed}\n")
    if not trace.rounds:
        console.print("no rounds")
        return
    console.print(rounds_table(trace, console.width if console.is_terminal else None))
    left = len(trace.rounds) - _MOST_ROUNDS
    if left > 0:
        console.print(f"and {left} more: --round N draws any of 1 to {len(trace.rounds)}", style="dim")
    console.print()
    for label, value in stats_lines(trace.stats()):
        console.print(f"{label:<10} {value}")
    console.print(f"\nthe most telling one (--round N draws another of 1 to {len(trace.rounds)}):")


def rounds_table(trace: Trace, num_cells: int | None) -> str:
    """The first rounds, one a line of at most so many cells."""
    lines = ["round  nodes  depth  accepted      ms  emitted"]
    for entry in trace.rounds[:_MOST_ROUNDS]:
        milliseconds = entry.draft_ms + entry.verify_ms + entry.host_ms + entry.recheck.ms
        numbers = f"{entry.number:5}  {len(entry.nodes):5}  {entry.depth:5}  {len(entry.path):8}  {milliseconds:6.1f}  "
        text = quoted(b"".join(token.raw for token in entry.emitted))
        lines.append(numbers + (text if num_cells is None else head(text, num_cells - len(numbers))))
    return "\n".join(lines)


def round_text(entry: Round, before: bytes, num_rounds: int, lines: bool) -> Text:
    """A round as a tree. before: what its answer said so far, with the anchor.  lines: more than ASCII?"""
    fork, last, pipe, tick = _TREE[lines]
    text = Text()
    text.append(f"round {entry.number} of {num_rounds}", style="bold")
    separator = " · " if lines else ", "
    text.append(f"{separator}{round_line(entry)}".replace(" · ", separator) + "\n")
    if len(before) > len(entry.anchor.raw):
        text.append(f'after "{tail(before, 60)}"\n', style=_MISSED)
    sources = entry.sources
    if len(sources) == 1:
        text.append(f"guessed by {sources[0]}; {tick} taken, + the model's own token (bonus)\n", style=_MISSED)
    elif sources:
        text.append(f"{tick} taken, + the model's own token (bonus)\n", style=_MISSED)
    text.append("\n")
    text.append(quoted(entry.anchor.raw), style="bold")
    text.append("  anchor\n", style=_MISSED)
    bonus_parent = entry.path[-1] if entry.path else -1
    children = children_of([node.parent for node in entry.nodes])
    todo: list[tuple[int | None, str, bool]] = []  # node (None: the bonus), what stands before it, is it the last?

    def visit(parent: int, indent: str) -> None:
        family: list[int | None] = [*children[parent], *([None] if parent == bonus_parent else [])]
        todo.extend((node, indent, node is family[-1]) for node in reversed(family))

    visit(-1, "")
    while todo:
        node, indent, is_last = todo.pop()
        text.append(indent + (last if is_last else fork), style=_MISSED)
        _append_node(text, entry, node, tick, named=len(sources) > 1)
        if node is not None:
            visit(node, indent + ("   " if is_last else pipe))
    return text


def _append_node(text: Text, entry: Round, index: int | None, tick: str, *, named: bool) -> None:
    if index is None:
        text.append(f"+ {quoted(entry.bonus.raw)}", style=_BONUS)
        text.append("  bonus\n", style=_MISSED)
        return
    node = entry.nodes[index]
    is_taken = index in entry.path
    text.append(f"{tick if is_taken else ' '} {quoted(node.text.raw)}", style=_TAKEN if is_taken else _MISSED)
    details = [odds_text(node.probability)] if node.probability is not None else []
    if named:
        details.append(node.source)
    text.append("".join(f"  {detail}" for detail in details) + "\n", style=_MISSED)
