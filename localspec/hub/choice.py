"""Which files of a repository make one model. The same rules serve listings of the Hub and folders here."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from localspec.errors import HubMissingError, ModelFileError

from .trust import is_safe_name

GGUF, SAFETENSORS = "gguf", "safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

PREFERRED = ("Q4_K_M", "Q4_0", "UD-Q4_K_XL", "Q4_K_S", "IQ4_XS", "MXFP4", "Q5_K_M", "Q6_K", "Q8_0")
"""Quantisations taken without being asked for, first one first: small, and close to the original."""

_SMALL = frozenset(
    {
        CONFIG,
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
_PART = re.compile(r"(?P<base>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_LABEL = re.compile(r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|BF16|F16|FP16|F32))$", re.IGNORECASE)
_HELPER = re.compile(r"(?:.*/)?(?:mmproj|mtp|imatrix)[-._].*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class GgufModel:
    """One GGUF model of a repository: its files in order, the first of which is opened."""

    files: tuple[str, ...]
    num_parts: int

    @property
    def stem(self) -> str:
        """The first file without part number and extension."""
        part = _PART.fullmatch(self.files[0])
        return part["base"] if part else self.files[0].removesuffix(".gguf")

    @property
    def label(self) -> str | None:
        """Its quantisation as the name says it, None where it does not."""
        folder, _, last = self.stem.rpartition("/")
        found = _LABEL.search(last) or _LABEL.search(folder)
        return found[1].upper() if found else None

    @property
    def is_helper(self) -> bool:
        """A vision projector, a bare MTP head or an importance matrix: no model to talk to."""
        return _HELPER.fullmatch(self.files[0]) is not None

    def check_complete(self, where: str) -> None:
        """Raise HubMissingError if parts are missing."""
        if len(self.files) != self.num_parts:
            raise HubMissingError(
                f"{where} lacks parts of {self.stem}", got=f"{len(self.files)} parts", expected=self.num_parts
            )


def choose_format(names: Collection[str], choice: str | None, formats: Sequence[str], where: str) -> str:
    """GGUF or safetensors: the first of `formats` that is there; a choice means GGUF. Raises HubMissingError."""
    there = {GGUF} if any(name.endswith(".gguf") for name in names) else set()
    if CONFIG in names and any(_is_weights(name) for name in names):
        there.add(SAFETENSORS)
    wanted = [kind for kind in formats if kind in there and (choice is None or kind == GGUF)]
    if wanted:
        return wanted[0]
    if choice is not None and SAFETENSORS in there:
        raise HubMissingError(
            f"{where} has no GGUF files to choose {choice!r} from", fix="Leave out what follows the colon."
        )
    got = " and ".join(sorted(there)) or "neither GGUF files nor config.json with safetensors"
    raise HubMissingError(
        f"{where} has no model that can be read here",
        got=got,
        expected=" or ".join(formats),
        fix="Choose another repository, or another --backend." if there else "Choose another repository.",
    )


def choose_gguf(names: Iterable[str], choice: str | None, where: str) -> GgufModel:
    """The GGUF model of that quantisation or file name; without a choice the only or the preferred one.

    Raises HubMissingError, with a list of what there is, if nothing or more than one thing fits.
    """
    models = gguf_models(names)
    fitting = _fitting(models, choice)
    if len(fitting) == 1:
        fitting[0].check_complete(where)
        return fitting[0]
    if choice is None:
        what = f"{where} has several models, none of them in a preferred quantisation"
    elif fitting:
        what = f"{where} has several models of quantisation {choice}"
    else:
        what = f"{where} has no model {choice!r}"
    raise HubMissingError(
        what, expected=f"one of {_choices(fitting or models)}", fix=f"Write it after a colon: {where}:..."
    )


def gguf_models(names: Iterable[str]) -> list[GgufModel]:
    """All GGUF models, parts put together, sorted by name."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in sorted(name for name in names if name.endswith(".gguf")):
        part = _PART.fullmatch(name)
        groups.setdefault((part["base"], int(part["count"])) if part else (name, 1), []).append(name)
    return [GgufModel(tuple(files), count) for (_, count), files in groups.items()]


def _fitting(models: Sequence[GgufModel], choice: str | None) -> list[GgufModel]:
    main = [model for model in models if not model.is_helper]
    if choice is None:
        by_label = {label: [model for model in main if model.label == label] for label in PREFERRED}
        return main if len(main) == 1 else next(filter(None, by_label.values()), [])
    by_file = [model for model in models if choice in (*model.files, model.stem, f"{model.stem}.gguf")]
    exact = [model for model in main if model.label == choice.upper()]
    dynamic = [model for model in main if model.label == f"UD-{choice.upper()}"]
    return by_file or exact or dynamic


def _choices(models: Sequence[GgufModel]) -> str:
    """What may be written after the colon."""
    labels = [model.label for model in models]
    texts = [
        label if label is not None and labels.count(label) == 1 else model.stem.removesuffix(".gguf")
        for label, model in zip(labels, models, strict=True)
    ]
    return ", ".join(texts[:40]) or "nothing: there is no GGUF file"


# ---------------------------------------------------------------- folders


def small_files(names: Collection[str]) -> list[str]:
    """Configuration, tokenizer, chat template and index of a folder; never code."""
    return sorted(name for name in names if name in _SMALL or name == INDEX)


def weight_files(names: Collection[str], index: Mapping[str, object] | None, where: str) -> list[str]:
    """The safetensors files of a folder: those of its index, or without one all of them.

    Raises HubMissingError for a file of the index that is not there, ModelFileError for a bad index.
    """
    if index is None:
        weights = sorted(name for name in names if _is_weights(name))
        return ["model.safetensors"] if "model.safetensors" in weights else weights
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ModelFileError(f"{INDEX} of {where} names no files")
    files = {str(file) for file in table.values()}
    if wrong := [file for file in files if not _is_weights(file) or not is_safe_name(file)]:
        raise ModelFileError(f"{INDEX} of {where} names a file that cannot be weights", got=ascii(wrong[0][:120]))
    if missing := sorted(files - set(names)):
        raise HubMissingError(f"{where} lacks weights that its index names", got=f"no {missing[0]}")
    return sorted(files)


def _is_weights(name: str) -> bool:
    """Subfolders hold other models: adapters, heads, other precisions."""
    return name.endswith(".safetensors") and "/" not in name
