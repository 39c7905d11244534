"""Sizes of recurrent states, read from headers, against those that the runtimes make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from localspec.formats import states, summarize
from localspec.formats.gguf import read_header
from localspec.loading import get_backend, load_model, plan_parts
from localspec.memory import Machine, make_plan
from localspec.protocols import HostTokens, LoadSettings, Step, chain_parents
from localspec.testing.gguf_architectures import ARCHITECTURES, write_architecture

RECURRENT = [name for name, one in ARCHITECTURES.items() if one.kind.startswith(("recurrent", "hybrid"))]
HEADER = 1024
"""Bytes at most that llama.cpp writes around the numbers of a saved sequence."""

has_llama = pytest.mark.skipif(not get_backend("llamacpp").is_installed(), reason="needs llama.cpp")
has_mlx = pytest.mark.skipif(not get_backend("mlx").is_installed(), reason="needs MLX")


@has_llama
@pytest.mark.parametrize("name", RECURRENT)
def test_a_saved_sequence_of_llama_cpp_is_as_large_as_planned(name: str, tmp_path: Path) -> None:
    path = write_architecture(tmp_path / "m.gguf", name)
    found = summarize(path)
    assert found.is_recurrent and found.state_values
    model = load_model(path, "llamacpp", LoadSettings(context=256))
    try:
        state: Any = model.open()
        tokens = HostTokens(np.arange(3, dtype=np.int32) + 20)
        model.forward([Step(state, (tokens,), chain_parents(state, 3), (2,))])
        saved = len(bytes(state.cache.context.save(state._work).buffer))
    finally:
        model.close()
    least = found.state_values * 4 + 3 * found.kv_values * 2  # F32 states, F16 keys and values
    assert least <= saved <= least + HEADER, f"{saved} bytes saved, {least} planned"


@has_llama
def test_states_are_in_the_plan_once_per_snapshot(tmp_path: Path) -> None:
    path = write_architecture(tmp_path / "m.gguf", "mamba")
    plan = make_plan(plan_parts(path, None, "llamacpp"), LoadSettings(), 256, Machine(None, None), num_sequences=2)
    [line] = [line for line in plan.lines if line.what.startswith("states")]
    num_ids = import_module(f"{type(get_backend('llamacpp')).__module__}.recurrent").NUM_IDS
    assert (line.num_bytes, line.times) == (num_ids * 4 * (summarize(path).state_values or 0), 2)
    assert not plan.notes


def test_a_state_of_unknown_size_is_said(tmp_path: Path) -> None:
    path = write_architecture(tmp_path / "m.gguf", "mamba")
    path.write_bytes(path.read_bytes().replace(b"mamba.ssm.inner_size", b"mamba.ssm.inner_sise"))
    assert "inner_sise" in str(read_header(path).metadata)
    assert summarize(path).state_values is None and summarize(path).is_recurrent
    plan = make_plan(plan_parts(path, None, "llamacpp"), LoadSettings(), 256, Machine(None, None))
    assert "not counted" in plan.notes[0]


@has_mlx
@pytest.mark.parametrize(
    "name",
    ["falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "mamba", "mamba2", "nemotron_h", "plamo2",
     "qwen3_5", "qwen3_next", "recurrent_gemma", "rwkv7", "bailing_hybrid", "qwen3"],
)  # fmt: skip
def test_a_folders_states_are_as_large_as_those_of_mlx_lm(name: str) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.cache import ArraysCache, make_prompt_cache

    tiny: Any = import_module("scripts.tiny_mlx")
    module: Any = tiny.build(name)
    caches, weights = make_prompt_cache(module), cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))
    for token in range(6):
        module(mx.array([[token + 1]]), cache=caches)
    made = sum(array.size for array in _arrays(caches, ArraysCache))
    file: Any = import_module(f"mlx_lm.models.{name}")
    config: Mapping[str, Any] = tiny.BASE | tiny.OVERRIDES.get(name, {})
    config = config | config.get("text_config", {})
    arguments: Any = getattr(file, "TextModelArgs", file.ModelArgs)
    known = {field.name for field in fields(arguments)}
    found = states.of_folder(
        {key: value for key, value in config.items() if key in known},
        name,
        [path for path, _ in weights],
    )
    assert found == made


def _arrays(cache: Any, kind: type) -> Iterator[Any]:
    """Arrays of the caches that keep a state, wherever they are nested."""
    if isinstance(cache, kind):
        yield from (array for array in vars(cache)["cache"] if array is not None)
    for inner in cache if isinstance(cache, list) else vars(cache).get("caches", ()):
        yield from _arrays(inner, kind)
