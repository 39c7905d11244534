"""One answer in the making: what a round's tokens become, how much the next round may guess, and how it all ended.

A session writes one of these at a time, a server's batch many at once; neither knows anything of text.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from localspec.constraint import Constraint
from localspec.context import Context
from localspec.engine.detokenize import Detokenizer
from localspec.engine.early import Early
from localspec.engine.recheck import Recheck
from localspec.engine.round import Lane, Room, RoundResult, TokenLogprob
from localspec.engine.stats import Stats
from localspec.engine.stop import StopStrings
from localspec.errors import ContextOverflowError, PromptError
from localspec.exactness import Exactness
from localspec.protocols import Drafter, LanguageModel, SequenceState
from localspec.sampling import Sampler, SamplingParams
from localspec.types import TokenIds
from localspec.verify import Acceptance

TARGET = "target"
"""Source of tokens that nobody guessed."""


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
    "cancelled".  note: what a person should know about how it ended.  complete: does the text satisfy the grammar
    that was asked for? False where it was cut off before its end; None without a grammar.  plain_because: why
    nothing was speculated, if so.  width_class: the widths every target pass ran in.  exact: "class", "guarded" or
    "off", what is promised of the text (`localspec.exactness`).  bound: how near a choice had to be to be re-checked,
    in logits.
    """

    text: str
    tokens: tuple[int, ...]
    sources: tuple[str, ...]
    finish_reason: str
    stop_string: str | None
    note: str
    complete: bool | None
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
            "complete": self.complete,
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


def check_prompt(model: LanguageModel, tokens: TokenIds, exactness: Exactness | None = None) -> None:
    """Raise PromptError for what cannot be answered: no token, too many (`ContextOverflowError`), or one that the
    vocabulary does not have."""
    if not len(tokens):
        raise PromptError("the prompt is empty", expected="at least one token")
    limit = model.info.context_length - (exactness or Exactness.of_class(model)).widest_padding + 1
    if len(tokens) > limit:
        raise ContextOverflowError(len(tokens), limit)
    if int(tokens.min()) < 0 or int(tokens.max()) >= model.vocab_size:
        raise PromptError("token id outside the vocabulary", expected=f"0 to {model.vocab_size - 1}")


