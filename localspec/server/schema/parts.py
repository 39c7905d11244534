"""What bodies of all interfaces are made from."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
NUM_LIMIT = 2**31
MAX_SEED = 2**64 - 1


class Part(BaseModel):
    """Strict: a number is no text, an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def joined(content: object) -> object:
    """Text given in parts, as one text; other parts than text are refused."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            shown = kind if isinstance(kind, str) else type(part).__name__
            raise ValueError(f"part {index} is {shown[:40]!r}: this server reads text only")
        texts.append(text)
    return "".join(texts)


def _listed(value: object) -> object:
    """One text as a list of one."""
    return [value] if isinstance(value, str) else value


def without_none(value: object) -> object:
    """An empty list for null."""
    return [] if value is None else value


Text = Annotated[str, BeforeValidator(joined)]
"""A text, or a list of text parts, which are joined."""

Stops = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_listed), Field(max_length=MAX_STOPS)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
Nothing = Annotated[None, BeforeValidator(lambda value: None if value == [] else value)]
"""null, or a list of nothing."""
NumTokens = Annotated[int, Field(ge=1, lt=NUM_LIMIT)]


class FunctionBody(Part):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class StreamOptionsBody(Part):
    """include_usage: a last chunk with the counts. include_obfuscation: padding against eavesdroppers; only off."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class SpeculationBody(Part):
    """Who guesses for this request, and at most how many tokens a round."""

    drafter: str = "auto"
    width: Annotated[int, Field(ge=1, le=4096)] | None = None


def _spelled_out(value: object) -> object:
    """A drafter's name alone, or true and false for `auto` and `off`."""
    if isinstance(value, bool):
        return {"drafter": "auto" if value else "off"}
    return {"drafter": value} if isinstance(value, str) else value


class Body(Part):
    """What every request that writes text may say.

    speculation: "off", "auto", a drafter as on the command line, or {"drafter": ..., "width": ...}.  show_rounds: with
    every chunk the round behind it: who guessed what, and what was taken.  return_progress: chunks while the prompt
    is read.
    """

    reported: ClassVar[frozenset[str]] = frozenset()

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=100.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1, lt=NUM_LIMIT)
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(
        default=None, gt=0.0, le=100.0, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")
    )
    seed: int | None = Field(default=None, ge=-1, le=MAX_SEED)
    ignore_eos: bool | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=NUM_LIMIT)]] | None = Field(default=None, max_length=1000)
    speculation: Annotated[SpeculationBody | None, BeforeValidator(_spelled_out)] = None
    show_rounds: bool = False
    return_progress: bool = False

    @property
    def ignored(self) -> tuple[str, ...]:
        """Fields that were sent and mean nothing here."""
        return tuple(name for name in sorted(self.model_fields_set & self.reported) if getattr(self, name) is not None)


class Penalised(Body):
    """What OpenAI's two interfaces for plain text have in common."""

    presence_penalty: float | None = Field(default=None, ge=-100.0, le=100.0)
    frequency_penalty: float | None = Field(default=None, ge=-100.0, le=100.0)
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], float] | None = Field(
        default=None, max_length=4096
    )
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: Stops | None = None
    stream_options: StreamOptionsBody | None = None
    user: str | None = None
