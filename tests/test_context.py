"""The context's counts always equal a recount, whatever was appended and truncated."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from localspec.context import Context, common_prefix


@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.integers(-40, 5), max_size=60))
def test_counts_follow_appends_and_truncations(prompt: list[int], actions: list[int]) -> None:
    """Non-negative actions append that token, negative ones truncate to that length."""
    context, tokens = Context(prompt), list(prompt)
    context.start_output()
    start = len(prompt)
    _ = context.counts, context.output_counts
    for action in actions:
        if action >= 0:
            context.append(action)
            tokens.append(action)
        else:
            tokens = tokens[: min(len(tokens), -action)]
            context.truncate(len(tokens))
            start = min(start, len(tokens))
        for counts, want in ((context.counts, tokens), (context.output_counts, tokens[start:])):
            ids, amounts = counts.seen()
            assert dict(zip(ids.tolist(), amounts.tolist(), strict=True)) == Counter(want)
    assert context.tokens.tolist() == tokens


def test_the_view_of_the_tokens_is_read_only_and_grows() -> None:
    context = Context(range(300))
    context.extend(range(1000))
    assert len(context) == 1300 and context.anchor == 999 and not context.tokens.flags.writeable


def test_common_prefix() -> None:
    a = np.array([1, 2, 3], np.int32)
    assert common_prefix(a, a) == 3
    assert common_prefix(a, np.array([1, 2, 4, 5], np.int32)) == 2
    assert common_prefix(a, np.zeros(0, np.int32)) == 0
