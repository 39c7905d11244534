"""What every trained head must do, as tests to subclass:

    class TestMine(HeadConformance):
        def head(self) -> DraftHead: ...          # loaded once and cached by you
        def target(self) -> LanguageModel: ...    # the target it was loaded for

A head's rows are whatever its network says; what is tested is that they depend on the committed tokens and on the
path of guesses alone: not on how the tokens came there, nor on other guesses, sequences or passes. Whether the network
is computed as it was trained is for a comparison with an independent forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast
from unittest import SkipTest

import numpy as np

from localspec import noise
from localspec.engine.width import pad
from localspec.noise import Purpose
from localspec.protocols import (
    DraftHead,
    HeadState,
    HostTokens,
    LanguageModel,
    Scores,
    SequenceState,
    Step,
    chain_parents,
)
from localspec.ranking import gumbel_argmax
from localspec.testing.reference import random_tree
from localspec.tree.mask import depths
from localspec.tree.token_tree import TokenTree
from localspec.types import Logits, NodeIndices, Probabilities

Check = Callable[[np.random.Generator, SequenceState, HeadState, list[int]], None]


class HeadConformance:
    """The suite. Override `head` and `target`; the rest are knobs. tolerance: how far rows may differ that the contract
    says are the same, in logits, where a runtime does not promise bits; say why."""

    tolerance = 0.0
    num_random_rounds = 30
    prefix_length = 24

    def head(self) -> DraftHead:
        """The head under test."""
        raise NotImplementedError

    def target(self) -> LanguageModel:
        """Its target."""
        raise NotImplementedError

    # ------------------------------------------------------------ helpers

    def tokens(self, rng: np.random.Generator, count: int) -> list[int]:
        """Random ids of ordinary tokens."""
        return [int(t) for t in rng.integers(0, self.target().tokenizer.num_tokens, count)]

    def run(self, state: SequenceState, ids: Sequence[int], parents: NodeIndices) -> Logits:
        """One padded forward of the target; all rows of its own tokens, copied."""
        step = Step(state, (HostTokens(np.array(ids, np.int32)),), parents)
        [scores] = self.target().forward([pad(step, self.target().capabilities.width_class)])
        return scores.rows(range(len(ids))).copy()

    def commit(self, state: SequenceState, ids: Sequence[int], chunk: int = 512) -> None:
        """Read tokens, so many at a time."""
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            self.run(state, part, chain_parents(state, len(part)))
            state.keep(range(len(part)))

    def with_prefix(self, seed: int, check: Check) -> None:
        """Run `check` on a sequence with the head beside it from the start, after a random prefix."""
        rng = np.random.default_rng(seed)
        prefix = self.tokens(rng, self.prefix_length)
        state = self.target().open()
        try:
            beside = self.head().open(state)
            self.commit(state, prefix)
            check(rng, state, beside, prefix)
            beside.close()
        finally:
            state.close()

    def rows(self, scores: Scores) -> Logits:
        """All rows, copied."""
        return scores.rows(range(scores.num_rows)).copy()

    def grown(self, beside: HeadState, anchor: int, ids: Sequence[int], parents: NodeIndices) -> Logits:
        """[1 + N, V] behind the anchor and behind each of some guesses, fed level by level."""
        rows = {-1: self.rows(beside.start(anchor))[0]}
        number = {-1: -1}
        levels = depths(parents)
        for level in range(int(levels.max(initial=-1)) + 1):
            chosen = [int(node) for node in np.flatnonzero(levels == level)]
            below = [number[int(parents[node])] for node in chosen]
            made = self.rows(beside.extend(HostTokens(np.array([ids[node] for node in chosen], np.int32)), below))
            assert len(made) == len(chosen)
            number.update({node: len(number) - 1 + place for place, node in enumerate(chosen)})
            rows.update(zip(chosen, made, strict=True))
        return np.array([rows[node] for node in range(-1, len(ids))])

    def fresh_rows(self, tokens: Sequence[int], anchor: int, ids: Sequence[int]) -> Logits:
        """[1 + N, V] of a chain of guesses in a new sequence that was prefilled with `tokens`."""
        state = self.target().open()
        try:
            beside = self.head().open(state)
            self.commit(state, tokens)
            rows = self.grown(beside, anchor, ids, np.arange(-1, len(ids) - 1, dtype=np.int32))
            beside.close()
            return rows
        finally:
            state.close()

    def depth(self, most: int = 3) -> int:
        """Levels of guesses that can be fed."""
        levels = self.head().info.levels
        return most if levels is None else min(most, levels - 1)

    def assert_rows(self, got: Logits, want: Logits, what: str) -> None:
        """The same, tokens that cannot be guessed included."""
        assert got.shape == want.shape, f"{what}: shapes {got.shape} and {want.shape}"
        assert np.array_equal(np.isneginf(got), np.isneginf(want)), f"{what}: other tokens can be guessed"
        known = ~np.isneginf(got)
        worst = float(np.abs(got[known] - want[known]).max(initial=0.0))
        assert worst <= self.tolerance, f"{what}: rows differ by {worst:g}, allowed {self.tolerance:g}"

    def assert_as_fresh(self, beside: HeadState, tokens: Sequence[int], what: str) -> None:
        """The head guesses as one beside a sequence that was just prefilled with `tokens`."""
        anchor, *path = [(5 * (i + 1)) % self.target().tokenizer.num_tokens for i in range(1 + self.depth())]
        got = self.grown(beside, anchor, path, np.arange(-1, len(path) - 1, dtype=np.int32))
        self.assert_rows(got, self.fresh_rows(tokens, anchor, path), what)

    # ------------------------------------------------------------ rows

    def test_rows_have_the_targets_vocabulary(self) -> None:
        """float32 logits [N, V], none NaN, something to guess in each; the facts say what the state does."""

        def check(rng: np.random.Generator, state: SequenceState, beside: HeadState, prefix: list[int]) -> None:
            ids = self.tokens(rng, self.depth())
            made = self.grown(beside, 3, ids, np.arange(-1, len(ids) - 1, dtype=np.int32))
            assert made.dtype == np.float32 and made.shape == (1 + len(ids), self.target().vocab_size)
            assert not np.isnan(made).any() and not np.isposinf(made).any()
            assert np.isfinite(made).any(axis=1).all()
            assert beside.num_missing == 0 and beside.room > 0

        self.with_prefix(1, check)

    def test_rows_depend_on_what_was_read_on_the_anchor_and_on_the_path(self) -> None:
        """Otherwise nothing here would show anything. Heads whose levels do not see the guesses may ignore the path."""

        def check(rng: np.random.Generator, state: SequenceState, beside: HeadState, prefix: list[int]) -> None:
            here = self.rows(beside.start(3))
            other = self.fresh_rows([*prefix[:-1], (prefix[-1] + 1) % self.target().tokenizer.num_tokens], 3, [])
            assert not np.array_equal(here, other), "the last committed token makes no difference"

        self.with_prefix(2, check)

    def test_prefill_in_chunks_is_prefill(self) -> None:
        """However the prompt is cut."""
        for chunk in (1, 5, 16):
            rng = np.random.default_rng(3)
            tokens = self.tokens(rng, self.prefix_length)
            state = self.target().open()
            try:
                beside = self.head().open(state)
                self.commit(state, tokens, chunk)
                self.assert_as_fresh(beside, tokens, f"chunks of {chunk}")
            finally:
                state.close()

    def test_trees_equal_chains(self) -> None:
        """Each guess's row is that of its path alone."""
        if not self.head().info.trees:
            raise SkipTest(f"{self.head().info.name} guesses chains only")

        def check(rng: np.random.Generator, state: SequenceState, beside: HeadState, prefix: list[int]) -> None:
            for size in (3, 7, 12):
                ids, parents = self.tokens(rng, size), random_tree(rng, size)
                shallow = [int(node) for node in np.flatnonzero(depths(parents) < self.depth(size))]
                place = {node: index for index, node in enumerate(shallow)}
                parents = np.array([place.get(int(parents[node]), -1) for node in shallow], np.int32)
                ids = [ids[node] for node in shallow]
                tree = TokenTree.from_parents(np.array(ids, np.int32), parents)
                made = self.grown(beside, 3, ids, parents)
                for node in range(len(tree)):
                    path = tree.path(node)
                    alone = self.fresh_rows(prefix, 3, [ids[i] for i in path])
                    self.assert_rows(made[1 + node], alone[-1], f"guess {node} of {parents.tolist()}")

        self.with_prefix(4, check)

    def test_start_forgets_earlier_guesses(self) -> None:
        """Whatever was guessed before, behind whatever anchor."""

        def check(rng: np.random.Generator, state: SequenceState, beside: HeadState, prefix: list[int]) -> None:
            for anchor in (3, 7, 3):
                ids = self.tokens(rng, self.depth())
                self.grown(beside, anchor, ids, np.arange(-1, len(ids) - 1, dtype=np.int32))
                self.assert_as_fresh(beside, prefix, f"after guesses behind {anchor}")

        self.with_prefix(5, check)

    def test_confidence_is_a_chance_per_row(self) -> None:
        """[N] of the rows scored last; None where the facts say that there is none."""

        def check(rng: np.random.Generator, state: SequenceState, beside: HeadState, prefix: list[int]) -> None:
            def see(num_rows: int) -> None:
                said: Probabilities | None = beside.confidence()
                assert (said is not None) == self.head().info.confident
                if said is not None:
                    assert said.shape == (num_rows,) and bool(((said >= 0.0) & (said <= 1.0)).all())

            beside.start(3)
            see(1)
            if self.depth():
                width = 2 if self.head().info.trees else 1
                beside.extend(HostTokens(np.array(self.tokens(rng, width), np.int32)), [-1] * width)
                see(width)

        self.with_prefix(6, check)

    def test_scores_agree_with_their_rows(self) -> None:
        """argmax, top and winners say what numpy says of the same logits."""

        def check(rng: np.random.Generator, state: SequenceState, beside: HeadState, prefix: list[int]) -> None:
            scores = beside.start(3)
            [row] = self.rows(scores)
            assert scores.argmax().numpy().tolist() == [int(row.argmax())]
            best, values = scores.top(3).numpy()
            assert np.allclose(values[0], np.sort(row)[::-1][:3]) and np.allclose(row[best[0]], values[0])
            key = noise.keys(3, Purpose.TOKEN, np.arange(1))
            [winner] = scores.winners(0.9, key).numpy().tolist()
            want = gumbel_argmax(row, 0.9, (int(key[0, 0]), int(key[0, 1])))
            both = np.array([want, winner], np.int32)
            sums = row[both] / np.float32(0.9) + noise.gumbel((int(key[0, 0]), int(key[0, 1])), both)
            assert want == winner or abs(float(sums[0] - sums[1])) < 1e-4

        self.with_prefix(7, check)

    # ------------------------------------------------------------ what it makes of committed tokens

    def test_kept_paths_are_read(self) -> None:
        """After keep the head guesses as after a fresh prefill, also where guesses were in progress."""

        def check(rng: np.random.Generator, state: SequenceState, beside: HeadState, prefix: list[int]) -> None:
            tokens = list(prefix)
            for size in (2, 5, 9):
                ids, parents = self.tokens(rng, size), self._parents(rng, state, size)
                beside.start(3)
                self.run(state, ids, parents)
                path = TokenTree.from_parents(np.array(ids, np.int32), parents).path(int(rng.integers(0, size)))
                state.keep(path)
                tokens += [ids[node] for node in path]
                self.assert_as_fresh(beside, tokens, f"kept {path} of {parents.tolist()}")

        for seed in (8, 9):
            self.with_prefix(seed, check)

    def test_what_is_dropped_leaves_no_trace(self) -> None:
        """keep(()) and truncate."""

        def check(rng: np.random.Generator, state: SequenceState, beside: HeadState, prefix: list[int]) -> None:
            ids = self.tokens(rng, 5)
            self.run(state, ids, chain_parents(state, 5))
            state.keep(())
            self.assert_as_fresh(beside, prefix, "dropped")
            for length in (len(prefix) - 1, len(prefix) // 2, 1):
                state.truncate(length)
                self.assert_as_fresh(beside, prefix[:length], f"truncated to {length}")
            state.truncate(0)
            other = self.tokens(rng, 9)
            self.commit(state, other)
            self.assert_as_fresh(beside, other, "another text")

        self.with_prefix(10, check)

    def test_copies_bring_the_head_along(self) -> None:
        """fork, save and open: each copy guesses as the original did, and neither knows of the other."""

        def check(rng: np.random.Generator, state: SequenceState, beside: HeadState, prefix: list[int]) -> None:
            saved = state.save()
            fork = state.fork()
            try:
                left, right = self.tokens(rng, 3), self.tokens(rng, 4)
                self.commit(state, left)
                other = self.head().open(fork)
                assert other.num_missing == 0
                self.commit(fork, right)
                self.assert_as_fresh(beside, prefix + left, "original")
                self.assert_as_fresh(other, prefix + right, "fork")
                state.truncate(2)
                self.assert_as_fresh(other, prefix + right, "fork after the original was cut")
                other.close()
            finally:
                fork.close()
            for _ in range(2):
                opened = saved.open()
                try:
                    self.commit(opened, left)
                    self.assert_as_fresh(self.head().open(opened), prefix + left, "opened again")
                finally:
                    opened.close()

        self.with_prefix(11, check)

    def test_sequences_do_not_leak_into_each_other(self) -> None:
        """Two in one pass, and two that guess in turns."""

        def check(rng: np.random.Generator, state: SequenceState, beside: HeadState, prefix: list[int]) -> None:
            other = self.target().open()
            try:
                another = self.head().open(other)
                tokens = self.tokens(rng, 9)
                self.commit(other, tokens)
                ids, more = self.tokens(rng, 5), self.tokens(rng, 3)
                steps = [
                    Step(state, (HostTokens(np.array(ids, np.int32)),), chain_parents(state, 5)),
                    Step(other, (HostTokens(np.array(more, np.int32)),), chain_parents(other, 3)),
                ]
                self.target().forward(steps)
                state.keep(range(5))
                other.keep(range(3))
                first, second = self.rows(beside.start(3)), self.rows(another.start(7))
                self.assert_rows(first, self.fresh_rows(prefix + ids, 3, []), "first of two")
                self.assert_rows(second, self.fresh_rows(tokens + more, 7, []), "second of two")
            finally:
                other.close()

        self.with_prefix(12, check)

    def test_random_rounds_leave_the_head_of_a_fresh_prefill(self) -> None:
        """Guess, verify, keep, truncate and fork in random order."""
        rng = np.random.default_rng(13)
        state, tokens = self.target().open(), list[int]()
        limit = min(120, self.target().info.context_length // 2)
        try:
            beside = self.head().open(state)
            for turn in range(self.num_random_rounds):
                if rng.integers(0, 2):
                    guesses = self.tokens(rng, self.depth())
                    self.grown(beside, 3, guesses, np.arange(-1, len(guesses) - 1, dtype=np.int32))
                size = int(rng.integers(1, 9))
                ids, parents = self.tokens(rng, size), self._parents(rng, state, size)
                self.run(state, ids, parents)
                path = TokenTree.from_parents(np.array(ids, np.int32), parents).path(int(rng.integers(-1, size)))
                state.keep(path)
                tokens += [ids[node] for node in path]
                action = rng.integers(0, 5)
                if action == 0 or len(tokens) > limit:
                    tokens = tokens[: int(rng.integers(0, len(tokens) + 1))]
                    state.truncate(len(tokens))
                elif action == 1:
                    forked = state.fork()
                    state.close()
                    state, beside = forked, self.head().open(forked)
                if turn % 5 == 4:
                    self.assert_as_fresh(beside, tokens, f"round {turn}")
        finally:
            state.close()

    def test_the_target_does_not_notice(self) -> None:
        """Its rows are those of a sequence without a head, with guesses in progress or not."""

        def check(rng: np.random.Generator, state: SequenceState, beside: HeadState, prefix: list[int]) -> None:
            alone = self.target().open()
            try:
                self.commit(alone, prefix)
                for ids in (self.tokens(rng, 4), self.tokens(rng, 4)):
                    beside.start(3)
                    got = self.run(state, ids, chain_parents(state, 4))
                    want = self.run(alone, ids, chain_parents(alone, 4))
                    state.keep(range(2))
                    alone.keep(range(2))
                    assert float(np.abs(got - want).max()) == 0.0
            finally:
                alone.close()

        self.with_prefix(14, check)

    # ------------------------------------------------------------ limits and misuse

    def test_a_head_that_comes_late_says_what_it_missed(self) -> None:
        """It guesses nevertheless; once what it missed is read again it guesses as any."""
        rng = np.random.default_rng(15)
        prefix = self.tokens(rng, self.prefix_length)
        state = self.target().open()
        try:
            self.commit(state, prefix)
            beside = self.head().open(state)
            assert beside.num_missing == len(prefix)
            assert np.isfinite(self.rows(beside.start(3))).any()
            self.commit(state, prefix[:4])
            assert beside.num_missing == len(prefix)
            assert np.isfinite(self.rows(beside.start(3))).any()
            state.truncate(5)
            assert beside.num_missing == 5
            state.truncate(0)
            assert beside.num_missing == 0
            self.commit(state, prefix)
            self.assert_as_fresh(beside, prefix, "read again")
            beside.close()
            self.commit(state, prefix[:4])
            again = self.head().open(state)
            assert again.num_missing == state.length, "it was not there for a while"
        finally:
            state.close()

    def test_guesses_beyond_the_last_level_are_refused(self) -> None:
        """ValueError, and the head goes on working."""
        levels = self.head().info.levels
        if levels is None:
            raise SkipTest(f"{self.head().info.name} guesses any number of levels")

        def check(rng: np.random.Generator, state: SequenceState, beside: HeadState, prefix: list[int]) -> None:
            beside.start(3)
            for level in range(levels - 1):
                beside.extend(HostTokens(np.array([level], np.int32)), [level - 1])
            try:
                beside.extend(HostTokens(np.array([1], np.int32)), [levels - 2])
            except ValueError:
                self.assert_as_fresh(beside, prefix, "after a refusal")
            else:
                raise AssertionError(f"a head of {levels} levels was fed one more")

        self.with_prefix(16, check)

    def test_closing_is_the_end(self) -> None:
        """Twice does nothing; the sequence works on; a foreign sequence is refused."""

        def check(rng: np.random.Generator, state: SequenceState, beside: HeadState, prefix: list[int]) -> None:
            beside.close()
            beside.close()
            self.commit(state, prefix[:3])
            state.truncate(2)
            try:
                self.head().open(cast(SequenceState, object()))
            except ValueError:
                return
            raise AssertionError("a sequence of nobody was accepted")

        self.with_prefix(17, check)

    def _parents(self, rng: np.random.Generator, state: SequenceState, size: int) -> NodeIndices:
        """Of nodes for the target to verify: a tree where it can."""
        capabilities = self.target().capabilities
        trees = capabilities.trees and (capabilities.exact_trees or self.tolerance > 0)
        return random_tree(rng, size) if trees else chain_parents(state, size)
