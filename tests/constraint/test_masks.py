"""What a grammar allows next, and how bytes are spelled in a vocabulary."""

from __future__ import annotations

import re
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localspec.bench.grammar import is_valid
from localspec.bench.schemas import random_schemas
from localspec.constraint import Grammar, constrain
from localspec.constraint import guidance as guidance_module
from localspec.loading import get_backend
from localspec.protocols import LanguageModel
from tests.constraint.following import PERSON, ROOT, Vocabulary, follow, model, text_of, walk

VOCABS = ROOT.parent / "shared" / "vocabs"


# ---------------------------------------------------------------- masks


def test_whatever_the_masks_allow_is_valid_for_200_random_schemas() -> None:
    rng = np.random.default_rng(1)
    for schema in random_schemas(200):
        constraint = follow(Grammar.json_schema(schema))
        output, ended = walk(constraint, rng)
        assert ended, schema
        assert is_valid(text_of(output), schema), (schema, text_of(output))
        assert constraint.complete(output)
        assert constraint.accepts(text_of(output))


@pytest.mark.parametrize("pattern", [r"(yes|no), because [a-z ]{5,20}\.", r"[0-9]{3}-[A-Z]{2}", "ä[öü]+😀{1,2}"])
def test_whatever_the_masks_allow_matches_the_regular_expression(pattern: str) -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        output, ended = walk(follow(Grammar.regex(pattern)), rng)
        assert ended and re.fullmatch(pattern, text_of(output))


@pytest.mark.parametrize(
    "source",
    ['start: sum\nsum: NUMBER ("+" NUMBER)~1..3\nNUMBER: /[0-9]{1,3}/', 'root ::= [0-9]{1,3} ("+" [0-9]{1,3}){1,3}'],
)
def test_lark_and_gbnf_say_the_same(source: str) -> None:
    output, ended = walk(follow(Grammar.lark(source)), np.random.default_rng(3))
    assert ended and re.fullmatch(r"[0-9]{1,3}(\+[0-9]{1,3}){1,3}", text_of(output))


def test_the_mask_of_another_output_is_not_given_again() -> None:
    """Old bug, found by the next test: llguidance gave its last mask again after going back and on, if lexer and number
    of lexemes were the same."""
    grammar, rng = Grammar.json_schema(PERSON), np.random.default_rng(909)
    first, second = (walk(follow(grammar), rng)[0] for _ in range(2))
    asked = follow(grammar)
    before, after = asked.mask(second[:43]), asked.mask(first[:37])
    assert np.array_equal(after, follow(grammar).mask(first[:37])) and not np.array_equal(after, before)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_mask_depends_on_the_output_alone_not_on_what_was_asked_before(data: st.DataObject) -> None:
    grammar = Grammar.json_schema(PERSON)
    asked = follow(grammar)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    outputs = [walk(follow(grammar), rng)[0] for _ in range(2)]
    for _ in range(8):
        output = outputs[data.draw(st.integers(0, 1))]
        output = output[: data.draw(st.integers(0, len(output)))]
        if data.draw(st.booleans()):  # a guess that breaks the grammar, in between
            asked.mask(np.append(output, np.int32(data.draw(st.integers(0, model().vocab_size - 1)))))
        assert np.array_equal(asked.mask(output), follow(grammar).mask(output))
        some = rng.integers(0, model().vocab_size, 50).tolist()
        assert asked.allows(output, some) == [bool(asked.mask(output)[token]) for token in some]
        assert asked.complete(output) == follow(grammar).complete(output)
        assert np.array_equal(asked.forced(output), follow(grammar).forced(output))


def test_an_output_that_breaks_the_grammar_allows_nothing() -> None:
    constraint = follow(Grammar.regex("ab"))
    wrong = model().tokenizer.encode("xy", special=False)
    assert not constraint.mask(wrong).any()
    assert not constraint.complete(wrong)
    assert len(constraint.forced(wrong)) == 0
    assert constraint.mask(wrong[:0]).any(), "it must be able to go back"


