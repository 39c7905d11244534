"""The conversation in another vocabulary, kept in step at the cost of what is new.

The target's tokens become bytes, the bytes the draft model's tokens. New text can change how the last words
are split, so a bounded tail is encoded again: from the start of a word, where no tokenizer we know merges
across. Special tokens are barriers that nothing is encoded across.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from localspec.context import common_prefix
from localspec.drafters.byte_encoder import ByteEncoder, Encoded, incomplete
from localspec.errors import SettingError
from localspec.fingerprint import Relation
from localspec.types import TokenIds

_NEAR = 16
"""Bytes that are encoded again at least, so that a split next to the new text may change."""
_FAR = 256
"""Where no word starts within so many bytes, a tail begins between any two characters."""

MAP, TEXT, SKIP = "map", "text", "skip"
SPECIALS = (MAP, TEXT, SKIP)


class Mirror:
    """ids: [T'] the draft model's tokens of the conversation.  ends: where in the bytes each of them ends.

    specials: what becomes of the target's special tokens. map: those that the draft model has by the same text
    are its own, the others text; text: all are text; skip: all that are not shared are left out. A BOS is never
    doubled: the draft's own stands first if it wants one, the target's is left out.  encoder: of the draft's
    vocabulary, if there is one already.
    """

    def __init__(self, relation: Relation, specials: str = MAP, encoder: ByteEncoder | None = None) -> None:
        if specials not in SPECIALS:
            raise SettingError("unknown treatment of special tokens", got=specials, expected=" or ".join(SPECIALS))
        self.relation = relation
        self.specials = specials
        self.ids: list[int] = [] if relation.draft.bos is None else [relation.draft.bos]
        self.ends: list[int] = [0] * len(self.ids)
        self.raw = bytearray()
        self.marks: list[tuple[int, int]] = []  # per target token: where it ends, barriers up to there
        self._first = len(self.ids)
        self._tokens: list[int] = []
        self._barriers: list[int] = []
        self._encoder = encoder or ByteEncoder(relation.draft)
        self._is_cut = False

    @property
    def segment_start(self) -> int:
        """Where the bytes behind the last special token begin."""
        return self._barriers[-1] if self._barriers else 0

    def begin(self, tokens: TokenIds) -> int:
        """Follow another conversation; number of leading ids that stayed."""
        same = common_prefix(np.array(self._tokens, np.int32), tokens)
        kept = len(self.ids)
        if same < len(self._tokens):
            kept = self._truncate(same)
        return min(kept, self.follow(tokens))

    def follow(self, tokens: TokenIds) -> int:
        """Take in what the conversation, otherwise unchanged, has more; number of leading ids that stayed."""
        kept = len(self.ids)
        texts, special = self.relation.target.texts, self.relation.target.special
        for token in tokens[len(self._tokens) :].tolist():
            if token in special:
                kept = min(kept, self._encode_tail(), self._put_special(token))
            elif token < len(texts):
                self.raw += texts[token]
            self._tokens.append(token)
            self.marks.append((len(self.raw), len(self._barriers)))
        return min(kept, self._encode_tail())

    def _put_special(self, token: int) -> int:
        """A special token between two barriers; number of leading ids that stayed."""
        kept = len(self.ids)
        relation = self.relation
        same = int(relation.to_draft[token])
        self._barriers.append(len(self.raw))
        if not self._tokens and (token == relation.target.bos or same == relation.draft.bos):
            return kept
        if same >= 0 and self.specials != TEXT:
            self.raw += b"\0"  # a place of its own among the bytes
            self.ids.append(same)
            self.ends.append(len(self.raw))
        elif self.specials != SKIP:
            self.raw += relation.target.texts[token]
            kept = min(kept, self._encode_tail())
        self._barriers.append(len(self.raw))
        return kept

    def _encode_tail(self) -> int:
        """Bring the ids to the end of the bytes; number of leading ids that stayed."""
        ids, ends, size = self.ids, self.ends, len(self.raw)
        segment = self.segment_start
        covered = max(ends[-1] if ends else 0, segment)
        if covered == size and not self._is_cut:
            return len(ids)
        self._is_cut = False
        first = tail_start(self.raw, ends, self._first, segment, covered)
        start = max(ends[first - 1] if first else 0, segment)
        new = self._encoder.encode(bytes(self.raw[start:]))
        kept = first
        for old, token in zip(ids[first:], new.ids, strict=False):
            if old != token:
                break
            kept += 1
        ids[kept:] = new.ids[kept - first :]
        ends[kept:] = [start + end for end in new.ends[kept - first :]]
        return kept

    def _truncate(self, length: int) -> int:
        """Forget the target's tokens from `length` on; number of leading ids that stayed."""
        size, num_barriers = self.marks[length - 1] if length else (0, 0)
        del self._tokens[length:], self.marks[length:], self._barriers[num_barriers:], self.raw[size:]
        kept = max(bisect_right(self.ends, size), self._first)
        if not length:
            kept = self._first
        del self.ids[kept:], self.ends[kept:]
        self._is_cut = True
        return kept


def tail_start(raw: bytes | bytearray, ends: Sequence[int], first: int, segment: int, covered: int) -> int:
    """Number of the token from which to encode again, given where each ends. No token before number `first`, and
    none that ends before `segment`, is part of it."""
    place = len(ends)
    while place > first and ends[place - 1] > segment:
        at = ends[place - 1]
        behind = covered - at
        if behind >= _NEAR and raw[at : at + 1] == b" " and not raw[at - 1 : at].isspace():
            return place
        if behind >= _FAR and raw[at] & 0xC0 != 0x80:
            return place
        place -= 1
    return place


class Tail:
    """The target's last word: what guessed bytes are encoded behind, so that they join it as the target would.

    is_whole: are its tokens what the tokenizer makes of its bytes? A sampled text need not be so.
    """

    def __init__(self, mirror: Mirror, encoder: ByteEncoder, tokens: TokenIds) -> None:
        self._encoder = encoder
        self._known: dict[bytes, tuple[Encoded, bool]] = {}
        marks, raw = mirror.marks, mirror.raw
        segment, place = mirror.segment_start, len(marks)
        while place and marks[place - 1][0] > segment:
            place -= 1
            at = marks[place - 1][0] if place else 0
            if at <= segment or (raw[at : at + 1] == b" " and not raw[at - 1 : at].isspace()):
                break
            if len(raw) - at >= _FAR and raw[at] & 0xC0 != 0x80:
                break
        self.start = max(marks[place - 1][0] if place else 0, segment)
        self.tokens: list[int] = tokens[place:].tolist() if len(raw) > segment else []
        self.raw = bytes(raw[self.start :])
        self.is_whole = not self.tokens or encoder.encode(self.raw).ids == self.tokens

    @property
    def num_unfinished(self) -> int:
        """Bytes of a character that the conversation ends within."""
        return incomplete(self.raw)

    def encode(self, more: bytes) -> tuple[Encoded, bool]:
        """(the target's tokens of `more` behind the conversation, does the last word stay as it is?). Where it
        would be split otherwise, `more` is encoded by itself: the target has already said where its token ends."""
        found = self._known.get(more)
        if found is None:
            found = self._known[more] = self._encode(more)
        return found

    def _encode(self, more: bytes) -> tuple[Encoded, bool]:
        if self.is_whole and self.tokens:
            whole = self._encoder.encode(self.raw + more)
            size, skip = len(self.tokens), len(self.raw)
            if whole.ids[:size] != self.tokens:
                return self._encoder.encode(more), False
            return Encoded(whole.ids[size:], [end - skip for end in whole.ends[size:]], whole.num_lost), True
        return self._encoder.encode(more), True
