"""What may follow bytes that end within a word, in a model's own tokens.

The target ends its tokens where its vocabulary does, the draft model would often have written on in one
piece: behind `jo` it has no good token left, because `joint` is one of its own. So a guess may also begin
some tokens back, with a token that writes again what stands there and goes on. The weights are those of the
exact distribution over the next bytes, as far back as one looks (the covers of Vieira et al. 2024, arXiv
2412.03719, of Phan et al. 2024, arXiv 2410.09303): the chance of the tokens that stay, times the new one's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localspec.fingerprint import Vocabulary
from localspec.ranking import top_ids
from localspec.types import Logits, TokenIds


class Prefixes:
    """The ordinary tokens of a vocabulary by how they begin."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        pairs = sorted(vocabulary.ids.items())
        self._texts = [text for text, _ in pairs]
        self._ids = np.array([token for _, token in pairs], np.int32)

    def longer_than(self, text: bytes) -> TokenIds:
        """Tokens that begin with `text` and go on."""
        first = bisect_left(self._texts, text + b"\0")
        last = bisect_left(self._texts, _behind(text)) if text.strip(b"\xff") else len(self._texts)
        return self._ids[first:last]


def _behind(text: bytes) -> bytes:
    """The first byte string behind all that begin with `text`."""
    text = text.rstrip(b"\xff")
    return text[:-1] + bytes([text[-1] + 1])


@dataclass(frozen=True, slots=True)
class Continuations:
    """ids: [K] tokens, likeliest first.  behind: [K] how many of the last tokens each replaces.  values: [K] logarithm
    of each one's chance, but for a constant."""

    ids: TokenIds
    behind: NDArray[np.int32]
    values: NDArray[np.float64]


def continuations(
    rows: NDArray[np.float32], last: Sequence[int], texts: Sequence[bytes], prefixes: Prefixes, count: int
) -> Continuations:
    """The likeliest `count` per number of replaced tokens.

    rows: [N, V] logits behind the last N tokens, in units of one.  last: the last N - 1 tokens.
    """
    ids: list[TokenIds] = []
    behind: list[NDArray[np.int32]] = []
    values: list[NDArray[np.float64]] = []
    stays = 0.0
    for back in range(len(last), -1, -1):
        row = rows[len(rows) - 1 - back]
        offset = stays - log_total(row)
        if back:
            suffix = b"".join(texts[token] for token in last[len(last) - back :])
            longer = prefixes.longer_than(suffix)
            found = longer[top_ids(row[longer], count)] if len(longer) else longer
            stays = offset + float(row[last[len(last) - back]])
        else:
            found = top_ids(row, count)
        found = found[np.isfinite(row[found])]
        ids.append(found)
        behind.append(np.full(len(found), back, np.int32))
        values.append(row[found].astype(np.float64) + offset)
    order = np.argsort(-np.concatenate(values), kind="stable")
    return Continuations(
        np.concatenate(ids)[order].astype(np.int32), np.concatenate(behind)[order], np.concatenate(values)[order]
    )


def log_total(row: Logits) -> float:
    """Logarithm of the sum of the exponentials."""
    peak = row.max()
    return float(peak) + float(np.log(np.exp(row - peak).sum(dtype=np.float64)))
