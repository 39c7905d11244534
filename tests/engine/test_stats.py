"""What rounds report: who guessed each node, which guesses were taken, what was run again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from localspec.context import Context
from localspec.drafters import DraftModel, Nothing
from localspec.engine.answer import TARGET
from localspec.engine.round import RoundResult
from localspec.engine.session import Session
from localspec.engine.stats import Stats, sibling_ranks
from localspec.protocols import DraftRequest, HostTokens, Outcome, Proposal, Rewind, SavedDraft, SequenceState
from localspec.sampling import SamplingParams
from localspec.terminal import summary
from localspec.testing.reference import ReferenceModel, ReferenceState, random_tree
from localspec.tree.mask import depths
from localspec.types import NodeIndices

PARAMS = SamplingParams(temperature=0.9, seed=2, max_tokens=60, ignore_eos=True)


def shallow(parents: NodeIndices, max_depth: int) -> NodeIndices:
    """The tree itself, or a fan of its nodes where it is too deep."""
    too_deep = int(depths(parents).max(initial=-1)) >= max_depth
    return np.full(len(parents), -1, np.int32) if too_deep else parents


class Two:
    """Random trees over a small vocabulary; even tokens are guessed by `even`, odd ones by `odd`."""

    name = "two"
    needs_trees = True

    def __init__(self, vocab_size: int) -> None:
        self.rng = np.random.default_rng(1)
        self.vocab_size = vocab_size

    def attach(self, state: SequenceState) -> None: ...

    def begin(self, context: Context) -> None:
        pass

    def propose(self, request: DraftRequest) -> Proposal:
        size = min(request.max_nodes if request.max_depth else 0, int(self.rng.integers(0, 12)))
        tokens = self.rng.integers(0, self.vocab_size, size).astype(np.int32)
        sources = tuple("odd" if token % 2 else "even" for token in tokens.tolist())
        return Proposal(
            self.name, (HostTokens(tokens),), shallow(random_tree(self.rng, size), request.max_depth), sources=sources
        )

    def observe(self, outcome: Outcome) -> None:
        pass

    def save(self) -> tuple[SavedDraft, ...]:
        return ()

    def restore(self, saved: Sequence[SavedDraft]) -> None: ...

    def close(self) -> None:
        pass


def run(model: ReferenceModel, drafter: Two | Nothing | DraftModel) -> tuple[Stats, list[RoundResult], list[str]]:
    rounds: list[RoundResult] = []
    with Session(model, drafter) as session:
        result = session.stream([1, 2, 3], PARAMS, on_round=rounds.append).result
    return result.stats, rounds, list(result.sources)


def test_each_node_is_counted_for_who_guessed_it() -> None:
    stats, rounds, sources = run(ReferenceModel(12, seed=4), Two(12))
    for name, odd in (("even", 0), ("odd", 1)):
        drafted = sum(int((r.verdict.tree.token % 2 == odd).sum()) for r in rounds)
        accepted = sum(1 for r in rounds for node in r.verdict.path if r.verdict.tree.token[node] % 2 == odd)
        assert stats.drafted_by_source[name] == drafted > 0
        assert stats.accepted_by_source[name] == accepted == sources.count(name) > 0
    assert sum(stats.drafted_by_source.values()) == stats.num_drafted
    assert sum(stats.accepted_by_source.values()) == stats.num_accepted == sum(stats.accepted_by_rank)
    assert stats.num_from_branches > 0, "no guess but the first was ever taken: the test shows nothing"
    assert sources.count(TARGET) == stats.num_rounds


def test_the_hook_sees_every_round_with_its_anchor() -> None:
    prompt = [1, 2, 3]
    rounds: list[RoundResult] = []
    with Session(ReferenceModel(12, seed=4), Two(12)) as session:
        result = session.stream(prompt, PARAMS, on_round=rounds.append).result
    assert len(rounds) == result.stats.num_rounds
    assert [token for r in rounds for token in r.verdict.tokens] == list(result.tokens)
    assert [r.anchor for r in rounds] == [3, *(r.verdict.tokens[-1] for r in rounds[:-1])]
    assert all(len(r.sources) == len(r.verdict.tree) for r in rounds)


def test_pieces_say_which_guess_for_their_place_was_taken() -> None:
    rounds: list[RoundResult] = []
    with Session(ReferenceModel(100, seed=4), Two(100)) as session:
        pieces = list(session.stream([1, 2, 3], replace(PARAMS, max_tokens=100), on_round=rounds.append))
    shown = [zip(r.verdict.tokens, (*r.record.accepted_ranks, 0), strict=True) for r in rounds]
    want = [rank for pairs in shown for token, rank in pairs if token != 99]  # which has no text
    assert [piece.rank for piece in pieces] == want and any(want)


def test_a_rank_is_the_number_of_elder_siblings() -> None:
    parents = np.array([-1, -1, 0, -1, 1, 1, 5], np.int32)
    assert sibling_ranks(parents, (3,)) == (2,)
    assert sibling_ranks(parents, (1, 5, 6)) == (1, 1, 0)
    assert sibling_ranks(parents, ()) == ()


@pytest.mark.parametrize("field", ["log_q", "sources"])
def test_a_proposal_with_values_for_other_nodes_is_refused(field: str) -> None:
    class Wrong(Two):
        def propose(self, request: DraftRequest) -> Proposal:
            tokens = (HostTokens(np.array([1], np.int32)),)
            proposal = Proposal(self.name, tokens, np.array([-1], np.int32))
            return replace(proposal, log_q=(-1.0, -1.0)) if field == "log_q" else replace(proposal, sources=("a", "b"))

    with pytest.raises(ValueError, match=f"2 {field} for 1 nodes"):
        run(ReferenceModel(12), Wrong(12))


# ---------------------------------------------------------------- tokens run again


class ReplayingState(ReferenceState):
    """Pretends to run what it keeps once more whenever nodes are dropped."""

    replayed = 0

    @property
    def num_replayed(self) -> int:
        return self.replayed

    def keep(self, path: Sequence[int]) -> None:
        dropped = self.num_pending > len(path)
        super().keep(path)
        self.replayed += len(path) if dropped else 0


class Replaying(ReferenceModel):
    def open(self) -> ReferenceState:
        self.num_open += 1
        self.state = ReplayingState(self)
        return self.state


def test_tokens_that_were_run_again_are_counted_and_shown() -> None:
    model = Replaying(12, seed=4)
    model.capabilities = replace(model.capabilities, rewind=Rewind.REPLAY)
    rounds: list[RoundResult] = []
    with Session(model, Two(12)) as session:
        result = session.stream([1, 2, 3], PARAMS, on_round=rounds.append).result
    stats = result.stats
    want = [1 + len(r.verdict.path) if len(r.verdict.tree) > len(r.verdict.path) else 0 for r in rounds]
    assert [r.record.num_replayed for r in rounds] == want
    assert stats.num_replayed == sum(want) == stats.as_dict()["num_replayed"] > 0
    assert f"{stats.num_replayed} tokens run again" in summary(result)


def test_where_rewinding_is_free_nothing_is_said_of_it() -> None:
    with Session(ReferenceModel(12, seed=4), Two(12)) as session:
        result = session.generate([1, 2, 3], PARAMS)
    assert result.stats.num_replayed == 0 and "run again" not in summary(result)
