"""A conversation in messages: template, history, and a session that keeps the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from localspec.engine.answer import Generation
from localspec.engine.round import RoundResult
from localspec.engine.session import Progress, Session, Stream
from localspec.engine.template import Message, render, thought_end
from localspec.errors import PromptError
from localspec.sampling import SamplingParams


class Chat:
    """Turns of user and assistant, rendered by the model's own template.

    An answer joins the history when its stream ends, also one that was cancelled. If a turn fails
    (no room, say), the history is as it was before it.
    """

    def __init__(self, session: Session, system: str | None = None) -> None:
        self.session = session
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = list(self._system)

    def say(
        self,
        text: str,
        params: SamplingParams | None = None,
        *,
        on_prefill: Progress | None = None,
        on_round: Callable[[RoundResult], None] | None = None,
        on_result: Callable[[Generation], None] | None = None,
    ) -> Stream:
        """Answer the user's next message; hooks as in `Session.stream`. Raises PromptError if it is empty or
        leaves no room."""
        if not text.strip():
            raise PromptError("the message is empty", expected="some text")
        self.session.stop()  # an answer that is still being written joins the history first
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        prompt = render(self.session.model.tokenizer, messages)
        if params is not None and params.grammar is not None:
            params = replace(params, grammar=params.grammar.behind(thought_end(prompt)))

        def remember(result: Generation) -> None:
            self.messages = [*messages, {"role": "assistant", "content": result.text}]
            if on_result is not None:
                on_result(result)

        return self.session.stream(prompt, params, on_prefill=on_prefill, on_round=on_round, on_result=remember)

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self.messages = list(self._system)
        self.session.reset()
