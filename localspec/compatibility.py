"""What two models' headers say about each other, before the weights of either are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from localspec.errors import PairMismatchError, UnsupportedModelError
from localspec.formats import ModelSummary, gguf, safetensors

_MAX_TOKENIZER = 128 * 2**20
_MAX_IDS = 2**22
_HEAVY = 0.5  # of the target's bytes: from here on a draft pass costs what it should save
_SPECIAL = ("bos", "eos", "pad")
_PACKED = ("Q2", "Q3", "Q4", "4 bits", "3 bits", "2 bits")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """tokens: the texts as the file spells them.  spelling: how, so that only like is compared with like.
    special: ids by name."""

    tokens: Sequence[str]
    spelling: str
    special: Mapping[str, int]

    def difference(self, draft: Vocabulary) -> str | None:
        """The first token of a draft model that is not the target's, in words; "" where there is none, None where
        the files spell their tokens in different ways, or only the padding may differ."""
        if self.spelling != draft.spelling:
            return None
        for token, (mine, other) in enumerate(zip(self.tokens, draft.tokens, strict=False)):
            if mine != other:
                return f"token {token} is {mine[:80]!r} in the target and {other[:80]!r} in the draft model"
        return "" if len(self.tokens) == len(draft.tokens) else None

    def doubts(self, draft: Vocabulary) -> tuple[str, ...]:
        """What else differs between equal vocabularies."""
        mine, other = self.special.get("eos"), draft.special.get("eos")
        if mine == other:
            return ()
        said = f"the draft model's eos token is {other}, the target's {mine}: the target's counts"
        return (f"{said}, the drafter may guess past an end",)


def check_whole(model: ModelSummary, role: str) -> None:
    """Raise UnsupportedModelError for a draft head, which reads another model's hidden states."""
    if model.drafter_kind is None:
        return
    trained_for = f", trained for a target of hidden size {model.target_hidden}" if model.target_hidden else ""
    raise UnsupportedModelError(
        f"the {role} is a draft head, not a model that writes by itself",
        got=f"{model.drafter_kind}{trained_for}",
        fix="Give the model that the head was trained for, and the head with --head.",
    )


def check_draft(target: ModelSummary, draft: ModelSummary) -> tuple[str, ...]:
    """Doubts about a pair, for people. Raises PairMismatchError for a draft model of the target's vocabulary with
    more rows of logits. Another vocabulary is no fault. A head is no draft model: see `check_head`."""
    mine, other = read_vocabulary(target.path), read_vocabulary(draft.path)
    if mine is None or other is None or mine.difference(other) != "":
        return doubts(target, draft)
    if draft.vocab_size > target.vocab_size > 0:
        raise PairMismatchError(
            "the draft model has more rows of logits than the target",
            got=draft.vocab_size,
            expected=f"at most {target.vocab_size}",
            fix="Choose a draft model whose vocabulary is not padded further than the target's.",
        )
    return (*mine.doubts(other), *doubts(target, draft))


def doubts(target: ModelSummary, draft: ModelSummary) -> tuple[str, ...]:
    """What is allowed and will probably not pay."""
    found = []
    share = draft.total_weight_bytes / max(1, target.total_weight_bytes)
    if target.path != draft.path and share >= _HEAVY:
        found.append(
            f"the draft model weighs {share:.0%} of the target ({draft.quantization} and {target.quantization}), so "
            "drafting costs much of what it can save; a smaller drafter, or one with fewer bits, may be faster"
        )
    mine, other = target.trained_context, draft.trained_context
    if mine is not None and other is not None and other < mine:
        found.append(
            f"the draft model was trained for {other} tokens of context and the target for {mine}: beyond that its "
            "guesses get worse"
        )
    return tuple(found)


def translation(target: Path, draft: Path) -> str | None:
    """That guesses will have to be translated, with the first token that differs; None where headers do not
    say so. After loading, `fingerprint` compares in bytes and has the last word. Raises ModelFileError."""
    mine, other = read_vocabulary(target), read_vocabulary(draft)
    difference = mine.difference(other) if mine is not None and other is not None else None
    if not difference:
        return None
    return f"the draft model has another tokenizer ({difference}): guesses will be translated"


def read_vocabulary(path: Path) -> Vocabulary | None:
    """The tokens of a GGUF file or of a folder's tokenizer.json; None where there are none.

    Raises ModelFileError.
    """
    return _of_folder(path) if path.is_dir() else _of_gguf(path)


def _of_gguf(path: Path) -> Vocabulary | None:
    metadata = gguf.read_header(path).metadata
    tokens, kind = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.model")
    if not isinstance(tokens, list) or not isinstance(kind, str):
        return None
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    return Vocabulary(tokens, f"gguf {kind}", {name: value for name, value in ids.items() if isinstance(value, int)})


def _of_folder(path: Path) -> Vocabulary | None:
    if not (path / "tokenizer.json").is_file():
        return None
    content = safetensors.read_json(path / "tokenizer.json", _MAX_TOKENIZER)
    model, added = content.get("model"), content.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict):
        return None
    ids = {text: number for text, number in vocab.items() if type(number) is int}
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and type(entry.get("id")) is int and isinstance(entry.get("content"), str):
            ids[entry["content"]] = entry["id"]
    size = max(ids.values(), default=-1) + 1
    if min(ids.values(), default=0) < 0 or size > _MAX_IDS:
        return None
    tokens = [""] * size
    for text, number in ids.items():
        tokens[number] = text
    special = {}
    config = safetensors.read_json(path / "config.json") if (path / "config.json").is_file() else {}
    for name in _SPECIAL:
        value = config.get(f"{name}_token_id")
        if type(value) is int:
            special[name] = value
    return Vocabulary(tokens, f"tokenizer.json {model.get('type') if isinstance(model, dict) else ''}", special)


def check_head(target: ModelSummary, head: ModelSummary) -> tuple[str, ...]:
    """Doubts about a head for a target, for people. Raises PairMismatchError for one that was trained for another, and
    UnsupportedModelError for what is no head at all, as far as headers tell; the backend has the last word."""
    if head.drafter_kind is None and head.path != target.path:  # a target's file may hold heads of its own
        raise UnsupportedModelError(
            "this is no head that reads a target's hidden states, as far as is known",
            got=f"{head.path.name}, a {head.architecture} model",
            fix="Name a draft model with --draft.",
        )
    for what, got, expected in (
        ("hidden size", head.target_hidden, target.hidden_size),
        ("number of layers", head.num_target_layers, target.num_layers),
    ):
        if got is not None and got != expected:
            raise PairMismatchError(
                f"the {head.drafter_kind} head was trained for another target: its {what} differs",
                got=f"a head for {got}",
                expected=expected,
                fix="Give the model that the head was trained for.",
            )
    if head.path != target.path and any(mark in target.quantization for mark in _PACKED):
        return (f"a head is trained on the whole target: {target.quantization} will cost it some acceptance",)
    return ()
