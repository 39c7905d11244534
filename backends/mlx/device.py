"""The device MLX computes on, and the facts that depend on it."""

from __future__ import annotations

import mlx.core as mx

from localspec.protocols import WidthClass


def on_cpu() -> bool:
    """Is the default device the CPU?"""
    return mx.default_device().type == mx.DeviceType.cpu


def describe_device() -> str:
    """For people: `cpu`, or the GPU's name."""
    if on_cpu():
        return "cpu"
    info = mx.device_info()
    return f"gpu ({info.get('device_name', info.get('architecture', 'unnamed'))})"


def is_cuda() -> bool:
    """Is it an NVIDIA GPU?"""
    return not on_cpu() and mx.cuda.is_available()


def builds_attention() -> bool:
    """Is the kernel of a wide pass's attention built anew for every number of cells?

    So it is on CUDA, by cuDNN, in 50 ms (NVIDIA H100, mlx 0.32.4): several times what the pass itself takes.
    """
    return is_cuda()


def width_steps() -> tuple[int, ...]:
    """Widths to keep to. Where attention is built for each number of rows, few: the first pass of a width takes 60 to
    110 ms there, later ones over 4 to 16 rows all the same, over 32 and 64 a fifth more (8B on an H100: 19.4, 19.1,
    19.3, 23.0 and 22.8 ms in bfloat16)."""
    return (1, 16, 64) if builds_attention() else ()


def width_class(width_one_differs: bool) -> WidthClass:
    """The widths whose rows are the same bits, as far as is known. On a GPU nothing is promised (`measured` is False),
    so nothing is padded either."""
    found = "differed from" if width_one_differs else "equalled"
    evidence = f"{_CPU_EVIDENCE if on_cpu() else _GPU_EVIDENCE}; here width 1 {found} width 2"
    return WidthClass(2 if width_one_differs and on_cpu() else 1, None, evidence, measured=on_cpu())


def replay_class(same_bits: bool) -> WidthClass:
    """The same for states that replay.

    They are never padded: padding is dropped again, so every token would be replayed, and a token that is
    kept may be replayed at another width than it was scored at whatever the padding.
    """
    found = "the same bits" if same_bits else "equal within rounding, not bit for bit"
    evidence = f"at load rows of one, two and six tokens at a time, and of replays, were {found}"
    return WidthClass(1, None, evidence, measured=on_cpu() and same_bits)


# MLX computes each row of a product alone on the CPU, which is also why a pass costs there in
# proportion to its width.
_CPU_EVIDENCE = (
    "measured with mlx 0.32.4 on an x86 CPU, float32, models of 5M and 55M: rows of widths 1 to 16, in chains and in "
    "trees, behind 20, 300 and 600 tokens, were the same bits"
)
_GPU_EVIDENCE = (
    "not measured on this GPU. On an NVIDIA H200 the rows of a chain were not those of one-by-one decoding: kernels "
    "change with the number of rows, and near-ties may fall otherwise"
)
