"""Passes of a draft model for many sequences at once, though each drafter works for one and knows of no other.

Each drafter's work is a task with a thread of its own, but only one of them runs at any time: a task runs until it
asks for a pass, then the next one does, and when all have asked (or are done) the passes run as one. So nothing is ever
done by two at once, the order is always the same, and drafters need not be written for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from localspec.protocols import Capabilities, LanguageModel, ModelInfo, Scores, SequenceState, Step, Tokenizer

T = TypeVar("T")
_ALIKE = 8  # tokens; wider steps (prompts) go alone, or all others would be padded to them


class Gathered:
    """A `LanguageModel` that gathers what the tasks of `run` ask of it; to all others it is the model itself."""

    def __init__(self, model: LanguageModel, most: int) -> None:
        self._model = model
        self._here: dict[int, _Task[object]] = {}  # thread -> its task
        self._pool = ThreadPoolExecutor(most, "localspec-draft")

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
        task = self._here.get(threading.get_ident())
        return self._model.forward(steps) if task is None else task.ask(steps)

    def close(self) -> None:
        """End the threads. The model is closed by whoever opened it."""
        self._pool.shutdown()

    def run(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """What each of them returns, one after another or, where they ask for passes, side by side. Raises what the
        first of them raised, after all have ended."""
        if len(works) == 1:
            return [works[0]()]
        tasks = [_Task(work) for work in works]
        for task in tasks:
            self._pool.submit(self._live, task)
            task.wait()
        while asking := [task for task in tasks if task.steps]:
            wide = [task for task in asking if max(step.num_tokens for step in task.steps) > _ALIKE]
            group = wide[:1] or asking
            self._serve(group)
            for task in group:  # reads its scores before any pass can overwrite them
                task.go_on()
        return [task.result() for task in tasks]

    def _live(self, task: _Task[T]) -> None:
        self._here[threading.get_ident()] = task  # type: ignore[assignment]
        try:
            task.work()
        finally:
            del self._here[threading.get_ident()]
            task.end()

    def _serve(self, tasks: Sequence[_Task[T]]) -> None:
        try:
            scores = self._model.forward([step for task in tasks for step in task.steps])
        except Exception as error:
            for task in tasks:
                task.answer = error
            return
        start = 0
        for task in tasks:
            task.answer = scores[start : start + len(task.steps)]
            start += len(task.steps)


class _Task(Generic[T]):
    """One drafter's work, and the baton that it and `run` hand to each other."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self.steps: Sequence[Step] = ()
        self.answer: list[Scores] | Exception = []
        self._outcome: list[T] = []
        self._failure: BaseException | None = None

    def work(self) -> None:
        """Do it, on its own thread."""
        try:
            self._outcome.append(self._work())
        except BaseException as error:
            self._failure = error

    def ask(self, steps: Sequence[Step]) -> list[Scores]:
        """Called by the work: wait for a pass."""
        self.steps = steps
        self._theirs.release()
        self._mine.acquire()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def end(self) -> None:
        """Nothing more to come."""
        self.steps = ()
        self._theirs.release()

    def wait(self) -> None:
        """Until it asks or ends."""
        self._theirs.acquire()

    def go_on(self) -> None:
        """It has its answer: let it run until it asks again or ends."""
        self.steps = ()
        self._mine.release()
        self.wait()

    def result(self) -> T:
        """What came out. Raises what it raised."""
        if self._failure is not None:
            raise self._failure
        return self._outcome[0]
