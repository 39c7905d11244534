"""Drafting with a smaller language model that shares the target's tokenizer.

Guesses are coupled: the drafter takes argmax [log q + g] with the target's own noise g, so at any
temperature it guesses what the target would sample if the two agreed (DESIGN, "the one idea").
Under rejection it draws from q with noise of its own instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from localspec import noise
from localspec.context import Context, common_prefix
from localspec.errors import SettingError
from localspec.noise import Purpose
from localspec.protocols import (
    DraftRequest,
    HostTokens,
    LanguageModel,
    Outcome,
    Proposal,
    Scores,
    Step,
    Tokens,
    chain_parents,
    require_rewind,
)
from localspec.sampling import Law, log_softmax_at
from localspec.types import TokenIds

_PREFILL_CHUNK = 512


class DraftModel:
    """A chain of up to `num` guesses from `model`.

    min_prob: end the chain at a guess whose own probability (of the raw model) is lower (it is left
    out, unless it is the first or was drawn for the rejection rule); 0 never ends it. Where logits
    live on a device, min_prob > 0 costs one wait per guess; without it a greedy or plain-temperature
    chain is built lazily and costs none.
    The state commits accepted guesses and nothing else, so it is always a prefix of the context.
    """

    name = "draft_model"

    def __init__(self, model: LanguageModel, *, num: int = 3, min_prob: float = 0.0) -> None:
        if not 1 <= num <= 64:
            raise SettingError("draft_model: num out of range", got=num, expected="1 to 64")
        if not 0.0 <= min_prob < 1.0:
            raise SettingError("draft_model: min_prob out of range", got=min_prob, expected="at least 0 and below 1")
        require_rewind(model)
        self.model = model
        self.num = num
        self.min_prob = min_prob
        self._state = model.open()
        self._committed: list[int] = []  # what the state holds, to compare with a new turn's context
        self._pending: list[Tokens] = []  # what is pending in the state, in order
        self._context = Context()

    def begin(self, context: Context) -> None:
        """Keep what the cache shares with the new context, but for the anchor: its row starts the guessing."""
        self._context = context
        same = common_prefix(np.array(self._committed, np.int32), context.tokens)
        self._reset_to(min(same, len(context) - 1))

    def propose(self, request: DraftRequest) -> Proposal:
        """Guess token by token; the shape is known before the tokens are."""
        context = request.context
        room = self.model.info.context_length - len(context)
        num = min(self.num, request.max_nodes, room)
        if num < 1:
            return Proposal(self.name)
        self._reset_to(self._state.length)
        scores = self._catch_up(context.tokens)
        tokens: list[Tokens] = []
        laws: list[Law] = []
        mark = len(context)
        try:
            for guess, law in self._guesses(scores, request, num):
                tokens.append(guess)
                if law is not None:
                    laws.append(law)
        finally:
            context.truncate(mark)
        parents = np.arange(-1, len(tokens) - 1, dtype=np.int32)
        return Proposal(self.name, tuple(tokens), parents, tuple(laws) if request.needs_law else None)

    def observe(self, outcome: Outcome) -> None:
        """Commit the pending guesses that were emitted, whoever proposed them."""
        emitted = self._context.tokens[self._state.length :]
        if not self._pending:
            return
        held = np.concatenate([segment.numpy() for segment in self._pending])
        kept = common_prefix(held, emitted[:-1])
        self._state.keep(range(kept))
        self._committed += held[:kept].tolist()
        self._pending = []

    def close(self) -> None:
        """Give the draft model's cache back (the model itself belongs to the pair)."""
        self._state.close()

    def _reset_to(self, length: int) -> None:
        self._state.truncate(length)
        del self._committed[length:]
        self._pending = []

    def _forward(self, tokens: Tokens, *, scored: bool = True) -> Scores:
        """Run a chain below what is pending; the last row is scored."""
        parents = chain_parents(self._state, len(tokens))
        rows = (len(tokens) - 1,) if scored else ()
        [scores] = self.model.forward([Step(self._state, (tokens,), parents, rows)])
        self._pending.append(tokens)
        return scores

    def _catch_up(self, context: TokenIds) -> Scores:
        """Feed what the draft model has not seen, the anchor last."""
        while len(context) - self._state.length > _PREFILL_CHUNK:
            chunk = context[self._state.length : self._state.length + _PREFILL_CHUNK].copy()
            self._forward(HostTokens(chunk), scored=False)
            self._state.keep(range(len(chunk)))
            self._committed += chunk.tolist()
            self._pending = []
        return self._forward(HostTokens(context[self._state.length :].copy()))

    def _guesses(self, scores: Scores, request: DraftRequest, num: int) -> Iterator[tuple[Tokens, Law | None]]:
        """Up to `num` guesses; each is fed to the model only if another one follows."""
        on_host = self.model.capabilities.host_scores or self.min_prob > 0.0 or not request.sampler.is_plain
        for index in range(num):
            guess, law = self._guess(scores, request)
            if on_host or request.needs_law:
                token = int(guess.numpy()[0])
                unlikely = self._is_unlikely(scores, token)
                # The first guess is free: the verify pass is padded to two tokens anyway. A token that
                # was drawn from a law must not be taken back: that would be another law.
                if unlikely and index and not request.needs_law:
                    return
                request.context.append(token)
                yield guess, law
                if unlikely or token in request.stop_tokens:
                    return
            else:
                yield guess, law
            if index + 1 < num:
                scores = self._forward(guess)

    def _guess(self, scores: Scores, request: DraftRequest) -> tuple[Tokens, Law | None]:
        """One guess at the position that follows the context and the guesses so far."""
        sampler, context = request.sampler, request.context
        if request.needs_law:
            law = sampler.law(scores.rows((0,))[0], context)
            with np.errstate(divide="ignore"):
                logs = np.log(law.probs) + noise.gumbel(noise.key(sampler.seed, Purpose.DRAFT, len(context)), law.ids)
            return _host(int(law.ids[int(logs.argmax())])), law
        if not sampler.is_plain:
            return _host(sampler.choose(scores.rows((0,))[0], context)), None
        if sampler.is_greedy:
            return scores.argmax(), None
        # appended guesses have moved len(context) only where they were read on the host
        position = self._state.length + self._state.num_pending
        return scores.winners(sampler.params.temperature, sampler.keys(np.array([position]))), None

    def _is_unlikely(self, scores: Scores, token: int) -> bool:
        if self.min_prob <= 0.0:
            return False
        return log_softmax_at(scores.rows((0,))[0], [token])[0] < math.log(self.min_prob)


def _host(token: int) -> HostTokens:
    return HostTokens(np.array([token], np.int32))
