"""Reading a prompt into a state, chunk by chunk."""

from __future__ import annotations

from localspec.context import common_prefix
from localspec.engine.width import pad
from localspec.protocols import HostTokens, LanguageModel, Rewind, SequenceState, Step, WidthClass, chain_parents
from localspec.types import TokenIds

PREFILL_CHUNK = 512
"""Tokens of a pass."""


def reuse(model: LanguageModel, state: SequenceState, held: TokenIds, prompt: TokenIds) -> int:
    """Cut a state that holds `held` back to what it shares with all of the prompt but its last token, the anchor;
    returns how many tokens that is."""
    same = min(common_prefix(held, prompt), len(prompt) - 1, state.length)
    if same < state.length and model.capabilities.rewind is Rewind.NEVER:
        same = 0
    state.truncate(same)
    return same


def read_chunk(
    model: LanguageModel,
    state: SequenceState,
    prompt: TokenIds,
    most: int = PREFILL_CHUNK,
    *,
    widths: WidthClass | None = None,
) -> bool:
    """Commit the next tokens of the prompt, its last one left out. False where there is nothing left to read.
    widths: of the passes [default: the model's class].

    The last chunk is waited for: else the first round would, which would then count as decoding.
    """
    last = len(prompt) - 1
    chunk = prompt[state.length : min(last, state.length + most)]
    if not len(chunk):
        return False
    step = Step(state, (HostTokens(chunk),), chain_parents(state, len(chunk)), ())
    model.forward([pad(step, widths or model.capabilities.width_class)])
    state.keep(range(len(chunk)))
    if state.length == last:
        state.wait()
    return True
