"""The workloads that speed is measured on: what each is, and its prompts.

A file or folder of prompts given by the user replaces the workloads whose names its domains have, and adds the
others; the built ones (`words`, `stranger`) are then made from these prompts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from random import Random

from localspec.bench.prompts import Prompt, load_prompts
from localspec.errors import PromptError, UnknownNameError

_WRITTEN = Path(__file__).with_name("written.jsonl")
_EVERYTHING = 1_000_000
_WORDS, _STRANGER = "words", "stranger"
_NUM_WORDS = 48


@dataclass(frozen=True, slots=True)
class Workload:
    """A kind of text that is decoded. about: what it is, in one line.  foreign_draft: the draft model is replaced
    by one that was trained on something else (`stranger.py`)."""

    name: str
    about: str
    prompts: tuple[Prompt, ...] = ()
    foreign_draft: bool = False


WORKLOADS = (
    Workload("chat", "questions and tasks, held out from training, answered through the chat template"),
    Workload("code", "the beginnings of held-out source files, continued"),
    Workload("prose", "passages of held-out books and documents, continued"),
    Workload("copy", "a short file, then the same file again with one name or value changed: most of it can be copied"),
    Workload("json", "records in a JSON list, continued in the same form"),
    Workload(_WORDS, "adversarial: words of the prompts in random order, continued"),
    Workload(
        _STRANGER,
        "adversarial: held-out prompts, with a draft model trained on something else (its vocabulary is shuffled)",
        foreign_draft=True,
    ),
)
"""All that come with localspec, without their prompts."""


def load_workloads(
    path: Path | None = None, names: Sequence[str] = (), num_prompts: int = 10, *, has_draft: bool = True
) -> list[Workload]:
    """The workloads of these names with their first `num_prompts` prompts.

    names: none for all that there are, or with a path for all that it holds.  has_draft: False leaves out, where
    no names are given, what needs a draft model.  Raises PromptError, UnknownNameError.
    """
    held_out = load_prompts(path, (), _EVERYTHING)
    own = _by_domain(held_out)
    known = {work.name: work for work in WORKLOADS}
    for name in own:
        known.setdefault(name, Workload(name, "prompts of yours"))
    if path is not None:
        known |= {name: replace(known[name], about="prompts of yours", foreign_draft=False) for name in own}
    for name in names:
        if name not in known:
            raise UnknownNameError.among("workload", name, list(known))
    chosen = names or [name for name, work in known.items() if path is None or name in own]
    if not names and not has_draft:
        chosen = [name for name in chosen if not known[name].foreign_draft]
    written = _by_domain(load_prompts(_WRITTEN, (), _EVERYTHING))
    loaded = []
    for name in dict.fromkeys(chosen):
        prompts = own.get(name) or written.get(name)
        if prompts is None and name in (_WORDS, _STRANGER):
            prompts = _random_words(held_out, num_prompts) if name == _WORDS else _in_turn(own.values(), _STRANGER)
        if prompts is None:
            raise PromptError(f"the prompts given hold none for the workload {name}", got=", ".join(own))
        if len({prompt.id for prompt in prompts}) < len(prompts):
            raise PromptError(f"two prompts of the workload {name} have the same id", fix="Give each its own.")
        loaded.append(replace(known[name], prompts=tuple(prompts[:num_prompts])))
    return loaded


def listing() -> str:
    """Every workload with what it is, a line each."""
    width = max(len(work.name) for work in WORKLOADS)
    return "\n".join(f"{work.name:{width}}  {work.about}" for work in WORKLOADS)


def _by_domain(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    domains: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        domains.setdefault(prompt.domain, []).append(prompt)
    return domains


def _random_words(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Lists of words that occur in the prompts, the same ones every time."""
    texts = " ".join(
        prompt.text or " ".join(str(message.get("content")) for message in prompt.messages or ()) for prompt in prompts
    )
    words = sorted({word for word in re.findall(r"[^\W\d_]+", texts) if 3 <= len(word) <= 10}) or sorted(
        set(texts.split())
    )
    return [
        Prompt(f"{_WORDS}-{number + 1:02}", _WORDS, " ".join(Random(number).choices(words, k=_NUM_WORDS)), None)
        for number in range(count)
    ]


def _in_turn(domains: Iterable[Sequence[Prompt]], name: str) -> list[Prompt]:
    """A prompt of each domain in turn, renamed for another workload."""
    mixed = [prompt for row in zip_longest(*domains) for prompt in row if prompt is not None]
    return [replace(prompt, id=f"{name}/{prompt.id}", domain=name) for prompt in mixed]
