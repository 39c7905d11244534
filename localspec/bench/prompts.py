"""The prompts that benchmarks run on: 120 held-out ones come with localspec, others can be given.

A file holds one JSON object per line: {"id", "domain", "text"} to be continued, or {"id", "domain",
"messages"} to be answered through the chat template. A folder holds such files (.jsonl), or texts to be
continued (.txt, .md), whose domain is the folder's name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localspec.engine.prefix import encode_prompt
from localspec.engine.template import Message, render
from localspec.errors import PromptError, UnknownNameError
from localspec.protocols import Tokenizer
from localspec.types import TokenIds

_BUNDLED = Path(__file__).with_name("prompts.jsonl")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a workload."""

    id: str
    domain: str
    text: str | None
    messages: tuple[Message, ...] | None

    def encode(self, tokenizer: Tokenizer) -> TokenIds:
        """[T] tokens, through the chat template where the prompt is a conversation."""
        text = self.text if self.messages is None else render(tokenizer, self.messages)
        assert text is not None
        return encode_prompt(tokenizer, text)


def load_prompts(path: Path | None = None, domains: Sequence[str] = (), per_domain: int = 40) -> list[Prompt]:
    """The first `per_domain` prompts of each domain, at least one. Raises PromptError, UnknownNameError."""
    path = path or _BUNDLED
    prompts = _from_folder(path) if path.is_dir() else _from_lines(path)
    if not prompts:
        raise PromptError(
            f"there are no prompts in {path}", expected="lines of JSON, or a folder with .jsonl, .txt or .md"
        )
    known = list(dict.fromkeys(prompt.domain for prompt in prompts))
    for domain in domains:
        if domain not in known:
            raise UnknownNameError.among("domain", domain, known)
    chosen: list[Prompt] = []
    for domain in domains or known:
        chosen += [prompt for prompt in prompts if prompt.domain == domain][:per_domain]
    return chosen


def _from_lines(path: Path) -> list[Prompt]:
    prompts: list[Prompt] = []
    for number, line in enumerate(_read(path).split("\n"), 1):  # JSON may hold what else splitlines() splits at
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            messages = tuple(item["messages"]) if "messages" in item else None
            prompts.append(Prompt(item["id"], item["domain"], item.get("text"), messages))
        except (ValueError, KeyError, TypeError) as error:
            raise PromptError(f"line {number} of {path} is not a prompt: {error}") from None
        if messages is None and not isinstance(prompts[-1].text, str):
            raise PromptError(f"line {number} of {path} has neither text nor messages")
    return prompts


def _from_folder(folder: Path) -> list[Prompt]:
    prompts: list[Prompt] = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".jsonl":
            prompts += _from_lines(path)
        elif path.suffix in (".txt", ".md"):
            text = _read(path)
            if not text.strip():
                raise PromptError(f"{path} is empty", expected="a text to be continued")
            prompts.append(Prompt(path.stem, folder.resolve().name, text, None))
    return prompts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PromptError(
            f"cannot read prompts from {path}: {error.strerror}", fix="Give a file of JSON lines."
        ) from None
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not valid UTF-8: {error}", fix="Convert it to UTF-8.") from None
