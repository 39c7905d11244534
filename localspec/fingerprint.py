"""Are two tokenizers the same for drafting, and if not, how much do they share?

What counts is the logical vocabulary in bytes: rows that only pad a matrix are left out, an ordinary token
is the bytes it adds to the text, a special token is its text and its role. Two vocabularies are the same
when every id means the same bytes; otherwise a drafter's tokens must be translated
(`localspec/drafters/cross_tokenizer.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from localspec.protocols import Tokenizer
from localspec.types import TokenIds

_NONE = -1


class Vocabulary:
    """A tokenizer's tokens as bytes. texts: [V] of each id, b"" where there is nothing.  special: ids of control
    tokens and of those that end an answer.  eos: the one that the model's template names, if any."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.texts = tuple(tokenizer.token_bytes(token) for token in range(tokenizer.num_tokens))
        self.special = frozenset(
            token for token in range(tokenizer.num_tokens) if tokenizer.is_special(token)
        ) | frozenset(token for token in tokenizer.stop_tokens if token < tokenizer.num_tokens)
        self.bos = tokenizer.bos
        self.stop_tokens = tokenizer.stop_tokens

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def eos(self) -> int | None:
        """The stop token that templates call eos_token, or the only one there is."""
        text = self.tokenizer.template_tokens.get("eos_token", "").encode()
        named = [token for token in sorted(self.stop_tokens) if text and self.texts[token] == text]
        if named:
            return named[0]
        return next(iter(self.stop_tokens)) if len(self.stop_tokens) == 1 else None

    @cached_property
    def ids(self) -> Mapping[bytes, int]:
        """Bytes -> the ordinary token that writes them. Where several do (a character and its byte token), it is
        the one that the tokenizer itself uses."""
        found: dict[bytes, int] = {}
        doubles: dict[bytes, list[int]] = {}
        for token, text in enumerate(self.texts):
            if text and token not in self.special:
                if text in found:
                    doubles.setdefault(text, [found[text]]).append(token)
                else:
                    found[text] = token
        for text, tokens in doubles.items():
            found[text] = self._used(text, tokens)
        return found

    @cached_property
    def missing(self) -> bytes:
        """Bytes that no token writes alone."""
        return bytes(byte for byte in range(256) if bytes([byte]) not in self.ids)

    @cached_property
    def special_ids(self) -> Mapping[bytes, int]:
        """Text -> special token, the lowest of equals."""
        return {self.texts[token]: token for token in sorted(self.special, reverse=True) if self.texts[token]}

    def _used(self, text: bytes, tokens: list[int]) -> int:
        """The one of several tokens of the same bytes that encoding gives. A line break before the text keeps
        away the space that some tokenizers put in front of all text."""
        try:
            readable = text.decode()
        except UnicodeDecodeError:
            return tokens[0]
        for before in ("", "\n"):
            ids = self.tokenizer.encode(before + readable, special=False)
            if len(ids) and int(ids[-1]) in tokens:
                return int(ids[-1])
        return tokens[0]


