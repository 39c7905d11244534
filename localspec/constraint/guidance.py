"""Constraints by llguidance, which is imported when the first grammar is compiled.

Where the grammar leaves only one way to write the next bytes, llguidance allows only the tokens that the model's own
tokenizer cuts them into: text comes out as the model is used to reading it, and such tokens can be guessed for certain.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.util import find_spec
from threading import Lock
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from localspec.constraint.contract import Constraint
from localspec.constraint.grammar import WHITE_SPACE, Grammar
from localspec.context import common_prefix
from localspec.errors import BackendMissingError, GrammarError, SettingError
from localspec.protocols import LanguageModel, Tokenizer
from localspec.types import BoolMask, TokenIds

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_log = logging.getLogger("localspec.constraint")

_MASKS_KEPT = 64  # the drafter asks for masks that the target needs again in the same round
_MESSAGE = 300  # characters of llguidance's own words

_vocabularies: WeakKeyDictionary[LanguageModel, LLTokenizer] = WeakKeyDictionary()
_lock = Lock()


def constrain(model: LanguageModel, grammar: Grammar | None) -> Constraint | None:
    """The constraint for one answer of `model`; None without a grammar. Takes milliseconds, for the first grammar of a
    model up to a second. May be called from any thread.

    Raises SettingError for a grammar that cannot be followed, and BackendMissingError without llguidance.
    """
    if grammar is None:
        return None
    if find_spec("llguidance") is None:
        raise BackendMissingError(
            "llguidance, which follows grammars, is not installed", fix='Install it: pip install "localspec[grammar]".'
        )
    from llguidance import LLMatcher, LLParserLimits

    vocabulary = _vocabulary(model)
    source = _compiled(grammar)
    if grammar.thought_end:
        source = _behind_thought(source, model.tokenizer, grammar.thought_end)
    matcher = LLMatcher(vocabulary, source, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if matcher.is_error():
        raise _refused(grammar, matcher.get_error())
    matcher.compute_bitmask()
    if matcher.is_error():  # it compiles and cannot be begun
        raise _refused(grammar, "no answer satisfies it")
    for warning in matcher.get_grammar_warnings():
        _log.info("%s", warning)
    return GuidanceConstraint(matcher, vocabulary, model.vocab_size)


def _compiled(grammar: Grammar) -> str:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        if grammar.kind == "json_schema":
            return LLMatcher.grammar_from_json_schema(
                grammar.source, defaults={"whitespace_pattern": WHITE_SPACE, "lenient": grammar.lenient}
            )
        if grammar.kind == "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        text = gbnf_to_lark(grammar.source) if "::=" in grammar.source else grammar.source
        return LLMatcher.grammar_from_lark(text)
    except Exception as error:  # the converter has errors of its own, and stumbles over some input
        raise _refused(grammar, str(error)) from error


def _behind_thought(source: str, tokenizer: Tokenizer, end: str) -> str:
    """The grammar behind any text up to the first `end`."""
    token = special_token(tokenizer, end)
    thought = f"[lazy]: TEXT {json.dumps(end)}" if token is None else f": TEXT <[{token}]>"
    lark = f"start: thought GAP @answer\nthought{thought}\nTEXT: /(?s:.*)/\nGAP: /[ \\n]{{0,4}}/"
    answer = json.loads(source)["grammars"][0] if source.startswith('{"grammars"') else {"lark_grammar": source}
    return json.dumps({"grammars": [{"lark_grammar": lark}, {**answer, "name": "answer"}]})


def special_token(tokenizer: Tokenizer, text: str) -> int | None:
    """The control token of that text; None where the text is written with ordinary tokens."""
    if not text:
        return None
    ids = tokenizer.encode(text, special=True)
    return int(ids[0]) if len(ids) == 1 and tokenizer.is_special(int(ids[0])) else None


def _refused(grammar: Grammar, reason: str) -> SettingError:
    name = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "grammar"}[grammar.kind]
    return SettingError(f"the {name} cannot be followed: {_shortened(reason)}")


def _shortened(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= _MESSAGE else f"{line[:_MESSAGE]} ..."


def _vocabulary(model: LanguageModel) -> LLTokenizer:
    with _lock:
        if model not in _vocabularies:
            _vocabularies[model] = _read_vocabulary(model)
        return _vocabularies[model]


def _read_vocabulary(model: LanguageModel) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    ends = sorted(token for token in model.tokenizer.stop_tokens if token < model.vocab_size)
    if not ends:
        raise SettingError("a grammar needs a token that ends the answer, and the model names none")
    # from here on llguidance asks `Spelling` for tokens; it reads all else at once
    return LLTokenizer(TokenizerWrapper(Spelling(model.tokenizer, model.vocab_size)), eos_token=ends)


class Spelling:
    """A tokenizer as llguidance wants it. Called with bytes, it gives tokens that write exactly those: as the tokenizer
    itself cuts them where it adds nothing, by longest match elsewhere (bytes that are no text, Unicode that it
    normalises)."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        known = range(min(tokenizer.num_tokens, vocab_size))
        self.special_token_ids = [t for t in known if tokenizer.is_special(t) or t in tokenizer.stop_tokens]
        self.eos_token_id = min(tokenizer.stop_tokens)
        self.bos_token_id = tokenizer.bos

    def __call__(self, raw: bytes) -> list[int]:
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            return self._longest(raw)
        for before in ("", "\n"):  # a line break keeps away the space that some put in front of all text
            ids = self._tokenizer.encode(before + text, special=False).tolist()
            size = 0
            for place in range(len(ids) - 1, -1, -1):
                size += len(self.tokens[ids[place]])
                if size >= len(raw):
                    break
            else:
                place = 0
            if b"".join(self.tokens[token] for token in ids[place:]) == raw:
                return list(ids[place:])
        return self._longest(raw)

    def _longest(self, raw: bytes) -> list[int]:
        ids, start = [], 0
        while start < len(raw):
            sizes = range(min(len(raw) - start, self._longest_token), 0, -1)
            size = next((size for size in sizes if raw[start : start + size] in self._ordinary), None)
            if size is None:  # no token writes this byte, so no answer can
                break
            ids.append(self._ordinary[raw[start : start + size]])
            start += size
        return ids

    @cached_property
    def _ordinary(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {text: token for token, text in enumerate(self.tokens) if text and token not in special}

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self._ordinary), default=0)


