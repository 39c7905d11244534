"""The suffix drafter: its automaton against counting by hand, what it guesses, and what it keeps to itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from localspec.context import Context
from localspec.drafters import Suffix, make_drafter
from localspec.drafters.suffix_automaton import Place, SuffixAutomaton
from localspec.errors import SettingError
from localspec.history import History
from localspec.protocols import Drafter, DraftRequest
from localspec.sampling import Sampler, SamplingParams
from localspec.testing.drafters import DrafterConformance
from localspec.testing.reference import ReferenceModel
from localspec.tree.token_tree import TokenTree


class TestSuffix(DrafterConformance):
    def drafter(self, target: ReferenceModel) -> Drafter:
        return Suffix(num=6)


class TestTreeOfSuffixes(DrafterConformance):
    def drafter(self, target: ReferenceModel) -> Drafter:
        return Suffix(num=12, shape="tree", min_prob=0.0)


class TestSuffixWithAHistory(DrafterConformance):
    """Sessions of the suite guess from each other's texts."""

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.history = History(self.target().tokenizer, folder=tmp_path)

    def drafter(self, target: ReferenceModel) -> Drafter:
        return Suffix(self.history, num=12, shape="tree", min_prob=0.0)


# ---------------------------------------------------------------- the automaton


def occurrences(text: Sequence[int], words: Sequence[int]) -> list[int]:
    """Number of tokens up to the end of each occurrence."""
    size = len(words)
    return [end for end in range(size, len(text) + 1) if list(text[end - size : end]) == list(words)]


def check_all(automaton: SuffixAutomaton, text: Sequence[int]) -> None:
    """All that it says of all substrings is what counting says."""
    depth = automaton.depth
    assert automaton.tokens == list(text)
    longest = [size for size in range(1, min(depth, len(text)) + 1) if len(occurrences(text, text[-size:])) > 1]
    assert automaton.match.length == max(longest, default=0)
    for start in range(len(text)):
        place: Place | None = Place(0, 0)
        for stop in range(start, min(len(text), start + depth)):
            assert place is not None
            place = automaton.follow(place, text[stop])
            ends = occurrences(text, text[start : stop + 1])
            assert place is not None and place.length == stop + 1 - start
            assert automaton.count(place) == len(ends)
            assert automaton.end(place.state) == ends[-1]
            after = [text[end] for end in ends if end < len(text)]
            latest = {text[end]: end for end in ends if end < len(text)}
            ranked = sorted(set(after), key=lambda token: (-after.count(token), -latest[token]))
            if stop + 1 - start < depth:
                assert automaton.likeliest(place, 9) == {token: after.count(token) for token in ranked}
            shorter = automaton.shorter(place)
            assert shorter is not None and shorter.length < place.length
            if shorter.length:
                assert automaton.count(shorter) > len(ends)
    assert automaton.follow(Place(0, 0), 99) is None


@pytest.mark.parametrize("seed", range(40))
def test_the_automaton_counts_as_one_would_by_hand_after_any_history(seed: int) -> None:
    """Few words, so that they repeat; tokens added and taken back in turn; substrings up to a small depth."""
    rng = np.random.default_rng(seed)
    automaton, text = SuffixAutomaton(int(rng.choice([1, 2, 3, 5, 64]))), list[int]()
    words = int(rng.choice([1, 2, 3, 6]))
    for _ in range(8):
        if rng.random() < 0.4:
            text = text[: int(rng.integers(0, len(text) + 1))]
            automaton.truncate(len(text))
        new = rng.integers(0, words, int(rng.integers(0, 9))).tolist()
        text += new
        automaton.extend(new)
        check_all(automaton, text)
    fresh = SuffixAutomaton(automaton.depth)
    fresh.extend(text)
    assert len(fresh._link) == len(automaton._link), "taking tokens back left states behind"


def test_one_word_for_ever_costs_as_much_as_any_text() -> None:
    """States that are visited for one more token stay within the depth that is counted, however long the text."""
    automaton = SuffixAutomaton(16)
    automaton.extend([7] * 2000)
    assert all(len(step.ends) <= 16 for step in automaton._steps)
    assert automaton.match.length == 16 and len(automaton._link) == 2001


# ---------------------------------------------------------------- guesses


def proposal(
    drafter: Drafter, tokens: Sequence[int], budget: int = 16, stop: frozenset[int] = frozenset()
) -> TokenTree:
    context = Context(tokens)
    drafter.begin(context)
    sampler = Sampler(SamplingParams(), 0)
    request = DraftRequest(
        context=context, max_nodes=budget, max_depth=budget, sampler=sampler, stop_tokens=stop, trees=True
    )
    return drafter.propose(request).tree()


def guessed(drafter: Drafter, tokens: Sequence[int], budget: int = 16) -> list[int]:
    return [int(token) for token in proposal(drafter, tokens, budget).token]


def test_the_longest_run_decides_and_among_equals_the_latest() -> None:
    drafter = Suffix(num=2)
    assert guessed(drafter, [1, 2, 3, 50, 9, 2, 3, 60, 8, 3, 70, 1, 2, 3]) == [50, 9]  # 1 2 3 beats 2 3
    assert guessed(drafter, [5, 6, 10, 5, 6, 11, 5, 6]) == [11, 5]


