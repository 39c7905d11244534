"""The list of pairs, one pair in full, and what it takes, on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from localspec.drafters import DRAFTERS, Nothing
from localspec.hub.catalog import KINDS, KnownPair
from localspec.hub.fit import Fit, verdict
from localspec.hub.selection import USABLE, Row, fits, memory_gb, missing

_WIDE = 118  # columns from which the table names target and quantisation as well
_OTHERS = 98  # columns that everything but the target takes then
_HERE = (("yes", "green"), ("too big", "yellow"), ("not yet", "dim"))


def _console(width: int | None) -> Console:
    return Console(width=width, markup=False, emoji=False, highlight=False)


def print_pairs(rows: Sequence[Row], memory: int, *, width: int | None = None) -> None:
    """A line per pair, and below it what the words mean. width: columns; None asks the terminal."""
    console = _console(width)
    if not rows:
        console.print("no pair matches; `localspec pairs` lists all")
        return
    console.print(_table(rows, console.width))
    console.print(Text(legend(rows, memory), style="dim"))


def _table(rows: Iterable[Row], width: int) -> Table:
    wide = width >= _WIDE
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("pair", overflow="fold")
    if wide:
        table.add_column("target", no_wrap=True, overflow="ellipsis", max_width=width - _OTHERS)
    table.add_column("drafter")
    table.add_column("backends")
    if wide:
        table.add_column("quantisation")
    table.add_column("memory", justify="right")
    table.add_column("published", justify="right")
    table.add_column("here")
    if wide:
        table.add_column("tested")
    for row in rows:
        pair, choice = row.pair, row.choice
        word, style = _HERE[row.rank]
        cells: list[str | Text] = [pair.name + (" ?" if pair.doubt else ""), pair.drafter, _backends(pair)]
        cells += [memory_text(row), ratio_text(pair), Text(word, style=style)]
        if wide:
            cells.insert(1, pair.target)
            cells.insert(4, choice.quantization)
            cells.append("yes" if pair.tested else "no")
        table.add_row(*cells, style="dim" if row.rank == 2 else None)
    return table


def _backends(pair: KnownPair) -> str:
    return ", ".join(dict.fromkeys(choice.backend for choice in pair.choices))


def memory_text(row: Row) -> str:
    """GB, with a tilde where it is estimated."""
    need = memory_gb(row.pair, row.choice)
    return f"{'~' if row.choice.memory is None else ''}{need:.{0 if need >= 9.95 else 1}f} GB"


def ratio_text(pair: KnownPair) -> str:
    """Published speed against plain decoding, lowest to highest."""
    if pair.ratio is None:
        return "-"
    low, high = (f"{value:.1f}" for value in pair.ratio)
    return f"{high}x" if low == high else f"{low}-{high}x"


def legend(rows: Sequence[Row], memory: int) -> str:
    """What the columns mean, and what was not tested."""
    num_tested = sum(row.pair.tested for row in rows)
    published = "Published speeds are their sources' own, against plain decoding: read, not repeated here."
    lines = [
        f"{len(rows)} pair{'s' if len(rows) > 1 else ''}, {num_tested or 'none'} tested here. {published}",
        f"here, with {memory / 2**30:.0f} GB of memory, of which {1 - USABLE:.0%} is left for the rest:",
        "  yes      runs with this version and fits",
        "  too big  runs with this version",
        f"  not yet  needs a drafter that this version lacks; it has {known_drafters()}",
        "~ estimated from parameters and quantisation. `localspec pairs show NAME` tells more.",
    ]
    if any(row.pair.doubt for row in rows):
        lines.append("? doubtful; `show` says why.")
    return "\n" + "\n".join(lines)


def known_drafters() -> str:
    """Names of the drafters of this version that guess."""
    return ", ".join(name for name in DRAFTERS if name != Nothing.name)


def print_pair(pair: KnownPair, memory: int, *, width: int | None = None) -> None:
    """Everything that is known about one pair."""
    console = _console(width)
    console.print(Text.assemble((pair.name, "bold"), f"  family {pair.family}, from {pair.origin}\n"), soft_wrap=False)
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    lacks = missing(pair)
    facts.add_row("target", f"{pair.target}, {_billions(pair.parameters)} parameters")
    size = f", {_billions(pair.draft_parameters)} parameters" if pair.draft_parameters else ""
    facts.add_row("drafter", f"{pair.draft}{size}, {pair.tokenizer} tokenizer")
    facts.add_row("kind", f"{pair.drafter}: {KINDS[pair.drafter]}")
    facts.add_row("runs", f"no: {lacks} (it has {known_drafters()})" if lacks else "yes")
    facts.add_row("tested here", "yes" if pair.tested else "no: read, not tested here")
    facts.add_row("source", pair.source)
    for label, text in (("note", pair.note), ("doubtful", pair.doubt)):
        if text:
            facts.add_row(label, text)
    for speed in pair.speeds:
        low, high = speed.ratio
        ratio = f"{high:g}x" if low == high else f"{low:g}x to {high:g}x"
        facts.add_row("published", f"{ratio} on {speed.hardware}{_after(speed.conditions)} ({speed.source})")
    for choice in pair.choices:
        row = Row(pair, choice, fits(pair, choice, memory), lacks)
        room = "fits" if row.fits else "too big"
        facts.add_row("", "")
        facts.add_row(choice.backend, f"{choice.quantization}, {memory_text(row)}, {room} in {memory / 2**30:.0f} GB")
        facts.add_row("", f"target  {choice.target}")
        facts.add_row("", f"drafter {choice.draft or 'in the target'}")
        for head in choice.heads:
            facts.add_row("", f"head    {head}")
    for task in pair.tasks:
        facts.add_row(f"task {task.name}", f"{task.backend}, drafter {task.draft}")
    console.print(facts)
    if not lacks:
        console.print(f"\nlocalspec chat --pair {pair.name}")


def _billions(parameters: float) -> str:
    return f"{parameters:g}B" if parameters < 1000 else f"{parameters / 1000:g}T"


def _after(text: str) -> str:
    return f", {text}" if text else ""


def print_fit(fit: Fit, *, width: int | None = None) -> None:
    """A memory plan as a table, what is doubtful about the pair, and the verdict."""
    plan = fit.plan
    table = Table(box=None, pad_edge=False)
    for name in ("model", "what", "MiB"):
        table.add_column(name, justify="right" if name == "MiB" else "left")
    for line in plan.lines:
        times = f", {line.times} conversations" if line.times > 1 else ""
        table.add_row(line.part, line.what + times, f"{line.total / 2**20:,.1f}")
    table.add_row("", Text("together", "bold"), Text(f"{plan.total / 2**20:,.1f}", "bold"))
    console = _console(width)
    console.print(f"with {plan.context} tokens of context")
    console.print(table)
    for note in (*fit.notes, *plan.notes):
        console.print(f"note: {note}", soft_wrap=True)
    console.print(Text(verdict(fit), "green" if plan.fits else "red"), soft_wrap=True)