@dataclass(frozen=True, slots=True)
class Relation:
    """How a draft model's vocabulary relates to the target's.

    same: every id means the same bytes.  first_difference: in words, empty if same.  roles: special tokens and
    roles that differ, in words.  num_shared: ordinary tokens of the target with a byte-identical one in the draft.
    to_target: [V of the draft] the target's id of the same bytes, or -1 (special tokens: of the same text).
    to_draft: [V of the target] the reverse.
    """

    target: Vocabulary
    draft: Vocabulary
    same: bool
    first_difference: str
    roles: tuple[str, ...]
    num_shared: int
    to_target: TokenIds
    to_draft: TokenIds

    @property
    def target_share(self) -> float:
        """Share of the target's ordinary tokens that the draft has, too."""
        return self.num_shared / max(len(self.target.ids), 1)

    @property
    def draft_share(self) -> float:
        """Share of the draft's ordinary tokens that the target has, too."""
        return self.num_shared / max(len(self.draft.ids), 1)

    def coverage(self, counts: Mapping[int, int]) -> float:
        """Share of a text, given how often each of the target's tokens occurs in it, whose tokens the draft has.
        Ids beyond the vocabulary (rows that pad a matrix) count as not shared."""
        total = sum(counts.values())
        size = len(self.to_draft)
        shared = sum(count for token, count in counts.items() if 0 <= token < size and self.to_draft[token] != _NONE)
        return shared / total if total else 0.0

    def coverage_of(self, tokens: TokenIds) -> float:
        """The same of a text that is given as tokens."""
        inside = tokens[(tokens >= 0) & (tokens < len(self.to_draft))]
        return float(np.count_nonzero(self.to_draft[inside] != _NONE)) / len(tokens) if len(tokens) else 0.0

    def __str__(self) -> str:
        if self.same:
            return f"one vocabulary of {len(self.target)} tokens"
        return (
            f"the draft model has another tokenizer ({self.first_difference}); "
            f"{self.target_share:.0%} of the target's tokens are among the draft's {len(self.draft)}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "same": self.same,
            "first_difference": self.first_difference,
            "roles": list(self.roles),
            "num_target": len(self.target),
            "num_draft": len(self.draft),
            "num_shared": self.num_shared,
            "target_share": round(self.target_share, 4),
            "draft_share": round(self.draft_share, 4),
        }


def relate(target: Tokenizer | Vocabulary, draft: Tokenizer | Vocabulary) -> Relation:
    """Compare two tokenizers, or vocabularies that were read from them before."""
    mine = target if isinstance(target, Vocabulary) else Vocabulary(target)
    other = mine if draft is target else draft if isinstance(draft, Vocabulary) else Vocabulary(draft)
    difference = first_difference(mine, other)
    to_target = np.full(len(other), _NONE, np.int32)
    to_draft = np.full(len(mine), _NONE, np.int32)
    if not difference:
        to_target[:] = to_draft[:] = np.arange(len(mine), dtype=np.int32)
        shared = len(mine.ids)
    else:
        pairs = [(token, mine.ids[text]) for text, token in other.ids.items() if text in mine.ids]
        shared = len(pairs)
        pairs += [
            (token, mine.special_ids[text]) for text, token in other.special_ids.items() if text in mine.special_ids
        ]
        for token, same in pairs:
            to_target[token], to_draft[same] = same, token
    return Relation(mine, other, not difference, difference, _roles(mine, other), shared, to_target, to_draft)


def first_difference(target: Vocabulary, draft: Vocabulary) -> str:
    """The lowest id that means different bytes, in words; empty where there is none."""
    for token, (mine, other) in enumerate(zip(target.texts, draft.texts, strict=False)):
        if mine != other:
            return f"token {token} is {_shown(mine)} in the target and {_shown(other)} in the draft model"
    if len(target) != len(draft):
        return f"sizes differ: {len(target)} tokens in the target, {len(draft)} in the draft model"
    return ""


def _roles(target: Vocabulary, draft: Vocabulary) -> tuple[str, ...]:
    """What special tokens and roles differ, in words."""

    def named(vocabulary: Vocabulary, token: int | None) -> str:
        return "none" if token is None else _shown(vocabulary.texts[token])

    found = []
    for role, mine, other in (("BOS", target.bos, draft.bos), ("EOS", target.eos, draft.eos)):
        if named(target, mine) != named(draft, other):
            found.append(f"{role}: {named(target, mine)} in the target, {named(draft, other)} in the draft model")
    for owner, texts in (
        ("the target", target.special_ids.keys() - draft.special_ids.keys()),
        ("the draft model", draft.special_ids.keys() - target.special_ids.keys()),
    ):
        if texts:
            some = ", ".join(_shown(text) for text in sorted(texts)[:3])
            found.append(f"special in {owner} only: {some}{' ...' if len(texts) > 3 else ''}")
    return tuple(found)


def _shown(text: bytes) -> str:
    """Bytes as people read them."""
    return repr(text.decode(errors="backslashreplace")) if text else "unused"
