"""One conversation's state with a target and a drafter: prompts in, a stream of text out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from localspec.constraint import Constraint, constrain
from localspec.context import Context
from localspec.drafters.nothing import Nothing
from localspec.engine.answer import Answer, Generation, Piece, check_prompt
from localspec.engine.prefill import read_chunk, reuse
from localspec.engine.prefix import encode_prompt
from localspec.engine.round import RoundResult, run_round
from localspec.errors import SettingError, UnsupportedModelError
from localspec.exactness import Exactness
from localspec.protocols import Drafter, LanguageModel, require_rewind
from localspec.sampling import SamplingParams
from localspec.types import TokenIds
from localspec.verify import Acceptance, make_acceptance

Progress = Callable[[int, int], None]
"""Called with (prefilled tokens, tokens to prefill)."""


class Stream:
    """An answer as it is written. Iterate for its pieces; `result` is there once they are exhausted.

    `cancel()` may be called from a signal handler or another thread: the answer ends after the round
    in progress and the session stays usable.
    """

    def __init__(self, pieces: Callable[[Stream], Generator[Piece, None, None]]) -> None:
        self.cancelled = False
        self._result: Generation | None = None
        self._failure: BaseException | None = None
        self._pieces = pieces(self)

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def cancel(self) -> None:
        """End the answer after the round in progress."""
        self.cancelled = True

    def close(self) -> None:
        """Stop reading: the answer ends where it is. Also what happens to a stream that is dropped."""
        self._pieces.close()

    def finish(self, result: Generation, failure: BaseException | None = None) -> None:
        """Set the result, and what ended the answer if it failed (the session does)."""
        self._result, self._failure = result, failure

    @property
    def result(self) -> Generation:
        """The finished answer; reads the rest of the stream if need be. Raises what made the answer fail,
        and ValueError if the stream was closed before it began."""
        for _ in self._pieces:
            pass
        if self._failure is not None:
            raise self._failure
        if self._result is None:
            raise ValueError("the stream was closed before its first piece was read")
        return self._result


class Session:
    """A target's state, a drafter, and the tokens that both have seen.

    acceptance: "walk" (text equals plain decoding) or "rejection" (equal in distribution).
    exactness: what keeps the walk's text equal [default: the model's width class].
    """

    def __init__(
        self,
        model: LanguageModel,
        drafter: Drafter,
        *,
        acceptance: str | Acceptance = "walk",
        exactness: Exactness | None = None,
    ) -> None:
        self.model = model
        self.exactness = exactness or Exactness.of_class(model)
        self.acceptance = make_acceptance(acceptance) if isinstance(acceptance, str) else acceptance
        self._context = Context()
        self._live: Stream | None = None
        self._num_written = 0  # tokens in the state as the prefill wrote them
        self._state = model.open()
        try:
            self.use(drafter)
        except BaseException:
            self._state.close()
            raise

    def use(self, drafter: Drafter, acceptance: Acceptance | None = None) -> None:
        """Draft with another drafter, and accept by another rule, from the next answer on; the former drafter
        is not closed. One that reads the model's hidden states and was not there from the start has the next prompt
        read again from its beginning. Raises UnsupportedModelError if the model cannot serve it, SettingError for a
        rule that cannot be guarded."""
        if not isinstance(drafter, Nothing) or self.exactness.bound is not None:
            require_rewind(self.model)
        if drafter.needs_trees:
            require_trees(self.model, drafter.name)
        if self.exactness.bound is not None:
            require_guardable(acceptance or self.acceptance)
        self.drafter = drafter
        if acceptance is not None:
            self.acceptance = acceptance

    @property
    def tokens(self) -> TokenIds:
        """[T] prompt and answers so far."""
        return self._context.tokens

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        on_prefill: Progress | None = None,
        on_round: Callable[[RoundResult], None] | None = None,
        on_result: Callable[[Generation], None] | None = None,
    ) -> Stream:
        """Answer a prompt (text, in which special tokens are recognised, or token ids).

        The whole prompt is given each time; what the cache shares with it is not computed again. A
        session writes one answer at a time: an earlier stream that was not read to its end is closed.
        on_round: called with each round as it is done, before its text is given out.
        on_result: called with the answer when it ends or is cancelled, not when it fails.
        Raises PromptError for an empty prompt or one longer than the context, SettingError for a grammar that
        cannot be followed.
        """
        params = params or SamplingParams()
        constraint = constrain(self.model, params.grammar)
        ids = encode_prompt(self.model.tokenizer, prompt, self.tokens) if isinstance(prompt, str) else prompt
        tokens = np.array(ids, np.int32)
        check_prompt(self.model, tokens, self.exactness)
        self.stop()
        hooks = _Hooks(on_prefill, on_round or _ignore, on_result or _ignore)
        self._live = Stream(lambda stream: self._answer(tokens, params, constraint, stream, hooks))
        return self._live

    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Generation:
        """The whole answer at once."""
        return self.stream(prompt, params).result

    def stop(self) -> None:
        """End the answer that is being written, if there is one: a session writes one at a time."""
        if self._live is not None:
            self._live.close()
            self._live = None

    def reset(self) -> None:
        """Forget the conversation."""
        self.stop()
        self._state.truncate(0)
        self._context = Context()

    def close(self) -> None:
        """Give the caches back."""
        self.stop()
        self._state.close()
        self.drafter.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------ inside

    def _answer(
        self,
        tokens: TokenIds,
        params: SamplingParams,
        constraint: Constraint | None,
        stream: Stream,
        hooks: _Hooks,
    ) -> Generator[Piece, None, None]:
        answer = Answer.begin(self.model, tokens, params, constraint, self.exactness)
        failure: BaseException | None = None
        try:
            self._prefill(tokens, answer, stream, hooks.on_prefill)
            lane = answer.lane(self._state, self.drafter, self.acceptance)
            while answer.finish_reason is None:
                answer.cancelled = stream.cancelled
                room = answer.room()
                if room is not None:
                    [result] = run_round(self.model, [lane], [room])
                    if result.failure is not None:
                        raise result.failure
                    hooks.on_round(result)
                    yield from answer.take(result, self._state)
            yield from answer.finish()
        except GeneratorExit:  # the reader stopped reading: the answer ends here
            raise
        except BaseException as error:
            failure = error
            raise
        finally:
            answer.early.drop(self._state)
            generation = answer.generation(self.drafter.name, self.acceptance.name)
            stream.finish(generation, failure)
            if failure is None:
                hooks.on_result(generation)

    def _prefill(self, tokens: TokenIds, answer: Answer, stream: Stream, on_prefill: Progress | None) -> None:
        """Bring the state to all of the prompt but its last token, the anchor."""
        started = perf_counter()
        last = len(tokens) - 1
        self.drafter.attach(self._state)
        # guarded: what an answer left in the state depends on how it was guessed
        most = len(tokens) if self.exactness.bound is None else self._num_written
        same = self._num_written = reuse(self.model, self._state, self.tokens, tokens[: most + 1])
        self._context = answer.context
        while not stream.cancelled and read_chunk(self.model, self._state, tokens, widths=self.exactness.widths):
            self._num_written = self._state.length
            if on_prefill is not None:
                on_prefill(self._state.length - same, last - same)
        self.drafter.begin(self._context)
        answer.stats.prefill_ms = (perf_counter() - started) * 1e3
        answer.stats.num_reused, answer.stats.num_prefilled = same, self._state.length - same


@dataclass(frozen=True, slots=True)
class _Hooks:
    """Who wants to be told what."""

    on_prefill: Progress | None
    on_round: Callable[[RoundResult], None]
    on_result: Callable[[Generation], None]


def require_trees(model: LanguageModel, drafter: str) -> None:
    """Raise UnsupportedModelError, for a drafter that branches, where only chains are verified exactly."""
    capabilities = model.capabilities
    if not (capabilities.trees and capabilities.exact_trees):
        raise UnsupportedModelError(
            f"the drafter {drafter!r} guesses trees, and {model.info.name} verifies chains only as it was loaded",
            got="; ".join(capabilities.limits) or None,
            fix="Guess chains (draft_model:shape=chain), or load the model with trees (LoadSettings.trees).",
        )


def require_guardable(rule: Acceptance) -> None:
    """Raise SettingError for a rule that draws: there is no one token that another row could decide."""
    if rule.needs_law:
        raise SettingError(
            f"acceptance {rule.name!r} cannot be guarded: it is equal in distribution only",
            got="exact guarded",
            expected="exact class or off with it, or the acceptance rule walk",
        )


def _ignore(_: object) -> None:
    pass
