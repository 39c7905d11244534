"""A toy state that cannot forget, rewound by snapshots: it must always equal a fresh one."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localspec.replay import History

moves = st.lists(
    st.one_of(
        st.tuples(st.just("commit"), st.lists(st.integers(0, 9), min_size=1, max_size=5)),
        st.tuples(st.just("rewind"), st.floats(0, 1)),
        st.tuples(st.just("copy"), st.none()),
    ),
    max_size=40,
)


def digest(start: int, tokens: Iterable[int]) -> int:
    for token in tokens:
        start = (start * 31 + int(token) + 1) % 1_000_003
    return start


@given(moves=moves)
def test_rewound_state_equals_a_fresh_one(moves: list[tuple[str, object]]) -> None:
    history: History[int] = History(most=3)
    state, tokens = 0, list[int]()
    for action, argument in moves:
        if action == "commit":
            assert isinstance(argument, list)
            state, tokens = digest(state, argument), tokens + argument
            history.extend(argument)
            history.mark(state)
        elif action == "rewind":
            assert isinstance(argument, float)
            tokens = tokens[: int(argument * len(tokens))]
            mark = history.rewind(len(tokens))
            state = digest(mark.snapshot if mark else 0, history.since(mark))
            history.mark(state)
        else:
            history = history.copy()
        assert state == digest(0, tokens) and len(history) == len(tokens)
        assert len(history.marked_lengths) <= 4


def test_snapshots_spread_so_that_short_rewinds_replay_little() -> None:
    history: History[None] = History(most=6)
    for _ in range(1000):
        history.extend([1])
        history.mark(None)
    lengths = history.marked_lengths
    assert lengths[-1] == 1000 and len(lengths) == 7
    for back in (1, 10, 100, 500):
        nearest = max([0, *(length for length in lengths if length <= 1000 - back)])
        assert 1000 - back - nearest <= 4 * back


def test_rewinding_beyond_the_tokens_is_refused() -> None:
    history: History[int] = History()
    history.extend([1, 2])
    with pytest.raises(ValueError, match="cannot rewind 2 tokens to 3"):
        history.rewind(3)