class GuidanceConstraint:
    """Follows one answer: goes back to where an output leaves what was asked before, and on from there."""

    def __init__(self, matcher: LLMatcher, vocabulary: LLTokenizer, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._output: TokenIds = np.zeros(0, np.int32)  # what the matcher has taken in
        self._masks: dict[bytes, NDArray[np.uint8]] = {}  # a bit per token, by output; the oldest first

    def mask(self, output: TokenIds) -> BoolMask:
        """[V] the tokens that may follow."""
        return np.unpackbits(self._bits(output), count=self._vocab_size, bitorder="little").view(np.bool_)

    def allows(self, output: TokenIds, tokens: Sequence[int]) -> list[bool]:
        """May these follow, each for itself?"""
        bits = self._bits(output)
        return [bool(bits[token >> 3] >> (token & 7) & 1) for token in tokens]

    def _bits(self, output: TokenIds) -> NDArray[np.uint8]:
        """The mask with eight tokens in a byte, the lowest first."""
        key = output.tobytes()
        bits = self._masks.get(key)
        if bits is None:
            bits = np.zeros((self._vocab_size + 7) // 8, np.uint8)
            if self._go(output):
                bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
                self._check()
            if len(self._masks) >= _MASKS_KEPT:
                del self._masks[next(iter(self._masks))]
            self._masks[key] = bits
        return bits

    def forced(self, output: TokenIds) -> TokenIds:
        """[T] what follows in any case."""
        return _ids(self._matcher.compute_ff_tokens() if self._go(output) else ())

    def complete(self, output: TokenIds) -> bool:
        """May the answer end here? Where following failed nobody knows, and the answer is no."""
        try:
            return self._go(output) and self._matcher.is_accepting()
        except GrammarError:
            return False

    def accepts(self, text: str) -> bool:
        """Is this a whole answer?"""
        matcher = self._matcher.deep_copy()
        if not matcher.reset():
            return False
        tokens = self._vocabulary.greedy_tokenize(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    def _go(self, output: TokenIds) -> bool:
        """Bring the matcher to this output; False, and as far as it goes, where it breaks the grammar."""
        same = common_prefix(self._output, output)
        if same < len(self._output):
            self._matcher.rollback(len(self._output) - same)
            # llguidance 1.9 knows its last mask by the state of the lexer and the number of lexemes, and would give it
            # again for another output with as many; a mask of here takes its place
            self._matcher.compute_bitmask()
        rest = output[same:].tolist()
        taken = self._matcher.try_consume_tokens(rest) if rest else 0
        self._output = output[: same + taken].copy()
        self._check()
        return taken == len(rest)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar became too costly to follow: {_shortened(self._matcher.get_error())}")


def _ids(tokens: Iterable[int]) -> TokenIds:
    return np.fromiter(tokens, np.int32)


_: type[Constraint] = GuidanceConstraint
