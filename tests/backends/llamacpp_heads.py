"""Heads beside a target on llama.cpp: opening both, running text, hearing what a head hears, comparing rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localspec.protocols import HostTokens, LanguageModel, LoadSettings, SequenceState, Step, chain_parents
from localspec.testing.gguf_heads import write_block_head, write_eagle3_head
from localspec.types import Logits
from tests.backends.llamacpp_backend import BACKEND, module

SETTINGS = LoadSettings(context=256, num_sequences=3, threads=1, extra_buffers=False)
CLOSE = 2e-3  # rows of float32 files differ by float16 keys and values, in another order
LOOSE = 5e-3  # where a step's own state goes into the next one
Features = NDArray[np.float32]


@contextmanager
def loaded(target: Path, head: Path, settings: LoadSettings = SETTINGS) -> Iterator[tuple[LanguageModel, Any]]:
    model = BACKEND.load(target, settings)
    try:
        opened = BACKEND.load_head(head, model)
        try:
            yield model, opened
        finally:
            opened.close()
    finally:
        model.close()


def write_head(path: Path, target: Path, kind: str) -> Path:
    if kind == "eagle3":
        return write_eagle3_head(path, target)
    return write_block_head(path, target, kind=kind)


def ids(count: int, start: int = 0) -> list[int]:
    return [(index * 37 + 11) % 250 + 3 for index in range(start, start + count)]


def forward(
    model: LanguageModel, state: SequenceState, tokens: Sequence[int], parents: Sequence[int] | None = None
) -> Logits:
    above = chain_parents(state, len(tokens)) if parents is None else np.array(parents, np.int32)
    [scores] = model.forward([Step(state, (HostTokens(np.array(tokens, np.int32)),), above)])
    return scores.rows(range(scores.num_rows)).copy()


def commit(model: LanguageModel, state: SequenceState, tokens: Sequence[int]) -> None:
    forward(model, state, tokens)
    state.keep(range(len(tokens)))


def listen(model: Any, state: Any, head: Any) -> list[tuple[int, Features]]:
    """What a companion of this state is handed: (token, features) of each committed one."""
    heard: list[tuple[int, Features]] = []

    class Listener(module("companion").Companion):  # type: ignore[misc]
        num_missing = 0
        is_closed = False

        @property
        def end(self) -> int:
            return len(heard)

        def feed(self, tokens: NDArray[np.int32], features: Features) -> None:
            heard.extend(zip(tokens.tolist(), features.copy(), strict=True))

        def truncate(self, length: int) -> None:
            del heard[length:]

        def save(self) -> object:
            raise NotImplementedError

        def close(self) -> None:
            pass

    listener = Listener()
    listener.head = head
    state.recording = module("companion").Recording(model.memory.taps, [listener])
    return heard


def features_of(model: LanguageModel, head: Any, tokens: Sequence[int]) -> Features:
    """[T, W] hidden states of a text, read in one pass."""
    state = model.open()
    try:
        heard = listen(model, state, head)
        commit(model, state, tokens)
        return np.array([row for _, row in heard])
    finally:
        state.close()


def assert_close(got: Logits, want: Logits, tolerance: float = CLOSE) -> None:
    assert np.array_equal(np.isfinite(got), np.isfinite(want))
    some = np.isfinite(want)
    assert np.abs(got[some] - want[some]).max() <= tolerance * want[some].std()


def chain_behind(guesses: Any, anchor: int, tokens: Sequence[int]) -> Logits:
    """[T + 1, V] rows of a chain of guesses."""
    rows = [guesses.start(anchor).rows([0])[0].copy()]
    for number, token in enumerate(tokens):
        rows.append(guesses.extend(HostTokens(np.array([token], np.int32)), [number - 1]).rows([0])[0].copy())
    return np.array(rows)
