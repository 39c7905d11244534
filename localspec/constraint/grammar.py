"""Descriptions of what an answer may look like; nothing is compiled here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from localspec.errors import SettingError

WHITE_SPACE = r"[ \n\r\t]{1,40}"
"""Between tokens of JSON: what an indented line needs. Without an end a model can lose itself in it."""

Kind: TypeAlias = Literal["json_schema", "regex", "lark"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """kind: how `source` is written.  lenient: leave out the parts of a JSON schema that cannot be enforced, instead of
    refusing it.  thought_end: the answer begins behind this text (`</think>`, say); before it anything may stand.

    Whether a grammar can be compiled shows in `constrain`. Objects come out with the properties in the schema's
    order, and with some white space between tokens, if the model likes.
    """

    kind: Kind
    source: str
    lenient: bool = False
    thought_end: str = ""

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str, *, lenient: bool = False) -> Grammar:
        """JSON that satisfies a schema, given as JSON text or what that stands for. Raises SettingError for what is
        no schema at all."""
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise SettingError("the JSON schema is not JSON", got=error) from None
        if not isinstance(schema, Mapping | bool):
            raise SettingError("the JSON schema is of the wrong type", got=type(schema).__name__, expected="an object")
        if isinstance(schema, bool):
            if not schema:
                raise SettingError("the JSON schema `false` allows no answer")
            schema = {}
        try:
            return cls("json_schema", json.dumps(schema), lenient)
        except (TypeError, ValueError, RecursionError) as error:
            raise SettingError("the JSON schema holds what JSON cannot say", got=error) from None

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that a regular expression (Rust's syntax, no look-around) matches from end to end."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """A context-free grammar in llguidance's variety of Lark, or in llama.cpp's GBNF, told apart by `::=`. In Lark,
        `%json {...}` stands for a schema."""
        return cls("lark", text)

    def behind(self, thought_end: str) -> Grammar:
        """The same behind a thought that ends with this text; unchanged if there is no such text."""
        return replace(self, thought_end=thought_end)
