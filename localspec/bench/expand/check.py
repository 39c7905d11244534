"""Does an expanded model say what the small one says? Both are opened and asked."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localspec.bench.expand.files import Expansion, Progress, read_source
from localspec.bench.prompts import Prompt
from localspec.engine.width import pad
from localspec.formats.conversion import write_gguf_file
from localspec.loading import load_model
from localspec.pair import Pair
from localspec.protocols import HostTokens, LanguageModel, LoadSettings, Step, chain_parents
from localspec.sampling import SamplingParams
from localspec.types import Logits, TokenIds

_WIDTH = 8  # tokens in a pass when rows are compared


@dataclass(frozen=True, slots=True)
class Check:
    """num_equal: of num_prompts greedy answers.  num_equal_rows: of num_rows rows of logits, bit for bit, after the
    tokens of prompts and answers.  difference: the largest of two logits.  num_other_best: rows with another best."""

    backend: str
    num_prompts: int
    num_equal: int
    num_tokens: int
    num_rows: int
    num_equal_rows: int
    num_other_best: int
    difference: float

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def line(self) -> str:
        """For people."""
        return (
            f"on {self.backend}, {self.num_equal} of {self.num_prompts} greedy answers ({self.num_tokens} tokens) are "
            f"the small model's; {self.num_equal_rows} of {self.num_rows} rows of logits the same bits, largest "
            f"difference {self.difference:.1e}, another best token in {self.num_other_best}"
        )


def check(
    source: Path,
    done: Expansion,
    prompts: Sequence[Prompt],
    max_tokens: int,
    backend: str,
    settings: LoadSettings,
    on_prompt: Progress = lambda done, total: None,
) -> Check:
    """Compare the model that `expand` wrote with its source, stored in the same type where that is GGUF.

    The models are open one after the other. Raises what opening them raises.
    """
    total = 2 * len(prompts)
    with _small(source, done) as path:
        model = load_model(path, backend, settings)
        try:
            small = []
            for number, prompt in enumerate(prompts, 1):
                small.append(_asked(model, prompt, max_tokens, None))
                on_prompt(number, total)
        finally:
            model.close()
    model = load_model(Path(done.path), backend, settings)
    try:
        num_equal = num_rows = same = other = 0
        difference = 0.0
        for number, (prompt, (text, want)) in enumerate(zip(prompts, small, strict=True), 1):
            answer, rows = _asked(model, prompt, max_tokens, text)
            apart = np.abs(rows - want).max(axis=1)
            num_equal += answer == text
            num_rows += len(rows)
            same += int(np.count_nonzero(apart == 0))
            other += int(np.count_nonzero(rows.argmax(axis=1) != want.argmax(axis=1)))
            difference = max(difference, float(apart.max()))
            on_prompt(len(prompts) + number, total)
        where = f"{model.info.backend} ({model.info.device})"
    finally:
        model.close()
    num_tokens = sum(len(text) for text, _ in small)
    return Check(where, len(prompts), num_equal, num_tokens, num_rows, same, other, difference)


@contextmanager
def _small(source: Path, done: Expansion) -> Iterator[Path]:
    """The source as a file of the type that was written."""
    if Path(done.path).is_dir():
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.gguf"
        write_gguf_file(path, read_source(source), done.kind, name="small")
        yield path


def _asked(
    model: LanguageModel, prompt: Prompt, max_tokens: int, text: tuple[int, ...] | None
) -> tuple[tuple[int, ...], Logits]:
    """The greedy answer, and the rows [T, V] after the prompt's last tokens and all of `text` (None: the answer)."""
    room = model.info.context_length - max_tokens - _WIDTH
    tokens = prompt.encode(model.tokenizer)[-room:]  # of a long one the end is as good
    with Pair(model, None).session("nothing") as session:
        answer = session.generate(tokens.tolist(), SamplingParams(max_tokens=max_tokens)).tokens
    ids = np.concatenate([tokens, np.array(answer if text is None else text, np.int32)])
    return answer, _rows(model, ids, max(len(tokens) - _WIDTH, 0))


def _rows(model: LanguageModel, ids: TokenIds, start: int) -> Logits:
    """[T - start, V] logits after the tokens from `start` on."""
    state = model.open()
    try:
        found = []
        if start:
            model.forward([Step(state, (HostTokens(ids[:start]),), chain_parents(state, start), ())])
            state.keep(range(start))
        for place in range(start, len(ids), _WIDTH):
            piece = ids[place : place + _WIDTH]
            step = Step(state, (HostTokens(piece),), chain_parents(state, len(piece)))
            [scores] = model.forward([pad(step, model.capabilities.width_class)])
            found.append(np.array(scores.rows(range(len(piece)))))
            state.keep(range(len(piece)))
        return np.concatenate(found)
    finally:
        state.close()
