"""Reading tool calls out of an answer while it is written: text, and calls whose arguments come piece by piece."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes calls: `opening`, then JSON objects with the name and, under the key `arguments`, the
    arguments, then `closing`, with `gap` between markers and objects. listed: the objects stand in one array.
    id_size: ids of exactly so many letters and digits (0: any id will do).  separator: if there is one, a call is the
    name, this, and the arguments alone.

    Where `opening` is empty an answer is a call if it is one from its first character on.
    """

    name: str
    opening: str
    closing: str
    arguments: str = "arguments"
    listed: bool = False
    id_size: int = 0
    gap: str = "\n"
    separator: str = ""


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>")
LLAMA3 = ToolFormat("llama3", "", "", arguments="parameters")
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "", listed=True, id_size=9)
MISTRAL_NAMED = ToolFormat("mistral, names first", "[TOOL_CALLS]", "", id_size=9, gap="", separator="[ARGS]")

PYTHON_TAG = "<|python_tag|>"
"""Llama 3 may write this before a call."""


# ---------------------------------------------------------------- what comes out


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text beside the calls."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call begins. index: from 0 within the answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, which together are JSON."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call ends. complete: its arguments are a JSON object; otherwise it was cut off or is broken."""

    index: int
    complete: bool


Delta: TypeAlias = TextDelta | CallBegin | CallArguments | CallEnd


def new_id(tool_format: ToolFormat) -> str:
    """A fresh id of a call, fit for the format's template."""
    if not tool_format.id_size:
        return f"call_{secrets.token_hex(12)}"
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(tool_format.id_size))


# ---------------------------------------------------------------- JSON, piece by piece

_PLAIN = frozenset(string.ascii_letters + string.digits + "+-.,: \t\r\n")


class JsonEnd:
    """Finds where a JSON object or array ends, fed piece by piece. Sees brackets and strings, nothing else."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._in_string = False
        self._escaped = False
        self.ended = False
        self.broken = False  # what came last cannot stand in JSON

    def feed(self, text: str) -> int:
        """How much of `text` still belongs to the value. Less than all of it only if it `ended` or is `broken`."""
        for place, char in enumerate(text):
            if not self._take(char):
                self.broken = True
                return place
            if not self._open:
                self.ended = True
                return place + 1
        return len(text)

    def _take(self, char: str) -> bool:
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = not self._escaped and char == "\\"
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._open.append("}" if char == "{" else "]")
        elif char in "}]":
            return bool(self._open) and self._open.pop() == char
        else:
            return char in _PLAIN
        return True


_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_START = '{"name":'
_CALL_ID = "[CALL_ID]"
_NAMED = re.compile(r"([A-Za-z0-9_.-]*)(?:\[CALL_ID\][A-Za-z0-9]*)?")


class _Body:
    """One call's JSON object in the making; gives out its arguments as they come, where the name stands first. With a
    name given, the object is the arguments."""

    def __init__(self, name: str | None = None) -> None:
        self.text = ""
        self.name = name
        self.whole = JsonEnd()
        self._arguments = None if name is None else JsonEnd()
        self._shown = 0

    def feed(self, text: str) -> tuple[int, str]:
        """(how much of `text` was taken, arguments that came out)."""
        taken = self.whole.feed(text)
        self.text += text[:taken]
        if self._arguments is None:
            head = _HEAD.match(self.text)
            name = _parsed(head[1]) if head is not None else None
            if head is None or not isinstance(name, str):
                return taken, ""
            self.name, self._shown, self._arguments = name, head.end(), JsonEnd()
        if self._arguments.ended or self._arguments.broken:
            return taken, ""
        size = self._arguments.feed(self.text[self._shown :])
        arguments = self.text[self._shown : self._shown + size]
        self._shown += size
        return taken, arguments

    @property
    def has_all_arguments(self) -> bool:
        """Did the arguments come to their end?"""
        return self._arguments is not None and self._arguments.ended

    @property
    def starts_like_a_call(self) -> bool:
        """Could it be one with the name first, as far as it goes?"""
        start = "".join(self.text.split())[: len(_START)]
        return _START.startswith(start)

    def parsed(self, key: str) -> tuple[str, str] | None:
        """(name, arguments as JSON), read from the finished object; None if it is no call."""
        call = _parsed(self.text)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        arguments = call.get(key, call.get("arguments", call.get("parameters", {})))
        if isinstance(arguments, str):  # JSON within JSON
            return call["name"], arguments
        return call["name"], json.dumps(arguments, ensure_ascii=False)


def _parsed(text: str) -> Any:
    """JSON, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# ---------------------------------------------------------------- the reader


