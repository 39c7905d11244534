"""The measured curves as a picture. Needs matplotlib, which is an extra."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from localspec.errors import SettingError
from localspec.schedule.cost import Curve
from localspec.tune.options import described
from localspec.tune.result import CONTEXT, Candidate, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TICKS = (1, 2, 4, 8, 16, 32, 64, 128)
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#666666", "#f0e442")
"""Okabe and Ito's, which people of any colour vision can tell apart."""


def check_plot(file: Path) -> None:
    """Raise SettingError before an hour of measuring, not after it."""
    if find_spec("matplotlib") is None:
        raise SettingError("pictures need matplotlib", fix='Install it with: pip install "localspec[plot]"')
    if file.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise SettingError("--plot", got=file.name, expected="a name that ends in .png, .svg or .pdf")


def draw(result: Result, file: Path) -> None:
    """Three panels: the target's passes with the winning options by context; all sets of options at one context; the
    draft model's passes."""
    check_plot(file)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    winner = result.winner
    assert winner.costs is not None
    measured = [one for one in result.candidates if one.costs is not None]
    panels = 1 + (len(measured) > 1) + (winner.costs.draft is not None)
    figure = Figure(figsize=(1.0 + 4.8 * panels, 4.6), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    _by_context(axes.pop(0), winner.costs.target, f"target, {described(winner.options)}", winner)
    if len(measured) > 1:
        _by_options(axes.pop(0), measured, winner)
    if winner.costs.draft is not None:
        _by_context(axes.pop(0), winner.costs.draft, "draft model, the same options", None)
    figure.suptitle(
        f"{result.target} on {result.runtime.split(', build')[0]}, {winner.device}, {result.date}", fontsize=10
    )
    figure.savefig(file)


def _by_context(axes: Axes, curve: Curve, title: str, winner: Candidate | None) -> None:
    for number, (context, row) in enumerate(zip(curve.contexts, curve.ms, strict=True)):
        axes.plot(curve.widths, row, "o-", ms=3.5, color=_COLOURS[number], label=f"{context} tokens of context")
    if winner is not None and winner.best is not None and winner.best.num_nodes:
        width = 1 + winner.best.num_nodes
        axes.axvline(width, color="#999999", ls=":", lw=1)
        axes.text(width, 0.98, f" best: {width} wide", transform=axes.get_xaxis_transform(), va="top", fontsize=8)
    _dress(axes, title, curve.widths[-1])


def _by_options(axes: Axes, measured: list[Candidate], winner: Candidate) -> None:
    widest = 1
    for number, one in enumerate(sorted(measured, key=lambda one: -one.speed)):
        assert one.costs is not None
        curve = one.costs.target
        widths = [width for width in curve.widths if width <= 32]
        widest = max(widest, widths[-1])
        axes.plot(
            widths,
            [curve.at(width, CONTEXT) for width in widths],
            "o-" if one is winner else "o--",
            ms=3.5,
            color=_COLOURS[number % len(_COLOURS)],
            label=f"{described(one.options)}: {one.speed:.0f} tokens/s",
        )
    _dress(axes, f"target, options compared, {CONTEXT} tokens of context", widest)


def _dress(axes: Axes, title: str, widest: int) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set_title(title, fontsize=9)
    axes.set_xscale("log", base=2)
    ticks = [tick for tick in _TICKS if tick <= widest]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens in a pass")
    axes.set_ylabel("milliseconds")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")
