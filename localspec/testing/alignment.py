"""What must hold of the translation between two vocabularies, checked on random text of the worst kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from localspec.drafters.byte_encoder import ByteEncoder, Encoded
from localspec.drafters.mirror import Mirror, Tail
from localspec.fingerprint import Relation, Vocabulary

STRINGS_PER_TEXT = 20

_SPACES = (
    " ",
    "  ",
    "    ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    " \n ",
    "\u00a0",
    "\u200b",
    "\u3000",
    "\ufeff",
    " " * 30,
    "\n" * 5,
)
_WORDS = (
    "the", "and", "of", "ing", "Hello", "world", "unbelievably", "speculative", "'s", "'ll", "x", "Z", "0", "12",
    "2026",     "3.14", "1,000,000", ".", ",", "...", "!?", "(", ")", "[]", "{}", "->", "==", "//",
    "#", "_", "▁", "Ġ", "<0x41>",
    "é", "ñ", "ß", "ﬁ", "İ", "Привет", "мир", "你好", "世界", "。", "、", "日本語", "ガ", "한국어",
    "각",     "नमस्ते", "क्षि", "ไทย", "العربية", "שלום", "😀", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>",
    "</s>",     "<unk>", "<|eot_id|>", "<|end|>", "<bos>", "[INST]", "<|im_", "|>",
)  # fmt: skip
_JOINED = (
    "e\u0301", "A\u030a", "\u0301", "\u0323\u0307", "カ\u3099", "\u1100\u1161\u11a8", "\u202eabc\u202c", "\0", "\x7f",
    "\U0001f44d\U0001f3fd", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f1eb\U0001f1f7", "\u2764\ufe0f", "\ufe0f", "\U0001f9d1\u200d\U0001f4bb", "\ufffd", "\U0010ffff",
    "def f(x):\n    return x", "https://example.org/a?b=c", "a" * 40, "=" * 20,
)  # fmt: skip
_PARTS = tuple(text.encode() for text in (*_SPACES, *_WORDS, *(" " + word for word in _WORDS), *_JOINED))
_BROKEN = (
    b"\xff",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xf0\x9f",
    b"\xf0\x9f\x98",
    b"\x80",
    b"\xbf\xbf",
    b"\xe2\x82",
    b"\xf4\x90",
)


def random_strings(count: int, seed: int = 0) -> Iterator[bytes]:
    """Words, numbers, spaces, combining marks, emoji joined and flagged, scripts of all kinds, texts of special
    tokens, any code point, bytes that are no UTF-8."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        parts = []
        for kind, place in zip(
            rng.random(size := int(rng.integers(1, 6))), rng.integers(0, 1 << 30, size), strict=True
        ):
            if kind < 0.8:
                parts.append(_PARTS[place % len(_PARTS)])
            elif kind < 0.9:
                point = int(place) % 0x110000
                parts.append(chr(point if not 0xD800 <= point < 0xE000 else point - 0x800).encode())
            else:
                parts.append(_BROKEN[place % len(_BROKEN)])
        yield b"".join(parts)


def written(vocabulary: Vocabulary, ids: Sequence[int]) -> bytes:
    """What tokens write."""
    return b"".join([vocabulary.texts[token] for token in ids])


def check_written(vocabulary: Vocabulary, ids: Sequence[int], raw: bytes | bytearray) -> None:
    """Raise AssertionError unless the tokens write `raw`, but for bytes that the vocabulary does not have."""
    found = written(vocabulary, ids)
    missing = vocabulary.missing
    if missing:
        raw, found = raw.translate(None, missing), found.translate(None, missing)
    assert found == raw, f"{bytes(raw)!r} was written as {found!r}, tokens {list(ids)}"


def check_encoder(encoder: ByteEncoder, raw: bytes) -> list[int]:
    """The tokens of `raw`, which write it and are not special. Raises AssertionError."""
    encoded = encoder.encode(raw)
    assert not encoded.num_lost or encoder.vocabulary.missing, f"{raw!r}: {encoded.num_lost} bytes lost"
    check_written(encoder.vocabulary, encoded.ids, raw)
    assert encoder.vocabulary.special.isdisjoint(encoded.ids), f"{raw!r}: special tokens in {encoded.ids}"
    return encoded.ids