class CallReader:
    """Takes the answer's text as it comes, gives text and calls. What turns out to be no call comes out as text: no
    character is lost but the markers of calls, white space around them, and another call's beginning at the very end.

    names: tools that there are; where a format has no marker, only those make a call.
    """

    def __init__(self, tool_format: ToolFormat, names: Collection[str]) -> None:
        self._format = tool_format
        self._names = frozenset(names)
        self._text = ""  # not understood yet
        self._held = ""  # markers and white space, which are text if no call follows
        self._body = _Body()
        self._begun = False  # was the call in hand announced?
        self._sent = ""  # its arguments so far
        self._state: Callable[[list[Delta]], bool] = self._in_text if tool_format.opening else self._before_call
        self.num_calls = 0

    def push(self, text: str) -> list[Delta]:
        """What this text brings."""
        self._text += text
        deltas: list[Delta] = []
        while self._state(deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        """What is left at the end of the answer."""
        deltas: list[Delta] = []
        cut_off = self._state != self._in_text and self._state != self._only_text
        if self._state == self._in_body and self._begun:
            self._end_body(deltas)
        elif self._state == self._in_body:
            self._held += self._body.text
        self._hold(len(self._text))
        if not self.num_calls or (self._held.strip() and not cut_off):
            self._say_held(deltas)
        return deltas

    # ------------------------------------------------------------ states: each says whether the next may go on

    def _in_text(self, deltas: list[Delta]) -> bool:
        """Text up to the next opening, without the white space before it."""
        opening = self._format.opening
        start = self._text.find(opening) if opening else -1
        found = start >= 0
        end = start if found else len(self._text) - _overlap(self._text, opening)
        said = self._text[:end].rstrip() if opening else self._text
        if said:
            deltas.append(TextDelta(said))
        self._text = self._text[len(said) :]
        if found:
            self._hold(end - len(said) + len(opening))
            self._state = self._before_call
        return found

    def _before_call(self, deltas: list[Delta]) -> bool:
        """White space, and brackets where calls are listed, before an object."""
        self._hold(len(self._text) - len(self._text.lstrip()))
        if not self._text:
            return False
        if self._format.separator:
            return self._before_arguments(deltas)
        if not self._format.opening and _may_be(self._text, PYTHON_TAG):
            self._hold(len(PYTHON_TAG) if self._text.startswith(PYTHON_TAG) else 0)
            return not _may_be(self._text, PYTHON_TAG)
        if self._text[0] == "{":
            self._body, self._begun, self._sent = _Body(), False, ""
            self._state = self._in_body
        elif self._format.listed and self._text[0] in "[,":
            self._hold(1)
        else:
            self._back_to_text(deltas)
        return True

    def _before_arguments(self, deltas: list[Delta]) -> bool:
        """A name, perhaps with an id behind it, up to the separator."""
        head = _NAMED.match(self._text)
        assert head is not None  # it may match nothing
        rest = self._text[head.end() :]
        separator = self._format.separator
        if head[1] and rest.startswith(separator + "{"):
            self._hold(head.end() + len(separator))
            self._body, self._begun, self._sent = _Body(head[1]), False, ""
            self._state = self._in_body
            return True
        if not rest or _CALL_ID.startswith(rest) or (separator + "{").startswith(rest):
            return False
        self._back_to_text(deltas)
        return True

    def _in_body(self, deltas: list[Delta]) -> bool:
        body = self._body
        taken, arguments = body.feed(self._text)
        self._text = self._text[taken:]
        if arguments and self._is_tool(body.name):
            self._say_arguments(body.name or "", arguments, deltas)
        marked = bool(self._format.opening)
        if body.whole.ended or body.whole.broken or not (marked or self._begun or body.starts_like_a_call):
            self._end_body(deltas)
            return True
        return False

    def _after_call(self, deltas: list[Delta]) -> bool:
        """The closing marker, the next call, or text again."""
        rest = self._text.lstrip()
        closing, listed = self._format.closing, self._format.listed
        if closing and rest.startswith(closing):
            self._text, self._state = rest[len(closing) :], self._in_text
        elif listed and rest.startswith("]"):
            self._text, self._state = rest[1:], self._in_text
        elif not rest or (closing and _may_be(rest, closing)):
            return False
        elif rest[0] == "{" or (listed and rest[0] == ","):
            self._text, self._state = rest, self._before_call
        elif not closing and rest[0] == ";":
            self._text, self._state = rest[1:], self._before_call
        else:
            self._state = self._in_text
        return True

    # ------------------------------------------------------------ steps

    def _is_tool(self, name: str | None) -> bool:
        return bool(self._format.opening) or name in self._names

    def _say_arguments(self, name: str, arguments: str, deltas: list[Delta]) -> None:
        """More arguments; the first announce the call."""
        if not self._begun:
            self._begun, self._held = True, ""
            deltas.append(CallBegin(self.num_calls, new_id(self._format), name))
            self.num_calls += 1
        self._sent += arguments
        deltas.append(CallArguments(self.num_calls - 1, arguments))

    def _end_body(self, deltas: list[Delta]) -> None:
        """The object ended or broke off, or it is none that could be a call."""
        body = self._body
        self._state = self._after_call
        if not self._begun and body.whole.ended:
            call = body.parsed(self._format.arguments)
            if call is not None and self._is_tool(call[0]):
                self._say_arguments(*call, deltas)
        if self._begun:
            whole = body.whole.ended or body.has_all_arguments
            deltas.append(CallEnd(self.num_calls - 1, whole and isinstance(_parsed(self._sent), dict)))
        else:
            self._held += body.text
            self._back_to_text(deltas)

    def _back_to_text(self, deltas: list[Delta]) -> None:
        self._say_held(deltas)
        self._state = self._in_text
        if not self._format.opening:  # one that began as text stays text
            self._state = self._only_text

    def _only_text(self, deltas: list[Delta]) -> bool:
        self._hold(len(self._text))
        self._say_held(deltas)
        return False

    def _hold(self, size: int) -> None:
        self._held += self._text[:size]
        self._text = self._text[size:]

    def _say_held(self, deltas: list[Delta]) -> None:
        if self._held:
            deltas.append(TextDelta(self._held))
        self._held = ""


def _may_be(text: str, marker: str) -> bool:
    """Does it begin with the marker, or could it when more comes?"""
    return bool(text) and (text.startswith(marker) or marker.startswith(text))


def _overlap(text: str, marker: str) -> int:
    """Length of the longest proper prefix of `marker` that ends `text`."""
    sizes = range(min(len(text), len(marker) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(marker[:size])), 0)
