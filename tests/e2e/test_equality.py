"""The promise itself, on the bundled pair: text under speculation equals plain decoding.

A sample of what `localspec bench equality` runs over all held-out prompts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from localspec.bench.equality import compare
from localspec.bench.prompts import load_prompts
from localspec.engine.chat import Chat
from localspec.loading import bundled_path, get_backend, open_pair
from localspec.pair import Pair
from localspec.protocols import LoadSettings
from localspec.sampling import SamplingParams
from localspec.schedule import store
from tests.conftest import brief_prompts

pytestmark = pytest.mark.real


@cache
def pair_on(backend: str, trees: bool = False) -> Pair:
    """The bundled pair, opened once per backend, and once more so that trees are exact."""
    if not get_backend(backend).is_installed():
        pytest.skip(f"needs {backend}: {get_backend(backend).report().install_command}")
    return open_pair(
        backend=backend,
        settings=LoadSettings(context=1024, trees=trees, num_sequences=6),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "tokens"), [("llamacpp", 48), ("mlx", 16)])
def test_text_equals_plain_decoding_on_held_out_prompts(backend: str, tokens: int) -> None:
    prompts = brief_prompts() if backend == "mlx" else load_prompts(per_domain=2)
    report = compare(pair_on(backend), prompts, ["draft_model", "ngram:min=1"], [0.0, 0.8], tokens)
    assert report.differences == []
    assert sum(row.num_prompts for row in report.rows) == 4 * len(prompts)
    guessed = [row for row in report.rows if row.drafter == "draft_model"]
    assert sum(row.num_tokens for row in guessed) > 1.3 * sum(row.num_rounds for row in guessed)


@pytest.mark.slow
def test_guarded_text_equals_plain_decoding_where_plain_runs_at_width_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Width 1 has rows of its own here, so this is a trial; the bound is the one of a first load."""
    monkeypatch.setattr(store, "_automatic", True)
    prompts = load_prompts(per_domain=2)
    pair = pair_on("llamacpp")
    report = compare(pair, prompts, ["draft_model", "ngram:min=1"], [0.0, 0.8], 32, exact="guarded")
    assert report.differences == []
    for name in ("nothing", "draft_model"):
        rows = [row for row in report.rows if row.drafter == name]
        assert 0 < sum(row.num_rechecked for row in rows) < 0.5 * sum(row.num_tokens for row in rows)
    assert pair.exactness("guarded").widths.min_width == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "domains", "budgets", "tokens", "temperatures"),
    [
        ("llamacpp", ("chat", "code", "prose"), (8, 16, 32, 64), 12, (0.0, 0.7, 1.0)),
        ("mlx", ("code",), (16, 64), 8, (0.7,)),
    ],
)
def test_text_equals_plain_decoding_under_trees(
    backend: str, domains: tuple[str, ...], budgets: tuple[int, ...], tokens: int, temperatures: tuple[float, ...]
) -> None:
    prompts = brief_prompts(*domains) if backend == "mlx" else load_prompts(domains=domains, per_domain=1)
    drafters = [f"draft_model:num={budget},shape=tree" for budget in budgets]
    drafters.append("draft_model:shape=3-2-1+ngram:min=1,shape=tree")
    report = compare(pair_on(backend, trees=True), prompts, drafters, temperatures, tokens)
    assert report.differences == []
    for name in drafters:
        rows = [row for row in report.rows if row.drafter == name]
        assert sum(row.num_tokens for row in rows) > 1.3 * sum(row.num_rounds for row in rows)


@pytest.mark.slow
def test_types_whose_kernels_change_with_the_width_stay_in_the_class_that_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q4_K and Q6_K: five rows add up otherwise than two."""
    backend = get_backend("llamacpp")
    if not backend.is_installed():
        pytest.skip("llama-cpp-python is not installed")
    assert backend.quantizer is not None
    monkeypatch.setattr(store, "_automatic", True)
    target = tmp_path / "target.gguf"
    backend.quantizer.write(bundled_path("tiny", "target"), target, "Q4_K_M", lambda _: None, again=True)
    draft = str(bundled_path("tiny", "draft"))
    settings = LoadSettings(context=1024, num_sequences=2)
    with open_pair(str(target), draft, backend="llamacpp", settings=settings) as pair:
        found = pair.target.capabilities.width_class
        assert found.measured and found.max_width is not None
        report = compare(pair, load_prompts(per_domain=2), ["draft_model:num=4", "ngram:min=1"], (0.0, 0.8), 32)
        assert report.differences == []
    with open_pair(str(target), draft, backend="llamacpp", settings=settings, use_tuned=False) as pair:
        assert not pair.target.capabilities.width_class.measured


HARD = {
    "truncated": SamplingParams(temperature=1.0, top_k=40, top_p=0.95, min_p=0.02),
    "penalties": SamplingParams(temperature=0.7, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2),
    "greedy with penalties": SamplingParams(repetition_penalty=1.3),
    "hot": SamplingParams(temperature=1.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["llamacpp", "mlx"])
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize(
    ("trees", "drafters"),
    [(False, ("draft_model", "ngram:min=1")), (True, ("draft_model:num=12,shape=tree", "draft_model:shape=3-2+ngram"))],
    ids=["chains", "trees"],
)
def test_every_sampling_setting_works_under_speculation(
    backend: str, name: str, trees: bool, drafters: tuple[str, ...]
) -> None:
    pair = pair_on(backend, trees)
    params = replace(HARD[name], seed=11, max_tokens=24 if backend == "llamacpp" else 12, ignore_eos=True, logprobs=2)
    prompt = brief_prompts("code")[0].encode(pair.target.tokenizer).tolist()
    answers = []
    for drafter in ("nothing", *drafters):
        with pair.session(drafter) as session:
            answers.append(session.generate(prompt, params))
    assert answers[0].tokens == answers[1].tokens == answers[2].tokens
    assert answers[0].logprobs == answers[1].logprobs == answers[2].logprobs


def test_a_conversation_prefills_only_what_is_new() -> None:
    pair = pair_on("llamacpp")
    with pair.session() as session:
        chat = Chat(session)
        params = SamplingParams(max_tokens=24, seed=1)
        first = chat.say("What is 4 * 78?", params).result
        second = chat.say("And 5 * 78?", params).result
    known = first.num_prompt_tokens + len(first.tokens) - 1
    assert second.stats.num_reused == known
    assert second.num_prompt_tokens == second.stats.num_reused + second.stats.num_prefilled + 1
