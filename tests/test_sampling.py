"""Settings define a law; choices are drawn from exactly that law; fast paths equal the plain formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from localspec import noise
from localspec.constraint import Constraint
from localspec.context import Context
from localspec.errors import SettingError, StaleScoresError
from localspec.host_scores import HostScores
from localspec.noise import Purpose
from localspec.ranking import group_maxima, gumbel_argmax, top_ids
from localspec.sampling import Sampler, SamplingParams, Tolerance, log_softmax_at
from localspec.types import BoolMask, Logits, TokenIds


def row_of(size: int, seed: int = 0, spread: float = 3.0) -> Logits:
    return (spread * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


class AllAllowed:
    """A grammar that forbids nothing."""

    def mask(self, output: TokenIds) -> BoolMask:
        return np.ones(2, np.bool_)


def softmax(row: Logits) -> np.ndarray[Any, np.dtype[np.float64]]:
    weights = np.exp(row.astype(np.float64) - float(row.max()))
    return np.asarray(weights / weights.sum())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 1e-9),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 1e9),
        ("seed", -1),
        ("max_tokens", 0),
        ("logprobs", -1),
        ("stop", ("",)),
        ("logit_bias", {-3: 1.0}),
        ("logit_bias", {3: float("nan")}),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(SettingError) as error:
        SamplingParams(**{field: value})
    assert field.split("_")[0] in str(error.value)


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(1, 3000), elements=st.floats(-50, 50, width=32)),
    st.integers(1, 400),
)
def test_top_ids_equals_a_stable_sort(row: Logits, k: int) -> None:
    assert top_ids(row, k).tolist() == np.argsort(-row, kind="stable")[:k].tolist()


@pytest.mark.parametrize("size", [4096, 4097, 50_000, 151_936, 262_144, 300_000])
def test_group_maxima_are_the_best_logits_of_their_groups(size: int) -> None:
    row, tokens = row_of(size), np.arange(size)
    best = np.full(noise.num_groups(size), -np.inf, np.float32)
    np.maximum.at(best, (tokens >> 18) * 4096 + (tokens & 4095), row)
    assert np.array_equal(group_maxima(row), best)


@pytest.mark.parametrize("size", [64 * 40 * 4, 50_000, 151_936, 300_000])
def test_top_ids_equals_a_stable_sort_where_blocks_are_used(size: int) -> None:
    for seed in range(5):
        row = np.round(row_of(size, seed), 1).astype(np.float32)  # many ties
        for k in (1, 7, 40):
            assert top_ids(row, k).tolist() == np.argsort(-row, kind="stable")[:k].tolist()


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 20.0])
@pytest.mark.parametrize("size", [2, 500, 100_000, 300_000])
def test_gumbel_argmax_equals_the_whole_formula(size: int, spread: float) -> None:
    """The shortcut never changes the winner."""
    for seed in range(10):
        row, temperature = row_of(size, seed, spread), [0.1, 0.8, 1.0, 3.0][seed % 4]
        key = noise.key(seed, Purpose.TOKEN, 17)
        whole = (row - row.max()) * np.float32(1.0 / temperature) + noise.gumbel(key, np.arange(size))
        assert gumbel_argmax(row, temperature, key) == int(whole.argmax())


SETTINGS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.2, top_k=5),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=1.5, top_k=12, top_p=0.9, min_p=0.05),
    SamplingParams(temperature=1.0, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.5),
    SamplingParams(temperature=1.0, logit_bias={2: 3.0, 4: -100.0}),
]


def formula(row: Logits, params: SamplingParams, prompt: list[int], output: list[int]) -> np.ndarray[Any, Any]:
    """The documented order of settings, written down once more without any shortcut."""
    logits = row.astype(np.float64)
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for token in set(prompt + output):
        logits[token] *= 1 / params.repetition_penalty if logits[token] > 0 else params.repetition_penalty
    for token in set(output):
        logits[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    logits /= params.temperature
    order = np.argsort(-logits, kind="stable")
    if params.top_k:
        order = order[: params.top_k]
    weights = np.exp(logits[order] - logits[order[0]])
    inside = np.cumsum(weights) / weights.sum()
    order = order[: int(np.searchsorted(inside, params.top_p)) + 1]
    order = order[np.exp(logits[order] - logits[order[0]]) >= params.min_p]
    law = np.zeros(len(row))
    law[order] = np.exp(logits[order] - logits[order[0]])
    return np.asarray(law / law.sum())


@pytest.mark.parametrize("params", SETTINGS)
def test_the_law_is_the_documented_formula(params: SamplingParams) -> None:
    for seed in range(20):
        row, context = row_of(40, seed, 2.0), Context([1, 2, 3, 3])
        context.extend([2, 5, 5])
        law = Sampler(params, 0).law(row, context)
        dense = np.zeros(len(row))
        dense[law.ids] = law.probs
        assert dense == pytest.approx(formula(row, params, [1, 2, 3, 3], [2, 5, 5]), abs=1e-6)


@pytest.mark.parametrize("params", SETTINGS)
def test_choices_follow_the_law(params: SamplingParams) -> None:
    """Chi-square over 4,000 seeds that are fixed, so there are no false alarms (p > 0.001 was seen)."""
    row, context = row_of(12, 3, 1.0), Context([1, 2, 3, 3])
    context.extend([2, 5, 5])
    law = Sampler(params, 0).law(row, context)
    chosen = np.bincount([Sampler(params, seed).choose(row, context) for seed in range(4000)], minlength=12)
    assert chosen.sum() == chosen[law.ids].sum(), "a token outside the law was chosen"
    likely = law.probs * 4000 >= 5
    observed, expected = chosen[law.ids][likely], (law.probs * 4000)[likely]
    if likely.sum() > 1:
        assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 0.001


def test_temperature_zero_takes_the_best_and_the_lowest_among_equals() -> None:
    row = np.array([1.0, 5.0, 5.0, 2.0], np.float32)
    sampler = Sampler(SamplingParams(top_k=2, top_p=0.1, min_p=0.9), 0)
    assert sampler.is_plain and sampler.choose(row, Context([0])) == 1


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
@pytest.mark.parametrize("offset", [0.0, 500.0, -500.0])
def test_tiny_temperatures_tend_to_greedy(settings: dict[str, Any], offset: float) -> None:
    """Old bug: large row / temperature left no candidate at all."""
    row = row_of(300, 1) + np.float32(offset)
    for seed in range(10):
        sampler = Sampler(SamplingParams(temperature=1e-5, **settings), seed)
        assert sampler.choose(row, Context([0])) == int(row.argmax())
        assert sampler.law(row, Context([0])).probability(int(row.argmax())) == pytest.approx(1.0)


def test_the_row_is_what_it_was_afterwards() -> None:
    """Penalties are written into it for the time of a choice; one that must not be written to gives the same."""
    context = Context([1, 2, 2])
    context.start_output()
    context.extend([2, 4])
    for params in SETTINGS:
        for sampler in (Sampler(params, 0), Sampler(replace(params, temperature=0.0), 0)):
            row, fixed = row_of(50), row_of(50)
            fixed.flags.writeable = False
            assert sampler.choose(row, context) == sampler.choose(fixed, context)
            assert sampler.decide(row, context, Tolerance(0.1, 0.1)) == sampler.decide(
                fixed, context, Tolerance(0.1, 0.1)
            )
            assert np.array_equal(sampler.law(row, context).probs, sampler.law(fixed, context).probs)
            assert np.array_equal(sampler.guesses(row, context, 4)[0], sampler.guesses(fixed, context, 4)[0])
            assert np.array_equal(row, fixed)
    banned = Sampler(
        SamplingParams(logit_bias={0: -np.inf, 1: -np.inf}, repetition_penalty=2.0), 0, cast(Constraint, AllAllowed())
    )
    row = row_of(2)
    with pytest.raises(SettingError, match="nothing can be said"):
        banned.choose(row, Context([1]))
    assert np.array_equal(row, row_of(2))


@pytest.mark.parametrize("params", SETTINGS)
def test_answers_do_not_change_with_the_next_row(params: SamplingParams) -> None:
    """Nothing of an answer is a view of a row that changes back."""
    rows, context, sampler = [row_of(5000, seed) for seed in (0, 1)], Context([1, 2, 3, 3, 5]), Sampler(params, 0)
    law, (ids, chances) = sampler.law(rows[0], context), sampler.guesses(rows[0], context, 4)
    answers = [np.asarray(answer) for answer in (law.ids, law.probs, ids, chances)]
    kept = [answer.copy() for answer in answers]
    sampler.law(rows[1], context)
    assert sampler.choose(rows[0], context) == Sampler(params, 0).choose(rows[0], context) == ids[0]
    for answer, copy in zip(answers, kept, strict=True):
        assert np.array_equal(answer, copy)


def test_a_bias_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(SettingError, match="names no token"):
        Sampler(SamplingParams(logit_bias={99: 1.0}), 0).choose(row_of(50), Context([1]))


def test_log_softmax_sums_to_one() -> None:
    row = row_of(400)
    values = log_softmax_at(row, range(400))
    assert float(np.exp(values).sum()) == pytest.approx(1.0)
    assert values[7] == pytest.approx(float(np.log(softmax(row)[7])), abs=1e-6)


def test_host_scores_refuse_to_answer_after_the_next_pass() -> None:
    generation = [0]
    scores = HostScores(np.stack([row_of(20), row_of(20, 1)]), generation)
    assert scores.num_rows == 2 and scores.top(3).numpy()[0].shape == (2, 3)
    generation[0] += 1
    keys = noise.keys(0, Purpose.TOKEN, np.arange(2))
    for ask in (scores.argmax, lambda: scores.winners(1.0, keys), lambda: scores.top(1), lambda: scores.rows([0])):
        with pytest.raises(StaleScoresError):
            ask()
