"""Grammars and settings that are refused, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest

from localspec.constraint import Grammar, constrain
from localspec.constraint import guidance as guidance_module
from localspec.errors import BackendMissingError, GrammarError, SettingError
from localspec.protocols import LanguageModel, Tokenizer
from localspec.sampling import SamplingParams
from tests.constraint.following import Vocabulary, follow, model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Grammar.json_schema({"type": "objec"}), "JSON schema cannot be followed: Invalid type"),
        (lambda: Grammar.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda: Grammar.json_schema({"$ref": "#/nowhere"}), "nowhere"),
        (lambda: Grammar.json_schema({"$ref": "#"}), "no answer satisfies it"),
        (lambda: Grammar.regex(r"[^\x00-\x{10ffff}]"), "no answer satisfies it"),
        (lambda: Grammar.json_schema("{"), "not JSON"),
        (lambda: Grammar.json_schema("[1]"), "got list, expected an object"),
        (lambda: Grammar.json_schema(False), "allows no answer"),
        (lambda: Grammar.json_schema({"const": {1, 2}}), "what JSON cannot say"),
        (lambda: Grammar.regex("a(b"), "regular expression cannot be followed"),
        (lambda: Grammar.regex("(?=a)b"), "look-ahead"),
        (lambda: Grammar.lark("start: nothing"), "unknown name"),
        (lambda: Grammar.lark("root ::= [0-9"), "grammar cannot be followed"),
        (lambda: Grammar.lark(""), "grammar cannot be followed"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(make: Callable[[], Grammar], words: str) -> None:
    with pytest.raises(SettingError) as caught:
        follow(make())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_lenient_leaves_out_what_cannot_be_enforced() -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True}
    constraint = follow(Grammar.json_schema(schema, lenient=True))
    assert constraint.accepts("[true, true]")
    assert not constraint.accepts("[1]")


def test_a_model_without_an_end_is_refused() -> None:
    class Endless:
        stop_tokens: frozenset[int] = frozenset()

        def __getattr__(self, name: str) -> Any:
            return getattr(model().tokenizer, name)

    endless = cast(LanguageModel, Vocabulary(cast(Tokenizer, Endless())))
    with pytest.raises(SettingError, match="token that ends the answer"):
        constrain(endless, Grammar.regex("a"))


def test_without_llguidance_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guidance_module, "find_spec", lambda name: None)
    with pytest.raises(BackendMissingError, match=r"localspec\[grammar\]"):
        constrain(model(), Grammar.regex("a"))
    assert constrain(model(), None) is None


def test_a_grammar_that_gets_too_costly_ends_in_an_error_of_ours() -> None:
    constraint = follow(Grammar.regex("ab"))
    broken = cast(Any, constraint)
    broken._matcher.consume_token(int(model().tokenizer.encode("x", special=False)[0]))  # puts it into its error state
    with pytest.raises(GrammarError, match="too costly"):
        constraint.mask(np.zeros(0, np.int32))
    assert not constraint.complete(np.zeros(0, np.int32))
    assert not constraint.accepts("ab")


def test_ignore_eos_contradicts_a_grammar() -> None:
    with pytest.raises(SettingError, match="ignore_eos"):
        SamplingParams(grammar=Grammar.regex("a"), ignore_eos=True)
