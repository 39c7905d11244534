"""Chances where several drafters speak of the same place."""

from __future__ import annotations

import numpy as np
import pytest

from localspec.schedule.opinions import Dissent, Hindsight, Opinion, Opinions
from localspec.tree.grow import merge
from localspec.tree.token_tree import TokenTree


def tree(tokens: list[int], parents: list[int]) -> TokenTree:
    return TokenTree.from_parents(np.array(tokens, np.int32), np.array(parents, np.int32), [0.0] * len(tokens))


def said(
    first: tuple[list[int], list[int], list[float]], second: tuple[list[int], list[int], list[float]], dissent: Dissent
) -> tuple[TokenTree, Opinions]:
    merged = merge([tree(*first[:2]), tree(*second[:2])])
    places = merged.places
    opinions = [Opinion(places[0], first[2], Dissent()), Opinion(places[1], second[2], dissent)]
    return merged.tree, Opinions(merged.tree, opinions)


def chance_of(merged: TokenTree, opinions: Opinions, token: int) -> float:
    place: int = merged.token.tolist().index(token)
    return opinions.chances[place]


def test_who_is_trusted_more_keeps_its_chances_and_others_share_what_it_leaves() -> None:
    merged, opinions = said(([1, 2], [-1, 0], [0.7, 0.9]), ([1, 5, 6], [-1, -1, 1], [0.6, 0.3, 0.8]), Dissent())
    assert chance_of(merged, opinions, 1) == 0.7 and chance_of(merged, opinions, 2) == 0.9
    # three quarters of what it did not give to the token that both named, of the 0.3 that are left
    assert chance_of(merged, opinions, 5) == pytest.approx(0.3 * 0.3 / 0.4)
    assert chance_of(merged, opinions, 6) == 0.8  # behind a token that nobody else named: its own word


def test_siblings_never_count_as_more_than_one_token() -> None:
    merged, opinions = said(([1, 2], [-1, -1], [0.8, 0.19]), ([3, 4], [-1, -1], [0.6, 0.4]), Dissent())
    assert sum(opinions.chances) <= 1.0 + 1e-9 and len(merged) == 4


def test_how_much_dissent_deserves_is_learned() -> None:
    right, wrong = Dissent(), Dissent()
    for _ in range(60):
        said(([1], [-1], [0.7]), ([5], [-1], [0.6]), right)[1].observe([5])
        said(([1], [-1], [0.7]), ([5], [-1], [0.6]), wrong)[1].observe([1])
    assert wrong.factor < 0.3 < 1.0 < right.factor
    merged, opinions = said(([1], [-1], [0.7]), ([5], [-1], [0.6]), right)
    assert chance_of(merged, opinions, 5) == 0.6  # at most its own word
    merged, opinions = said(([1], [-1], [0.7]), ([5], [-1], [0.6]), wrong)
    assert chance_of(merged, opinions, 5) < 0.06


def test_only_places_on_the_path_teach() -> None:
    dissent = Dissent()
    _, opinions = said(([1, 2], [-1, 0], [0.7, 0.9]), ([1, 5], [-1, 0], [0.6, 0.3]), dissent)
    opinions.observe([9, 5])
    assert dissent.expected == 0.0  # of the first place all named the same, and nothing was seen of the second
    opinions.observe([1, 5])
    assert dissent.came == 1 and dissent.expected == pytest.approx(0.1 * 0.3)


def test_what_lookup_promised_too_much_is_taken_back_while_that_lasts() -> None:
    hindsight = Hindsight()
    assert hindsight.factor == 1.0
    for _ in range(20):  # it promised twice what came
        hindsight.observe(1.0, 1)
        hindsight.observe(1.0, 0)
    assert hindsight.factor == pytest.approx(0.55, abs=0.12)
    for _ in range(200):
        hindsight.fade()
    assert hindsight.factor > 0.95, "what is not chosen any more gets another chance"
    for _ in range(20):
        hindsight.observe(0.5, 3)
    assert hindsight.factor == 1.0
