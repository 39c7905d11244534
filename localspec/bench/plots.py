"""Pictures of a speed benchmark: who is how fast, where the time goes, how deep guesses hold, and the grid.

Colours are those of Okabe and Ito, which people with any kind of colour vision tell apart; every mark also has its
name or number beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from localspec.bench.contenders import Kind
from localspec.bench.grid import family
from localspec.bench.summary import Row, Summary
from localspec.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLACK, _ORANGE, _SKY, _GREEN, _BLUE, _RED, _PINK = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
_GREY, _LIGHT = "#9a9a9a", "#dddddd"
_OURS = (_BLUE, _ORANGE, _GREEN, _PINK, _RED)
_BEST = "best of the grid"
_PARTS = {"draft": _ORANGE, "verify": _BLUE, "host": _BLACK}
_FAMILIES = {"chain": (_BLUE, "o"), "tree": (_GREEN, "s"), "lookup": (_ORANGE, "^")}
_PANEL_WIDTH = 4.0  # inches


def draw(summary: Summary, folder: Path) -> list[str]:
    """Write all pictures that the figures allow; their file names. Raises UsageError without matplotlib."""
    require()
    pictures: list[tuple[str, Callable[[Summary], Figure], bool]] = [
        ("speed.png", speed_figure, any(row.speedup is not None for row in _named(summary))),
        ("time.png", time_figure, any(row.split_ms for row in _named(summary))),
        ("depth.png", depth_figure, any(row.acceptance_by_depth for row in _named(summary))),
        ("grid.png", grid_figure, bool(summary.oracles)),
    ]
    written = []
    for name, figure, possible in pictures:
        if possible:
            figure(summary).savefig(folder / name, dpi=130)
            written.append(name)
    return written


def require() -> None:
    """Raise UsageError unless pictures can be drawn."""
    try:
        import matplotlib.figure  # noqa: F401 - asks only whether it is there
    except ImportError:
        raise UsageError(
            "pictures need the package matplotlib",
            fix='Install it with `pip install "localspec[bench]"`, or leave them out: --no-plots.',
        ) from None


def speed_figure(summary: Summary) -> Figure:
    """Bars with intervals: how many times as fast as plain decoding, the faster plain being the line at 1."""
    rows = [row for row in _named(summary) if row.speedup is not None]
    colours = _colours(rows)
    figure, axes = _panels(summary, rows, "How many times as fast as plain decoding?", _bar_heights)
    end = max(row.speedup.high or row.speedup.value for row in rows if row.speedup is not None)
    for axis, mine, names in _bars(summary, rows, axes):
        axis.axvline(1.0, color=_BLACK, linewidth=1, linestyle="--", zorder=0)
        for row in mine:
            place, interval = names.index(_label(row)), row.speedup
            assert interval is not None
            colour = _SKY if row.kind is Kind.GRID else colours[row.contender]
            axis.barh(place, interval.value, color=colour, height=0.68)
            if interval.low is not None and row.contender != row.against:
                axis.plot([interval.low, interval.high or 0.0], [place, place], color=_BLACK, linewidth=1.2)
            sure = interval.low is not None and interval.low > 1
            weight = "bold" if sure and row.contender != row.against else "normal"
            axis.text(end * 1.04, place, f"{interval.value:.2f}x", va="center", fontsize=8, weight=weight)
        _say_which(axis, mine, names)
        axis.set_xlim(0, end * 1.15)
    _say_below(
        figure,
        "dashed: the faster plain decoding. black lines: 95% interval over prompts. bold: faster beyond that interval",
    )
    return figure


def time_figure(summary: Summary) -> Figure:
    """Stacked bars: milliseconds per token in draft, verify and host."""
    rows = _named(summary)
    figure, axes = _panels(summary, rows, "Where does the time of a token go? (milliseconds)", _bar_heights)
    end = max(1e3 / row.tokens_per_second.value for row in rows)
    for axis, mine, names in _bars(summary, rows, axes):
        for row in mine:
            place, total, left = names.index(_label(row)), 1e3 / row.tokens_per_second.value, 0.0
            shares = {part: row.split_ms[part] / sum(row.split_ms.values()) for part in row.split_ms}
            for part, colour in _PARTS.items() if shares else ():
                axis.barh(place, shares[part] * total, left=left, color=colour, height=0.68)
                left += shares[part] * total
            if not shares:  # other libraries do not say
                axis.barh(place, total, color=_GREY, height=0.68)
            axis.text(end * 1.03, place, f"{total:.1f} ms", va="center", fontsize=8)
        axis.set_xlim(0, end * 1.2)
    untold = {"not told apart": _GREY} if any(not row.split_ms for row in rows) else {}
    _legend(figure, {**_PARTS, **untold})
    return figure


def depth_figure(summary: Summary) -> Figure:
    """Lines: of the rounds that guessed so deep, the share in which that guess was taken."""
    rows = [row for row in _named(summary) if row.acceptance_by_depth]
    colours = _colours(rows)
    figure, axes = _panels(summary, rows, "How often is a guess taken, by its depth?", lambda _: 1.7)
    deepest = max(len(row.acceptance_by_depth) for row in rows)
    for axis, mine in zip(axes, _by_panel(summary, rows), strict=True):
        for number, row in enumerate(mine):
            depths = range(1, len(row.acceptance_by_depth) + 1)
            shares = [100 * share for share in row.acceptance_by_depth]
            width = 1.6 + 1.4 * (len(mine) - 1 - number)  # equal lines stay visible below each other
            axis.plot(depths, shares, marker="o", markersize=3.5, color=colours[row.contender], linewidth=width)
        axis.set_xticks(range(1, deepest + 1))
        axis.set_xlim(0.7, deepest + 0.3)
        axis.set_ylim(-4, 105)
        axis.set_yticks([0, 50, 100], ["0%", "50%", "100%"], fontsize=8)
        axis.grid(axis="y", color=_LIGHT, linewidth=0.8)
    _legend(figure, {name: colours[name] for name in _own(rows)})
    _say_below(
        figure,
        "across: depth of the guess, 1 follows the last known token. up: share of the rounds that guessed so deep",
    )
    return figure


def grid_figure(summary: Summary) -> Figure:
    """Lines over the number of guesses, one per family; a ring around the best, dashes for what was asked by name."""
    rows = [row for row in summary.rows if row.kind is Kind.GRID and row.speedup is not None]
    named = [row for row in summary.rows if row.kind is Kind.CONFIG and row.speedup is not None]
    colours = dict(zip(dict.fromkeys(row.contender for row in named), (_RED, _PINK, _SKY, _BLACK), strict=False))
    best = {(oracle.workload, oracle.temperature): oracle.contender for oracle in summary.oracles}
    figure, axes = _panels(summary, rows, "Speed against plain, by guesses per round", lambda _: 1.9)
    numbers = sorted({family(row.contender)[1] for row in rows})
    for axis, mine in zip(axes, _by_panel(summary, rows), strict=True):
        for label, (colour, marker) in _FAMILIES.items():
            points = sorted(
                (family(row.contender)[1], row.speedup.value, row.contender)
                for row in mine
                if row.speedup is not None and family(row.contender)[0] == label
            )
            axis.plot([x for x, _, _ in points], [y for _, y, _ in points], color=colour, marker=marker, markersize=4)
            for x, y, contender in points:
                if mine and best.get((mine[0].workload, mine[0].temperature)) == contender:
                    axis.plot([x], [y], "o", markersize=12, markerfacecolor="none", markeredgecolor=_BLACK)
                    axis.annotate(f"{y:.2f}x", (x, y), (8, 4), textcoords="offset points", fontsize=8, weight="bold")
        here = [
            row for row in named if mine and (row.workload, row.temperature) == (mine[0].workload, mine[0].temperature)
        ]
        for row in here:
            if row.speedup is not None and row.contender in colours:
                axis.axhline(row.speedup.value, color=colours[row.contender], linewidth=1.4, linestyle=":")
        axis.axhline(1.0, color=_BLACK, linewidth=1, linestyle="--")
        axis.set_xscale("log", base=2)
        axis.set_xticks(numbers, [str(number) for number in numbers], fontsize=7)
        axis.minorticks_off()
        axis.margins(y=0.2)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", color=_LIGHT, linewidth=0.8)
    families = {
        label: colour
        for label, (colour, _) in _FAMILIES.items()
        if any(family(row.contender)[0] == label for row in rows)
    }
    _legend(figure, {**families, **{f"{name} (dotted)": colour for name, colour in colours.items()}})
    _say_below(figure, "dashed: plain decoding. ring: the best static configuration (no ring: plain is)")
    return figure


# ---------------------------------------------------------------- pieces


def _named(summary: Summary) -> list[Row]:
    """All but the grid, which has a picture of its own; without others the grid's best per panel."""
    rows = [row for row in summary.rows if row.kind is not Kind.GRID]
    best = {(oracle.workload, oracle.temperature, oracle.contender) for oracle in summary.oracles}
    have = {(row.workload, row.temperature, row.contender) for row in rows}
    return rows + [
        row
        for row in summary.rows
        if (row.workload, row.temperature, row.contender) in best
        and (row.workload, row.temperature, row.contender) not in have
    ]


