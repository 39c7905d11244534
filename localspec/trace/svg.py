"""One round as a picture: a self-contained SVG, from left to right, the anchor first.

All colours are given, the background too, so it looks the same on light and dark pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from rich.cells import cell_len

from localspec.trace.layout import tidy_rows
from localspec.trace.record import Round, TokenText
from localspec.trace.summary import round_line
from localspec.trace.text import clipped, quoted, tail, visible

_CELL = 7.9  # of a 13 px monospace font
_SMALL_CELL = 6.7  # of an 11 px one
_BOX, _PITCH = 28.0, 44.0  # height of a box, and of a row
_MARGIN, _TOP = 24.0, 92.0
_ODDS = 42.0  # of a probability and the air around it
_MOST_CELLS = 18
_SOURCES = ("#2563eb", "#c026d3", "#0e7490", "#c2410c", "#4d7c0f", "#7c3aed")

_STYLE = """
text { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px }
.title { font-size: 15px; font-weight: 700; fill: #0f172a }
.small { font-size: 11px; fill: #475569 }
.blank { fill-opacity: 0.75 }
rect { fill: #f8fafc; stroke: #cbd5e1; stroke-width: 1.25 }
.background { fill: #ffffff; stroke: #e2e8f0 }
.node text { fill: #64748b }
.taken rect { fill: #dcfce7; stroke: #15803d; stroke-width: 2 }
.taken text { fill: #14532d; font-weight: 700 }
.anchor rect { fill: #1e293b; stroke: #1e293b }
.anchor text { fill: #ffffff }
.bonus rect { fill: #fef3c7; stroke: #b45309; stroke-width: 2; stroke-dasharray: 5 3 }
.bonus text { fill: #78350f; font-weight: 700 }
.node text.caption { font-size: 11px; font-weight: 400; fill: #475569 }
.edge { fill: none; stroke: #cbd5e1; stroke-width: 1.5 }
.edge.taken { stroke: #15803d; stroke-width: 3 }
.edge.bonus { stroke: #b45309; stroke-width: 2; stroke-dasharray: 5 3 }
.odds { font-size: 11px; fill: #64748b; text-anchor: end; paint-order: stroke; stroke: #ffffff; stroke-width: 4px }
.odds.taken { fill: #14532d; font-weight: 700 }
"""


@dataclass(frozen=True, slots=True)
class _Box:
    """A node as it will be drawn. kind: anchor, taken, missed or bonus."""

    name: str
    token: TokenText
    parent: int
    kind: str
    odds: str
    colour: str | None
    hint: str

    @property
    def width(self) -> float:
        cells = sum(cell_len(text) for text, _ in self.parts)
        return max(44.0, cells * _CELL + 20.0 + (12.0 if self.colour else 0.0))

    @property
    def parts(self) -> list[tuple[str, bool]]:
        return clipped(visible(self.token.raw), _MOST_CELLS) or [("∅", True)]


def svg(entry: Round, before: bytes = b"") -> str:
    """The picture. before: what the answer said so far, the anchor included; shown above it."""
    boxes = _boxes(entry)
    parents = [box.parent for box in boxes]
    depth = _depths(parents)
    room = _ODDS if any(box.odds for box in boxes) else 6.0  # before each box, where its edge runs level
    gap = room + 34.0
    lefts = _columns(boxes, depth, gap)
    tops = [_TOP + row * _PITCH for row in tidy_rows(parents)]
    title = f"Round {entry.number}"
    said = f"after “{tail(before, 72)}”" if len(before) > len(entry.anchor.raw) else ""
    key = _legend(entry, boxes)
    width = max(
        max(lefts[depth[i]] + box.width for i, box in enumerate(boxes)),
        _MARGIN + cell_len(round_line(entry)) * _SMALL_CELL,
        _MARGIN + cell_len(said) * _SMALL_CELL,
        _MARGIN + key[1],
    )
    width, height = width + _MARGIN, max(tops) + _BOX + 64.0
    ends = [(lefts[depth[i]], tops[i] + _BOX / 2) for i in range(len(boxes))]  # where edges arrive
    below = sorted(range(1, len(boxes)), key=lambda i: boxes[i].kind != "missed")  # the taken path lies on top
    edges = [_edge(boxes[i], boxes[parents[i]].width, ends[parents[i]], ends[i], room) for i in below]
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" style="color-scheme: light">',
        f"<title>{title}: {escape(round_line(entry))}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="background" x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="10"/>',
        f'<text class="title" x="{_MARGIN}" y="34">{title}</text>',
        f'<text class="small" x="{_MARGIN}" y="53">{escape(round_line(entry))}</text>',
        f'<text class="small" x="{_MARGIN}" y="71" xml:space="preserve">{escape(said)}</text>' if said else "",
        *edges,
        *(_node(box, lefts[depth[i]], tops[i]) for i, box in enumerate(boxes)),
        f'<g transform="translate({_MARGIN} {height - 20:.0f})">{key[0]}</g>',
        "</svg>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _boxes(entry: Round) -> list[_Box]:
    """The anchor, the nodes and the bonus, each after its parent."""
    sources = entry.sources
    colours = dict(zip(sources, _SOURCES * len(sources), strict=False)) if len(sources) > 1 else {}
    boxes = [_Box("anchor", entry.anchor, -1, "anchor", "", None, "the anchor")]
    for index, node in enumerate(entry.nodes):
        kind = "taken" if index in entry.path else "missed"
        odds = "" if node.probability is None else odds_text(node.probability)
        hint = f"guessed by {node.source}" + (f", chance {odds}" if odds else "")
        boxes.append(_Box(str(index), node.text, node.parent + 1, kind, odds, colours.get(node.source), hint))
    last = entry.path[-1] + 1 if entry.path else 0
    boxes.append(_Box("bonus", entry.bonus, last, "bonus", "", None, "the model's own token (the bonus)"))
    return boxes


def odds_text(probability: float) -> str:
    """Two digits; never a zero for what is merely small."""
    return "<0.01" if 0.0 < probability < 0.005 else f"{probability:.2f}"


def _depths(parents: Sequence[int]) -> list[int]:
    depth: list[int] = []
    for parent in parents:
        depth.append(depth[parent] + 1 if parent >= 0 else 0)
    return depth


def _columns(boxes: Sequence[_Box], depth: Sequence[int], gap: float) -> list[float]:
    """Left end of each depth's column, as wide as its widest box."""
    widest = [0.0] * (max(depth) + 1)
    for box, level in zip(boxes, depth, strict=True):
        widest[level] = max(widest[level], box.width)
    lefts = [_MARGIN]
    for width in widest[:-1]:
        lefts.append(lefts[-1] + width + gap)
    return lefts


def _edge(box: _Box, parent_width: float, parent: tuple[float, float], end: tuple[float, float], room: float) -> str:
    """A curve from the parent's right end; over the last `room` it runs level, under the probability."""
    (x1, y1), (x2, y2) = (parent[0] + parent_width, parent[1]), end
    level = x2 - room
    start = max(x1, level - 56.0)
    middle = (start + level) / 2
    path = f"M{x1:.1f} {y1:.1f}H{start:.1f}C{middle:.1f} {y1:.1f} {middle:.1f} {y2:.1f} {level:.1f} {y2:.1f}H{x2:.1f}"
    curve = f'<path class="edge {box.kind}" d="{path}"/>'
    if not box.odds:
        return curve
    return f'{curve}<text class="odds {box.kind}" x="{x2 - 6:.1f}" y="{y2 - 5:.1f}">{escape(box.odds)}</text>'


def _node(box: _Box, x: float, y: float) -> str:
    dot = f'<circle cx="{x + 12:.1f}" cy="{y + _BOX / 2:.1f}" r="4" fill="{box.colour}"/>' if box.colour else ""
    middle = x + box.width / 2 + (6.0 if box.colour else 0.0)
    text = "".join(
        f'<tspan class="blank">{escape(part)}</tspan>' if special else escape(part) for part, special in box.parts
    )
    caption = f'<text class="caption" x="{x + 2:.1f}" y="{y + _BOX + 12:.1f}">{box.name}</text>'
    return (
        f'<g class="node {box.kind}" data-node="{box.name}"><title>{escape(quoted(box.token.raw))} '
        f"(token {box.token.token}), {escape(box.hint)}</title>"
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{box.width:.1f}" height="{_BOX:.1f}" rx="7"/>{dot}'
        f'<text x="{middle:.1f}" y="{y + _BOX / 2 + 4.5:.1f}" text-anchor="middle" xml:space="preserve">{text}</text>'
        f"{caption if box.kind in ('anchor', 'bonus') else ''}</g>"
    )


def _legend(entry: Round, boxes: Sequence[_Box]) -> tuple[str, float]:
    """What the colours mean, of those that are there; and how wide that is."""
    items: list[tuple[str, str]] = []
    kinds = {box.kind for box in boxes}
    for kind, meaning in (("taken", "taken"), ("missed", "not taken"), ("bonus", "the model's own (bonus)")):
        if kind in kinds:
            items.append(
                (f'<g class="node {kind}"><rect x="{{x}}" y="-9" width="16" height="11" rx="3"/></g>', meaning)
            )
    for source in entry.sources:
        colour = next((b.colour for b, n in zip(boxes[1:], entry.nodes, strict=False) if n.source == source), None)
        dot = f'<circle cx="{{x}}" cy="-4" r="4" fill="{colour}" transform="translate(8 0)"/>' if colour else ""
        items.append((dot, source if colour else f"guessed by {source}"))
    drawn, x = "", 0.0
    for sample, meaning in items:
        indent = 22.0 if sample else 0.0
        drawn += sample.replace("{x}", f"{x:.0f}")
        drawn += f'<text class="small" x="{x + indent:.0f}" y="0">{escape(meaning)}</text>'
        x += indent + cell_len(meaning) * _SMALL_CELL + 22.0
    return drawn, x
