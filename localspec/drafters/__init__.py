"""Drafters by name. A specification is written `name` or `name:setting=value,setting=value`; several, joined
by plus signs, are merged into one tree."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from localspec.drafters.combined import Combined
from localspec.drafters.cross_tokenizer import CrossTokenizer
from localspec.drafters.draft_model import DraftModel
from localspec.drafters.forced import Forced
from localspec.drafters.head import KINDS, HeadDrafter
from localspec.drafters.ngram import Ngram
from localspec.drafters.nothing import Nothing
from localspec.drafters.suffix import Suffix
from localspec.errors import SettingError, UnknownNameError, UsageError
from localspec.fingerprint import Relation, relate
from localspec.history import History
from localspec.protocols import Drafter, DraftHead, LanguageModel

__all__ = [
    "AUTO",
    "DRAFTERS",
    "KINDS",
    "Combined",
    "CrossTokenizer",
    "Draft",
    "DraftModel",
    "DrafterSpec",
    "Forced",
    "HeadDrafter",
    "Ngram",
    "Nothing",
    "Suffix",
    "check_settings",
    "find_head",
    "make_drafter",
]

DRAFTERS: dict[str, Callable[..., Drafter]] = {
    **{maker.name: maker for maker in (Nothing, DraftModel, CrossTokenizer, Ngram, Suffix, Forced)},
    **dict.fromkeys(KINDS, HeadDrafter),
}
"""Name -> class. Keyword arguments of the class are its settings on the command line."""

AUTO = "auto"
"""The schedule decides every round (`Pair.drafter`); with settings, the pair's draft model when there is one, else
its first head, else lookup (`suffix`)."""


@dataclass(frozen=True, slots=True)
class DrafterSpec:
    """A parsed specification: the drafter's name and its settings as written; others to merge it with."""

    name: str
    settings: dict[str, str]
    others: tuple[DrafterSpec, ...] = ()

    @classmethod
    def parse(cls, text: str) -> DrafterSpec:
        """Raises UnknownNameError and SettingError, naming what is known."""
        first, *others = [cls._parse_one(part) for part in text.split("+")]
        if others and Nothing.name in (first.name, *(other.name for other in others)):
            raise SettingError(f"the drafter {Nothing.name} has nothing to combine", got=text, fix="Leave it out.")
        return cls(first.name, first.settings, tuple(others))

    @classmethod
    def _parse_one(cls, text: str) -> DrafterSpec:
        name, _, rest = text.strip().partition(":")
        if name != AUTO and name not in DRAFTERS:
            raise UnknownNameError.among("drafter", name, [AUTO, *DRAFTERS])
        settings: dict[str, str] = {}
        for item in filter(None, rest.split(",")):
            key, equals, value = item.partition("=")
            if not equals or not value:
                raise SettingError(f"drafter setting {item!r} is not name=value", fix="Write e.g. ngram:max=4,num=8.")
            settings[key.strip()] = value.strip()
        return cls(name, settings)

    @property
    def decides(self) -> bool:
        """Is it left to the schedule what to draft, and how much?"""
        return self.name == AUTO and not self.settings and not self.others

    @property
    def asks_for_trees(self) -> bool:
        """Does it need a target that verifies trees?"""
        return bool(self.others) or self.settings.get("shape", "chain") != "chain"

    @property
    def needs_draft(self) -> bool:
        """Does it need a draft model?"""
        return self.name in DRAFTERS and "model" in inspect.signature(DRAFTERS[self.name]).parameters

    @property
    def needs_head(self) -> bool:
        """Does it need a trained head of its name?"""
        return self.name in KINDS

    @property
    def parts(self) -> tuple[DrafterSpec, ...]:
        """This one and those it is merged with, each alone."""
        return (DrafterSpec(self.name, self.settings), *self.others)

    @property
    def remembers(self) -> bool:
        """Does it guess from earlier sessions, where they are kept?"""
        names = [part.name for part in self.parts]
        return self.decides or any("history" in inspect.signature(DRAFTERS[name]).parameters for name in names)

    def with_settings(self, settings: Mapping[str, str]) -> DrafterSpec:
        """With more settings. Raises SettingError where it is not clear whose they are."""
        if settings and self.others:
            raise SettingError(
                "of several drafters, whose setting is this?",
                got=", ".join(settings),
                fix="Write it behind the drafter's name: draft_model:num=8+ngram.",
            )
        return DrafterSpec(self.name, {**self.settings, **settings}, self.others)

    def resolved(self, draft: LanguageModel | None, heads: Sequence[DraftHead] = ()) -> DrafterSpec:
        """The same with `auto` decided: the draft model where there is one, else the first head, else lookup."""
        if self.name != AUTO:
            return self
        first = heads[0].info.kind if heads else Suffix.name
        return DrafterSpec(DraftModel.name if draft is not None else first, self.settings, self.others)


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft model and how its vocabulary relates to that of its target, which has `num_rows` rows of logits."""

    model: LanguageModel
    relation: Relation
    num_rows: int

    @classmethod
    def of(cls, target: LanguageModel, model: LanguageModel) -> Draft:
        """Compares the vocabularies."""
        return cls(model, relate(target.tokenizer, model.tokenizer), target.vocab_size)


def make_drafter(
    spec: str | DrafterSpec,
    draft: LanguageModel | Draft | None,
    heads: Sequence[DraftHead] = (),
    *,
    history: History | None = None,
) -> Drafter:
    """Build a drafter for one session. draft: the pair's draft model, if it has one; with another tokenizer than
    the target's, `draft_model` means the wrapper that translates.  heads: those that are loaded.  history: earlier
    sessions, if any are kept."""
    model = draft.model if isinstance(draft, Draft) else draft
    parsed = (DrafterSpec.parse(spec) if isinstance(spec, str) else spec).resolved(model, heads)
    if parsed.others:
        parts: list[Drafter] = []
        try:
            parts += (make_drafter(part, draft, heads, history=history) for part in parsed.parts)
        except BaseException:
            for made in parts:
                made.close()
            raise
        return Combined(parts)
    name = parsed.name
    if name == DraftModel.name and isinstance(draft, Draft) and not draft.relation.same:
        name = CrossTokenizer.name
    maker = DRAFTERS[name]
    arguments = inspect.signature(maker).parameters
    settings = {key: _convert(name, key, value, arguments) for key, value in parsed.settings.items()}
    if "head" in arguments:
        return maker(find_head(name, heads), **settings)
    if "model" in arguments:
        if model is None:
            raise UsageError(
                f"drafter {name!r} needs a draft model", fix="Name one with --draft, or use --drafter ngram."
            )
        if "relation" not in arguments:
            return maker(model, **settings)
        if not isinstance(draft, Draft):
            raise UsageError(
                f"drafter {name!r} needs to know the target's vocabulary", fix="Use Draft.of(target, draft)."
            )
        return maker(model, draft.relation, draft.num_rows, **settings)
    if "history" in arguments:
        return maker(history, **settings)
    return maker(**settings)


def find_head(kind: str, heads: Sequence[DraftHead]) -> DraftHead:
    """The loaded head of a kind. Raises UsageError where there is none."""
    for head in heads:
        if head.info.kind == kind:
            return head
    raise UsageError(
        f"drafter {kind!r} needs such a head",
        got=", ".join(head.info.kind for head in heads) or "none loaded",
        fix="Name it with --head PATH.",
    )


def check_settings(specs: Iterable[DrafterSpec]) -> None:
    """Raise UnknownNameError or SettingError for settings that these drafters, `auto` resolved, do not have."""
    for spec in specs:
        arguments = inspect.signature(DRAFTERS[spec.name]).parameters
        for key, value in spec.settings.items():
            _convert(spec.name, key, value, arguments)


def _convert(name: str, key: str, value: str, arguments: Mapping[str, inspect.Parameter]) -> int | float | str:
    """A setting's text as the type of its default."""
    known = {setting: p.default for setting, p in arguments.items() if p.kind is p.KEYWORD_ONLY}
    if key not in known:
        raise UnknownNameError.among(f"setting of drafter {name}:", key, known)
    kind: type[int] | type[float] | type[str] = type(known[key])
    try:
        return kind(value)
    except ValueError:
        raise SettingError(f"drafter setting {name}:{key}", got=value, expected=f"a number ({kind.__name__})") from None
