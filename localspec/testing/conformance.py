"""What every backend must do, as tests to subclass:

    class TestMine(BackendConformance):
        def model(self) -> LanguageModel: ...   # opened once and cached by you

Rows are compared with `==`: within a width class the contract promises identical bits. A backend that
cannot promise that sets `tolerance` and says why. The methods need no pytest fixture, so that a test
can also run the suite against a backend with planted faults and see it fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from unittest import SkipTest

import numpy as np

from localspec import noise
from localspec.engine.width import pad
from localspec.errors import BackendError, ContextFullError, StaleScoresError
from localspec.noise import Purpose
from localspec.protocols import HostTokens, LanguageModel, SequenceState, Step, chain_parents
from localspec.ranking import gumbel_argmax, top_ids
from localspec.testing.reference import random_tree
from localspec.tree.mask import depths
from localspec.tree.token_tree import TokenTree
from localspec.types import Logits, NodeIndices


class BackendConformance:
    """The suite. Override `model`; the rest are knobs."""

    tolerance = 0.0
    num_random_rounds = 40
    prefix_length = 24

    def model(self) -> LanguageModel:
        """The model under test. Every test opens and closes its own states."""
        raise NotImplementedError

    # ------------------------------------------------------------ helpers

    def tokens(self, rng: np.random.Generator, count: int) -> list[int]:
        """Random ids of ordinary tokens."""
        return [int(t) for t in rng.integers(0, self.model().tokenizer.num_tokens, count)]

    def run(
        self, state: SequenceState, ids: Sequence[int], parents: NodeIndices, rows: tuple[int, ...] | None
    ) -> Logits:
        """One padded forward; the rows asked for, copied."""
        step = Step(state, (HostTokens(np.array(ids, np.int32)),), parents, rows)
        [scores] = self.model().forward([pad(step, self.model().capabilities.width_class)])
        return scores.rows(range(scores.num_rows)).copy()

    def commit(self, state: SequenceState, ids: Sequence[int]) -> None:
        """Prefill: run a chain without rows and keep it."""
        if ids:
            self.run(state, ids, chain_parents(state, len(ids)), ())
            state.keep(range(len(ids)))

    def next_row(self, state: SequenceState, token: int) -> Logits:
        """The row after `token`, which is dropped again."""
        rows = self.run(state, [token], chain_parents(state, 1), (0,))
        state.keep(())
        return np.asarray(rows[0])

    def one_by_one(self, prefix: Sequence[int], ids: Sequence[int]) -> Logits:
        """[T, V] rows after each of `ids`, decoded one at a time behind `prefix`."""
        state = self.model().open()
        try:
            self.commit(state, prefix)
            rows = []
            for token in ids:
                rows.append(self.run(state, [token], chain_parents(state, 1), (0,))[0])
                state.keep((0,))
            return np.array(rows)
        finally:
            state.close()

    def assert_rows(self, got: Logits, want: Logits, what: str) -> None:
        """Equal bits, or within the backend's stated tolerance."""
        assert got.shape == want.shape, f"{what}: shapes {got.shape} and {want.shape}"
        worst = float(np.abs(got - want).max(initial=0.0))
        assert worst <= self.tolerance, f"{what}: rows differ by {worst:g}, allowed {self.tolerance:g}"

    def assert_same_future(self, state: SequenceState, tokens: Sequence[int], what: str) -> None:
        """The state answers like a fresh one that was prefilled with `tokens`."""
        assert (state.length, state.num_pending) == (len(tokens), 0), f"{what}: wrong length"
        probe = 5 % self.model().tokenizer.num_tokens
        fresh = self.model().open()
        try:
            self.commit(fresh, tokens)
            self.assert_rows(self.next_row(state, probe), self.next_row(fresh, probe), what)
        finally:
            fresh.close()

    def with_prefix(self, seed: int, check: Callable[[np.random.Generator, SequenceState, list[int]], None]) -> None:
        """Run `check` on a state that holds a random prefix."""
        rng = np.random.default_rng(seed)
        prefix = self.tokens(rng, self.prefix_length)
        state = self.model().open()
        try:
            self.commit(state, prefix)
            check(rng, state, prefix)
        finally:
            state.close()

    def tree_rows(self, prefix: Sequence[int], ids: Sequence[int], parents: NodeIndices) -> Logits:
        """[N, V] what each node's row must be, by decoding its path alone."""
        tree = TokenTree.from_parents(np.array(ids, np.int32), parents)
        leaves = [node for node in range(len(tree)) if not tree.children(node)]
        rows: dict[int, Logits] = {}
        for leaf in leaves:
            path = tree.path(leaf)
            rows.update(zip(path, self.one_by_one(prefix, [ids[node] for node in path]), strict=True))
        return np.array([rows[node] for node in range(len(tree))])

    def compares_trees(self) -> bool:
        """Trees whose rows are only nearly those of chains are compared where a tolerance is stated."""
        capabilities = self.model().capabilities
        return capabilities.trees and (capabilities.exact_trees or self.tolerance > 0)

    def skip_without_trees(self) -> None:
        """Skip, visibly, where the model promises chains only."""
        if not self.compares_trees():
            raise SkipTest(f"{self.model().info.name}: {'; '.join(self.model().capabilities.limits) or 'chains only'}")

    # ------------------------------------------------------------ rows

    def test_chain_rows_equal_one_by_one_rows(self) -> None:
        """A chain verified in one pass gives the rows of plain decoding."""

        def check(rng: np.random.Generator, state: SequenceState, prefix: list[int]) -> None:
            for count in (1, 2, 3, 5, 8):
                ids = self.tokens(rng, count)
                got = self.run(state, ids, chain_parents(state, count), None if count > 1 else (0,))
                state.keep(())
                self.assert_rows(got, self.one_by_one(prefix, ids), f"chain of {count}")

        self.with_prefix(1, check)

    def test_tree_rows_equal_one_by_one_rows(self) -> None:
        """Each node of a tree sees its ancestors only, at its own depth (mask and position)."""
        self.skip_without_trees()

        def check(rng: np.random.Generator, state: SequenceState, prefix: list[int]) -> None:
            for size in (3, 9, 16):
                parents, ids = random_tree(rng, size), self.tokens(rng, size)
                got = self.run(state, ids, parents, None)
                state.keep(())
                self.assert_rows(got, self.tree_rows(prefix, ids, parents), f"tree {parents.tolist()}")

        self.with_prefix(2, check)

    def test_growing_level_by_level_equals_one_pass(self) -> None:
        """A drafter may add nodes below pending ones, call by call."""
        self.skip_without_trees()

        def check(rng: np.random.Generator, state: SequenceState, prefix: list[int]) -> None:
            ids, parents = self.tokens(rng, 12), random_tree(rng, 12)
            levels = depths(parents)
            number: dict[int, int] = {-1: -1}  # padding nodes count too, so numbers are not 0, 1, 2
            got: dict[int, Logits] = {}
            for level in range(int(levels.max()) + 1):
                chosen = [int(node) for node in np.flatnonzero(levels == level)]
                number.update((node, state.num_pending + place) for place, node in enumerate(chosen))
                below = np.array([number[int(parents[node])] for node in chosen], np.int32)
                rows = self.run(state, [ids[node] for node in chosen], below, tuple(range(len(chosen))))
                got.update(zip(chosen, rows, strict=True))
            grown = np.array([got[node] for node in range(12)])
            self.assert_rows(grown, self.tree_rows(prefix, ids, parents), "level by level")
            path = TokenTree.from_parents(np.array(ids, np.int32), parents).path(11)
            state.keep([number[node] for node in path])
            self.assert_same_future(state, prefix + [ids[node] for node in path], "kept after growing")

        for seed in range(3, 7):
            self.with_prefix(seed, check)

    def test_only_the_rows_asked_for_are_scored(self) -> None:
        """`rows` selects; None means all, () none."""

        def check(rng: np.random.Generator, state: SequenceState, prefix: list[int]) -> None:
            ids = self.tokens(rng, 6)
            parents = chain_parents(state, 6)
            everything = self.run(state, ids, parents, None)
            state.keep(())
            some = self.run(state, ids, parents, (1, 4))
            state.keep(())
            self.assert_rows(some, everything[[1, 4]], "rows 1 and 4")
            assert len(self.run(state, ids, parents, ())) == 0
            state.keep(())

        self.with_prefix(7, check)

    def test_the_same_pass_twice_gives_the_same_bits(self) -> None:
        """No randomness, no dependence on what ran before."""

        def check(rng: np.random.Generator, state: SequenceState, prefix: list[int]) -> None:
            ids = self.tokens(rng, 4)
            first = self.run(state, ids, chain_parents(state, 4), None)
            state.keep(())
            second = self.run(state, ids, chain_parents(state, 4), None)
            assert np.array_equal(first, second)

        self.with_prefix(8, check)

    # ------------------------------------------------------------ state

    def test_keep_commits_exactly_one_path(self) -> None:
        """After keep the state equals a fresh prefill of prefix and path."""

        def check(rng: np.random.Generator, state: SequenceState, prefix: list[int]) -> None:
            tokens = list(prefix)
            for size in (2, 7, 12):
                trees = self.compares_trees()
                parents = random_tree(rng, size) if trees else chain_parents(state, size)
                ids = self.tokens(rng, size)
                tree = TokenTree.from_parents(np.array(ids, np.int32), parents)
                self.run(state, ids, parents, ())
                path = tree.path(int(rng.integers(0, size)))
                state.keep(path)
                tokens += [ids[node] for node in path]
                self.assert_same_future(state, tokens, f"keep {path} of {parents.tolist()}")

        for seed in range(10, 14):
            self.with_prefix(seed, check)

    def test_every_leaf_of_a_bush_can_be_kept(self) -> None:
        """Siblings at the root and below: whichever is kept, its own cells stay, not its sibling's."""
        self.skip_without_trees()
        parents = np.array([-1, -1, 0, 0, 1, 1, 4, 4], np.int32)

        def check(rng: np.random.Generator, state: SequenceState, prefix: list[int]) -> None:
            for node in range(len(parents)):
                ids = self.tokens(rng, len(parents))
                tree = TokenTree.from_parents(np.array(ids, np.int32), parents)
                self.run(state, ids, parents, ())
                state.keep(tree.path(node))
                self.assert_same_future(state, prefix + [ids[i] for i in tree.path(node)], f"kept node {node}")
                state.truncate(len(prefix))

        self.with_prefix(14, check)

    def test_dropped_nodes_leave_no_trace(self) -> None:
        """keep(()) and truncate forget what was pending."""

        def check(rng: np.random.Generator, state: SequenceState, prefix: list[int]) -> None:
            for by_truncating in (False, True):
                ids = self.tokens(rng, 6)
                self.run(state, ids, chain_parents(state, 6), ())
                assert state.num_pending >= 6
                if by_truncating:
                    state.truncate(state.length)
                else:
                    state.keep(())
                self.assert_same_future(state, prefix, "dropped")

        self.with_prefix(15, check)

    def test_truncate_leaves_the_beginning(self) -> None:
        """Any shorter length, down to nothing."""

        def check(rng: np.random.Generator, state: SequenceState, prefix: list[int]) -> None:
            for length in (len(prefix) - 1, len(prefix) // 2, 1, 0):
                state.truncate(length)
                self.assert_same_future(state, prefix[:length], f"truncated to {length}")

        self.with_prefix(16, check)

    def test_waiting_changes_nothing(self) -> None:
        """Behind a pass that nobody read, with its nodes pending and with them dropped; and on an empty state."""

        def check(rng: np.random.Generator, state: SequenceState, prefix: list[int]) -> None:
            state.wait()
            self.run(state, self.tokens(rng, 3), chain_parents(state, 3), ())
            state.wait()
            assert state.num_pending == 3 and state.length == len(prefix), f"{state.num_pending}, {state.length}"
            state.keep(())
            self.assert_same_future(state, prefix, "after waiting")
            state.truncate(0)
            state.wait()

        self.with_prefix(17, check)

    def test_a_fork_is_independent(self) -> None:
        """Writing to either leaves the other alone, also after the first is closed."""

        def check(rng: np.random.Generator, state: SequenceState, prefix: list[int]) -> None:
            fork = state.fork()
            try:
                left, right = self.tokens(rng, 3), self.tokens(rng, 4)
                self.commit(state, left)
                self.commit(fork, right)
                self.assert_same_future(state, prefix + left, "original")
                self.assert_same_future(fork, prefix + right, "fork")
                state.truncate(2)
                self.assert_same_future(fork, prefix + right, "fork after the original was cut")
            finally:
                fork.close()

        self.with_prefix(17, check)

    def test_batching_does_not_leak_between_sequences(self) -> None:
        """Two sequences in one pass answer like each alone."""

        def check(rng: np.random.Generator, state: SequenceState, prefix: list[int]) -> None:
            other = self.model().open()
            try:
                other_prefix = self.tokens(rng, 9)
                self.commit(other, other_prefix)
                ids, other_ids = self.tokens(rng, 5), self.tokens(rng, 3)
                steps = [
                    Step(state, (HostTokens(np.array(ids, np.int32)),), chain_parents(state, 5)),
                    Step(other, (HostTokens(np.array(other_ids, np.int32)),), chain_parents(other, 3)),
                ]
                first, second = self.model().forward(steps)
                assert (first.num_rows, second.num_rows) == (5, 3)
                rows, other_rows = first.rows(range(5)).copy(), second.rows(range(3)).copy()
                self.assert_rows(rows, self.one_by_one(prefix, ids), "first of two")
                self.assert_rows(other_rows, self.one_by_one(other_prefix, other_ids), "second of two")
                state.keep(range(5))
                other.keep(range(3))
                self.assert_same_future(state, prefix + ids, "first after keep")
                self.assert_same_future(other, other_prefix + other_ids, "second after keep")
            finally:
                other.close()

        self.with_prefix(18, check)

    def test_many_sequences_go_on_as_each_would_alone(self) -> None:
        """Rounds of up to five sequences of unlike lengths and widths, as trees where there are trees, which come and
        go; some rows scored or none."""
        model, rng = self.model(), np.random.default_rng(24)
        states: list[SequenceState] = []
        texts: list[list[int]] = []
        try:
            for turn in range(12):
                if len(states) < min(5, model.capabilities.num_sequences - 1) and turn % 2 == 0:
                    states.append(model.open())
                    texts.append(self.tokens(rng, int(rng.integers(1, 40))))
                    self.commit(states[-1], texts[-1])
                new = [self.tokens(rng, int(rng.integers(1, 6))) for _ in states]
                trees = self.compares_trees()
                forms = [
                    random_tree(rng, len(ids)) if trees else np.arange(-1, len(ids) - 1, dtype=np.int32) for ids in new
                ]
                rows = [tuple(range(int(rng.integers(0, len(ids) + 1)))) for ids in new]
                steps = [
                    Step(state, (HostTokens(np.array(ids, np.int32)),), parents, wanted)
                    for state, ids, parents, wanted in zip(states, new, forms, rows, strict=True)
                ]
                if len(steps) == 1 or not model.capabilities.batches:
                    steps = [pad(step, model.capabilities.width_class) for step in steps]
                got = [scores.rows(range(scores.num_rows)).copy() for scores in model.forward(steps)]
                for index, (state, ids, parents, wanted) in enumerate(zip(states, new, forms, rows, strict=True)):
                    want = self.tree_rows(texts[index], ids, parents)[list(wanted)]
                    self.assert_rows(got[index], want, f"round {turn}, sequence {index}")
                    path = TokenTree.from_parents(np.array(ids, np.int32), parents).path(
                        int(rng.integers(-1, len(ids)))
                    )
                    state.keep(path)
                    texts[index] += [ids[node] for node in path]
                if turn in (5, 8):
                    states.pop(1).close()
                    texts.pop(1)
            for state, text in zip(states, texts, strict=True):
                self.assert_same_future(state, text, "after all rounds")
        finally:
            for state in states:
                state.close()

    def test_a_saved_state_outlives_its_own(self) -> None:
        """It can be opened again and again, and neither knows of the other; nothing pending may be saved."""

        def check(rng: np.random.Generator, state: SequenceState, prefix: list[int]) -> None:
            saved = state.save()
            assert saved.num_bytes > 0
            more = self.tokens(rng, 5)
            self.commit(state, more)
            for _ in range(2):
                opened = saved.open()
                try:
                    self.assert_same_future(opened, prefix, "opened again")
                    self.commit(opened, self.tokens(rng, 2))
                    opened.truncate(len(prefix) // 2)
                    self.assert_same_future(opened, prefix[: len(prefix) // 2], "opened again and cut")
                finally:
                    opened.close()
            self.assert_same_future(state, prefix + more, "the one that was saved")
            self.run(state, more, chain_parents(state, len(more)), ())
            try:
                state.save()
            except ValueError:
                return
            raise AssertionError("a state was saved while nodes were pending")

        self.with_prefix(25, check)

    def test_random_rounds_leave_the_state_of_a_fresh_prefill(self) -> None:
        """Propose, keep, truncate and fork in random order."""
        rng = np.random.default_rng(19)
        state, tokens = self.model().open(), []
        limit = min(200, self.model().info.context_length // 2)
        try:
            for turn in range(self.num_random_rounds):
                size = int(rng.integers(1, 9))
                trees = self.compares_trees()
                parents = random_tree(rng, size) if trees else chain_parents(state, size)
                ids = self.tokens(rng, size)
                tree = TokenTree.from_parents(np.array(ids, np.int32), parents)
                self.run(state, ids, parents, ())
                path = tree.path(int(rng.integers(-1, size)))
                state.keep(path)
                tokens += [ids[node] for node in path]
                action = rng.integers(0, 5)
                if action == 0 or len(tokens) > limit:
                    tokens = tokens[: int(rng.integers(0, len(tokens) + 1))]
                    state.truncate(len(tokens))
                elif action == 1:
                    forked = state.fork()
                    state.close()
                    state = forked
                if turn % 5 == 4:
                    self.assert_same_future(state, tokens, f"round {turn}")
        finally:
            state.close()

    # ------------------------------------------------------------ scores

    def test_scores_agree_with_their_rows(self) -> None:
        """argmax, top and winners say what numpy says of the same logits."""

        def check(rng: np.random.Generator, state: SequenceState, prefix: list[int]) -> None:
            ids = self.tokens(rng, 4)
            step = Step(state, (HostTokens(np.array(ids, np.int32)),), chain_parents(state, 4))
            [scores] = self.model().forward([step])
            rows = scores.rows(range(4))
            assert rows.dtype == np.float32 and rows.shape == (4, self.model().vocab_size)
            assert scores.argmax().numpy().tolist() == rows.argmax(axis=1).tolist()
            top, logits = scores.top(5).numpy()
            assert [row.tolist() for row in top] == [top_ids(row, 5).tolist() for row in rows]
            assert np.array_equal(logits, np.take_along_axis(rows, top, axis=1))
            assert scores.top(5).tokens.numpy().tolist() == top.reshape(-1).tolist()
            keys = noise.keys(3, Purpose.TOKEN, np.arange(4))
            winners = scores.winners(0.9, keys).numpy()
            for row, key, winner in zip(rows, keys, winners, strict=True):
                low_high = (int(key[0]), int(key[1]))
                want = gumbel_argmax(row, 0.9, low_high)
                both = np.array([want, int(winner)], np.int32)
                sums = row[both] / np.float32(0.9) + noise.gumbel(low_high, both)
                # log() may differ in the last bit between devices, so equal up to rounding is equal
                assert want == winner or abs(float(sums[0] - sums[1])) < 1e-4
            best, values = scores.top(3, 0.9, keys).numpy()
            for row, key, tokens, ranked in zip(rows, keys, best, values, strict=True):
                sums = row / np.float32(0.9) + noise.gumbel((int(key[0]), int(key[1])), np.arange(len(row)))
                assert np.allclose(ranked, np.sort(sums)[::-1][:3], atol=1e-4)
                assert np.allclose(ranked, sums[tokens], atol=1e-4)

        self.with_prefix(20, check)

    def test_old_scores_are_refused_or_still_right(self) -> None:
        """Never another pass's numbers."""

        def check(rng: np.random.Generator, state: SequenceState, prefix: list[int]) -> None:
            ids = self.tokens(rng, 3)
            step = Step(state, (HostTokens(np.array(ids, np.int32)),), chain_parents(state, 3))
            [scores] = self.model().forward([step])
            before = scores.rows(range(3)).copy()
            self.model().forward([replace(step, parents=chain_parents(state, 3))])
            try:
                after = scores.rows(range(3))
            except StaleScoresError:
                return
            assert np.array_equal(before, after)

        self.with_prefix(21, check)

    # ------------------------------------------------------------ limits and misuse

    def test_a_full_context_is_refused_before_anything_changes(self) -> None:
        """ContextFullError; the state goes on working."""

        def check(rng: np.random.Generator, state: SequenceState, prefix: list[int]) -> None:
            count = self.model().info.context_length - len(prefix) + 1
            step = Step(state, (HostTokens(np.zeros(count, np.int32)),), chain_parents(state, count), ())
            try:
                self.model().forward([step])
            except ContextFullError:
                self.assert_same_future(state, prefix, "after a refused pass")
            else:
                raise AssertionError("a pass beyond the context was accepted")

        self.with_prefix(22, check)

    def test_keeping_what_is_not_a_path_is_refused(self) -> None:
        """ValueError, and nothing is lost."""

        def check(rng: np.random.Generator, state: SequenceState, prefix: list[int]) -> None:
            ids = self.tokens(rng, 3)
            self.run(state, ids, chain_parents(state, 3), ())
            for wrong in ([1], [0, 2], [99], [-1]):
                try:
                    state.keep(wrong)
                except ValueError:
                    continue
                raise AssertionError(f"keep({wrong}) was accepted")
            state.keep((0, 1, 2))
            self.assert_same_future(state, prefix + ids, "kept after refusals")

        self.with_prefix(23, check)

    def test_states_are_given_back_on_close(self) -> None:
        """As many states as promised, again and again; a closed one refuses work."""
        count = self.model().capabilities.num_sequences
        for _ in range(2):
            states = [self.model().open() for _ in range(count)]
            try:
                self.model().open().close()
            except BackendError:
                pass
            else:
                raise AssertionError(f"{count + 1} states were opened, {count} are promised")
            finally:
                for state in states:
                    state.close()
                    state.close()
        state = self.model().open()
        state.close()
        for use in (lambda: state.keep(()), lambda: state.truncate(0), state.fork, state.wait):
            try:
                use()
            except ValueError:
                continue
            raise AssertionError("a closed state was used")

    def test_token_bytes_join_to_the_text(self) -> None:
        """Ordinary text survives encoding, byte for byte."""
        tokenizer = self.model().tokenizer
        if tokenizer.num_tokens < 257:
            return  # a toy vocabulary without all bytes
        for text in ("Hello, world!", "  indented\n\tcode()", "naïve café", "日本語 🙂 👩‍👩‍👧", "a\u0301"):
            ids = tokenizer.encode(text, special=False)
            assert b"".join(tokenizer.token_bytes(int(t)) for t in ids).decode() == text
