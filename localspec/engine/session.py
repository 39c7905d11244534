"""One conversation's state with a target and a drafter: prompts in, a stream of text out."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import numpy as np

from localspec.context import Context, common_prefix
from localspec.drafters.nothing import Nothing
from localspec.engine.detokenize import Detokenizer
from localspec.engine.early import Early
from localspec.engine.prefix import encode_prompt
from localspec.engine.recheck import Recheck
from localspec.engine.round import Lane, Room, RoundResult, TokenLogprob, run_round
from localspec.engine.stats import Stats
from localspec.engine.stop import StopStrings
from localspec.engine.width import pad
from localspec.errors import PromptError, SettingError, UnsupportedModelError
from localspec.exactness import Exactness
from localspec.protocols import (
    Drafter,
    HostTokens,
    LanguageModel,
    Rewind,
    Step,
    WidthClass,
    chain_parents,
    require_rewind,
)
from localspec.sampling import Sampler, SamplingParams
from localspec.types import TokenIds
from localspec.verify import Acceptance, make_acceptance

_PREFILL_CHUNK = 512
TARGET = "target"
"""Source of tokens that nobody guessed."""

Progress = Callable[[int, int], None]
"""Called with (prefilled tokens, tokens to prefill)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of the stream and who guessed its tokens (`Proposal.sources`), or TARGET.

    rank: how many guesses for the same place stood before it in the tree; 0 in a chain.
    """

    text: str
    source: str
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer.

    finish_reason: "stop" (stop token or string), "length" (max_tokens), "context" (no room left) or
    "cancelled".  note: what a person should know about how it ended.  plain_because: why nothing was
    speculated, if so.  width_class: the widths every target pass ran in.  exact: "class", "guarded" or "off", what
    is promised of the text (`engine.exactness`).  bound: how near a choice had to be to be re-checked, in logits.
    """

    text: str
    tokens: tuple[int, ...]
    sources: tuple[str, ...]
    finish_reason: str
    stop_string: str | None
    note: str
    seed: int
    num_prompt_tokens: int
    stats: Stats
    logprobs: tuple[TokenLogprob, ...] | None
    plain_because: str | None
    width_class: str
    acceptance: str
    drafter: str
    exact: str
    bound: float | None

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        logprobs = None
        if self.logprobs is not None:
            logprobs = [
                {"token": p.token, "logprob": p.logprob, "top": [list(t) for t in p.top]} for p in self.logprobs
            ]
        return {
            "text": self.text,
            "tokens": list(self.tokens),
            "sources": list(self.sources),
            "finish_reason": self.finish_reason,
            "stop_string": self.stop_string,
            "note": self.note,
            "seed": self.seed,
            "num_prompt_tokens": self.num_prompt_tokens,
            "drafter": self.drafter,
            "acceptance": self.acceptance,
            "plain_because": self.plain_because,
            "width_class": self.width_class,
            "exact": self.exact,
            "bound": self.bound,
            "logprobs": logprobs,
            "stats": self.stats.as_dict(),
        }


