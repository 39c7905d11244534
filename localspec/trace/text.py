"""Token text that can be read: quoted, with everything escaped that would not show or would move the cursor."""

from __future__ import annotations

from collections.abc import Iterator

from rich.cells import cell_len

_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}


def quoted(raw: bytes) -> str:
    r"""In double quotes: \n and the like, \xNN for bytes that are no characters, \uNNNN for what has no shape."""
    return '"' + "".join(_escaped(char) for char in raw.decode(errors="surrogateescape")) + '"'


def _escaped(char: str) -> str:
    code = ord(char)
    if char in _ESCAPES:
        return _ESCAPES[char]
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if char.isprintable():
        return char
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def printable(text: str) -> str:
    """A name from a file that may come from anywhere: nothing in it moves the cursor or breaks a picture."""
    return "".join(char if char.isprintable() else "?" for char in text)


def visible(raw: bytes) -> Iterator[tuple[str, bool]]:
    """Parts of a text as shown in pictures; true for those that stand for something else (blanks, bytes)."""
    run = ""
    for char in raw.decode(errors="surrogateescape"):
        shown = _VISIBLE.get(char) or (char if char in '"\\' else _escaped(char))
        if shown == char:
            run += char
            continue
        if run:
            yield run, False
            run = ""
        yield shown, True
    if run:
        yield run, False


def clipped(parts: Iterator[tuple[str, bool]], num_cells: int) -> list[tuple[str, bool]]:
    """The parts that fit into so many cells of a fixed-width font, an ellipsis where some do not."""
    all_parts = list(parts)
    if sum(cell_len(text) for text, _ in all_parts) <= num_cells:
        return all_parts
    kept: list[tuple[str, bool]] = []
    room = num_cells - 1
    for text, special in all_parts:
        fitting = _fitting(text, room)
        if fitting:
            kept.append((fitting, special))
        room -= cell_len(fitting)
        if fitting != text:
            break
    return [*kept, ("…", True)]


def head(text: str, num_cells: int) -> str:
    """The beginning of a text, an ellipsis behind it where more comes."""
    return text if cell_len(text) <= num_cells else _fitting(text, num_cells - 1) + "…"


def tail(raw: bytes, num_cells: int) -> str:
    """The end of a text on one line, escaped as in `quoted`, an ellipsis before it where more came."""
    text = "".join(char if char in '"\\' else _escaped(char) for char in raw.decode(errors="surrogateescape"))
    return text if cell_len(text) <= num_cells else "…" + _fitting(text[::-1], num_cells - 1)[::-1]


def _fitting(text: str, num_cells: int) -> str:
    """As many characters from the beginning as fit."""
    for end, char in enumerate(text):
        num_cells -= cell_len(char)
        if num_cells < 0:
            return text[:end]
    return text
