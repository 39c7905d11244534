"""`protocols.Tokenizer` over the `tokenizers` library, and how to make one from a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeAlias

import numpy as np
from tokenizers import Tokenizer

from localspec.errors import ModelFileError, PromptError, UnsupportedModelError
from localspec.types import TokenIds

Spelling: TypeAlias = Literal["byte-level", "sentencepiece"]

END_TEXTS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~[",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 - DeepSeek's bars are full-width
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
})  # fmt: skip
"""Texts of tokens that end an answer wherever a vocabulary has them: llama.cpp's list, so that both
backends stop at the same place."""

_TEMPLATE_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in set(plain)]
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def end_tokens(ids: Mapping[str, int], named: set[int]) -> frozenset[int]:
    """Tokens that end an answer: those the files name, and those known by their text."""
    found = {text: ids[text] for text in END_TEXTS & ids.keys()}
    harmony = {"<|return|>", "<|call|>"} <= found.keys() or {"<|flush|>", "<|calls|>"} <= found.keys()
    if harmony and "<|end|>" in found:
        del found["<|end|>"]  # there it separates the channels of one answer
    if "<|tool_response>" in found:
        found.pop("</s>", None)
    return frozenset(named | set(found.values()))


class MlxTokenizer:
    """texts: [V] text of each id, "" where there is none.  spelling: how ordinary tokens write bytes.
    verbatim: ids whose text is itself.  single_bytes: ids that are one byte each."""

    def __init__(
        self,
        inner: Tokenizer,
        texts: list[str],
        spelling: Spelling,
        *,
        verbatim: frozenset[int],
        control: frozenset[int],
        bos: int | None,
        stop_tokens: frozenset[int],
        chat_template: str | None,
        template_tokens: Mapping[str, str],
    ) -> None:
        self._inner = inner
        self._texts = texts
        self._spelling = spelling
        self._verbatim = verbatim
        self._control = control | stop_tokens
        self._lock = Lock()  # `encode` switches a setting of the shared tokenizer
        self.bos = bos
        self.stop_tokens = stop_tokens
        self.chat_template = chat_template
        self.template_tokens = template_tokens

    @property
    def num_tokens(self) -> int:
        """Ids below this have a text or are gaps between such."""
        return len(self._texts)

    def encode(self, text: str, *, special: bool) -> TokenIds:
        """[T] ids, without a BOS. Raises PromptError for text that is not valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, which the library calls a wrong type
            raise PromptError(f"the text is not valid Unicode: {error}") from error
        with self._lock:
            self._inner.encode_special_tokens = not special
            ids = self._inner.encode(text, add_special_tokens=False).ids
        return np.array(ids, np.int32)

    def token_bytes(self, token: int) -> bytes:
        """Its bytes; of control tokens the text; nothing for ids beyond the vocabulary."""
        if not 0 <= token < len(self._texts):
            return b""
        text = self._texts[token]
        if token in self._verbatim:
            return text.encode()
        if self._spelling == "byte-level":
            if all(char in _BYTES for char in text):
                return bytes(_BYTES[char] for char in text)
            return text.encode()
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode()

    def is_special(self, token: int) -> bool:
        """Control tokens, and all that end an answer."""
        return token in self._control


# ---------------------------------------------------------------- from a folder


def open_folder_tokenizer(path: Path) -> MlxTokenizer:
    """From tokenizer.json and the configurations beside it. Raises ModelFileError or UnsupportedModelError."""
    from .folder import read_json

    file = path / "tokenizer.json"
    if not file.exists() and (path / "tokenizer.model").exists():
        raise UnsupportedModelError(
            "the folder has no tokenizer.json", got="tokenizer.model", fix="Convert it with transformers."
        )
    content = read_json(file)
    try:
        inner = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ModelFileError("tokenizer.json cannot be used", got=error) from error
    inner.no_truncation()
    inner.no_padding()
    config = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").exists() else {}
    ids = inner.get_vocab(with_added_tokens=True)
    texts = [""] * (max(ids.values(), default=-1) + 1)
    for text, token in ids.items():
        texts[token] = text
    added = [entry for entry in content.get("added_tokens") or () if isinstance(entry, dict)]
    template_tokens = _template_tokens(config)
    return MlxTokenizer(
        inner,
        texts,
        _spelling(content),
        verbatim=frozenset(entry["id"] for entry in added),
        control=frozenset(entry["id"] for entry in added if entry.get("special")),
        bos=_bos(inner, config, ids),
        stop_tokens=end_tokens(ids, _named_ends(path, template_tokens, ids)),
        chat_template=_chat_template(path, config),
        template_tokens=template_tokens,
    )


def _spelling(content: Mapping[str, Any]) -> Spelling:
    """Told by the decoder, which is what turns tokens back into text."""
    decoder = json.dumps(content.get("decoder"), ensure_ascii=False)
    if '"ByteLevel"' in decoder:
        return "byte-level"
    if "▁" in decoder or '"Metaspace"' in decoder:
        return "sentencepiece"
    raise UnsupportedModelError(
        "the tokenizer's decoder is not known", got=decoder[:80], expected="ByteLevel or Metaspace"
    )


def _bos(inner: Tokenizer, config: Mapping[str, Any], ids: Mapping[str, int]) -> int | None:
    """The BOS that the model wants, by the configuration's own word or else by what the tokenizer adds."""
    named = ids.get(_text(config.get("bos_token")) or "")
    wanted = config.get("add_bos_token")
    if isinstance(wanted, bool):
        return named if wanted else None
    added = inner.encode("", add_special_tokens=True).ids
    if not added:
        return None
    return added[0] if named is None or named == added[0] else None


def _text(value: object) -> str | None:
    """Configurations write a token as its text or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    texts = {name: _text(config.get(name)) for name in _TEMPLATE_NAMES}
    return {name: text for name, text in texts.items() if text is not None}


def _named_ends(path: Path, template_tokens: Mapping[str, str], ids: Mapping[str, int]) -> set[int]:
    """End tokens that the folder's files name."""
    from .folder import read_json

    named = {ids[text] for text in [template_tokens.get("eos_token", "")] if text in ids}
    for name in ("generation_config.json", "config.json"):
        if not (path / name).exists():
            continue
        config = read_json(path / name)
        inner = config.get("text_config")
        for part in (config, inner if isinstance(inner, dict) else {}):
            value = part.get("eos_token_id")
            values = value if isinstance(value, list) else [value]
            named |= {v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0}
    return named


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    """The file wins, as in transformers; of several templates the one named `default`."""
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelFileError("chat_template.jinja cannot be read", got=error) from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
