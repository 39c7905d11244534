"""llama.cpp's architectures, tiny, with random weights, and how each is examined.

Every architecture of `localspec/testing/gguf_architectures.py` is written as a file and examined twice, rows
compared bit for bit: as loaded by default, with chains; and with trees asked for, with trees. Before that a
chain's rows must be those of a bare llama.cpp, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from localspec.loading import get_backend
from localspec.protocols import HostTokens, LanguageModel, LoadSettings, Step, chain_parents
from localspec.testing.architectures import TOLERANCE, Finding, distance, examine
from localspec.testing.gguf_architectures import ARCHITECTURES, write_architecture
from localspec.types import Logits, TokenIds

_SETTINGS = LoadSettings(context=448, num_sequences=3)
_MAX_LENGTH = 150  # beyond windows, and beyond the 63 tokens after which flash attention works otherwise


def names() -> list[str]:
    """All architectures."""
    return list(ARCHITECTURES)


def versions() -> str:
    """What was examined."""
    return f"llama-cpp-python {version('llama_cpp_python')}"


def examined(name: str, rounds: int = 200, weights: str | None = None) -> Finding:
    """One architecture, written, judged and deleted again."""
    with TemporaryDirectory() as folder:
        path = write_architecture(Path(folder) / f"{name}.gguf", name, quantization=weights or "F32")
        return _judged(name, path, rounds)


def _judged(name: str, path: Path, rounds: int) -> Finding:
    backend = get_backend("llamacpp")

    def by_default() -> LanguageModel:
        model = backend.load(path, _SETTINGS)
        if not model.capabilities.exact_trees:  # then only chains are promised to the bit
            model.capabilities = replace(model.capabilities, trees=False)
        return model

    def with_trees() -> LanguageModel:
        return backend.load(path, replace(_SETTINGS, trees=True))

    difference = _from_own_rows(path, by_default)
    if difference > TOLERANCE:
        return Finding(name, "failed", f"rows are {difference:.2g} standard deviations from llama.cpp's own")
    chains = examine(name, by_default, num_rounds=rounds, max_length=_MAX_LENGTH, tolerance=0.0)
    if chains.kind != "chain":
        return chains
    trees = examine(name, with_trees, num_rounds=rounds, max_length=_MAX_LENGTH, tolerance=0.0)
    kind = ARCHITECTURES[name].kind
    if trees.kind == "tree":
        return replace(trees, reason=f"{kind}; trees when asked for, chains by default")
    if trees.kind == "refused":
        return replace(chains, reason=f"{kind}; {chains.reason}")
    return trees


def _from_own_rows(path: Path, open_model: Callable[[], LanguageModel]) -> float:
    """Largest difference from llama.cpp's own rows, in standard deviations, over 40 tokens in three passes."""
    ids = np.random.default_rng(1).integers(3, 300, 40).astype(np.int32)
    model, rows = open_model(), []
    state = model.open()
    for part in np.split(ids, [13, 27]):
        [scores] = model.forward([Step(state, (HostTokens(part),), chain_parents(state, len(part)))])
        rows.append(scores.rows(range(len(part))).copy())
        state.keep(range(len(part)))
    model.close()
    return distance(np.concatenate(rows), _own_rows(path, ids))


def _own_rows(path: Path, ids: TokenIds) -> Logits:
    """[T, V] rows of all tokens, run in one pass by a bare llama.cpp."""
    from llama_cpp import llama_cpp as lib

    model_params, params = lib.llama_model_default_params(), lib.llama_context_default_params()
    model_params.use_extra_bufts = False
    params.n_ctx, params.flash_attn_type = 448, 0
    model = lib.llama_model_load_from_file(str(path).encode(), model_params)
    context = lib.llama_init_from_model(model, params)
    batch = lib.llama_batch_init(len(ids), 0, 1)
    for place, token in enumerate(ids.tolist()):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    batch.n_tokens = len(ids)
    assert lib.llama_decode(context, batch) == 0
    num_tokens = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    rows = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(ids), num_tokens)).copy()
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return rows


def remarks() -> str:
    """What stands below the table."""
    return "Rows are compared bit for bit. *tree*: chains by default, trees when loaded for them.\n"
