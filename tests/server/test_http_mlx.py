"""The server with the other backend: of what is tried over HTTP with llama.cpp, what reaches down to the model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from localspec.loading import get_backend, open_pair
from localspec.pair import Pair
from localspec.protocols import LoadSettings
from localspec.server.batch import BatchSettings
from localspec.server.settings import ServerSettings
from tests.server import test_http_chat as chat
from tests.server import test_http_messages as messages
from tests.server import test_http_responses as responses
from tests.server.running import Served, serving, wait_until
from tests.server.test_http_many import all_written

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not get_backend("mlx").is_installed(), reason="needs MLX: pip install 'localspec[mlx-cpu]'"),
]


@pytest.fixture(scope="module")
def served_pair() -> Iterator[Pair]:
    """The bundled pair, with a sequence for those who compare."""
    settings = LoadSettings(num_sequences=BatchSettings().num_sequences + 1, batch=True)
    with open_pair(backend="mlx", settings=settings) as pair:
        yield pair


@pytest.fixture(scope="module")
def served(served_pair: Pair) -> Iterator[Served]:
    """A server with default settings."""
    with serving(served_pair, BatchSettings(), ServerSettings(names=("tiny",))) as server:
        yield server


test_a_text_is_that_of_a_session = chat.test_the_text_is_that_of_a_session_with_the_same_seed
test_a_stream_says_the_same = chat.test_a_stream_says_what_the_whole_answer_says
test_logprobs_name_every_token = chat.test_logprobs_name_every_token_of_the_text
test_a_schema_is_obeyed = chat.test_a_schema_is_obeyed
test_a_call_is_streamed = chat.test_a_streamed_call_is_put_together_by_the_client
test_a_second_turn_is_read_from_the_cache = chat.test_a_second_turn_is_read_from_the_cache
test_completions_continue_texts_and_tokens = chat.test_completions_continue_texts_and_tokens_alike
test_responses_are_streamed = responses.test_a_stream_ends_with_the_whole_response
test_messages_are_streamed = messages.test_a_stream_says_the_same


def test_neighbours_change_nothing_and_some_go_away(served: Served) -> None:
    alone = asyncio.run(all_written(served.address, 1, 8))
    together = asyncio.run(all_written(served.address, 4, 8))
    wait_until(lambda: served.num_busy == 0)
    assert together == alone
    assert None in alone and len(set(alone)) > 4


def test_a_client_that_goes_away_frees_its_place(oai: openai.OpenAI, served: Served) -> None:
    with oai.completions.create(model="tiny", prompt="Once", max_tokens=1500, stream=True) as chunks:
        next(iter(chunks))
        assert served.num_busy == 1
    wait_until(lambda: served.num_busy == 0)
