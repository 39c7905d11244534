"""Trained heads in a batch: exact in company, fed along shared beginnings, and seen to read what they missed."""

from __future__ import annotations

import pytest

from localspec.pair import Pair
from localspec.sampling import SamplingParams
from localspec.server.batch import Batch, BatchSettings, Request
from localspec.server.speculation import Speculation
from localspec.testing.reference import ReferenceModel
from localspec.testing.reference_head import ReferenceBlockHead, ReferenceHead

SHARED = [3 + i % 40 for i in range(48)]


@pytest.fixture(scope="module")
def pair() -> Pair:
    target = ReferenceModel(64, seed=5, context_length=300)
    return Pair(target, target.perturbed(0.4), heads=[ReferenceHead(target), ReferenceBlockHead(target)])


def request(tokens: list[int], how: str, temperature: float = 0.0) -> Request:
    params = SamplingParams(max_tokens=14, seed=1, temperature=temperature, ignore_eos=True)
    return Request(tokens=tokens, params=params, speculation=Speculation.parse(how))


def test_requests_with_heads_are_answered_as_plain_decoding_would(pair: Pair) -> None:
    """Together and in turns, with beginnings that other slots read, with and without a head beside them."""
    hows = ["dspark", "eagle3:num=4", "auto", "off", "dspark:shape=tree,num=8", "draft_model", "eagle3:num=4+ngram"]
    requests = [request([*SHARED, 5 + i], how, 0.8 * (i % 2)) for i, how in enumerate(hows * 2)]
    with Batch(pair, BatchSettings(parallel=3)) as batch:
        tickets = [batch.submit(one) for one in requests]
        answers = [ticket.result() for ticket in tickets]
        status = batch.status()
    for one, answer in zip(requests, answers, strict=True):
        with pair.session("nothing") as session:
            assert answer.tokens == session.generate(list(one.tokens), one.params).tokens, one.speculation
    assert status.num_cached_tokens > 0
    assert sum(answer.stats.num_accepted for answer in answers) > 0


def test_what_was_read_without_a_head_is_read_again_for_it_and_counted(pair: Pair) -> None:
    with Batch(pair, BatchSettings(parallel=1, cache_bytes=0)) as batch:
        for how, reused in (("off", 0), ("off", len(SHARED)), ("dspark", 0), ("dspark", len(SHARED))):
            answer = batch.submit(request([*SHARED, 7], how)).result()
            assert answer.stats.num_reused == reused
            assert answer.stats.num_prefilled == len(SHARED) - reused
