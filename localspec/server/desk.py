"""Where a request is made ready: from what was asked to what the batch runs."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from localspec.engine.template import Message, render, thought_end
from localspec.errors import PromptError, SettingError
from localspec.protocols import Tokenizer
from localspec.sampling import SamplingParams
from localspec.server.ask import Ask
from localspec.server.batch import Batch, Request
from localspec.server.refusals import Refusal
from localspec.server.reply import Reply
from localspec.server.settings import ServerSettings
from localspec.server.tools import ToolPlan

_SEED_BITS = 32
_NUM_SEEDS = 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request made ready. requests: the replies to be written, prompt by prompt, `ask.num_choices` of each."""

    ask: Ask
    id: str
    model: str
    created: int
    requests: tuple[Request, ...]
    plan: ToolPlan | None
    tokenizer: Tokenizer

    def replies(self) -> list[Reply]:
        """An empty reply for each request."""
        return [
            Reply(self.tokenizer, None if self.plan is None else self.plan.reader(), self.ask.show_rounds)
            for _ in self.requests
        ]

    def prompt_text(self, index: int) -> str:
        """The prompt behind an answer, as text."""
        prompt = self.ask.prompts[index // self.ask.num_choices]
        if isinstance(prompt, str):
            return prompt
        return b"".join(self.tokenizer.token_bytes(token) for token in prompt).decode(errors="replace")


class Desk:
    """Makes requests ready for one batch. Encoding and compiling take time, so this belongs on a thread of its own."""

    def __init__(self, batch: Batch, settings: ServerSettings) -> None:
        self.batch = batch
        self.names = settings.names
        self._settings = settings

    def prepare(self, ask: Ask) -> Job:
        """Raises Refusal and members of the error tree."""
        self.check_model(ask.model)
        tokenizer = self.batch.pair.target.tokenizer
        plan = self._plan(ask)
        written = self._render(ask, plan) if ask.messages else ""
        prompts = [self._encode(prompt) for prompt in ask.prompts or (written,)]
        params = self._params(ask, plan, written)
        speculation = ask.speculation or self._settings.speculation
        requests = [
            Request(tokens=prompt, params=_for_choice(params, choice), speculation=speculation)
            for prompt in prompts
            for choice in range(ask.num_choices)
        ]
        return Job(
            ask=ask,
            id=secrets.token_hex(12),
            model=self.names[0] if ask.model is None else ask.model,
            created=int(time.time()),
            requests=tuple(requests),
            plan=plan,
            tokenizer=tokenizer,
        )

    def count(self, ask: Ask) -> int:
        """Tokens of the conversation as the model would read it. Raises as `prepare`."""
        self.check_model(ask.model)
        return len(self._encode(self._render(ask, self._plan(ask))))

    def check_model(self, name: str | None) -> None:
        """Raise a Refusal for a model that is not here."""
        if name is not None and name not in self.names:
            known = ", ".join(self.names)
            raise Refusal(404, f"The model {name[:100]!r} does not exist here. Known: {known}.", "model_not_found")

    def _plan(self, ask: Ask) -> ToolPlan | None:
        """How tools are offered and their calls read; None where none play a part."""
        speaks_of_tools = any(message.get("tool_calls") or message["role"] == "tool" for message in ask.messages)
        if not ask.tools and not speaks_of_tools:
            return None
        return ToolPlan.of(self.batch.pair.target.tokenizer, ask.tools, ask.tool_choice, ask.parallel_tools)

    def _render(self, ask: Ask, plan: ToolPlan | None) -> str:
        """The prompt. What the last message of the assistant began is continued."""
        messages, begun = list(ask.messages), ""
        if len(messages) > 1 and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
            begun = messages.pop()["content"]
        reserved = {"messages", "add_generation_prompt", "tools"} & ask.variables.keys()
        if reserved:
            raise SettingError("template variables that are not yours to set", got=", ".join(sorted(reserved)))
        return self._rendered(messages, ask, plan) + begun

    def _rendered(self, messages: Sequence[Message], ask: Ask, plan: ToolPlan | None) -> str:
        if plan is not None:
            return plan.render(messages, **ask.variables)
        return render(self.batch.pair.target.tokenizer, messages, **ask.variables)

    def _encode(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if not prompt:
            raise PromptError("the prompt is empty", expected="some text")
        tokens: list[int] = self.batch.encode(prompt).tolist()
        return tokens

    def _params(self, ask: Ask, plan: ToolPlan | None, prompt: str) -> SamplingParams:
        """The server's settings under the request's; a grammar holds behind the thought that a prompt may have begun.
        Raises SettingError."""
        params = replace(self._settings.defaults, **ask.settings)
        grammar = None if plan is None else plan.grammar(prompt)
        asked = None if ask.grammar is None else ask.grammar.behind(thought_end(prompt))
        if grammar is not None and asked is not None:
            raise SettingError(
                "calls of tools are held to a grammar, and the answer is to have a format of its own",
                fix="Leave out the format, or set tool_choice to none.",
            )
        shown = frozenset() if plan is None else plan.shown_tokens
        return replace(params, grammar=grammar or asked, shown_tokens=shown)


def _for_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """Each answer has a seed of its own: the one that was named, the next, and so on."""
    if params.seed is None:
        return replace(params, seed=secrets.randbits(_SEED_BITS))
    return replace(params, seed=(params.seed + choice) % _NUM_SEEDS)
