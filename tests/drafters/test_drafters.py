"""Every drafter passes the suite; their own promises on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from localspec.context import Context
from localspec.drafters import (
    AUTO,
    DRAFTERS,
    KINDS,
    Combined,
    DrafterSpec,
    DraftModel,
    Ngram,
    Nothing,
    Suffix,
    make_drafter,
)
from localspec.drafters.draft_cache import DraftCache
from localspec.engine.session import Session
from localspec.errors import SettingError, UnknownNameError, UsageError
from localspec.protocols import (
    Drafter,
    DraftRequest,
    HostTokens,
    Outcome,
    Proposal,
    SavedDraft,
    Scores,
    SequenceState,
    Step,
)
from localspec.sampling import Law, Sampler, SamplingParams
from localspec.testing.drafters import DrafterConformance
from localspec.testing.reference import ReferenceModel, ReferenceState, random_tree
from localspec.tree.mask import depths, is_chain


class TestNothing(DrafterConformance):
    def drafter(self, target: ReferenceModel) -> Drafter:
        return Nothing()


class TestNgram(DrafterConformance):
    def drafter(self, target: ReferenceModel) -> Drafter:
        return Ngram(num=6, max=3, min=1)


class TestTrieOfNgrams(DrafterConformance):
    def drafter(self, target: ReferenceModel) -> Drafter:
        return Ngram(num=6, max=3, min=1, shape="tree")


class TestCombined(DrafterConformance):
    draws = True

    def drafter(self, target: ReferenceModel) -> Drafter:
        return Combined([DraftModel(target.perturbed(0.5), num=6, shape="tree"), Ngram(num=4, max=3, min=1)])


class TestGoodDraftModel(DrafterConformance):
    draws = True

    def drafter(self, target: ReferenceModel) -> Drafter:
        return DraftModel(target.perturbed(0.2), num=4)


class TestBadDraftModel(DrafterConformance):
    draws = True

    def drafter(self, target: ReferenceModel) -> Drafter:
        return DraftModel(target.perturbed(5.0), num=3)


class TestDraftModelThatStopsEarly(DrafterConformance):
    draws = True

    def drafter(self, target: ReferenceModel) -> Drafter:
        return DraftModel(target.perturbed(0.2), num=8, min_prob=0.3)


class TestDraftModelOnADevice(DrafterConformance):
    """Scores that do not lie on the host: guesses are chained without being read."""

    draws = True

    def drafter(self, target: ReferenceModel) -> Drafter:
        draft = target.perturbed(0.2)
        draft.capabilities = replace(draft.capabilities, host_scores=False)
        return DraftModel(draft, num=4)

    def target(self) -> ReferenceModel:
        model = super().target()
        model.capabilities = replace(model.capabilities, host_scores=False)
        return model


class TestDraftModelThatReusesPasses(DrafterConformance):
    """Tokens are fed one by one."""

    draws = True

    def drafter(self, target: ReferenceModel) -> Drafter:
        draft = target.perturbed(0.2)
        draft.capabilities = replace(draft.capabilities, reuses_passes=True)
        return DraftModel(draft, num=4)


class TestTreeOfADraftModel(DrafterConformance):
    draws = True

    def drafter(self, target: ReferenceModel) -> Drafter:
        return DraftModel(target.perturbed(0.5), num=12, shape="tree")


class TestGreedyTreeOfADraftModel(DrafterConformance):
    draws = True

    def drafter(self, target: ReferenceModel) -> Drafter:
        return DraftModel(target.perturbed(0.5), num=9, shape="tree", depth=4, guess="greedy", min_prob=0.02)


class TestFanOutOfADraftModel(DrafterConformance):
    draws = True

    def drafter(self, target: ReferenceModel) -> Drafter:
        return DraftModel(target.perturbed(0.5), shape="3-2-1")


class TestTreeOnADevice(TestDraftModelOnADevice):
    def drafter(self, target: ReferenceModel) -> Drafter:
        draft = target.perturbed(0.5)
        draft.capabilities = replace(draft.capabilities, host_scores=False)
        return DraftModel(draft, num=12, shape="tree")


class TestFanOutOnADevice(TestDraftModelOnADevice):
    def drafter(self, target: ReferenceModel) -> Drafter:
        draft = target.perturbed(0.5)
        draft.capabilities = replace(draft.capabilities, host_scores=False)
        return DraftModel(draft, num=8, shape="2-2-1")


class Adversary:
    """Guesses a random bush of any tokens: the worst drafter the engine must survive."""

    name = "adversary"
    needs_trees = False

    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)

    def attach(self, state: SequenceState) -> None: ...

    def begin(self, context: Context) -> None:
        pass

    def propose(self, request: DraftRequest) -> Proposal:
        size = min(request.max_nodes, 9)
        parents = random_tree(self.rng, size) if request.trees else np.arange(-1, size - 1, dtype=np.int32)
        parents = parents[depths(parents) < request.max_depth] if is_chain(parents) else parents
        if int(depths(parents).max(initial=-1)) >= request.max_depth:
            parents = np.full(min(size, request.max_depth * size), -1, np.int32)
        tokens = self.rng.integers(0, 48, len(parents)).astype(np.int32)
        return Proposal(self.name, (HostTokens(tokens),), parents)

    def observe(self, outcome: Outcome) -> None:
        pass

    def save(self) -> tuple[SavedDraft, ...]:
        return ()

    def restore(self, saved: Sequence[SavedDraft]) -> None: ...

    def close(self) -> None:
        pass


class TestAdversary(DrafterConformance):
    def drafter(self, target: ReferenceModel) -> Drafter:
        return Adversary()


def request(tokens: list[int], budget: int, params: SamplingParams | None = None) -> DraftRequest:
    sampler = Sampler(params or SamplingParams(), 0)
    return DraftRequest(
        context=Context(tokens),
        max_nodes=budget,
        max_depth=budget,
        sampler=sampler,
        stop_tokens=frozenset(),
        trees=True,
    )


def proposed(drafter: Drafter, tokens: list[int], budget: int = 16) -> list[int]:
    ask = request(tokens, budget)
    drafter.begin(ask.context)
    return [int(token) for token in drafter.propose(ask).tree().token]


# ---------------------------------------------------------------- ngram


def test_lookup_takes_the_longest_match_and_among_those_the_latest() -> None:
    drafter = Ngram(num=2, max=3, min=1)
    assert proposed(drafter, [1, 2, 3, 50, 9, 2, 3, 60, 8, 3, 70, 1, 2, 3]) == [50, 9]  # 1 2 3 beats 2 3
    assert proposed(drafter, [5, 6, 10, 5, 6, 11, 5, 6]) == [11, 5]


def test_lookup_as_a_tree_holds_every_continuation_by_how_often_it_came() -> None:
    tokens = [1, 2, 7, 8, 1, 2, 7, 9, 1, 2, 5, 1, 2]
    drafter = Ngram(num=4, max=2, min=2, shape="tree")
    ask = request(tokens, 16)
    drafter.begin(ask.context)
    tree = drafter.propose(ask).tree()
    assert [tuple(tree.token[tree.path(node)].tolist()) for node in range(len(tree))] == [(7,), (5,), (7, 9), (7, 8)]
    assert tree.log_q is not None  # three occurrences: two go on with 7, one with 5; of the two one each
    assert np.exp(tree.log_q).tolist() == pytest.approx([2 / 4, 1 / 4, 1 / 3, 1 / 3])


def test_a_combination_verifies_each_guess_once_and_knows_whose_it_was() -> None:
    def both() -> Combined:
        return Combined([DraftModel(ReferenceModel(48, seed=5), num=3), Ngram(num=4, max=2, min=1)])

    with Session(ReferenceModel(48, seed=5), both()) as session:
        result = session.generate([1, 2, 3, 1, 2, 3, 1], SamplingParams(max_tokens=40, ignore_eos=True))
    assert result.stats.accepted_length >= 4.0  # the perfect part's chain is always in the tree
    ask, drafter = request([1, 2, 3, 1, 2, 3, 1], 16), both()
    drafter.begin(ask.context)
    proposal = drafter.propose(ask)
    tree = proposal.tree()
    edges = list(zip(tree.parent.tolist(), tree.token.tolist(), strict=True))
    assert len(set(edges)) == len(edges) == proposal.num_nodes
    assert proposal.sources is not None and set(proposal.sources) == {"draft_model", "ngram"}


def test_lookup_proposes_nothing_without_a_match_of_the_least_size() -> None:
    assert proposed(Ngram(min=2), [1, 2, 3, 4, 5, 3]) == []
    assert proposed(Ngram(), [1]) == []


def test_the_index_equals_a_new_one_after_any_history() -> None:
    """Incremental updates and take-backs leave exactly the index of the context."""
    rng = np.random.default_rng(0)
    drafter, tokens = Ngram(num=5, max=4, min=1), [0]
    for _ in range(200):
        if rng.random() < 0.3:
            tokens = tokens[: int(rng.integers(1, len(tokens) + 1))]
        tokens += rng.integers(0, 4, int(rng.integers(0, 6))).tolist()
        assert proposed(drafter, tokens) == proposed(Ngram(num=5, max=4, min=1), tokens)
    fresh = Ngram(num=5, max=4, min=1)
    proposed(fresh, tokens)
    assert drafter._ends == fresh._ends


# ---------------------------------------------------------------- draft model


class CountingModel(ReferenceModel):
    """Counts the tokens it is given."""

    num_tokens = 0

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        self.num_tokens += sum(step.num_tokens for step in steps)
        return super().forward(steps)


def test_the_draft_cache_is_kept_in_step_with_acceptance() -> None:
    """Each token goes through the draft model once, plus the guesses that were wrong."""
    target = ReferenceModel(48, seed=5)
    draft = CountingModel(48, seed=5)  # the same weights: every guess is right
    with Session(target, DraftModel(draft, num=3)) as session:
        result = session.generate([1, 2, 3, 4], SamplingParams(max_tokens=40, ignore_eos=True))
    assert result.stats.acceptance_rate == 1.0
    assert result.stats.accepted_length == 4.0
    # 4 prompt tokens and all 40 emitted ones but the last round's tail, which nobody asked about
    assert draft.num_tokens <= 44


def test_a_perfect_drafter_is_right_at_any_temperature() -> None:
    """Coupled guessing: with q = p the guess is the sample."""
    target, draft = ReferenceModel(48, seed=5), ReferenceModel(48, seed=5)
    for params in (
        SamplingParams(temperature=1.5),
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(temperature=1.0, frequency_penalty=0.5),
    ):
        with Session(target, DraftModel(draft, num=3)) as session:
            result = session.generate([1, 2], replace(params, seed=1, max_tokens=24, ignore_eos=True))
        assert result.stats.acceptance_rate == 1.0


def test_a_turn_may_start_inside_what_the_draft_cache_already_holds() -> None:
    """The anchor's row is needed even where the anchor itself is cached."""
    drafter = DraftModel(ReferenceModel(48, seed=5), num=2)
    with Session(ReferenceModel(48, seed=5), drafter) as session:
        tokens = session.generate([1, 2, 3], SamplingParams(max_tokens=12, ignore_eos=True)).tokens
        session.reset()
        again = session.generate([1, 2, 3, *tokens[:4]], SamplingParams(max_tokens=5, ignore_eos=True))
    assert again.tokens == tokens[4:9]


