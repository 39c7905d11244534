"""Answers under a grammar on the bundled pair: equal to plain decoding, valid, and still guessed ahead."""

from __future__ import annotations

import re
from functools import cache

import pytest

from localspec.bench.grammar import is_valid, measure
from localspec.constraint import Grammar
from localspec.engine.answer import Generation
from localspec.loading import get_backend, open_pair
from localspec.pair import Pair
from localspec.protocols import LoadSettings
from localspec.sampling import SamplingParams

pytestmark = pytest.mark.real

BOOK = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 20},
        "year": {"type": "integer", "minimum": 1000, "maximum": 2100},
        "genres": {"type": "array", "items": {"enum": ["drama", "crime", "poetry"]}, "maxItems": 2},
    },
    "required": ["title", "year", "genres"],
    "additionalProperties": False,
}
PROMPT = "<|im_start|>user\nA book, in JSON.<|im_end|>\n<|im_start|>assistant\n"


@cache
def pair_on(backend: str, trees: bool) -> Pair:
    if not get_backend(backend).is_installed():
        pytest.skip(f"needs {backend}: {get_backend(backend).report().install_command}")
    return open_pair(backend=backend, settings=LoadSettings(context=512, trees=trees, num_sequences=4), use_tuned=False)


def answer(pair: Pair, drafter: str, params: SamplingParams, acceptance: str = "walk") -> Generation:
    with pair.session(drafter, acceptance=acceptance) as session:
        return session.generate(PROMPT, params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "trees", "drafters"),
    [
        ("llamacpp", False, ("draft_model:num=5", "grammar", "auto")),
        ("llamacpp", True, ("draft_model:num=16,shape=tree", "draft_model:num=5+ngram:min=1+grammar", "auto")),
        ("mlx", False, ("draft_model:num=5", "draft_model:num=8,shape=tree")),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_json_equals_plain_decoding_and_is_valid(
    backend: str, trees: bool, drafters: tuple[str, ...], temperature: float
) -> None:
    pair = pair_on(backend, trees)
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=64, grammar=Grammar.json_schema(BOOK))
    plain = answer(pair, "nothing", params)
    assert plain.complete and is_valid(plain.text, BOOK)
    for drafter in drafters:
        made = answer(pair, drafter, params)
        assert made.tokens == plain.tokens, drafter
        assert made.stats.num_drafted, "speculation was off"
    guessed = answer(pair, drafters[0], params, "rejection")
    assert guessed.complete and is_valid(guessed.text, BOOK)
    if temperature == 0.0:
        assert guessed.tokens == plain.tokens


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["llamacpp", "mlx"])
def test_every_sampling_setting_works_inside_a_grammar(backend: str) -> None:
    pair = pair_on(backend, False)
    params = SamplingParams(
        temperature=0.9,
        top_k=50,
        top_p=0.95,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        logit_bias={300: 2.0},
        seed=2,
        max_tokens=32,
        logprobs=2,
        grammar=Grammar.regex(r"(yes|no), because [a-z ]{5,40}\."),
    )
    plain = answer(pair, "nothing", params)
    assert re.fullmatch(r"(yes|no), because [a-z ]{5,40}\.", plain.text)
    made = answer(pair, "draft_model:num=4", params)
    assert made.tokens == plain.tokens
    assert made.logprobs is not None and len(made.logprobs) == len(made.tokens)


@pytest.mark.slow
def test_random_schemas_are_answered_validly_and_as_plainly() -> None:
    """A sample of what `localspec bench grammar` runs on 200."""
    report = measure(pair_on("llamacpp", False), 4, ("draft_model",), (0.0, 0.8), 96)
    assert report.wrong == []
    for row in report.rows:
        assert row.num_equal == row.num_schemas == 4
        assert row.num_valid + row.num_cut_off == 4
        assert row.length(0) > 1.2
