"""A server with the bundled pair, and the clients that people use."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import httpx2
import openai
import pytest
from hypothesis import settings

from localspec.loading import open_pair
from localspec.pair import Pair
from localspec.protocols import LoadSettings
from localspec.server.batch import BatchSettings
from localspec.server.settings import ServerSettings
from tests.server.running import LONG_S, Served, serving

settings.register_profile("many", max_examples=5000)


@pytest.fixture(scope="session")
def served_pair() -> Iterator[Pair]:
    """The bundled pair with sequences for two servers at a time."""
    sequences = 2 * BatchSettings().num_sequences
    with open_pair(backend="llamacpp", settings=LoadSettings(num_sequences=sequences, batch=True)) as pair:
        yield pair


@pytest.fixture(scope="session")
def served(served_pair: Pair) -> Iterator[Served]:
    """A server with default settings."""
    with serving(served_pair, BatchSettings(), ServerSettings(names=("tiny", "another-name"))) as server:
        yield server


@pytest.fixture
def http(served: Served) -> Iterator[httpx2.Client]:
    """Plain HTTP."""
    with httpx2.Client(base_url=served.address, timeout=LONG_S) as client:
        yield client


@pytest.fixture
def oai(served: Served) -> Iterator[openai.OpenAI]:
    """OpenAI's own client."""
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0, timeout=LONG_S) as client:
        yield client


@pytest.fixture
def ant(served: Served) -> Iterator[anthropic.Anthropic]:
    """Anthropic's own client."""
    with anthropic.Anthropic(base_url=served.address, api_key="none", max_retries=0, timeout=LONG_S) as client:
        yield client
