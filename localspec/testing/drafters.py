"""What every drafter must do, as tests to subclass:

    class TestMine(DrafterConformance):
        def drafter(self, target: ReferenceModel) -> Drafter: ...

They run against the reference backend, so that a failure is the drafter's. Text equality with plain
decoding is the engine's promise; it is tested here with every drafter because it must hold for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from localspec.context import Context
from localspec.drafters.nothing import Nothing
from localspec.engine.answer import Generation
from localspec.engine.session import Session
from localspec.protocols import (
    Drafter,
    DraftRequest,
    HostTokens,
    Outcome,
    Proposal,
    Step,
    WidthClass,
    chain_parents,
)
from localspec.sampling import Sampler, SamplingParams
from localspec.testing.reference import ReferenceModel
from localspec.tree.mask import is_chain

SETTINGS = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.8),
    "truncated": SamplingParams(temperature=1.0, top_k=20, top_p=0.9, min_p=0.02),
    "penalties": SamplingParams(
        temperature=0.7,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        logit_bias={3: 2.0, 7: -3.0},
    ),
    "greedy with penalties": SamplingParams(repetition_penalty=1.3, frequency_penalty=0.3),
}


class DrafterConformance:
    """The suite. Override `drafter`."""

    max_tokens = 40

    def drafter(self, target: ReferenceModel) -> Drafter:
        """A new drafter for sessions with `target`."""
        raise NotImplementedError

    def target(self) -> ReferenceModel:
        """A small target whose text repeats now and then."""
        return ReferenceModel(48, seed=5, width_class=WidthClass(2), context_length=160)

    def prompts(self) -> Iterator[list[int]]:
        """A repetitive prompt, a random one, and one of a single token."""
        rng = np.random.default_rng(0)
        yield [1, 2, 3, 4, 5, 6] * 4
        yield rng.integers(0, 47, 30).tolist()
        yield [9]

    def answer(self, drafter: Drafter, prompt: Sequence[int], params: SamplingParams, rule: str = "walk") -> Generation:
        """One answer from a fresh session."""
        with Session(self.target(), drafter, acceptance=rule) as session:
            return session.generate(prompt, params)

    def test_text_equals_plain_decoding_with_the_same_seed(self) -> None:
        """Token for token, for every kind of sampling setting."""
        for name, base in SETTINGS.items():
            for seed, prompt in enumerate(self.prompts()):
                params = _with(base, seed=seed, max_tokens=self.max_tokens)
                plain = self.answer(Nothing(), prompt, params)
                other = self.answer(self.drafter(self.target()), prompt, params)
                assert other.tokens == plain.tokens, f"{name}, prompt {seed}"
                assert other.finish_reason == plain.finish_reason

    def test_greedy_text_under_rejection_equals_plain_decoding(self) -> None:
        """At temperature 0 both rules accept the target's token and nothing else."""
        for prompt in self.prompts():
            params = SamplingParams(seed=1, max_tokens=self.max_tokens)
            plain = self.answer(Nothing(), prompt, params)
            assert self.answer(self.drafter(self.target()), prompt, params, "rejection").tokens == plain.tokens

    def test_turns_that_share_a_prefix_or_nothing_give_plain_text(self) -> None:
        """`begin` copes with longer, shorter and unrelated contexts."""
        params = SamplingParams(temperature=0.8, seed=3, max_tokens=12)
        prompts = list(self.prompts())
        turns = [prompts[0], prompts[0] + [7, 8, 9], prompts[1], prompts[0][:5], prompts[2]]
        with Session(self.target(), self.drafter(self.target())) as session:
            for turn in turns:
                assert session.generate(turn, params).tokens == self.answer(Nothing(), turn, params).tokens

    def test_an_answer_that_was_cut_short_leaves_the_drafter_usable(self) -> None:
        """Cancelling between rounds, then going on."""
        params = SamplingParams(temperature=0.8, seed=4, max_tokens=30)
        prompt = next(self.prompts())
        with Session(self.target(), self.drafter(self.target())) as session:
            stream = session.stream(prompt, params)
            for count, _ in enumerate(stream):
                if count == 3:
                    stream.cancel()
            tokens = session.tokens.tolist()
            assert stream.result.finish_reason == "cancelled"
            assert session.generate(tokens, params).tokens == self.answer(Nothing(), tokens, params).tokens

    def test_what_was_saved_can_be_gone_on_from(self) -> None:
        """After other contexts, by the drafter itself; by one that has other models it is passed over."""
        params = SamplingParams(temperature=0.8, seed=5, max_tokens=12)
        first, other, _ = self.prompts()
        again = [*first, 7, 8]
        plain = self.answer(Nothing(), again, params).tokens
        drafter = self.drafter(self.target())
        with Session(self.target(), drafter) as session:
            session.generate(first, params)
            saved = drafter.save()
            assert all(one.num_bytes > 0 and len(one.tokens) for one in saved)
            session.generate(other, params)
            drafter.restore(saved)
            assert session.generate(again, params).tokens == plain
        stranger = self.drafter(self.target())
        stranger.restore(saved)
        assert self.answer(stranger, again, params).tokens == plain

    def test_proposals_keep_to_the_budget_and_are_trees(self) -> None:
        """At most `max_nodes` nodes and `max_depth` levels, parents first, tokens of the vocabulary; 0 gives none."""
        target = self.target()
        drafter = self.drafter(target)
        for prompt in self.prompts():
            context = self.begun(target, drafter, prompt)
            for budget, depth in ((0, 0), (1, 1), (2, 2), (5, 5), (40, 40), (40, 2), (2, 40), (12, 0)):
                proposal = self.propose(drafter, context, budget, trees=budget > 2, depth=depth)
                assert proposal.num_nodes <= budget
                assert int(proposal.depth().max(initial=-1)) < depth
                assert budget > 2 or is_chain(proposal.parents), "a tree where a chain was asked for"
                tree = proposal.tree()
                assert len(tree) == proposal.num_nodes
                assert all(0 <= int(token) < target.vocab_size for token in tree.token)
                assert len(context) == len(prompt), "the drafter left the context changed"
                context.append(5)
                drafter.observe(Outcome(tree, (), (5,)))
                context.truncate(len(prompt))
                drafter.begin(context)
        drafter.close()

    draws = False
    """Does the drafter draw from a distribution it knows? Otherwise its guesses are point masses."""

    def test_a_law_is_given_for_every_drawn_node(self) -> None:
        """Under rejection: laws that sum to one and hold the token, or none at all for point masses."""
        target = self.target()
        drafter = self.drafter(target)
        context = self.begun(target, drafter, next(self.prompts()))
        proposal = self.propose(drafter, context, 5, needs_law=True, trees=True)
        assert (proposal.laws is not None) == self.draws
        if proposal.laws is not None:
            assert len(proposal.laws) == proposal.num_nodes > 0
            for token, law in zip(proposal.tree().token, proposal.laws, strict=True):
                assert abs(float(law.probs.sum()) - 1.0) < 1e-9
                assert law.probability(int(token)) > 0.0
        drafter.close()

    def begun(self, target: ReferenceModel, drafter: Drafter, prompt: Sequence[int]) -> Context:
        """The context of a turn that has just begun, its prompt read by the target."""
        state = target.open()
        drafter.attach(state)
        if len(prompt) > 1:
            read = HostTokens(np.array(prompt[:-1], np.int32))
            target.forward([Step(state, (read,), chain_parents(state, len(read)), ())])
            state.keep(range(len(read)))
        context = Context(prompt)
        drafter.begin(context)
        return context

    def propose(
        self,
        drafter: Drafter,
        context: Context,
        budget: int,
        *,
        trees: bool = False,
        needs_law: bool = False,
        depth: int | None = None,
    ) -> Proposal:
        """One proposal at temperature 0.8."""
        request = DraftRequest(
            context=context,
            max_nodes=budget,
            max_depth=budget if depth is None else depth,
            sampler=Sampler(SamplingParams(temperature=0.8), 7),
            stop_tokens=frozenset({47}),
            trees=trees,
            needs_law=needs_law,
        )
        return drafter.propose(request)


def _with(params: SamplingParams, *, seed: int, max_tokens: int) -> SamplingParams:
    return replace(params, seed=seed, max_tokens=max_tokens, ignore_eos=True)
