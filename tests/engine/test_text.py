"""Streams of text: whole characters, no part of a stop string, no special token."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localspec.engine.detokenize import Detokenizer
from localspec.engine.prefix import encode_prompt
from localspec.engine.stop import StopStrings
from localspec.engine.template import render
from localspec.errors import PromptError, UnsupportedModelError
from localspec.testing.reference import ByteTokenizer
from localspec.types import TokenIds

BYTES = ByteTokenizer(257)


@given(st.text())
def test_whole_characters_only(text: str) -> None:
    detokenizer = Detokenizer(BYTES)
    pieces = [detokenizer.push(token) for token in text.encode()]
    assert "".join(pieces) + detokenizer.finish() == text
    assert all("�" not in piece for piece in pieces) or "�" in text


@given(st.binary())
def test_invalid_bytes_come_out_as_python_shows_them(raw: bytes) -> None:
    detokenizer = Detokenizer(BYTES)
    shown = "".join(detokenizer.push(token) for token in raw) + detokenizer.finish()
    assert shown == raw.decode(errors="replace")


def test_special_tokens_are_not_shown() -> None:
    assert Detokenizer(BYTES).push(256) == ""


@given(st.text("ab#\n", max_size=40), st.lists(st.text("ab#\n", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_cut_before_the_first_match_however_text_arrives(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    stream = StopStrings(tuple(stops))
    shown = "".join(stream.push(part) for part in parts)
    shown += stream.finish()
    # a match is recognised as soon as it is complete, so a longer one cannot overrule it
    ends = [text[:end] for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if stream.matched is None:
        assert not ends and shown == text
    else:
        assert text.startswith(shown + stream.matched)
        assert not any(stop in shown for stop in stops)


def test_nothing_of_a_stop_string_leaks() -> None:
    stream = StopStrings(("</end>",))
    assert stream.push("Hi </") == "Hi "
    assert stream.push("en") == ""
    assert stream.push("emy> </end> more") == "</enemy> "
    assert stream.matched == "</end>" and stream.push("x") == "" and stream.finish() == ""


# ---------------------------------------------------------------- templates and prefixes


class Templated(ByteTokenizer):
    def __init__(self, template: str | None, bos: int | None = None, num_tokens: int = 257) -> None:
        super().__init__(num_tokens)
        self.chat_template = template
        self.bos = bos
        self.template_tokens: Mapping[str, str] = {"eos_token": "\0", "bos_token": "\1"}


USER = [{"role": "user", "content": "hi"}]


def test_templates_see_messages_and_the_models_own_tokens() -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m.content }}{{ eos_token }}{% endfor %}A:"
    assert render(Templated(template), USER) == "\1user:hi\0A:"


def test_templates_write_json_as_transformers_do_and_may_mark_generations() -> None:
    template = "{{ messages[0].content | tojson }}{% generation %}A{% endgeneration %}"
    messages = [{"role": "user", "content": "<é'"}]
    assert render(Templated(template), messages) == '"<é\'"A'


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(UnsupportedModelError, match="no chat template"):
        render(Templated(None), USER)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ 1 + 'a' }}",
        "{% if %}",
    ],
)
def test_refusing_broken_and_hostile_templates_are_reported_not_run(template: str) -> None:
    with pytest.raises(PromptError, match="chat template"):
        render(Templated(template), USER)


def tokens(text: str, tokenizer: ByteTokenizer = BYTES) -> TokenIds:
    return tokenizer.encode(text, special=True)


def test_a_bos_is_added_once() -> None:
    with_bos = Templated(None, bos=1)
    assert encode_prompt(with_bos, "ab").tolist() == [1, 97, 98]
    assert encode_prompt(with_bos, "\1ab").tolist() == [1, 97, 98]
    assert encode_prompt(BYTES, "ab").tolist() == [97, 98]


class Merging(ByteTokenizer):
    """Reads "ab" as one token, as a model need not write it."""

    def encode(self, text: str, *, special: bool) -> TokenIds:
        return super().encode(text.replace("ab", "Z"), special=special)

    def token_bytes(self, token: int) -> bytes:
        return b"ab" if token == ord("Z") else super().token_bytes(token)


def test_the_models_own_tokens_stay_where_the_text_goes_on_behind_a_special_one() -> None:
    merging = Merging(257)
    said = np.array([*b"ab", 256], np.int32)  # written as two tokens, then the end
    assert encode_prompt(merging, "ab\0ab", said).tolist() == [97, 98, 256, ord("Z")]
    cut = np.array([*b"ab"], np.int32)  # cut off by max_tokens: the rest begins with a special token
    assert encode_prompt(merging, "ab\0ab", cut).tolist() == [97, 98, 256, ord("Z")]


def test_without_a_seam_or_with_other_text_everything_is_encoded_again() -> None:
    merging = Merging(257)
    open_end = np.array([*b"a"], np.int32)
    assert encode_prompt(merging, "ab", open_end).tolist() == [ord("Z")]
    other = np.array([*b"xy", 256], np.int32)
    assert encode_prompt(merging, "ab", other).tolist() == [ord("Z")]


def test_a_seam_inside_a_character_is_no_seam() -> None:
    half = np.array([0xE2, 0x82], np.int32)  # cut off by max_tokens inside a euro sign
    assert encode_prompt(BYTES, "\u20ac\0", half).tolist() == [0xE2, 0x82, 0xAC, 256]


class Swallowing(ByteTokenizer):
    """Its special token swallows the newline behind it, as Phi-3's does."""

    def encode(self, text: str, *, special: bool) -> TokenIds:
        return super().encode(text.replace("\0\n", "\0"), special=special)


def test_what_a_special_token_swallows_is_swallowed_at_the_seam_too() -> None:
    swallowing = Swallowing(257)
    said = np.array([97, 256], np.int32)
    assert encode_prompt(swallowing, "a\0\nb", said).tolist() == encode_prompt(swallowing, "a\0\nb").tolist()


def test_a_bos_that_was_put_there_does_not_hide_the_shared_text() -> None:
    with_bos = Templated(None, bos=1)
    said = np.array([1, 97, 256], np.int32)
    assert encode_prompt(with_bos, "a\0b", said).tolist() == [1, 97, 256, 98]
