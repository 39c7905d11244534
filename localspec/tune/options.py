"""Which runtime options are worth trying here."""

from __future__ import annotations

from dataclasses import fields
from itertools import product
from typing import Any

from localspec.protocols import LanguageModel, LoadSettings

Options = dict[str, bool | int | str]
"""`LoadSettings` fields that move a model's speed, by name."""

_MOST_AT_ONCE = 8


def choices(model: LanguageModel, own_settings: frozenset[str], given: LoadSettings) -> dict[str, list[Any]]:
    """Per option of the backend that the user left open, the values to try, the one that the backend chose first.

    model: loaded with what was given; it says what the backend chose. Threads play no part where layers are on a
    GPU, nor do extra CPU buffers; extra buffers are tried without where the backend found that they work.
    """
    chosen = dict(model.info.options)
    free = {field.name for field in fields(given) if getattr(given, field.name) == field.default} & own_settings
    free &= chosen.keys()
    found: dict[str, list[Any]] = {}
    on_gpu = bool(chosen.get("gpu_layers", 0))
    if "threads" in free and not on_gpu:
        found["threads"] = _threads(int(chosen["threads"]))
    if "flash_attention" in free:
        found["flash_attention"] = [False, True] if chosen["flash_attention"] is False else [True, False]
    if "extra_buffers" in free and not on_gpu:
        found["extra_buffers"] = [True, False] if chosen["extra_buffers"] else []
    return {name: values for name, values in found.items() if len(values) > 1}


def _threads(cores: int) -> list[int]:
    """All numbers where they are few, else quarters."""
    counts = range(1, cores + 1) if cores <= 4 else [cores // 4, cores // 2, 3 * cores // 4, cores]
    return sorted(set(counts), reverse=True)


def combinations(tried: dict[str, list[Any]]) -> list[Options]:
    """Every combination where they are few; else each option varied alone, the others as the backend chose them."""
    every = [dict(zip(tried, values, strict=True)) for values in product(*tried.values())]
    if len(every) <= _MOST_AT_ONCE:
        return every
    first = every[0]
    return [first] + [{**first, name: value} for name, values in tried.items() for value in values[1:]]


def joining(
    model: LanguageModel, own_settings: frozenset[str], given: LoadSettings, tried: dict[str, list[Any]]
) -> Options | None:
    """What may bring width 1 into the class of the wider passes, where the backend says that it lies outside: keys and
    values in bfloat16 under flash attention (measured for llama.cpp on a CPU, docs/backends.md). None where the user
    decided otherwise, or where there is no such option."""
    chosen = dict(model.info.options)
    fixed = given.cache_type is not None or given.flash_attention is False or bool(chosen.get("gpu_layers", 0))
    if "cache_type" not in own_settings or fixed or model.capabilities.width_class.min_width == 1:
        return None
    first: Options = {name: values[0] for name, values in tried.items()}
    return {**first, "flash_attention": True, "cache_type": "bf16"}


def described(options: Options) -> str:
    """For people: threads 2, flash attention, no extra buffers, bf16 cache."""
    words = []
    for name, value in options.items():
        text = name.replace("_", " ")
        if isinstance(value, bool):
            words.append(text if value else f"no {text}")
        elif isinstance(value, str):
            words.append(f"{value} {text.removesuffix(' type')}")
        else:
            words.append(f"{value} {text}" if value != 1 else f"1 {text.removesuffix('s')}")
    return ", ".join(words) or "as the backend chooses"
