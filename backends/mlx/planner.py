"""How much memory MLX takes for a model, from its headers. An estimate that no measurement stands behind: MLX
takes memory as it goes, so its peak depends on what is asked."""

from __future__ import annotations

import platform
import sys
from importlib.util import find_spec

from localspec.errors import LocalspecError
from localspec.formats import ModelSummary
from localspec.preparation import GpuMemory, MemoryItem, MemoryScope
from localspec.protocols import LoadSettings

_MIB = 2**20
_PROGRAM = 100 * _MIB  # Python, mlx and mlx-lm: their imports alone took 73 MB on Linux
_STEP, _CUDA_STEP = 256, 1024  # rows by which a cache grows; on CUDA `cache.BLOCK`
_BATCH = 512  # tokens of a pass
_ROWS = 128
_F32 = 4
_NUM_STATES = 9  # the one at work, snapshots of committed lengths, one before a pass
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


class MlxPlanner:
    """`preparation.MemoryPlanner`."""

    def items(self, model: ModelSummary, settings: LoadSettings, context: int) -> tuple[MemoryItem, ...]:
        """See `MemoryPlanner`."""
        on_gpu = self._has_gpu()
        expands = not on_gpu and settings.dtype in (None, "float32")
        value = 4 if expands else _SIZES.get(settings.dtype or "", 2)
        weights = model.num_parameters * 4 if expands else model.total_weight_bytes
        step = _CUDA_STEP if _cuda_is_installed() else _STEP
        rows = -(-context // step) * step
        widest = max(model.feed_forward, model.hidden_size, model.num_heads * model.key_size)
        compute = _BATCH * (4 * widest + 0 if on_gpu else context * model.num_heads) * value

        def item(what: str, num_bytes: int, scope: MemoryScope) -> MemoryItem:
            return MemoryItem(what, num_bytes, scope, num_bytes if on_gpu else 0)

        said = "float32" if expands else model.quantization
        states = (model.state_values or 0) * _NUM_STATES * _F32
        found = (
            MemoryItem("Python, MLX and mlx-lm", _PROGRAM, MemoryScope.PROCESS),
            item(f"weights ({said})", weights, MemoryScope.MODEL),
            item("keys and values", rows * model.kv_values * value, MemoryScope.SEQUENCE),
            item("compute (estimated)", compute, MemoryScope.SEQUENCE),
            item("rows of logits", _ROWS * model.vocab_size * _F32, MemoryScope.SEQUENCE),
        )
        return (*found, item("states of recurrent layers", states, MemoryScope.SEQUENCE)) if states else found

    def gpu(self) -> GpuMemory | None:
        """What MLX recommends as the most to take, or the GPU's size where it says no more."""
        if not self._has_gpu():
            return None
        try:
            return _device_memory()
        except (LocalspecError, ImportError, OSError):
            return None

    def _has_gpu(self) -> bool:
        """Without importing MLX where it is clear that there is none."""
        if sys.platform == "darwin":
            return platform.machine() == "arm64"
        return find_spec("mlx") is not None and _cuda_is_installed()


def _cuda_is_installed() -> bool:
    return any(find_spec(f"mlx_cuda_{version}") is not None for version in (12, 13)) and not _on_cpu()


def _on_cpu() -> bool:
    from .device import on_cpu

    return on_cpu()


def _device_memory() -> GpuMemory | None:
    import mlx.core as mx

    if _on_cpu():
        return None
    info = mx.device_info()
    most = info.get("max_recommended_working_set_size") or info.get("free_memory") or info.get("memory_size")
    return GpuMemory(int(most), shared=sys.platform == "darwin") if isinstance(most, int) else None