def test_growing_stays_within_the_leaves_that_the_draft_model_can_hold() -> None:
    """llama.cpp has so many sequence ids and no more; a tree grows through more nodes than it keeps."""
    most = 0

    class Counting(ReferenceModel):
        def forward(self, steps: Sequence[Step]) -> list[Scores]:
            nonlocal most
            scores = super().forward(steps)
            [state] = [step.state for step in steps]
            assert isinstance(state, ReferenceState)
            most = max(most, len(set(range(len(state.parents))) - set(state.parents)))
            return scores

    draft = Counting(48, seed=5, sharpness=1.0)
    draft.capabilities = replace(draft.capabilities, max_leaves=20)
    drafter = DraftModel(draft, num=64, shape="tree")
    assert len(proposed(drafter, [1, 2, 3], 64)) == 64
    assert 10 < most <= 20


def test_a_long_prompt_is_fed_in_pieces() -> None:
    draft = ReferenceModel(48, seed=5, context_length=2000)
    drafter = DraftModel(draft, num=2)
    tokens = np.random.default_rng(0).integers(0, 48, 700).tolist()
    short = DraftModel(ReferenceModel(48, seed=5, context_length=2000), num=2)
    assert proposed(drafter, tokens) == proposed(short, tokens)
    assert isinstance(drafter._cache, DraftCache) and drafter._cache.length == 699


