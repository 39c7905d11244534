"""How guessed text is told from the target's own: a colour for each who guessed, a line under what a chain
would have missed."""

from __future__ import annotations

from localspec.engine.answer import TARGET, Piece
from localspec.engine.stats import Stats

_COLOURS = (("green", 32), ("cyan", 36), ("magenta", 35), ("blue", 34), ("yellow", 33))
_RESET = "\x1b[0m"


class Highlight:
    """Marks pieces of one answer and then says what the marks mean.

    colour: with escape codes; without, guesses stand in brackets, those from a later branch with its number.
    """

    def __init__(self, *, colour: bool = True) -> None:
        self._colour = colour
        self._sources: list[str] = []

    def mark(self, piece: Piece) -> str:
        """The piece's text with its marks; text of the target's own is left as it is."""
        if piece.source == TARGET:
            return piece.text
        if piece.source not in self._sources:
            self._sources.append(piece.source)
        if not self._colour:
            return f"[{piece.rank + 1}:{piece.text}]" if piece.rank else f"[{piece.text}]"
        _, code = self._colour_of(piece.source)
        return f"\x1b[1;{'4;' if piece.rank else ''}{code}m{piece.text}{_RESET}"

    def legend(self, stats: Stats) -> str:
        """One line; empty where nothing was marked."""
        if not self._sources:
            return ""
        if self._colour:
            marks = [f"{self._colour_of(source)[0]}: guessed by {source}" for source in self._sources]
            branch = "underlined"
        else:
            marks = [f"[in brackets]: guessed by {' and '.join(self._sources)}"]
            branch = "[N: with a number]"
        if stats.num_from_branches:
            marks.append(f"{branch}: not the first guess for its place ({stats.num_from_branches})")
        return " · ".join(marks)

    def _colour_of(self, source: str) -> tuple[str, int]:
        return _COLOURS[self._sources.index(source) % len(_COLOURS)]
