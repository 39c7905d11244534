"""The vocabulary of the bundled pair, grammars over it, and walks through what they allow."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import cast

import numpy as np

from localspec.constraint import Constraint, Grammar, constrain
from localspec.loading import get_backend
from localspec.protocols import LanguageModel, Tokenizer
from localspec.types import TokenIds

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ROOT = Path(__file__).resolve().parents[2]


class Vocabulary:
    """As much of a model as a grammar needs: the tokenizer, and a row of logits a little longer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.num_tokens + 7


@cache
def model() -> LanguageModel:
    """The bundled pair's vocabulary; constraints look at nothing else of a model."""
    tokenizer = get_backend("mlx").open_tokenizer(ROOT / "models" / "tiny" / "target.gguf")
    return cast(LanguageModel, Vocabulary(tokenizer))


def follow(grammar: Grammar) -> Constraint:
    constraint = constrain(model(), grammar)
    assert constraint is not None
    return constraint


def text_of(tokens: TokenIds) -> str:
    return b"".join(model().tokenizer.token_bytes(int(token)) for token in tokens).decode()


def walk(constraint: Constraint, rng: np.random.Generator, most: int = 2000) -> tuple[TokenIds, bool]:
    """(an answer of allowed tokens chosen at random, did it end?)"""
    output = np.zeros(0, np.int32)
    while len(output) < most:
        token = int(rng.choice(constraint.mask(output).nonzero()[0]))
        if token in model().tokenizer.stop_tokens:
            return output, True
        output = np.append(output, np.int32(token))
    return output, False
