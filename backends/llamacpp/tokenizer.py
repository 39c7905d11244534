"""llama.cpp's own tokenizer, in bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from localspec.errors import BackendError, PromptError
from localspec.types import TokenIds

from . import native
from .weights import Weights

_NAMED = {  # what templates call a token: how the file names it. llama.cpp's own answers fall back to guesses.
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
}


class LlamaTokenizer:
    """`Tokenizer` over the vocabulary inside the model file."""

    def __init__(self, weights: Weights) -> None:
        self._lib = native.library()
        self._weights = weights  # the vocabulary is part of it
        self._vocab = weights.vocab
        self._size = weights.vocab_size
        self.chat_template = weights.chat_template()
        self._buffer = ctypes.create_string_buffer(64)
        named = {name: weights.text(key) for name, key in _NAMED.items()}
        self.template_tokens: Mapping[str, str] = {
            name: self.token_bytes(int(token)).decode(errors="replace")
            for name, token in named.items()
            if token.isdecimal() and int(token) < self._size
        }

    @cached_property
    def num_tokens(self) -> int:
        """Size without the unused entries at the end that only pad the matrix."""
        size = self._size
        while size and self._lib.llama_vocab_get_attr(self._vocab, size - 1) & self._lib.LLAMA_TOKEN_ATTR_UNUSED:
            size -= 1
        return size

    @cached_property
    def bos(self) -> int | None:
        """The token that starts every sequence, if the file asks for one."""
        token = int(self._lib.llama_vocab_bos(self._vocab))
        return token if token >= 0 and self._lib.llama_vocab_get_add_bos(self._vocab) else None

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """All tokens that llama.cpp knows to end a generation."""
        return frozenset(t for t in range(self._size) if self._lib.llama_vocab_is_eog(self._vocab, t))

    def encode(self, text: str, *, special: bool) -> TokenIds:
        """[T] ids, without a BOS. Raises PromptError for text that is not valid Unicode."""
        try:
            raw = text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"the text is not valid Unicode: {error}") from error
        ids = np.zeros(len(raw) + 8, np.int32)
        count = self._tokenize(raw, ids, special)
        if count < 0:  # normalisation can make text longer; the answer is the size needed
            ids = np.zeros(-count, np.int32)
            count = self._tokenize(raw, ids, special)
        if count < 0:
            raise BackendError("llama.cpp could not tokenize the text", got=f"code {count}")
        return ids[:count]

    def _tokenize(self, raw: bytes, ids: TokenIds, special: bool) -> int:
        pointer = ctypes.cast(ids.ctypes.data, self._lib.llama_token_p)
        return int(self._lib.llama_tokenize(self._vocab, raw, len(raw), pointer, len(ids), False, special))

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds; of a special token, its text; none beyond the vocabulary."""
        if not 0 <= token < self.num_tokens:
            return b""
        while True:
            size = len(self._buffer)
            count = int(self._lib.llama_token_to_piece(self._vocab, token, self._buffer, size, 0, True))
            if count >= 0:
                return self._buffer.raw[:count]
            self._buffer = ctypes.create_string_buffer(-count)

    def is_special(self, token: int) -> bool:
        """Control tokens, and the one for text that is not in the vocabulary."""
        kinds = self._lib.LLAMA_TOKEN_ATTR_CONTROL | self._lib.LLAMA_TOKEN_ATTR_UNKNOWN
        return bool(self._lib.llama_vocab_get_attr(self._vocab, token) & kinds)
