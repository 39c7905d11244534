"""llama-cpp-python's own decoding (`llama_cpp.Llama`), plain and with its prompt lookup, for benchmarks.

It gets the weights, the threads, the GPU layers and the kind of attention that our backend would use.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from localspec.errors import BackendError
from localspec.peers import Peer, PeerAnswer, PeerLibrary, PeerMode, PeerRequest, require
from localspec.protocols import LoadSettings

from . import loading, native
from .processors import num_cores

_LOOKUP = {"num": 10, "max": 2}
"""LlamaPromptLookupDecoding's own defaults: tokens guessed at a time, longest n-gram looked for."""

_DEFAULT_CONTEXT = 4096


class LlamaCppPython:
    """`PeerLibrary` over the binding's high-level class. It has no way to draft with a second model."""

    name = "llama-cpp-python"
    backend = loading.NAME

    def version(self) -> str:
        """Of the binding."""
        return native.version() if native.is_installed() else ""

    def open(self, target: Path, draft: Path | None, settings: LoadSettings, modes: Sequence[PeerMode]) -> list[Peer]:
        """Plain, then prompt lookup once per mode. `draft` is not used."""
        require(self, readable=loading.is_model_file(target), path=target, reads="a .gguf file")
        lookups = [mode.get(_LOOKUP) for mode in modes]
        opened: list[Peer] = []
        try:
            opened.append(LlamaPeer(f"{self.name} plain", target, settings, None))
            opened += (
                LlamaPeer(f"{self.name} lookup:num={lookup['num']},max={lookup['max']}", target, settings, lookup)
                for lookup in lookups
            )
        except BaseException:
            for peer in opened:
                peer.close()
            raise
        return opened


class LlamaPeer:
    """A `Llama` object. lookup: settings of its prompt lookup, or None to decode plainly."""

    def __init__(self, name: str, path: Path, settings: LoadSettings, lookup: dict[str, int] | None) -> None:
        lib = native.library()
        has_gpu = bool(lib.llama_supports_gpu_offload())
        gpu_layers = loading.choose_gpu_layers(settings, has_gpu)
        threads = settings.threads or num_cores()
        module: Any = importlib.import_module("llama_cpp")
        self.name = name
        self._draft = None if lookup is None else _counting(lookup)
        with _extra_buffers_as_ours(lib, settings):
            try:
                self._llama: Any = module.Llama(
                    str(path),
                    n_ctx=settings.context or _DEFAULT_CONTEXT,
                    n_threads=threads,
                    n_threads_batch=threads,
                    n_gpu_layers=gpu_layers,
                    type_k=loading.CACHE_TYPES[settings.cache_type or "f16"],
                    type_v=loading.CACHE_TYPES[settings.cache_type or "f16"],
                    flash_attn=settings.flash_attention if settings.flash_attention is not None else gpu_layers > 0,
                    draft_model=self._draft,
                    verbose=False,
                )
            except (ValueError, RuntimeError, AssertionError) as error:
                raise BackendError(f"llama-cpp-python cannot load {path.name}: {error}") from error

    def decode(self, request: PeerRequest) -> PeerAnswer:
        """Through `Llama.generate`, all truncations and penalties off."""
        llama = self._llama
        llama.reset()
        llama.set_seed(request.seed & 0xFFFFFFFF)
        if self._draft is not None:
            self._draft.num_calls = self._draft.num_guessed = 0
        tokens: list[int] = []
        first = last = 0.0
        stream = llama.generate(
            list(request.tokens), top_k=0, top_p=1.0, min_p=0.0, temp=request.temperature, repeat_penalty=1.0
        )
        try:
            for token in stream:
                last = perf_counter()
                first = first or last
                tokens.append(int(token))
                if len(tokens) == request.max_tokens or token in request.stop_tokens:
                    break
        except RuntimeError as error:
            raise BackendError(f"llama-cpp-python failed while decoding: {error}") from error
        finally:
            stream.close()
        # the first token comes with the prompt, and each pass behind it has asked for guesses
        timed = (len(tokens) - 1, (last - first) * 1e3)
        if self._draft is None:
            return PeerAnswer(tuple(tokens), *timed, len(tokens))
        return PeerAnswer(tuple(tokens), *timed, 1 + self._draft.num_calls, self._draft.num_guessed)

    def close(self) -> None:
        """Free the model."""
        self._llama.close()


def _counting(lookup: dict[str, int]) -> Any:
    """The library's prompt lookup, with its calls and guesses counted."""
    speculative: Any = importlib.import_module("llama_cpp.llama_speculative")

    class Counting(speculative.LlamaPromptLookupDecoding):  # type: ignore[misc] # its module is imported late
        num_calls = 0
        num_guessed = 0

        def __call__(self, input_ids: Any, /, **kwargs: Any) -> Any:
            guesses = super().__call__(input_ids, **kwargs)
            self.num_calls += 1
            self.num_guessed += len(guesses)
            return guesses

    return Counting(max_ngram_size=lookup["max"], num_pred_tokens=lookup["num"])


@contextmanager
def _extra_buffers_as_ours(lib: Any, settings: LoadSettings) -> Iterator[None]:
    """`Llama` cannot be told to leave the extra CPU buffers alone, and where they crash so would it: while it
    loads, the defaults that it starts from say what our backend decided."""
    wanted, _ = loading.choose_extra_buffers(settings)
    original = lib.llama_model_default_params

    def defaults() -> Any:
        params = original()
        params.use_extra_bufts = wanted
        return params

    lib.llama_model_default_params = defaults
    try:
        yield
    finally:
        lib.llama_model_default_params = original


PEER: PeerLibrary = LlamaCppPython()