def test_a_chance_is_what_was_counted_blended_with_shorter_runs() -> None:
    """1 2 went on with 7 twice and with 5 once; 2 alone did so, and once with 4."""
    tokens = [1, 2, 7, 10, 1, 2, 7, 11, 1, 2, 5, 12, 2, 4, 13, 1, 2]
    tree = proposal(Suffix(num=3, shape="tree", depth=1, min_prob=0.0), tokens)
    assert tree.log_q is not None
    long, short = 2 / 2, 2 / 1  # doubt: 2 over the length
    left = long / (3 + long)
    want = {
        7: 2 / (3 + long) + left * 2 / (4 + short),
        5: 1 / (3 + long) + left * 1 / (4 + short),
        4: left * 1 / (4 + short),
    }
    assert dict(zip(tree.token.tolist(), np.exp(tree.log_q).tolist(), strict=True)) == pytest.approx(want)


def test_longer_runs_are_trusted_more() -> None:
    """The same next word, seen once, behind one, two, and ten words."""
    sure = []
    for size in (1, 2, 10):
        words = list(range(10, 10 + size))
        tree = proposal(Suffix(num=1, min_prob=0.0), [*words, 99, *range(40, 50), *words])
        assert tree.token.tolist() == [99] and tree.log_q is not None
        sure.append(float(np.exp(tree.log_q[0])))
    assert sure == sorted(sure) and sure[0] == pytest.approx(1 / 3) and sure[-1] > 0.8


def test_unlikely_guesses_and_runs_that_are_too_short_are_left_out() -> None:
    tokens = [1, 2, 7, 10, 1, 2, 7, 11, 1, 2, 5, 12, 2, 4, 13, 1, 2]
    assert guessed(Suffix(num=3, shape="tree", depth=1, min_prob=0.3), tokens) == [7]
    assert guessed(Suffix(min=2), [1, 2, 3, 4, 5, 3]) == []
    assert guessed(Suffix(min=1), [1, 2, 3, 4, 5, 3])[:1] == [4]
    assert guessed(Suffix(), [1]) == []


def test_nothing_is_guessed_behind_the_end_of_an_answer() -> None:
    tree = proposal(Suffix(num=8), [1, 2, 3, 4, 1, 2], stop=frozenset({3}))
    assert tree.token.tolist() == [3]


def test_proposals_equal_those_of_a_new_drafter_after_any_history() -> None:
    """Nothing of an earlier turn that the context no longer holds has any effect: what one request said is never
    guessed for another, though a server passes drafters on."""
    rng = np.random.default_rng(0)

    def make() -> Suffix:
        return Suffix(num=12, shape="tree", min_prob=0.0)

    drafter, tokens = make(), [0]
    for _ in range(150):
        if rng.random() < 0.3:
            tokens = tokens[: int(rng.integers(1, len(tokens) + 1))]
        tokens += rng.integers(0, 4, int(rng.integers(0, 6))).tolist()
        mine, fresh = proposal(drafter, tokens), proposal(make(), tokens)
        assert mine.token.tolist() == fresh.token.tolist() and mine.parent.tolist() == fresh.parent.tolist()
        assert mine.log_q is not None and fresh.log_q is not None and mine.log_q.tolist() == fresh.log_q.tolist()


def test_settings_out_of_range_are_explained() -> None:
    for text, words in (
        ("suffix:min=0", "min out of range"),
        ("suffix:min_prob=1", "below 1"),
        ("suffix:num=999", "256"),
    ):
        with pytest.raises(SettingError, match=words):
            make_drafter(text, None)
    drafter = make_drafter("suffix:num=5,shape=tree,min=3,min_prob=0.1", None)
    assert isinstance(drafter, Suffix) and (drafter.num, drafter.min, drafter.min_prob) == (5, 3, 0.1)
    assert drafter.needs_trees


# ---------------------------------------------------------------- earlier sessions


def test_what_was_said_in_an_earlier_session_is_guessed_in_a_later_one(tmp_path: Path) -> None:
    tokenizer = ReferenceModel(48).tokenizer
    first = Suffix(History(tokenizer, folder=tmp_path))
    assert guessed(first, [1, 2, 3, 4, 5, 6]) == []
    first.close()
    later = Suffix(History(tokenizer, folder=tmp_path))
    assert guessed(later, [9, 2, 3]) == [4, 5, 6]
    assert guessed(Suffix(), [9, 2, 3]) == [], "without a history nothing is remembered"


def test_a_conversation_is_one_session_however_many_turns_it_has(tmp_path: Path) -> None:
    history = History(ReferenceModel(48).tokenizer, folder=tmp_path)
    drafter = Suffix(history)
    for turn in ([1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7]):  # the last answer was asked for again
        proposal(drafter, turn)
    assert [text.tolist() for text in history._texts()] == [[1, 2, 3, 4, 5]], "the turn in progress comes later"
    proposal(drafter, [20, 21, 22])
    drafter.close()
    assert Counter(tuple(text.tolist()) for text in history._texts()) == Counter([(1, 2, 3, 4, 6, 7), (20, 21, 22)])


def test_this_conversation_outweighs_an_earlier_one_that_says_otherwise(tmp_path: Path) -> None:
    history = History(ReferenceModel(48).tokenizer, folder=tmp_path)
    history.entry().write(np.array([1, 2, 3], np.int32))
    drafter = Suffix(history, num=2, shape="tree", depth=1, min_prob=0.0)
    tree = proposal(drafter, [1, 2, 4, 9, 1, 2])
    assert tree.token.tolist() == [4, 3] and tree.log_q is not None and tree.log_q[0] > tree.log_q[1]
