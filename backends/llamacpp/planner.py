"""How much memory llama.cpp takes for a model, from its headers. docs/fit.md compares it with measurements.

Compute buffers were fitted to what llama.cpp 0.3.36 reports for three shapes at 2k, 8k and 16k tokens: without flash
attention the scores of a whole batch over all cells lie in memory at once, which soon is the largest item.
"""

from __future__ import annotations

from localspec.errors import LocalspecError
from localspec.formats import ModelSummary
from localspec.preparation import GpuMemory, MemoryItem, MemoryScope
from localspec.protocols import LoadSettings

from . import native, probe

_MIB = 2**20
_PROGRAM = 51 * _MIB  # Python, numpy, the binding and libllama: measured on Linux
_GRAPHS = int(3.5 * _MIB)  # of one model, whatever its size
_TOKEN = 500  # bytes of a vocabulary entry with its merge, in llama.cpp's tables
_CELL = 52  # bytes of bookkeeping of a cell
_STEP = 256  # cells are made in this step
_F32, _F16, _I64 = 4, 2, 8


class LlamaPlanner:
    """`preparation.MemoryPlanner`. The arguments are the loader's constants.

    width, tree_width: widest verify.  batch, flash_batch: tokens of a pass.  num_states: of recurrent layers that
    a sequence keeps, snapshots included.  slack, rows_each: cells beyond the context, and rows of logits, of each
    sequence that shares a context.
    """

    def __init__(
        self,
        *,
        width: int,
        tree_width: int,
        batch: int,
        flash_batch: int,
        num_states: int,
        slack: int,
        rows_each: int,
    ) -> None:
        self._slack, self._rows_each = slack, rows_each
        self._width, self._tree_width, self._num_states = width, tree_width, num_states
        self._batch, self._flash_batch = batch, flash_batch

    def items(self, model: ModelSummary, settings: LoadSettings, context: int) -> tuple[MemoryItem, ...]:
        """See `MemoryPlanner`."""
        share = self._gpu_share(model, settings)
        cells = -(-context // _STEP) * _STEP
        num_rows = (self._tree_width if settings.trees else self._width) + 2
        flash = settings.trees or bool(settings.flash_attention)
        tiled = flash and settings.cache_type in {None, "f16"}
        batch = self._flash_batch if tiled else self._batch
        num_ids = self._num_states if model.is_recurrent else num_rows
        shared = settings.batch and not model.is_recurrent  # one context, whose buffers all sequences use
        buffers = MemoryScope.MODEL if shared else MemoryScope.SEQUENCE
        if shared:
            cells += -(-self._slack // _STEP) * _STEP
            num_rows = max(num_rows, self._rows_each * settings.num_sequences)
            num_ids, batch = settings.num_sequences, self._batch
        repacked = ", repacked" if not share and self._repacks(settings) else ""
        tables = _GRAPHS + _TOKEN * model.vocab_size

        def item(what: str, num_bytes: int, scope: MemoryScope, *, movable: bool = True) -> MemoryItem:
            return MemoryItem(what, num_bytes, scope, int(num_bytes * share) if movable else 0)

        found = [
            MemoryItem("Python and llama.cpp", _PROGRAM, MemoryScope.PROCESS),
            item(f"weights ({model.quantization}{repacked})", model.file_bytes, MemoryScope.MODEL),
            item("vocabulary and graphs", tables, MemoryScope.MODEL, movable=False),
            item(
                f"keys and values ({(settings.cache_type or 'f16').upper()})",
                cells * model.kv_values * _F16,
                MemoryScope.SEQUENCE,
            ),
            item("cells", cells * _CELL, MemoryScope.SEQUENCE, movable=False),
            item("compute buffer", _compute(model, cells, batch, num_rows, num_ids, flash), buffers),
            item("rows of logits", num_rows * model.vocab_size * _F32, buffers, movable=False),
        ]
        if model.state_values:
            states = model.state_values * _F32 * self._num_states
            found.append(item("states of recurrent layers (F32)", states, MemoryScope.SEQUENCE))
        return tuple(found)

    def gpu(self) -> GpuMemory | None:
        """What llama.cpp's first GPU says is free."""
        try:
            return native.gpu_memory() if native.is_installed() else None
        except LocalspecError:
            return None

    def _gpu_share(self, model: ModelSummary, settings: LoadSettings) -> float:
        if settings.gpu_layers == 0 or self.gpu() is None:
            return 0.0
        if settings.gpu_layers is None:
            return 1.0
        return min(1.0, settings.gpu_layers / max(1, model.num_layers))

    def _repacks(self, settings: LoadSettings) -> bool:
        if settings.extra_buffers is False or not native.is_installed():
            return False
        return probe.examine().verdict is probe.Verdict.WORK


def _compute(model: ModelSummary, cells: int, batch: int, num_rows: int, num_ids: int, flash: bool) -> int:
    """The largest of a pass's three phases, which llama.cpp reserves for a batch rounded up to whole sequences,
    and without flash attention the scores once more as F16, as a product with F16 values wants them."""
    reserved = max(batch, num_rows) if flash else -(-batch // num_ids) * num_ids
    widest = max(model.num_heads * model.key_size, model.hidden_size)
    keys = max(model.kv_heads, default=0) * model.value_size
    mask = cells * reserved * (_F32 + _F16 if flash else _F32)
    scores = 0 if flash else cells * reserved * model.num_heads * _F32
    attention = mask + scores + 5 * widest * reserved * _F32 + (0 if flash else keys * reserved * _I64)
    feed_forward = mask + (3 * model.feed_forward + 2 * model.hidden_size) * reserved * _F32
    output = mask + num_rows * (model.vocab_size + 2 * model.hidden_size) * _F32
    converted = 0 if flash else cells * batch * model.num_heads * _F16
    return max(attention, feed_forward, output) + converted