def test_special_tokens_are_never_part_of_text_and_the_end_comes_where_it_may() -> None:
    tokenizer = model().tokenizer
    constraint = follow(Grammar.regex("(?s:.*)"))
    allowed = set(constraint.mask(np.zeros(0, np.int32)).nonzero()[0].tolist())
    special = {token for token in range(tokenizer.num_tokens) if tokenizer.is_special(token)}
    assert allowed & special == tokenizer.stop_tokens
    assert max(allowed) < tokenizer.num_tokens, "rows of padding were allowed"
    begun = tokenizer.encode('{"name": "', special=False)
    allowed = set(follow(Grammar.json_schema(PERSON)).mask(begun).nonzero()[0].tolist())
    assert allowed and not allowed & special


def test_forced_tokens_are_the_only_ones_allowed() -> None:
    name, value = "a rather long name", {"const": "and a long value"}
    schema = {"type": "object", "properties": {name: value}, "required": [name], "additionalProperties": False}
    constraint = follow(Grammar.json_schema(schema))
    output = np.zeros(0, np.int32)
    num_forced = 0
    while not constraint.complete(output):
        forced = constraint.forced(output)
        for token in forced:
            assert constraint.mask(output).nonzero()[0].tolist() == [token]
            output = np.append(output, token)
        num_forced += len(forced)
        if not len(forced):
            output = np.append(output, np.int32(constraint.mask(output).nonzero()[0][0]))
    assert num_forced >= 4


def test_white_space_between_tokens_of_json_has_an_end() -> None:
    constraint = follow(Grammar.json_schema(PERSON))
    encode = model().tokenizer.encode
    space = int(encode(" ", special=False)[0])
    output = encode("{", special=False)
    most = 200
    while len(output) < most and constraint.mask(output)[space]:
        output = np.append(output, np.int32(space))
    assert 32 <= len(output) < most


def test_an_answer_may_come_behind_a_thought() -> None:
    constraint = follow(Grammar.regex("[0-9]+").behind("</think>"))
    assert constraint.accepts("Let me see <b> 12.</think>\n\n42")
    assert constraint.accepts("</think>42")
    assert not constraint.accepts("42")
    assert not constraint.accepts("hm</think>\n\nforty")
    assert not constraint.accepts("hm</think>x</think>42")
    assert Grammar.regex("a").behind("") == Grammar.regex("a")


def test_accepts_reads_text_however_it_is_cut() -> None:
    constraint = follow(Grammar.json_schema(PERSON))
    assert constraint.accepts('{"name": "Ann", "age": 7, "tags": []}')
    assert not constraint.accepts('{"name": "Ann", "age": 7')
    assert not constraint.accepts('{"name": "Ann", "age": 151, "tags": []}')


# ---------------------------------------------------------------- spelling


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=12).map(lambda text: text.encode("utf-8", "replace")), st.binary(max_size=12)))
def test_bytes_are_spelled_exactly(raw: bytes) -> None:
    spelling = guidance_module.Spelling(model().tokenizer, model().vocab_size)
    assert b"".join(spelling.tokens[token] for token in spelling(raw)) == raw


@pytest.mark.parametrize("name", ["llama-spm", "qwen35", "phi-3", "gpt-2", "llama-bpe"])
def test_bytes_are_spelled_exactly_by_other_tokenizers(name: str) -> None:
    path = VOCABS / f"ggml-vocab-{name}.gguf"
    if not path.is_file():
        pytest.skip("needs the vocabularies in ../shared/vocabs")
    tokenizer = get_backend("mlx").open_tokenizer(path)
    spelling = guidance_module.Spelling(tokenizer, tokenizer.num_tokens)
    for raw in (b"hello world", b' {"a": 1}', b"\n\n", "é é".encode(), b"\xff\xfea", b"name", b"", b" "):
        assert b"".join(spelling.tokens[token] for token in spelling(raw)) == raw
    constraint = constrain(cast(LanguageModel, Vocabulary(tokenizer)), Grammar.regex("hello world"))
    assert constraint is not None
    output = np.zeros(0, np.int32)
    while not constraint.complete(output):
        output = np.append(output, np.int32(constraint.mask(output).nonzero()[0][0]))
    assert b"".join(tokenizer.token_bytes(int(token)) for token in output) == b"hello world"
