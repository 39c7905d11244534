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
    chars = [(char, special) for text, special in parts for char in text]
    if sum(cell_len(char) for char, _ in chars) <= num_cells:
        return _joined(chars)
    room, kept = num_cells - 1, []
    for char, special in chars:
        room -= cell_len(char)
        if room < 0:
            break
        kept.append((char, special))
    return _joined([*kept, ("…", True)])


def tail(raw: bytes, num_cells: int) -> str:
    """The end of a text on one line, blanks as they are, an ellipsis before it where more came."""
    text = "".join(" " if char.isspace() else _escaped(char) for char in raw.decode(errors="replace"))
    if cell_len(text) <= num_cells:
        return text
    kept: list[str] = []
    room = num_cells - 1
    for char in reversed(text):
        room -= cell_len(char)
        if room < 0:
            break
        kept.append(char)
    return "…" + "".join(reversed(kept))


def _joined(chars: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    parts: list[tuple[str, bool]] = []
    for char, special in chars:
        if parts and parts[-1][1] == special:
            parts[-1] = (parts[-1][0] + char, special)
        else:
            parts.append((char, special))
    return parts
