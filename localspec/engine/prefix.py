"""Reusing the cache of earlier turns: what of a new prompt is already there.

Encoding a conversation again can split the assistant's words otherwise than the model did, and then
the cache would be lost from there on. So where the new text continues the old one, the old tokens
stay and only the rest is encoded, provided that a special token stands at the seam: tokenizers never
merge across those.
"""

from __future__ import annotations

import numpy as np

from localspec.protocols import Tokenizer
from localspec.types import TokenIds


def encode_prompt(tokenizer: Tokenizer, text: str, previous: TokenIds | None = None) -> TokenIds:
    """[T] tokens of a prompt, BOS included where the model wants one; special tokens are recognised.

    previous: tokens of the conversation so far; they are kept where `text` continues their text.
    """
    if previous is not None and len(previous):
        continued = _continue(tokenizer, text, previous)
        if continued is not None:
            return continued
    ids = tokenizer.encode(text, special=True)
    bos = tokenizer.bos
    if bos is not None and (not len(ids) or int(ids[0]) != bos):
        ids = np.concatenate([np.array([bos], np.int32), ids])
    return ids


def _continue(tokenizer: Tokenizer, text: str, previous: TokenIds) -> TokenIds | None:
    """The previous tokens and those of the rest, or None where that would not be the same text."""
    new = text.encode("utf-8", errors="surrogatepass")
    spoken = previous
    if int(previous[0]) == tokenizer.bos and not new.startswith(tokenizer.token_bytes(int(previous[0]))):
        spoken = previous[1:]  # a BOS that was put there, not written by the template
    old = b"".join(tokenizer.token_bytes(int(token)) for token in spoken)
    if len(old) >= len(new) or not new.startswith(old) or new[len(old)] & 0xC0 == 0x80:  # or inside a character
        return None
    last = int(previous[-1])
    if tokenizer.is_special(last):  # encoded again with the rest: some swallow the space behind them
        seam = tokenizer.token_bytes(last)
        rest = tokenizer.encode((seam + new[len(old) :]).decode("utf-8", errors="surrogatepass"), special=True)
        return np.concatenate([previous, rest[1:]]) if len(rest) > 1 and int(rest[0]) == last else None
    rest = tokenizer.encode(new[len(old) :].decode("utf-8", errors="surrogatepass"), special=True)
    return np.concatenate([previous, rest]) if len(rest) and tokenizer.is_special(int(rest[0])) else None
