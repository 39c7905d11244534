"""Many clients at once, some of whom go away: every text is the one that its request gets alone, and nothing stays."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from localspec.pair import Pair
from localspec.server.batch import BatchSettings
from localspec.server.settings import ServerSettings
from tests.server.running import Served, serving, wait_until

pytestmark = [pytest.mark.real, pytest.mark.slow]

NUM_REQUESTS, AT_ONCE = 64, 8
PROMPTS = ("Hello!", "How do I reverse a list in Python?", "Tell me a story about a king. " * 12, "What is 3 + 4?")


@pytest.fixture(scope="module")
def wide(served_pair: Pair) -> Iterator[Served]:
    """A server that answers four at once and lets the rest wait."""
    with serving(served_pair, BatchSettings(), ServerSettings(names=("tiny",))) as server:
        yield server


def asked(number: int) -> dict[str, Any]:
    """A request; the same for the same number."""
    draw = random.Random(number)
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": draw.choice(PROMPTS)}],
        "max_tokens": draw.randint(1, 48),
        "temperature": draw.choice([0.0, 0.8]),
        "seed": number,
        "extra_body": {"speculation": draw.choice(["auto", "off", "draft_model:num=4", "ngram"])},
    }


async def written(client: openai.AsyncOpenAI, number: int, gate: asyncio.Semaphore) -> str | None:
    """The text of a request, streamed or not; None from a client that went away."""
    async with gate:
        if number % 3 == 0:
            answer = await client.chat.completions.create(**asked(number))
            return str(answer.choices[0].message.content)
        text = ""
        async with await client.chat.completions.create(stream=True, **asked(number)) as chunks:
            async for chunk in chunks:
                text += chunk.choices[0].delta.content or ""
                if number % 10 == 1 and text:
                    return None
        return text


async def all_written(address: str, at_once: int, count: int = NUM_REQUESTS) -> list[str | None]:
    gate = asyncio.Semaphore(at_once)
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120) as client:
        return await asyncio.gather(*(written(client, number, gate) for number in range(count)))


def test_neighbours_change_nothing_and_nothing_stays(wide: Served) -> None:
    alone = asyncio.run(all_written(wide.address, 1))
    wait_until(lambda: wide.num_busy == 0)
    before = _num_files()
    together = asyncio.run(all_written(wide.address, AT_ONCE))
    wait_until(lambda: wide.num_busy == 0)
    assert together == alone
    assert sum(text is None for text in alone) >= 4
    assert len({text for text in alone if text is not None}) > NUM_REQUESTS / 2
    if before is not None:
        wait_until(lambda: (_num_files() or 0) <= before)


def _num_files() -> int | None:
    """Open files of this process, sockets included; None where that cannot be seen."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else None