def test_a_drafter_with_a_shorter_context_falls_silent_instead_of_failing() -> None:
    target, draft = ReferenceModel(48, seed=5, context_length=120), ReferenceModel(48, seed=5, context_length=30)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    with Session(target, DraftModel(draft, num=4)) as session, Session(target, Nothing()) as plain:
        assert session.generate([1, 2, 3], params).tokens == plain.generate([1, 2, 3], params).tokens


class Greedy(Adversary):
    """Proposes what it likes, whatever was asked."""

    def __init__(self, proposal: Proposal) -> None:
        self.proposal = proposal

    def propose(self, request: DraftRequest) -> Proposal:
        return self.proposal


@pytest.mark.parametrize(
    ("num_tokens", "parents", "num_laws", "words"),
    [
        (30, range(-1, 29), None, "at most"),
        (2, [-1], None, "different number"),
        (1, [-1], 3, "3 laws"),
        (2, [-1, -1], None, "chains"),
    ],
)
def test_the_engine_holds_proposals_to_the_request(
    num_tokens: int, parents: Sequence[int], num_laws: int | None, words: str
) -> None:
    law = Law(np.array([1], np.int32), np.ones(1))
    tokens = (HostTokens(np.ones(num_tokens, np.int32)),)
    laws = None if num_laws is None else (law,) * num_laws
    target = ReferenceModel(48)
    target.capabilities = replace(target.capabilities, trees=False)
    with Session(target, Greedy(Proposal("greedy", tokens, np.array(parents, np.int32), laws))) as session:
        with pytest.raises(ValueError, match=words):
            session.generate([1, 2], SamplingParams(max_tokens=12))
        session.use(Nothing())
        assert len(session.generate([1, 2], SamplingParams(max_tokens=12, ignore_eos=True)).tokens) == 12


