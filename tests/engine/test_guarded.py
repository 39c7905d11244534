"""Guarded decoding on a model whose rows and cache change with the width of a pass, as a GPU's do: text equals plain
decoding where without guarding it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localspec.context import Context
from localspec.drafters import DraftModel, Ngram, Nothing
from localspec.engine.answer import Generation
from localspec.engine.recheck import Recheck
from localspec.engine.round import Lane, Room, RoundResult, run_round
from localspec.engine.session import Session
from localspec.errors import SettingError, UnknownNameError, UnsupportedModelError
from localspec.exactness import Bound, Exactness, Mode
from localspec.host_scores import HostScores
from localspec.pair import Pair
from localspec.protocols import Drafter, HostTokens, Outcome, Rewind, Scores, Step, WidthClass, chain_parents
from localspec.sampling import Sampler, SamplingParams, Tolerance
from localspec.schedule import bound as measuring
from localspec.schedule import store
from localspec.schedule.classes import Classes, find
from localspec.schedule.cost import Costs, Curve
from localspec.terminal import summary
from localspec.testing.reference import ReferenceModel
from localspec.verify import Walk, make_acceptance

VOCABULARY = 60
SHARPNESS = 4.0
CHEAP = Costs(Curve((1, 64), (0,), ((10.0, 10.0),)))
"""Of passes: whatever is re-checked, guesses pay."""
LIKE_A_GPU = Costs(Curve((1, 2, 3, 4, 5, 8, 64), (0,), ((6.4, 6.8, 7.4, 7.5, 9.5, 9.9, 15.0),)))
"""As of 8B in Q8_0 on an H200: guesses pay where nothing is re-checked."""
PROMPTS = [[(7 * number + 3 * place) % 50 + 1 for place in range(6)] for number in range(5)]
SETTINGS = {
    "greedy": SamplingParams(),
    "plain temperature": SamplingParams(temperature=0.8),
    "truncated": SamplingParams(temperature=1.0, top_k=12, top_p=0.9, min_p=0.02),
    "penalties": SamplingParams(temperature=0.7, repetition_penalty=1.2, presence_penalty=0.3),
    "greedy with penalties": SamplingParams(repetition_penalty=1.3, logit_bias={4: 1.0}),
}


class Rounding(ReferenceModel):
    """Rows, and what a pass leaves in the cache, are rounded by a grid that depends on the width of the pass."""

    grid = 0.05
    trace = 1.5e-3  # of the width in what is written, for which a row's place in its pass counts

    def __init__(self, *, host_scores: bool = True) -> None:
        super().__init__(VOCABULARY, seed=2, sharpness=SHARPNESS, host_scores=host_scores, context_length=256)
        self.capabilities = replace(self.capabilities, width_class=WidthClass(1, None, "none", measured=False))
        self.widths: list[int] = []

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        before = [step.state.num_pending for step in steps]
        found: list[Scores] = []
        for step, start, scores in zip(steps, before, super().forward(steps), strict=True):
            self.widths.append(step.num_tokens)
            width = self.kernel(step.num_tokens)
            shift = np.random.default_rng(width).uniform(0.0, self.grid, self.vocab_size)
            rows = np.array(scores.rows(range(scores.num_rows)))
            rows = (np.round((rows + shift) / self.grid) * self.grid - shift).astype(np.float32)
            found.append(HostScores(rows, self.generation))
            for cell in step.state.pending[start:]:  # type: ignore[attr-defined]
                cell.values[:] *= 1.0 + self.trace * np.sin(width)
        return found

    def kernel(self, width: int) -> int:
        """Which one passes of that width run."""
        return width


class Stepped(Rounding):
    """As llama.cpp on CUDA: passes of 3 and 4 tokens run the same kernels, of 5 to 8 others."""

    trace = 0.0

    def __init__(self, name: str) -> None:
        super().__init__()
        self.info = replace(self.info, name=name)
        self.capabilities = replace(self.capabilities, exact_trees=False)

    def kernel(self, width: int) -> int:
        return width if width < 3 else 1 << (width - 1).bit_length()


@pytest.fixture(scope="module")
def bound() -> Bound:
    return measuring.measure(Rounding(), seconds=2.0, contexts=(6, 20))


def drafters(target: ReferenceModel) -> dict[str, Drafter]:
    helper = ReferenceModel(VOCABULARY, seed=2, sharpness=SHARPNESS, context_length=256).perturbed(0.3)
    return {
        "chain": DraftModel(helper, num=4),
        "tree": DraftModel(helper, num=8, shape="tree"),
        "lookup": Ngram(min=1),
    }


def answers(target: ReferenceModel, exactness: Exactness, params: SamplingParams) -> dict[str, list[Generation]]:
    """By drafter, of all prompts; a session each."""
    found = {}
    for name, drafter in {"plain": Nothing(), **drafters(target)}.items():
        with Session(target, drafter, exactness=exactness) as session:
            found[name] = [
                session.generate(prompt, replace(params, seed=number, max_tokens=40, ignore_eos=True))
                for number, prompt in enumerate(PROMPTS)
            ]
    return found


def num_unequal(found: dict[str, list[Generation]]) -> int:
    return sum(
        one.tokens != want.tokens
        for name in ("chain", "tree", "lookup")
        for one, want in zip(found[name], found["plain"], strict=True)
    )


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("host_scores", [True, False])
def test_text_equals_plain_decoding_where_rows_change_with_the_width(
    name: str, host_scores: bool, bound: Bound
) -> None:
    target = Rounding(host_scores=host_scores)
    guarded = answers(target, Exactness.guarded(bound), SETTINGS[name])
    assert num_unequal(guarded) == 0
    for group in guarded.values():
        stats = [one.stats for one in group]
        assert 0 < sum(s.num_rechecked for s in stats) < 0.5 * sum(s.num_tokens for s in stats)
    assert sum(one.stats.num_accepted for one in guarded["chain"]) > 40, "nothing was speculated"
    assert sum(one.stats.num_changed for group in guarded.values() for one in group) > 0, "the plant is too weak"


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_without_guarding_or_with_a_bound_of_zero_it_does_not(name: str, bound: Bound) -> None:
    nothing = replace(bound, tolerance=Tolerance(0.0, 0.0))
    assert num_unequal(answers(Rounding(), Exactness.off(), SETTINGS[name])) > 0
    assert num_unequal(answers(Rounding(), Exactness.guarded(nothing), SETTINGS[name])) > 0


def test_the_next_turn_of_a_conversation_is_equal_too(bound: Bound) -> None:
    """What an answer left in the cache depends on how it was guessed, so it is not reused."""
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    texts = []
    for drafter in (Nothing(), drafters(Rounding())["tree"]):
        with Session(Rounding(), drafter, exactness=Exactness.guarded(bound)) as session:
            first = session.generate(PROMPTS[0], params)
            second = session.generate([*session.tokens.tolist(), 9, 9], params)
            assert second.stats.num_reused <= first.num_prompt_tokens
            texts.append((first.tokens, second.tokens))
    assert texts[0] == texts[1]


def test_lanes_of_one_pass_are_rechecked_each_for_itself(bound: Bound) -> None:
    wide = replace(bound, tolerance=Tolerance(2.0, 2.0))  # so that several lanes of a round are in doubt
    params = SamplingParams(temperature=0.8, logprobs=2, max_tokens=20, ignore_eos=True)
    want = []
    for number, prompt in enumerate(PROMPTS[:3]):
        with Session(Rounding(), Nothing(), exactness=Exactness.guarded(wide)) as session:
            want.append(session.generate(prompt, replace(params, seed=number)).tokens)
    target = Rounding()
    lanes = []
    for number, prompt in enumerate(PROMPTS[:3]):
        state = target.open()
        ids = np.array(prompt[:-1], np.int32)
        target.forward([Step(state, (HostTokens(ids),), chain_parents(state, len(ids)), ())])
        state.keep(range(len(ids)))
        context = Context(prompt)
        context.start_output()
        drafter = drafters(target)["chain"]
        drafter.begin(context)
        recheck = Recheck(target, state, wide)
        sampler = Sampler(params, number)
        lanes.append(Lane(state, context, drafter, sampler, Walk(), frozenset(), WidthClass(1), recheck))
    num_doubtful = 0
    while min(len(lane.context) for lane in lanes) < 26:
        results = run_round(target, lanes, [Room(8, 8)] * 3)
        num_doubtful += sum(result.record.recheck.num for result in results) > 1
        for result, lane in zip(results, lanes, strict=True):
            assert result.logprobs is not None and [one.token for one in result.logprobs] == [*result.verdict.tokens]
            assert lane.state.length == len(lane.context) - 1
    assert num_doubtful > 0, "no round had two lanes in doubt"
    assert [tuple(lane.context.tokens[6:26].tolist()) for lane in lanes] == want


def test_rechecks_are_counted_and_shown(bound: Bound) -> None:
    rounds: list[RoundResult] = []
    target = Rounding()
    with Session(target, drafters(target)["chain"], exactness=Exactness.guarded(bound)) as session:
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        result = session.stream(PROMPTS[0], params, on_round=rounds.append).result
    stats, data = result.stats, result.as_dict()
    assert stats.num_rechecked == sum(one.record.recheck.num for one in rounds) > 0
    assert stats.num_rechecked == sum(one.verdict.doubtful for one in rounds)
    assert data["exact"] == "guarded" and data["bound"] == bound.tolerance.difference
    assert data["stats"]["num_rechecked"] == stats.num_rechecked and stats.recheck_ms > 0.0
    assert f"guarded: {stats.num_rechecked} re-checked" in summary(result)
    assert target.widths.count(bound.block) >= stats.num_rechecked, "a re-check is a pass of the reference's width"


def test_a_full_context_ends_guarded_answers_at_the_same_token(bound: Bound) -> None:
    results = []
    for drafter in (Nothing(), drafters(Rounding())["tree"]):
        with Session(Rounding(), drafter, exactness=Exactness.guarded(bound)) as session:
            results.append(session.generate(PROMPTS[1] * 30, SamplingParams(ignore_eos=True)))
    assert results[0].tokens == results[1].tokens and {one.finish_reason for one in results} == {"context"}


def test_a_row_that_is_clear_needs_no_second_look() -> None:
    """Random rows and others within the tolerance: where `decide` is certain, the choice is the same."""
    rng = np.random.default_rng(0)
    settings = [
        *SETTINGS.values(),
        SamplingParams(temperature=1.2, top_p=0.7),
        SamplingParams(temperature=0.6, min_p=0.1),
        SamplingParams(temperature=1.5, top_k=3),
    ]
    for params in settings:
        num_certain = num_other = 0
        for seed in range(400):
            sampler = Sampler(params, seed)
            context = Context(rng.integers(0, VOCABULARY, 5).tolist())
            row = (3.0 * rng.normal(size=VOCABULARY)).astype(np.float32)
            token, is_certain = sampler.decide(row, context, Tolerance(0.4, 0.2))
            assert token == sampler.choose(row, context)
            num_certain += is_certain
            for _ in range(5):
                near = row + rng.uniform(-0.2, 0.2, VOCABULARY).astype(np.float32)
                is_other = sampler.choose(near, context) != token
                num_other += is_other
                assert not (is_certain and is_other), (params, seed)
        assert num_certain > 100 and num_other > 0, params


def test_what_cannot_be_guarded_is_refused(bound: Bound) -> None:
    with pytest.raises(SettingError, match="cannot be guarded"):
        Session(Rounding(), Nothing(), acceptance="rejection", exactness=Exactness.guarded(bound))
    with (
        Session(Rounding(), Nothing(), exactness=Exactness.guarded(bound)) as session,
        pytest.raises(SettingError, match="cannot be guarded"),
    ):
        session.use(Nothing(), make_acceptance("rejection"))
    stuck = Rounding()
    stuck.capabilities = replace(stuck.capabilities, rewind=Rewind.NEVER)
    with pytest.raises(UnsupportedModelError, match="cannot take tokens back"):
        Session(stuck, Nothing(), exactness=Exactness.guarded(bound))


# ---------------------------------------------------------------- the bound, and what a pair chooses


def test_the_bound_covers_what_was_planted(bound: Bound) -> None:
    assert bound.tolerance.difference > Rounding.grid, "two logits may be rounded apart by a grid"
    assert bound.num_rows > 500 and 1 in bound.widths and bound.width_one[0] >= bound.loose
    assert Bound.from_dict(bound.as_dict()) == bound
    assert measuring.measure(ReferenceModel(VOCABULARY, context_length=128), seconds=0.0).tolerance.difference == 0.0
    with pytest.raises(ValueError, match="bounds nothing"):
        Bound.from_dict({**bound.as_dict(), "block": 0})


@pytest.fixture
def measuring_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_automatic", True)


@pytest.mark.usefixtures("measuring_is_allowed")
def test_auto_keeps_the_promise_with_the_class_where_there_is_one(bound: Bound) -> None:
    def mode(target: ReferenceModel, exact: str = "auto", acceptance: str = "walk") -> str:
        with Pair(target, None) as pair:
            pair.bound, pair.costs = bound, CHEAP
            return pair.exactness(exact, acceptance=acceptance).mode.value

    assert mode(ReferenceModel(width_class=WidthClass(2))) == "class"
    assert mode(ReferenceModel(width_class=WidthClass(4, 4))) == "guarded", "one width is none worth using"
    assert mode(Rounding()) == "guarded"
    assert mode(Rounding(), acceptance="rejection") == "class"
    assert mode(Rounding(), "off") == "off" and mode(Rounding(), "class") == "class"
    assert mode(ReferenceModel(width_class=WidthClass(1, 1, plain_only=True))) == "class", "wider passes do not pay"
    stuck = Rounding()
    stuck.capabilities = replace(stuck.capabilities, rewind=Rewind.NEVER)
    assert mode(stuck) == "class"
    with pytest.raises(UnknownNameError, match="exactness"):
        mode(Rounding(), "sometimes")


@pytest.mark.usefixtures("measuring_is_allowed")
def test_auto_decodes_plainly_where_guarding_would_be_slower(bound: Bound) -> None:
    """It is the same for plain decoding and under any drafter, so texts stay equal; and the answer says why."""
    often = replace(bound, share_close=0.5)
    dear = Costs(Curve((1, 64), (0,), ((10.0, 20.0),)))
    texts = []
    for drafter in ("ngram:min=1", "nothing"):
        target = Rounding()
        with Pair(target, None) as pair:
            pair.bound, pair.costs = often, dear
            with pair.session(drafter) as session:
                target.widths.clear()
                result = session.generate(PROMPTS[0], SamplingParams(max_tokens=20, ignore_eos=True))
            assert set(target.widths[1:]) == {1} and result.exact == "class"
            assert "50% of choices would be re-checked" in str(result.plain_because)
            assert pair.exactness("guarded").mode is Mode.GUARDED
            texts.append(result.tokens)
            pair.bound = replace(bound, share_close=0.01)
            assert pair.exactness().mode is Mode.GUARDED
    assert texts[0] == texts[1]


@pytest.fixture
def looking_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_automatic", True)
    monkeypatch.setattr(store, "_CLASS_SECONDS", 60.0)


@contextmanager
def pair_like_a_gpu(target: Rounding, bound: Bound, costs: Costs | None = None) -> Iterator[Pair]:
    """Every second choice would be re-checked."""
    with Pair(target, None) as pair:
        pair.bound, pair.costs = replace(bound, share_close=0.5), costs or LIKE_A_GPU
        yield pair


@pytest.mark.usefixtures("looking_takes_its_time")
def test_where_guarding_would_be_slower_a_class_is_looked_for_once(bound: Bound) -> None:
    texts = []
    for number, drafter in enumerate(("nothing", "ngram:min=1,num=3")):
        target = Stepped("like a GPU")
        with pair_like_a_gpu(target, bound) as pair, pair.session(drafter) as session:
            assert (len(target.widths) > 0) == (number == 0), "what was seen is kept"
            target.widths.clear()
            result = session.generate(PROMPTS[0], SamplingParams(max_tokens=20, ignore_eos=True))
            assert (result.width_class, result.exact) == ("3 to 4", "class") and set(target.widths[1:]) <= {3, 4}
            assert "a short look" in pair.exactness().widths.evidence
            texts.append(result.tokens)
    assert texts[0] == texts[1]


@pytest.mark.usefixtures("looking_takes_its_time")
def test_whether_a_class_pays_is_decided_by_what_this_pair_costs(bound: Bound) -> None:
    dear = Costs(Curve((1, 3, 64), (0,), ((10.0, 25.0, 60.0),)))
    for costs, widest in ((dear, 1), (LIKE_A_GPU, 4), (dear, 1)):
        with pair_like_a_gpu(Stepped("like two"), bound, costs) as pair:
            assert pair.exactness().widths.max_width == widest


@pytest.mark.usefixtures("looking_takes_its_time")
def test_nothing_is_looked_for_where_tune_found_none_or_trees_are_verified(bound: Bound) -> None:
    tuned, branching = Stepped("tuned"), Stepped("branching")
    store.keep_class(tuned, tuned.capabilities.width_class)
    branching.capabilities = replace(branching.capabilities, exact_trees=True)
    for target in (tuned, branching):
        with pair_like_a_gpu(target, bound) as pair:
            assert pair.exactness().widths.max_width == 1 and not target.widths


@pytest.mark.usefixtures("looking_takes_its_time")
def test_one_context_is_not_enough_to_promise_anything_by(bound: Bound, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(target: ReferenceModel, widths: Sequence[int], seconds: float) -> Classes:
        found = find(target, widths, contexts=(20,), seconds=seconds)
        assert (3, 4) in found.groups
        return found

    monkeypatch.setattr(store, "find_classes", once)
    for _ in range(2):
        target = Stepped("like a large one")
        with pair_like_a_gpu(target, bound) as pair:
            assert pair.exactness().widths.max_width == 1
            passes = len(target.widths)
            assert passes and pair.exactness().widths.max_width == 1 and len(target.widths) == passes


def test_where_nothing_may_be_measured_auto_says_that_its_class_was_not(tmp_path: Path) -> None:
    target = Rounding()
    (tmp_path / "model").write_bytes(b"model")
    target.info = replace(target.info, path=tmp_path / "model")
    with Pair(target, None) as pair:
        assert str(pair.exactness()) == "1 to any (not measured here)"
        with pytest.raises(SettingError, match="bound that is measured"):
            pair.exactness("guarded")


@pytest.mark.usefixtures("measuring_is_allowed")
def test_sessions_of_a_pair_pass_it_on(bound: Bound) -> None:
    target = Rounding()
    with Pair(target, None) as pair:
        pair.bound, pair.costs = bound, CHEAP
        with pair.session("ngram:min=1") as session:
            assert session.generate(PROMPTS[0], SamplingParams(max_tokens=8)).exact == "guarded"
        target.widths.clear()
        with pair.session("nothing", exact="off") as session:
            result = session.generate(PROMPTS[0], SamplingParams(max_tokens=8, ignore_eos=True))
    assert set(target.widths[1:]) == {1} and result.stats.num_rechecked == 0
    assert result.exact == "off" and "exactness off" in summary(result)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_passes_begin_early_under_guard_and_are_dropped_where_a_recheck_is_due(
    temperature: float, bound: Bound
) -> None:
    waiting, lazy = Rounding(), Rounding(host_scores=False)
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=60, ignore_eos=True)
    guarded = Exactness.guarded(bound)
    begun: list[bool] = []

    class Watching(Nothing):
        def observe(self, outcome: Outcome) -> None:
            begun.append(outcome.begun_early)

    for prompt in PROMPTS:
        with Session(waiting, Nothing(), exactness=guarded) as one, Session(lazy, Watching(), exactness=guarded) as two:
            want, got = one.generate(prompt, params), two.generate(prompt, params)
            assert got.tokens == want.tokens and got.stats.num_rechecked == want.stats.num_rechecked > 0
            assert two._state.num_pending == 0
    assert any(begun) and not all(begun)
