"""A llama_context that runs a draft architecture: its tokens are hidden states, token ids, or both.

One per sequence of the target, as the target's own: what a sequence is told does not depend on its neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from localspec.errors import BackendError
from localspec.types import Logits

from . import native
from .memory import Pass
from .taps import Features, functions, view

_MROPE_SECTIONS = 4
_FLASH_OFF = 0


class HeadContext(native.Context):
    """features of width `width` go in; `generation` counts passes, for scores to know when they are stale."""

    def __init__(self, model: Any, params: Any, vocab_size: int, window: int, width: int) -> None:
        self.width = width
        self.generation = [0]
        lib = native.library()
        self._num_hidden = int(lib.llama_model_n_embd_out(model))
        self._sections = _MROPE_SECTIONS if lib.llama_model_rope_type(model) == lib.LLAMA_ROPE_TYPE_MROPE else 1
        super().__init__(model, params, vocab_size, window, int(params.n_batch))

    def _allocate(self) -> None:
        super()._allocate()
        self._states = np.zeros((self.max_batch, self.width), np.float32)
        self._wide_positions = np.zeros(self.max_batch * self._sections, np.int32)
        self._state_batch = self._batch_over(embd=self._states, pos=self._wide_positions)
        self._pair_batch = self._batch_over(token=self._tokens, embd=self._states, pos=self._positions)

    def attend_both_ways(self) -> None:
        """Tokens of one pass see each other whatever their order."""
        self._lib.llama_set_causal_attn(self._pointer, False)

    def give_states(self, masked: bool) -> None:
        """Have the states that a step hands to the next one kept: of scored tokens only, or of all."""
        functions()["set_final"](self._pointer, True, masked)

    def run_tokens(self, part: Pass, *, hidden: bool = False) -> tuple[Logits, Features | None]:
        """Views of ([T, V] logits, [T, E] states behind the final norm if asked for). All tokens must be scored."""
        self._lib.llama_set_embeddings(self._pointer, hidden)
        self.generation[0] += 1
        native.forget_errors()
        self._require(self.decode(part.tokens, part.positions, part.ids, part.outputs))
        rows = self.logits(len(part.tokens))
        if not hidden:
            return rows, None
        return rows, view(self._lib.llama_get_embeddings(self._pointer), len(rows), self._num_hidden)

    def read_states(self, part: Pass, states: Features) -> None:
        """Let states [T, width] without tokens become keys and values."""
        size = len(states)
        self._lib.llama_set_embeddings(self._pointer, False)
        self.generation[0] += 1
        self._states[:size], self._outputs[:size] = states, 0
        for section in range(self._sections):  # the last one of several is the height, which text has not
            last = self._sections > 1 and section == self._sections - 1
            self._wide_positions[section * size : (section + 1) * size] = 0 if last else part.positions
        self._fill_ids(part.ids, size)
        self._state_batch.n_tokens = size
        native.forget_errors()
        self._require(self._lib.llama_decode(self._pointer, self._state_batch))

    def encode_states(self, states: Features) -> Features:
        """[T, E] a copy of what the architecture's encoder makes of states [T, width of its input]."""
        size = len(states)
        inputs = np.ascontiguousarray(states)
        first = int(self._lib.llama_memory_seq_pos_max(self._memory, 0)) + 1  # of no use, and checked
        positions = np.tile(np.arange(first, first + size, dtype=np.int32), self._sections)
        batch = self._batch_over(embd=inputs, pos=positions)
        self._outputs[:size] = 1
        self._fill_ids(0, size)
        batch.n_tokens = size
        self.generation[0] += 1
        native.forget_errors()
        self._require(self._lib.llama_encode(self._pointer, batch))
        return view(functions()["get_final"](self._pointer), size, self._num_hidden).copy()

    def run_pairs(self, part: Pass, states: Features) -> tuple[Logits, Features]:
        """Views of ([N, V] logits, [N, E] states for the next step) of the scored ones of T tokens, each with a
        state [T, width]."""
        size = len(part.tokens)
        self._tokens[:size], self._positions[:size], self._outputs[:size] = part.tokens, part.positions, part.outputs
        self._states[:size] = states
        self._fill_ids(part.ids, size)
        self._pair_batch.n_tokens = size
        self.generation[0] += 1
        native.forget_errors()
        self._require(self._lib.llama_decode(self._pointer, self._pair_batch))
        count = int(np.count_nonzero(part.outputs))
        if not count:
            return self.logits(0), np.zeros((0, self._num_hidden), np.float32)
        return self.logits(count), view(functions()["get_final"](self._pointer), count, self._num_hidden)

    def _require(self, code: int) -> None:
        if code:
            raise BackendError(
                f"llama.cpp could not run the head: {native.quoted(native.complaints())}", got=f"code {code}"
            )


def parameters(cells: int, *, batch: int, outputs: int, ids: int, options: dict[str, bool | int | str]) -> Any:
    """llama.cpp's, for a head beside a target with these `ModelInfo.options`. batch: tokens of a pass."""
    params = native.library().llama_context_default_params()
    params.n_ctx = cells
    params.n_batch = params.n_ubatch = max(batch, ids)
    params.n_seq_max = ids
    params.n_outputs_max = max(outputs, ids)
    params.kv_unified = True
    params.swa_full = True
    params.n_threads = params.n_threads_batch = int(options["threads"])
    flash = options["flash_attention"]
    params.flash_attn_type = -1 if flash == "auto" else int(bool(flash))
    return params


def zeros(count: int) -> NDArray[np.int32]:
    """[count] token ids where there are none."""
    return np.zeros(count, np.int32)