# ---------------------------------------------------------------- specifications


def test_specifications_carry_settings() -> None:
    drafter = make_drafter("ngram:max=5,min=3,num=7", None)
    assert isinstance(drafter, Ngram) and drafter.num == 7 and list(drafter.sizes) == [5, 4, 3]
    model = make_drafter("draft_model:num=2,min_prob=0.5", ReferenceModel(8))
    assert isinstance(model, DraftModel) and (model.num, model.min_prob) == (2, 0.5)
    tree = make_drafter("draft_model:shape=tree,depth=3", ReferenceModel(8))
    assert isinstance(tree, DraftModel) and tree.needs_trees and tree.shape.branching == (16, 16, 16)


def test_specifications_joined_by_plus_are_combined() -> None:
    spec = DrafterSpec.parse("draft_model:num=5,shape=tree+ngram:max=3")
    drafter = make_drafter(spec, ReferenceModel(8))
    assert isinstance(drafter, Combined) and drafter.name == "draft_model+ngram"
    assert [part.needs_trees for part in drafter.parts] == [True, False]
    assert spec.asks_for_trees and not DrafterSpec.parse("ngram:num=3").asks_for_trees
    assert DrafterSpec.parse("draft_model:shape=3-2").asks_for_trees
    with pytest.raises(SettingError, match="several drafters"):
        spec.with_settings({"num": "3"})


def test_auto_takes_the_draft_model_where_there_is_one() -> None:
    assert isinstance(make_drafter(AUTO, ReferenceModel(8)), DraftModel)
    assert isinstance(make_drafter(AUTO, None), Suffix)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("ngrma", UnknownNameError, "Did you mean 'ngram'"),
        ("ngram:mx=3", UnknownNameError, "Did you mean 'max'"),
        ("ngram:max", SettingError, "name=value"),
        ("ngram:max=three", SettingError, "a number"),
        ("ngram:min=5,max=2", SettingError, "min <= max"),
        ("ngram:num=999", SettingError, "1 to 256"),
        ("ngram:shape=2-x", SettingError, "chain, tree, or children"),
        ("ngram+ngrma", UnknownNameError, "Did you mean 'ngram'"),
        ("ngram+nothing", SettingError, "nothing"),
        ("ngram+", UnknownNameError, "drafter"),
        ("draft_model:num=999", SettingError, "1 to 256"),
        ("draft_model:shape=bush", SettingError, "chain, tree, or children"),
        ("draft_model:shape=3-0", SettingError, "chain, tree, or children"),
        ("draft_model:shape=16-16-16", SettingError, "at most 256"),
        ("draft_model:guess=wildly", SettingError, "coupled or greedy"),
        ("draft_model:shape=tree,depth=-1", SettingError, "depth out of range"),
        ("draft_model:min_prob=1", SettingError, "below 1"),
        ("nothing:num=2", UnknownNameError, "setting of drafter nothing"),
    ],
)
def test_wrong_specifications_are_explained(text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        make_drafter(text, ReferenceModel(8))
    assert words in str(caught.value)


def test_a_draft_model_drafter_without_a_draft_model_is_refused() -> None:
    with pytest.raises(UsageError, match="--draft"):
        make_drafter("draft_model", None)


def test_the_registry_names_are_the_drafters_own() -> None:
    assert set(DRAFTERS) == {"nothing", "draft_model", "cross_tokenizer", "ngram", "suffix", "grammar", *KINDS}
    assert all(DrafterSpec.parse(name).name == name for name in DRAFTERS)