class RememberingEncoder(ByteEncoder):
    """Encodes the same bytes once: what a draft model reads does not depend on which target wrote it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self._known: dict[bytes, Encoded] = {}

    def encode(self, raw: bytes) -> Encoded:
        """Tokens that write `raw`."""
        found = self._known.get(raw)
        if found is None:
            found = self._known[raw] = super().encode(raw)
        return found

    def forget(self) -> None:
        """Free the memory."""
        self._known.clear()


class Follower:
    """A mirror that is checked at every step. `follow` and `finish` raise AssertionError. draft, target: encoders
    of the two vocabularies."""

    def __init__(self, relation: Relation, draft: ByteEncoder, target: ByteEncoder) -> None:
        self.relation = relation
        self.mirror = Mirror(relation, encoder=draft)
        self._target = target
        self._tokens: list[int] = []
        self._before: list[int] = list(self.mirror.ids)
        self._first = len(self.mirror.ids)  # a BOS of the draft's own

    def follow(self, new: Sequence[int], *, guess: bytes = b"") -> None:
        """Take in the target's tokens `new`; guess: bytes to encode behind them."""
        mirror, draft = self.mirror, self.relation.draft
        self._tokens += new
        tokens = np.array(self._tokens, np.int32)
        kept = mirror.follow(tokens)
        assert mirror.ids[:kept] == self._before[:kept], f"ids changed before {kept}"
        self._before[kept:] = mirror.ids[kept:]
        start = mirror.ends[kept - 1] if kept else 0
        check_written(draft, mirror.ids[max(kept, self._first) :], mirror.raw[start:])
        assert not mirror.ends or mirror.ends[-1] == len(mirror.raw) or draft.missing
        if guess:
            tail = Tail(mirror, self._target, tokens)
            encoded, _ = tail.encode(guess)
            check_written(self.relation.target, encoded.ids, guess)
            assert written(self.relation.target, tail.tokens) == tail.raw

    def finish(self, cut: int) -> None:
        """Nothing has drifted: all is there, and so it is after going back to `cut` tokens and on again."""
        mirror, draft = self.mirror, self.relation.draft
        raw = written(self.relation.target, self._tokens)
        assert mirror.raw == raw
        check_written(draft, mirror.ids[self._first :], raw)
        tokens = np.array(self._tokens, np.int32)
        mirror.begin(tokens[:cut])
        check_written(draft, mirror.ids[self._first :], written(self.relation.target, self._tokens[:cut]))
        mirror.begin(tokens)
        check_written(draft, mirror.ids[self._first :], raw)


def fuzz(
    vocabularies: Sequence[Vocabulary],
    relations: Sequence[Relation],
    num_strings: int,
    seed: int = 0,
) -> int:
    """Check every vocabulary on random strings, and relations on texts of STRINGS_PER_TEXT of them; number of steps.

    Raises AssertionError where anything is lost, replaced, doubled or drifts.
    """
    encoders = {id(vocabulary): RememberingEncoder(vocabulary) for vocabulary in vocabularies}
    rng = np.random.default_rng(seed)
    strings = list(random_strings(num_strings, seed))
    checked = 0
    for first in range(0, num_strings, STRINGS_PER_TEXT):
        batch = strings[first : first + STRINGS_PER_TEXT]
        tokens = {name: [check_encoder(encoder, raw) for raw in batch] for name, encoder in encoders.items()}
        for relation in relations:
            own = id(relation.target)
            follower = Follower(relation, encoders[id(relation.draft)], encoders[own])
            for place, new in enumerate(tokens[own]):
                follower.follow(new, guess=batch[(place + 1) % len(batch)] if place % 5 == 0 else b"")
                checked += 1
            total = sum(map(len, tokens[own]))
            follower.finish(int(rng.integers(0, total + 1)))
        for encoder in encoders.values():
            encoder.forget()
    return checked
