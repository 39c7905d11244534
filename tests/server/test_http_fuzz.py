"""Thousands of broken bodies: each is answered or refused, and leaves nothing behind.

`pytest -n 0 tests/server/test_http_fuzz.py --hypothesis-profile=many --hypothesis-show-statistics` sends 5,000 and
tells what came back; the suite sends a sample.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, event, given, settings

from localspec.pair import Pair
from localspec.sampling import SamplingParams
from localspec.server.batch import BatchSettings
from localspec.server.settings import ServerSettings
from tests.server.bodies import GOOD, requests
from tests.server.running import Served, serving, wait_until

pytestmark = pytest.mark.real

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "seed": 1}

seen: Counter[int] = Counter()


@pytest.fixture(scope="module")
def brief(served_pair: Pair) -> Iterator[Served]:
    """A server whose answers are short unless a request says otherwise."""
    defaults = SamplingParams(temperature=0.7, max_tokens=2)
    with serving(served_pair, BatchSettings(), ServerSettings(names=("tiny",), defaults=defaults)) as server:
        yield server


@pytest.fixture(scope="module")
def client(brief: Served) -> Iterator[httpx2.Client]:
    """One connection for all."""
    with httpx2.Client(base_url=brief.address, timeout=60.0) as client:
        yield client
    report = ", ".join(f"{count} times {status}" for status, count in sorted(seen.items()))
    assert seen or "PYTEST_XDIST_WORKER" in os.environ, "nothing was sent"  # else another process may have sent them
    assert not seen or 400 in seen, f"nothing was refused: {report}"


@pytest.mark.parametrize("path", sorted(GOOD))
def test_what_is_broken_was_good_before(client: httpx2.Client, path: str) -> None:
    response = client.post(path, json=GOOD[path])
    assert response.is_success, response.text


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(request=requests)
def test_no_body_breaks_the_server(brief: Served, client: httpx2.Client, request: tuple[str, bytes]) -> None:
    path, body = request
    response = client.post(path, content=body, headers={"Content-Type": "application/json"})
    seen[response.status_code] += 1
    event(f"{path} {response.status_code}")
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]
    wait_until(lambda: brief.num_busy == 0)


def test_afterwards_the_answer_is_the_same_as_ever(client: httpx2.Client, http: httpx2.Client) -> None:
    after, other = (one.post("/v1/chat/completions", json=HELLO) for one in (client, http))
    assert after.json()["choices"][0]["message"] == other.json()["choices"][0]["message"]
