"""Bytes to tokens whose bytes are exactly those bytes.

A tokenizer encodes text, and not always the text it was given: some put a space in front, some normalise,
none takes bytes that are no characters. Here whatever was asked for comes out, in the tokens that the
tokenizer would use wherever it can express them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from localspec.fingerprint import Vocabulary

_LONGEST_PIECE = 16
_SEAM = "\n"


@dataclass(frozen=True, slots=True)
class Encoded:
    """ids: the tokens.  ends: where in the bytes each ends.  num_lost: bytes that no token writes; they are left
    out."""

    ids: list[int]
    ends: list[int]
    num_lost: int = 0


class ByteEncoder:
    """Encodes bytes with one tokenizer, special tokens never recognised."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._tokenizer = vocabulary.tokenizer
        self._texts = vocabulary.texts
        self._ids = vocabulary.ids

    def encode(self, raw: bytes) -> Encoded:
        """Tokens that write `raw`."""
        result = Encoded([], [])
        lost = 0
        for start, end, text in _characters(raw):
            if text is None:
                lost += self._put_pieces(raw, start, end, result)
            else:
                lost += self._put_text(raw, start, end, text, result)
        return Encoded(result.ids, result.ends, lost)

    def _put_text(self, raw: bytes, start: int, end: int, text: str, into: Encoded) -> int:
        """Add the tokens of valid text raw[start:end]; number of bytes lost."""
        ids = self._exact(raw[start:end], text)
        if ids is not None:
            for token in ids:
                start += len(self._texts[token])
                into.ids.append(token)
                into.ends.append(start)
            return 0
        if len(text) == 1:
            return self._put_pieces(raw, start, end, into)
        middle = _cut(text)
        at = start + len(text[:middle].encode())
        return self._put_text(raw, start, at, text[:middle], into) + self._put_text(raw, at, end, text[middle:], into)

    def _exact(self, raw: bytes, text: str) -> list[int] | None:
        """The tokenizer's own tokens, if they write exactly this text."""
        ids = self._plain(text)
        written = self._written(ids)
        if written == raw:
            return ids
        if written != b" " + raw:
            return None
        if text.startswith(" "):  # the space it puts in front is the one that was asked for
            ids = self._plain(text[1:])
            return ids if self._written(ids) == raw else None
        ids = self._plain(_SEAM + text)
        seam = len(_SEAM) + 1
        while ids and seam > 0:
            seam -= len(self._texts[ids[0]])
            ids = ids[1:]
        return ids if seam == 0 and self._written(ids) == raw else None

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, special=False).tolist()
        return ids

    def _written(self, ids: list[int]) -> bytes:
        size = len(self._texts)
        return b"".join([self._texts[token] if token < size else b"" for token in ids])

    def _put_pieces(self, raw: bytes, start: int, end: int, into: Encoded) -> int:
        """Add the longest tokens that fit, one after the other; number of bytes lost."""
        lost = 0
        while start < end:
            for size in range(min(_LONGEST_PIECE, end - start), 0, -1):
                token = self._ids.get(raw[start : start + size])
                if token is not None:
                    start += size
                    into.ids.append(token)
                    into.ends.append(start)
                    break
            else:
                start += 1
                lost += 1
        return lost


def _cut(text: str) -> int:
    """Where to halve a text that is encoded in parts: before the space nearest to the middle, if there is one."""
    middle = len(text) // 2
    spaces = [match.start() for match in re.finditer(r"(?<=\S) ", text)]
    return min(spaces, key=lambda place: abs(place - middle)) if spaces else middle


def _characters(raw: bytes) -> Iterator[tuple[int, int, str | None]]:
    """(start, end, text) of the longest stretches that are valid UTF-8, and with None of what is between them."""
    start = 0
    while start < len(raw):
        try:
            yield start, len(raw), raw[start:].decode()
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield start, start + error.start, raw[start : start + error.start].decode()
            yield start + error.start, start + error.end, None
            start += error.end


def incomplete(raw: bytes) -> int:
    """Number of bytes at the end that begin a character without finishing it."""
    for back in range(1, min(len(raw), 3) + 1):
        byte = raw[-back]
        if byte & 0xC0 == 0x80:
            continue
        needed = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return back if byte < 0xF8 and needed > back else 0
    return 0
