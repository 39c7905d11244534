"""Tokens to text, never showing half a character and never a special token."""

from __future__ import annotations

import codecs

from localspec.protocols import Tokenizer


class Detokenizer:
    """Bytes go in token by token; text comes out as soon as its characters are whole.

    shown: special tokens that are shown nevertheless. Bytes that can never become valid UTF-8 come out as U+FFFD, as in
    `bytes.decode(errors="replace")`.
    """

    def __init__(self, tokenizer: Tokenizer, shown: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._shown = shown
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes; often empty inside a character."""
        if token not in self._shown and self._tokenizer.is_special(token):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What an unfinished character leaves."""
        return self._decoder.decode(b"", final=True)
