"""The sampler inside a grammar: the best of what is allowed, under every setting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from localspec import noise
from localspec.bench.grammar import is_valid
from localspec.constraint import Grammar
from localspec.context import Context
from localspec.errors import SettingError
from localspec.sampling import Sampler, SamplingParams, Tolerance
from localspec.types import Logits, TokenIds
from tests.constraint.following import PERSON, follow, model, text_of, walk

# ---------------------------------------------------------------- the sampler


def brute_force(row: Logits, context: Context, params: SamplingParams, seed: int, allowed: TokenIds) -> int:
    """argmax over the allowed tokens of log p + noise, by the definition."""
    if params.temperature == 0.0:
        return int(allowed[row[allowed].argmax()])
    scaled = (row[allowed] - row[allowed].max()) / np.float32(params.temperature)
    noises = noise.gumbel(noise.key(seed, noise.Purpose.TOKEN, len(context)), allowed)
    return int(allowed[(scaled + noises).argmax()])


@pytest.mark.parametrize("few", [0, 4096, 10**6])
@pytest.mark.parametrize("temperature", [0.0, 0.8, 3.0])
def test_the_choice_is_the_best_of_the_allowed(few: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are allowed, and whether the row is cut down to them or not."""
    monkeypatch.setattr("localspec.sampling._FEW", few)
    rng = np.random.default_rng(4)
    constraint = follow(Grammar.json_schema(PERSON))
    output, _ = walk(constraint, rng)
    params = SamplingParams(temperature=temperature)
    for length in range(len(output)):
        context = Context([5, 6])
        context.extend(output[:length])
        row = rng.normal(size=model().vocab_size).astype(np.float32) * 4
        sampler = Sampler(params, 9, constraint)
        allowed = constraint.mask(output[:length]).nonzero()[0].astype(np.int32)
        expected = brute_force(row, context, params, 9, allowed)
        assert sampler.choose(row, context) == expected
        ids, chances = sampler.guesses(row, context, 16)
        assert ids[0] == expected
        finite = ids[np.isfinite(chances)]
        assert set(finite.tolist()) <= set(allowed.tolist())
        law = sampler.law(row, context)
        assert law.probs.sum() == pytest.approx(1.0)
        assert set(law.ids[law.probs > 0].tolist()) <= set(allowed.tolist())


@pytest.mark.parametrize(
    "settings_of",
    [
        {"top_k": 40},
        {"top_p": 0.9},
        {"min_p": 0.2},
        {"top_k": 5, "top_p": 0.5, "min_p": 0.1},
        {"repetition_penalty": 1.5, "presence_penalty": 0.3, "frequency_penalty": 0.2},
        {"logit_bias": {20: 50.0, 3: float("inf"), 65: float("-inf")}},
    ],
)
@pytest.mark.parametrize("few", [0, 4096])
def test_every_setting_works_inside_the_grammar(
    settings_of: dict[str, Any], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localspec.sampling._FEW", few)
    rng = np.random.default_rng(5)
    constraint = follow(Grammar.json_schema(PERSON))
    sampler = Sampler(SamplingParams(temperature=0.9, **settings_of), 3, constraint)
    context = Context([5, 6])
    while len(context) < 300:
        row = rng.normal(size=model().vocab_size).astype(np.float32) * 3
        token = sampler.choose(row, context)
        assert constraint.mask(context.output)[token]
        assert sampler.guesses(row, context, 4)[0][0] == token
        assert sampler.law(row, context).probability(token) > 0.0
        if token in model().tokenizer.stop_tokens:
            break
        context.append(token)
    assert is_valid(text_of(context.output), PERSON)


def test_banning_all_that_the_grammar_allows_is_an_error() -> None:
    constraint = follow(Grammar.regex("a"))
    allowed = constraint.mask(np.zeros(0, np.int32)).nonzero()[0].tolist()
    sampler = Sampler(SamplingParams(logit_bias=dict.fromkeys(allowed, -np.inf)), 0, constraint)
    row = np.zeros(model().vocab_size, np.float32)
    with pytest.raises(SettingError, match="nothing can be said here"):
        sampler.choose(row, Context([5]))
    assert len(sampler.guesses(row, Context([5]), 4)[0]) == 0
    assert len(sampler.law(row, Context([5])).ids) == 0


# ---------------------------------------------------------------- within a tolerance


@pytest.mark.parametrize("settings_of", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("few", [0, 4096])
def test_a_decision_inside_a_grammar_holds_for_all_rows_within_the_tolerance(
    settings_of: dict[str, Any], temperature: float, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localspec.sampling._FEW", few)
    rng = np.random.default_rng(6)
    constraint = follow(Grammar.json_schema(PERSON))
    output, _ = walk(constraint, rng)
    sampler = Sampler(SamplingParams(temperature=temperature, **settings_of), 9, constraint)
    num_clear = 0
    for length in range(len(output)):
        context = Context([5, 6])
        context.extend(output[:length])
        row = rng.normal(size=model().vocab_size).astype(np.float32) * 4
        token, is_clear = sampler.decide(row, context, Tolerance(0.2, 0.1))
        assert token == sampler.choose(row, context)
        num_clear += is_clear
        for _ in range(5 if is_clear else 0):
            other = row + rng.uniform(-0.1, 0.1, len(row)).astype(np.float32)
            assert sampler.choose(other, context) == token
    assert num_clear