@dataclass(slots=True)
class _Answer:
    """An answer in the making."""

    sampler: Sampler
    stop_tokens: frozenset[int]
    num_prompt_tokens: int
    detokenizer: Detokenizer
    stops: StopStrings
    stats: Stats = field(default_factory=Stats)
    tokens: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    waiting: list[Piece] = field(default_factory=list)  # text held back by `stops`, with its sources
    finish_reason: str | None = None
    note: str = ""
    asked: bool = False  # was a drafter ever given room for a guess?

    def plain_because(self, drafter: str, widths: WidthClass) -> str | None:
        """Why nothing was speculated, if so. widths: of the passes."""
        if self.stats.num_drafted:
            return None
        if widths.max_width == 1:
            return f"passes are one token wide: {widths.evidence}"
        if self.stats.plain_rounds:
            return max(self.stats.plain_rounds, key=lambda reason: self.stats.plain_rounds[reason])
        return f"the drafter {drafter!r} proposed nothing" if self.asked else "no round had room for a guess"

    def say(self, text: str, source: str, rank: int = 0) -> Iterator[Piece]:
        """Pass text through the stop strings; yields what may be shown, split by source."""
        if text:
            self.waiting.append(Piece(text, source, rank))
        yield from self._release(len(self.stops.push(text)))

    def finish(self, source: str) -> Iterator[Piece]:
        """Show what was held back to the end."""
        yield from self.say(self.detokenizer.finish(), source)
        yield from self._release(len(self.stops.finish()))

    def _release(self, count: int) -> Iterator[Piece]:
        while count > 0:
            piece = self.waiting.pop(0)
            if len(piece.text) > count:
                self.waiting.insert(0, replace(piece, text=piece.text[count:]))
                piece = replace(piece, text=piece.text[:count])
            count -= len(piece.text)
            self.shown.append(piece.text)
            yield piece


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
        self.use(drafter)
        self._context = Context()
        self._live: Stream | None = None
        self._num_written = 0  # tokens in the state as the prefill wrote them
        self._state = model.open()

    def use(self, drafter: Drafter, acceptance: Acceptance | None = None) -> None:
        """Draft with another drafter, and accept by another rule, from the next answer on; the former drafter
        is not closed. Raises UnsupportedModelError if the model cannot serve it, SettingError for a rule that
        cannot be guarded."""
        if not isinstance(drafter, Nothing) or self.exactness.bound is not None:
            require_rewind(self.model)
        _require_trees(self.model, drafter)
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
        Raises PromptError for an empty prompt or one longer than the context.
        """
        params = params or SamplingParams()
        ids = encode_prompt(self.model.tokenizer, prompt, self.tokens) if isinstance(prompt, str) else prompt
        tokens = np.array(ids, np.int32)
        self._check(tokens)
        self.stop()
        hooks = _Hooks(on_prefill, on_round or _ignore, on_result or _ignore)
        self._live = Stream(lambda stream: self._answer(tokens, params, stream, hooks))
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

    def _check(self, tokens: TokenIds) -> None:
        if not len(tokens):
            raise PromptError("the prompt is empty", expected="at least one token")
        limit = self.model.info.context_length - self.exactness.widest_padding + 1
        if len(tokens) > limit:
            raise PromptError(
                "prompt is too long for the context",
                got=f"{len(tokens)} tokens",
                expected=f"at most {limit}",
                fix="Shorten it, or load the model with a larger --context.",
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.model.vocab_size:
            raise PromptError("token id outside the vocabulary", expected=f"0 to {self.model.vocab_size - 1}")

    def _answer(
        self,
        tokens: TokenIds,
        params: SamplingParams,
        stream: Stream,
        hooks: _Hooks,
    ) -> Generator[Piece, None, None]:
        seed = params.seed if params.seed is not None else secrets.randbits(32)
        tokenizer = self.model.tokenizer
        own_stops = frozenset() if params.ignore_eos else tokenizer.stop_tokens
        answer = _Answer(
            sampler=Sampler(params, seed),
            stop_tokens=own_stops | params.stop_tokens,
            num_prompt_tokens=len(tokens),
            detokenizer=Detokenizer(tokenizer),
            stops=StopStrings(params.stop),
        )
        early = Early()
        failure: BaseException | None = None
        try:
            self._prefill(tokens, answer, stream, hooks.on_prefill)
            lane = self._lane(answer, early)
            while answer.finish_reason is None:
                room = self._room(answer, params, stream)
                if room is not None:
                    answer.asked |= room.nodes > 0 and room.depth > 0
                    [result] = run_round(self.model, [lane], [room])
                    hooks.on_round(result)
                    yield from self._take(result, answer)
            yield from answer.finish(answer.sources[-1] if answer.sources else TARGET)
        except GeneratorExit:  # the reader stopped reading: the answer ends here
            raise
        except BaseException as error:
            failure = error
            raise
        finally:
            early.drop(self._state)
            generation = self._result(answer)
            stream.finish(generation, failure)
            if failure is None:
                hooks.on_result(generation)

    def _lane(self, answer: _Answer, early: Early) -> Lane:
        bound = self.exactness.bound
        return Lane(
            self._state,
            self._context,
            self.drafter,
            answer.sampler,
            self.acceptance,
            answer.stop_tokens,
            self.exactness.widths,
            None if bound is None else Recheck(self.model, self._state, bound),
            early,
        )

    def _prefill(self, tokens: TokenIds, answer: _Answer, stream: Stream, on_prefill: Progress | None) -> None:
        """Bring the state to all of the prompt but its last token, the anchor."""
        started = perf_counter()
        last = len(tokens) - 1
        same = min(common_prefix(self.tokens, tokens), last, self._state.length)
        if same < self._state.length and self.model.capabilities.rewind is Rewind.NEVER:
            same = 0
        if self.exactness.bound is not None:  # what an answer left in the state depends on how it was guessed
            same = min(same, self._num_written)
        self._state.truncate(same)
        self._num_written = same
        self._context = Context(tokens)
        while self._state.length < last and not stream.cancelled:
            chunk = tokens[self._state.length : min(last, self._state.length + _PREFILL_CHUNK)]
            step = Step(self._state, (HostTokens(chunk),), chain_parents(self._state, len(chunk)), ())
            self.model.forward([pad(step, self.exactness.widths)])
            self._state.keep(range(len(chunk)))
            self._num_written = self._state.length
            if on_prefill is not None:
                on_prefill(self._state.length - same, last - same)
        self.drafter.begin(self._context)
        answer.stats.prefill_ms = (perf_counter() - started) * 1e3
        answer.stats.num_reused, answer.stats.num_prefilled = same, self._state.length - same

    def _room(self, answer: _Answer, params: SamplingParams, stream: Stream) -> Room | None:
        """How much may be proposed; None, and a finish reason, where no token may be emitted any more."""
        capabilities = self.model.capabilities
        length = self.model.info.context_length
        in_context = length - self.exactness.widest_padding + 2 - len(self._context)
        in_answer = in_context if params.max_tokens is None else params.max_tokens - len(answer.tokens)
        if stream.cancelled:
            answer.finish_reason = "cancelled"
        elif in_answer <= 0 and params.max_tokens is not None:
            answer.finish_reason = "length"
        elif in_context <= 0:
            answer.finish_reason = "context"
            answer.note = f"the context of {length} tokens is full: start over, or load with a larger --context"
        if answer.finish_reason:
            return None
        widest = min(capabilities.max_width, self.exactness.widths.max_width or capabilities.max_width)
        # the anchor needs a place in the pass, and the round emits a token more than it accepts
        return Room(min(in_context, widest) - 1, min(in_context, in_answer) - 1)

    def _take(self, result: RoundResult, answer: _Answer) -> Iterator[Piece]:
        """Turn a round's tokens into text, up to a stop."""
        answer.stats.add(result.record)
        emitted = result.verdict.tokens
        guessed = [result.sources[node] for node in result.verdict.path]
        ranks = result.record.accepted_ranks
        for index, token in enumerate(emitted):
            source, rank = (guessed[index], ranks[index]) if index < len(guessed) else (TARGET, 0)
            answer.tokens.append(token)
            answer.sources.append(source)
            if result.logprobs is not None:
                answer.logprobs.append(result.logprobs[index])
            if token in answer.stop_tokens:
                answer.finish_reason = "stop"
                return
            yield from answer.say(answer.detokenizer.push(token), source, rank)
            if answer.stops.matched is not None:
                answer.finish_reason = "stop"
                self._cut(len(self._context) - (len(emitted) - index - 1))
                return

    def _cut(self, length: int) -> None:
        """Forget tokens that were emitted behind a stop string."""
        self._context.truncate(length)
        self._state.truncate(min(self._state.length, length - 1))

    def _result(self, answer: _Answer) -> Generation:
        return Generation(
            text="".join(answer.shown),
            tokens=tuple(answer.tokens),
            sources=tuple(answer.sources),
            finish_reason=answer.finish_reason or "cancelled",
            stop_string=answer.stops.matched,
            note=answer.note,
            seed=answer.sampler.seed,
            num_prompt_tokens=answer.num_prompt_tokens,
            stats=answer.stats,
            logprobs=tuple(answer.logprobs) if answer.sampler.params.logprobs is not None else None,
            plain_because=answer.plain_because(self.drafter.name, self.exactness.widths),
            width_class=str(self.exactness),
            acceptance=self.acceptance.name,
            drafter=self.drafter.name,
            exact=self.exactness.mode.value,
            bound=None if self.exactness.bound is None else self.exactness.bound.tolerance.difference,
        )


@dataclass(frozen=True, slots=True)
class _Hooks:
    """Who wants to be told what."""

    on_prefill: Progress | None
    on_round: Callable[[RoundResult], None]
    on_result: Callable[[Generation], None]


def _require_trees(model: LanguageModel, drafter: Drafter) -> None:
    """Raise UnsupportedModelError for a drafter that branches where only chains are verified exactly."""
    capabilities = model.capabilities
    if drafter.needs_trees and not (capabilities.trees and capabilities.exact_trees):
        raise UnsupportedModelError(
            f"the drafter {drafter.name!r} guesses trees, and {model.info.name} verifies chains only as it was loaded",
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