def _label(row: Row) -> str:
    """Which bar a row is; the grid's best is another configuration in every panel."""
    return _BEST if row.kind is Kind.GRID else row.contender


def _say_which(axis: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    """The name of the grid's best into its bar, below the line of its interval."""
    if _BEST in names:
        best = next((row.contender for row in rows if row.kind is Kind.GRID), "(plain)")
        axis.text(0.02, names.index(_BEST) + 0.2, best, va="center", fontsize=6.5)


def _own(rows: Sequence[Row]) -> list[str]:
    """Names of our configurations, in order."""
    return list(dict.fromkeys(row.contender for row in rows if row.kind in (Kind.CONFIG, Kind.GRID)))


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """One per contender: ours in colour, plain ones light, other libraries in grey."""
    ours = {name: _OURS[number % len(_OURS)] for number, name in enumerate(_own(rows))}
    others = {Kind.PEER: _GREY, Kind.PLAIN: _LIGHT}
    return {row.contender: ours.get(row.contender) or others[row.kind] for row in rows}


def _by_panel(summary: Summary, rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each panel, workload by workload."""
    return [
        [row for row in rows if (row.workload, row.temperature) == (workload, temperature)]
        for workload in summary.workloads
        for temperature in summary.temperatures
    ]


def _bar_heights(most: int) -> float:
    return 0.5 + 0.24 * most


def _panels(
    summary: Summary, rows: Sequence[Row], title: str, height: Callable[[int], float]
) -> tuple[Figure, list[Axes]]:
    """A figure with a row of panels per workload and a column per temperature. height: inches of a panel, by the
    most rows that one holds."""
    from matplotlib.figure import Figure

    workloads, temperatures = summary.workloads, summary.temperatures
    most = max(len(mine) for mine in _by_panel(summary, rows))
    size = (2.4 + _PANEL_WIDTH * len(temperatures), 1.5 + height(most) * len(workloads))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=13, weight="bold", x=0.01, ha="left")
    grid = figure.subplots(len(workloads), len(temperatures), squeeze=False)
    for row, workload in enumerate(workloads):
        for column, temperature in enumerate(temperatures):
            axis = grid[row][column]
            axis.set_title(f"{workload}, temperature {temperature:g}", fontsize=9, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
    return figure, list(grid.flat)


def _bars(summary: Summary, rows: Sequence[Row], axes: Sequence[Axes]) -> Iterator[tuple[Axes, list[Row], list[str]]]:
    """(panel, its rows, the names of its bars from above), bars of a workload standing at the same height."""
    for number, (axis, mine) in enumerate(zip(axes, _by_panel(summary, rows), strict=True)):
        workload = summary.workloads[number // len(summary.temperatures)]
        names = list(dict.fromkeys(_label(row) for row in rows if row.workload == workload))
        is_first = number % len(summary.temperatures) == 0
        axis.set_yticks(range(len(names)), names if is_first else [""] * len(names), fontsize=8)
        axis.set_ylim(len(names) - 0.5, -0.5)
        yield axis, mine, names


def _legend(figure: Figure, colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=min(len(handles), 4), fontsize=8, frameon=False)


def _say_below(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=8, x=0.01, ha="left")