@dataclass(slots=True, eq=False)
class Answer:
    """See the module. context: prompt and answer so far.  finish_reason: set once the answer has ended.
    cancelled: set it, and the answer ends before the next round.  early: the lane's next pass; whoever ends the answer
    drops it."""

    model: LanguageModel
    context: Context
    params: SamplingParams
    sampler: Sampler
    stop_tokens: frozenset[int]
    num_prompt_tokens: int
    detokenizer: Detokenizer
    stops: StopStrings
    exactness: Exactness
    early: Early = field(default_factory=Early)
    stats: Stats = field(default_factory=Stats)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    cancelled: bool = False
    _sources: list[str] = field(default_factory=list)
    _shown: list[str] = field(default_factory=list)
    _waiting: list[Piece] = field(default_factory=list)  # text held back by `stops`, with its sources
    _note: str = ""
    _asked: bool = False  # was a drafter ever given room for a guess?

    @classmethod
    def begin(
        cls,
        model: LanguageModel,
        prompt: TokenIds,
        params: SamplingParams,
        constraint: Constraint | None,
        exactness: Exactness | None = None,
    ) -> Answer:
        """An answer to a checked prompt, nothing of which has been read. exactness: [default: the width class]."""
        seed = params.seed if params.seed is not None else secrets.randbits(32)
        own_stops = frozenset() if params.ignore_eos else model.tokenizer.stop_tokens
        return cls(
            model,
            Context(prompt),
            params,
            Sampler(params, seed, constraint),
            own_stops | params.stop_tokens,
            len(prompt),
            Detokenizer(model.tokenizer, params.shown_tokens),
            StopStrings(params.stop),
            exactness or Exactness.of_class(model),
        )

    def lane(self, state: SequenceState, drafter: Drafter, acceptance: Acceptance) -> Lane:
        """Its part in the rounds, once the prompt is read."""
        bound = self.exactness.bound
        return Lane(
            state,
            self.context,
            drafter,
            self.sampler,
            acceptance,
            self.stop_tokens,
            self.exactness.widths,
            None if bound is None else Recheck(self.model, state, bound),
            self.early,
        )

    # ------------------------------------------------------------ round by round

    def room(self) -> Room | None:
        """How much may be proposed; None, and a finish reason, where no token may be emitted any more."""
        capabilities = self.model.capabilities
        length = self.model.info.context_length
        most = self.params.max_tokens
        in_context = length - self.exactness.widest_padding + 2 - len(self.context)
        in_answer = in_context if most is None else most - len(self.tokens)
        if self.cancelled:
            self.finish_reason = "cancelled"
        elif in_answer <= 0 and most is not None:
            self.finish_reason = "length"
        elif in_context <= 0:
            self.finish_reason = "context"
            self._note = f"the context of {length} tokens is full: start over, or load with a larger --context"
        if self.finish_reason:
            return None
        widest = min(capabilities.max_width, self.exactness.widths.max_width or capabilities.max_width)
        # the anchor needs a place in the pass, and the round emits a token more than it accepts
        room = Room(min(in_context, widest) - 1, min(in_context, in_answer) - 1)
        self._asked |= room.nodes > 0 and room.depth > 0
        return room

    def take(self, result: RoundResult, state: SequenceState) -> Iterator[Piece]:
        """Turn a round's tokens into text, up to a stop; what was emitted behind one is taken back."""
        self.stats.add(result.record)
        emitted = result.verdict.tokens
        guessed = [result.sources[node] for node in result.verdict.path]
        ranks = result.record.accepted_ranks
        for index, token in enumerate(emitted):
            source, rank = (guessed[index], ranks[index]) if index < len(guessed) else (TARGET, 0)
            self.tokens.append(token)
            self._sources.append(source)
            if result.logprobs is not None:
                self.logprobs.append(result.logprobs[index])
            if token in self.stop_tokens:
                self.finish_reason = "stop"
                return
            yield from self._say(self.detokenizer.push(token), source, rank)
            if self.stops.matched is not None:
                self.finish_reason = "stop"
                length = len(self.context) - (len(emitted) - index - 1)
                self.context.truncate(length)
                state.truncate(min(state.length, length - 1))
                return

    def finish(self) -> Iterator[Piece]:
        """Show what was held back to the end."""
        yield from self._say(self.detokenizer.finish(), self._sources[-1] if self._sources else TARGET)
        yield from self._release(len(self.stops.finish()))

    def _say(self, text: str, source: str, rank: int = 0) -> Iterator[Piece]:
        """Pass text through the stop strings; yields what may be shown, split by source."""
        if text:
            self._waiting.append(Piece(text, source, rank))
        yield from self._release(len(self.stops.push(text)))

    def _release(self, count: int) -> Iterator[Piece]:
        while count > 0:
            piece = self._waiting.pop(0)
            if len(piece.text) > count:
                self._waiting.insert(0, replace(piece, text=piece.text[count:]))
                piece = replace(piece, text=piece.text[:count])
            count -= len(piece.text)
            self._shown.append(piece.text)
            yield piece

    # ------------------------------------------------------------ the end

    def generation(self, drafter: str, acceptance: str) -> Generation:
        """The answer as far as it got; one that has not ended was cancelled."""
        complete = self._complete()
        note = "the answer was cut off before its grammar was satisfied" if complete is False else ""
        return Generation(
            text="".join(self._shown),
            tokens=tuple(self.tokens),
            sources=tuple(self._sources),
            finish_reason=self.finish_reason or "cancelled",
            stop_string=self.stops.matched,
            note="; ".join(filter(None, (self._note, note))),
            complete=complete,
            seed=self.sampler.seed,
            num_prompt_tokens=self.num_prompt_tokens,
            stats=self.stats,
            logprobs=tuple(self.logprobs) if self.params.logprobs is not None else None,
            plain_because=self._plain_because(drafter),
            width_class=str(self.exactness),
            acceptance=acceptance,
            drafter=drafter,
            exact=self.exactness.mode.value,
            bound=None if self.exactness.bound is None else self.exactness.bound.tolerance.difference,
        )

    def _complete(self) -> bool | None:
        """Does the answer satisfy its grammar? None without one."""
        constraint = self.sampler.constraint
        if constraint is None:
            return None
        if self.stops.matched is not None:
            return constraint.accepts("".join(self._shown))
        ended = bool(self.tokens) and self.tokens[-1] in self.stop_tokens
        return constraint.complete(np.array(self.tokens[: len(self.tokens) - ended], np.int32))

    def _plain_because(self, drafter: str) -> str | None:
        """Why nothing was speculated, if so."""
        if self.stats.num_drafted:
            return None
        if not self.exactness.leaves_room:
            return f"passes are one token wide: {self.exactness.widths.evidence}"
        if self.stats.plain_rounds:
            return max(self.stats.plain_rounds, key=lambda reason: self.stats.plain_rounds[reason])
        return f"the drafter {drafter!r} proposed nothing" if self._asked else "no round had room for a guess"
