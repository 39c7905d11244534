"""Passes of a draft model for many sequences at once, though each drafter works for one and knows of no other.

Each drafter's work has a thread of its own, but only one of them runs at any time: it runs until it asks for a pass,
then the next one does, and when all have asked (or are done) the passes run as one. So nothing is ever done by two at
once, the order is always the same, and drafters need not be written for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from localspec.protocols import Capabilities, LanguageModel, ModelInfo, Scores, SequenceState, Step, Tokenizer

T = TypeVar("T")
_ALIKE = 8  # tokens; wider steps (prompts) go alone, or all others would be padded to them


class Gathered:
    """A `LanguageModel` that gathers what the works of `run`, at most `most`, ask of it; to all others it is the model
    itself."""

    def __init__(self, model: LanguageModel, most: int) -> None:
        self._model = model
        self._workers = [_Worker(f"localspec-draft-{number}") for number in range(most)]
        self._here = {worker.ident: worker for worker in self._workers}

    @property
    def info(self) -> ModelInfo:
        """The model's."""
        return self._model.info

    @property
    def capabilities(self) -> Capabilities:
        """The model's."""
        return self._model.capabilities

    @capabilities.setter
    def capabilities(self, value: Capabilities) -> None:
        self._model.capabilities = value

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self._model.tokenizer

    @property
    def vocab_size(self) -> int:
        """The model's."""
        return self._model.vocab_size

    def open(self) -> SequenceState:
        """The model's."""
        return self._model.open()

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        """The model's, perhaps together with what others ask for."""
        worker = self._here.get(threading.get_ident())
        return self._model.forward(steps) if worker is None else worker.ask(steps)

    def close(self) -> None:
        """End the threads. The model is closed by whoever opened it."""
        for worker in self._workers:
            worker.end()

    def run(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """What each of them returns, one after another or, where they ask for passes, side by side. Raises what the
        first of them raised, after all have ended."""
        if len(works) == 1:
            return [works[0]()]
        workers = self._workers[: len(works)]
        kept = [_Kept(work) for work in works]
        for worker, one in zip(workers, kept, strict=True):
            worker.start_with(one.run)
        while asking := [worker for worker in workers if worker.steps]:
            wide = [worker for worker in asking if max(step.num_tokens for step in worker.steps) > _ALIKE]
            group = wide[:1] or asking
            self._serve(group)
            for worker in group:  # reads its scores before any pass can overwrite them
                worker.go_on()
        return [one.outcome() for one in kept]

    def _serve(self, workers: Sequence[_Worker]) -> None:
        try:
            scores = self._model.forward([step for worker in workers for step in worker.steps])
        except Exception as error:
            for worker in workers:
                worker.answer = error
            return
        start = 0
        for worker in workers:
            worker.answer = scores[start : start + len(worker.steps)]
            start += len(worker.steps)


class _Worker:
    """A thread that waits for work, and the baton that it and `run` hand to each other: two locks, since a semaphore of
    Python's costs several times as much."""

    def __init__(self, name: str) -> None:
        self._mine, self._theirs = threading.Lock(), threading.Lock()
        self._mine.acquire()
        self._theirs.acquire()
        self._work: Callable[[], None] | None = None
        self.steps: Sequence[Step] = ()
        self.answer: list[Scores] | Exception = []
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._thread.start()
        assert self._thread.ident is not None
        self.ident = self._thread.ident

    def start_with(self, work: Callable[[], None]) -> None:
        """Let it work until it asks or is done."""
        self._work = work
        self.go_on()

    def go_on(self) -> None:
        """It has its answer: let it work until it asks again or is done."""
        self.steps = ()
        self._mine.release()
        self._theirs.acquire()

    def ask(self, steps: Sequence[Step]) -> list[Scores]:
        """Called by the work: wait for a pass. Raises what the pass raised."""
        self.steps = steps
        self._theirs.release()
        self._mine.acquire()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def end(self) -> None:
        """No more work."""
        self._work = None
        self._mine.release()
        self._thread.join()

    def _live(self) -> None:
        while True:
            self._mine.acquire()
            if self._work is None:
                return
            self._work()
            self._theirs.release()


class _Kept(Generic[T]):
    """A work whose outcome is kept."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._outcome: list[T] = []
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Do it; nothing is raised here."""
        try:
            self._outcome.append(self._work())
        except BaseException as error:
            self._failure = error

    def outcome(self) -> T:
        """What it returned. Raises what it raised."""
        if self._failure is not None:
            raise self._failure
        return self._outcome[0]
