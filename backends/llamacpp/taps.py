"""Hidden states of a target, read from llama.cpp behind each pass, with its rows: the inputs of some layers, and the
state behind the last one.

llama.cpp exports these functions for its own programs, with C++ names and without a promise to keep them, so they
are looked up when a head is loaded; without them heads are refused and nothing else changes. It ends the process
where an architecture's graph does not publish its layers' inputs, or a layer does not exist: hence `check`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from localspec.errors import UnsupportedModelError

from . import native

Features: TypeAlias = NDArray[np.float32]
"""[T, W] hidden states of T tokens, those of several taps side by side."""

PUBLISHING = frozenset(
    {
        "bailingmoe3", "deepseek4", "gemma4", "hunyuan-vl", "lfm2", "llama", "mimo2", "minimax-01", "minimax-m2",
        "muse-glimmer", "nanbeige", "nemotron-h", "openai-moe", "qwen3", "qwen3moe", "qwen3next", "qwen35", "qwen35moe",
        "qwen4exp",
    }
)  # fmt: skip
"""Architectures whose graphs publish the inputs of their layers [src/models of llama-cpp-python 0.3.36]."""

GUESSING_AHEAD = frozenset({"qwen3next", "qwen35", "qwen35moe"})
"""Architectures whose MTP layer was run here; it is loaded with them."""

_BEHIND_THE_LAST = frozenset({"deepseek4", "mimo2", "nemotron-h"})
"""Of them, those that also publish what leaves the last layer."""

_POINTER, _FLOATS = ctypes.c_void_p, ctypes.POINTER(ctypes.c_float)
_FUNCTIONS: dict[str, tuple[tuple[str, str], list[Any], Any]] = {
    "set_layer": (
        (
            "_Z30llama_set_embeddings_layer_inpP13llama_contextjb",
            "?llama_set_embeddings_layer_inp@@YAXPEAUllama_context@@I_N@Z",
        ),
        [_POINTER, ctypes.c_uint32, ctypes.c_bool],
        None,
    ),
    "get_layer": (
        (
            "_Z30llama_get_embeddings_layer_inpP13llama_contextj",
            "?llama_get_embeddings_layer_inp@@YAPEAMPEAUllama_context@@I@Z",
        ),
        [_POINTER, ctypes.c_uint32],
        _FLOATS,
    ),
    "set_final": (
        (
            "_Z26llama_set_embeddings_nextnP13llama_contextbb",
            "?llama_set_embeddings_nextn@@YAXPEAUllama_context@@_N1@Z",
        ),
        [_POINTER, ctypes.c_bool, ctypes.c_bool],
        None,
    ),
    "get_final": (
        (
            "_Z26llama_get_embeddings_nextnP13llama_context",
            "?llama_get_embeddings_nextn@@YAPEAMPEAUllama_context@@@Z",
        ),
        [_POINTER],
        _FLOATS,
    ),
}


@lru_cache(maxsize=1)
def functions() -> dict[str, Callable[..., Any]]:
    """llama.cpp's functions by our names. Raises UnsupportedModelError where this build lacks one."""
    library: Any = native.library()._lib
    found: dict[str, Callable[..., Any]] = {}
    for name, (symbols, arguments, result) in _FUNCTIONS.items():
        function = next((getattr(library, one) for one in symbols if hasattr(library, one)), None)
        if function is None:
            raise UnsupportedModelError(
                "this build of llama.cpp does not export what trained heads need",
                got=f"no {symbols[0]} in llama-cpp-python {native.version()}",
                expected="llama-cpp-python 0.3.36 or a later one that still has it",
                fix="Use another drafter: a draft model, or ngram.",
            )
        function.argtypes, function.restype = arguments, result
        found[name] = function
    return found


@dataclass(frozen=True, slots=True)
class Taps:
    """layers: whose inputs are read, in this order.  final: also the state that a head inside the target reads,
    behind all layers.  hidden: numbers of each."""

    layers: tuple[int, ...]
    final: bool
    hidden: int

    @property
    def width(self) -> int:
        """Numbers per token, W."""
        return (len(self.layers) + self.final) * self.hidden

    def joined(self, other: Taps) -> Taps:
        """All that either of them reads."""
        layers = (*self.layers, *(layer for layer in other.layers if layer not in self.layers))
        return Taps(layers, self.final or other.final, self.hidden)

    def columns(self, part: Taps) -> NDArray[np.int64] | None:
        """Where in a row of all these what `part` reads stands; None: it is the row."""
        if part == self:
            return None
        starts = [self.layers.index(layer) for layer in part.layers] + [len(self.layers)] * part.final
        return np.concatenate([np.arange(self.hidden) + start * self.hidden for start in starts])

    def check(self, architecture: str, num_layers: int) -> None:
        """Raise UnsupportedModelError for what would end the process."""
        functions()
        if self.layers and architecture not in PUBLISHING:
            raise UnsupportedModelError(
                f"llama.cpp does not give away the hidden states of {architecture} models, so no trained head can read "
                "them",
                expected=", ".join(sorted(PUBLISHING)),
                fix="Use the MLX backend, or another drafter.",
            )
        most = num_layers if architecture in _BEHIND_THE_LAST else num_layers - 1
        beyond = [layer - 1 for layer in self.layers if not 0 <= layer <= most]
        if beyond:
            raise UnsupportedModelError(
                "the head reads layers that cannot be read of this target",
                got=f"the output of layer {', '.join(map(str, beyond))}",
                expected=f"-1 (the embedding) to {most - 1}",
                fix="Give the model that the head was trained for.",
            )

    def enable(self, context: Any, on: bool = True) -> None:
        """Have llama.cpp keep these states of every token from the next pass on, or no longer."""
        for layer in self.layers:
            functions()["set_layer"](context, layer, on)
        if self.final:
            functions()["set_final"](context, on, False)

    def read(self, context: Any, into: Features) -> None:
        """Copy the states of the last pass's tokens, in the order of its batch; `into` is [T, W]."""
        count = len(into)
        places = [functions()["get_layer"](context, layer) for layer in self.layers]
        places += [functions()["get_final"](context)] if self.final else []
        for number, place in enumerate(places):
            into[:, number * self.hidden : (number + 1) * self.hidden] = view(place, count, self.hidden)


def view(place: Any, num_rows: int, width: int) -> Features:
    """[num_rows, width] of llama.cpp's own floats, which its next call may overwrite. Raises BackendError for NULL."""
    if not place:
        raise native.no_output("hidden states")
    buffer: Any = (ctypes.c_float * (num_rows * width)).from_address(ctypes.addressof(place.contents))
    rows: Features = np.ndarray((num_rows, width), np.float32, buffer)
    return rows
