"""From a path and settings to a model: every check that can be made before llama.cpp is asked, then
its own answers, translated.

Memory: each open sequence has a context of its own (`state.py` says why), made at the first need and kept
for the next one, with room for `context` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localspec.errors import (
    BackendError,
    FailureError,
    ModelFileError,
    ModelNotFoundError,
    OutOfMemoryError,
    SettingError,
    UnsupportedModelError,
)
from localspec.protocols import Capabilities, LoadSettings, ModelInfo, Rewind, WidthClass

from . import native, probe
from .model import LlamaModel
from .processors import num_cores
from .state import Memory
from .weights import Weights

NAME = "llamacpp"
OWN_SETTINGS = frozenset({"gpu_layers", "threads", "flash_attention", "extra_buffers"})

_MAGIC = b"GGUF"
_DRAFT_HEADS = frozenset({"dflash", "dspark", "eagle3", "medusa"})
_DEFAULT_CONTEXT = 4096
_MAX_WIDTH = 128
_MAX_BATCH = 512
_MAX_SEQUENCES = 64
_ALL_LAYERS = 999
_FLASH_AUTO, _FLASH_OFF, _FLASH_ON = -1, 0, 1

_CPU_CLASS = WidthClass(
    2,
    None,
    "llama.cpp on CPU runs other kernels at width 1; chains of 2, 3, 4, 5, 8 and 16 tokens had identical rows "
    "(bundled Q4_0 and Q8_0 models, contexts of 20 to 701 tokens, extra buffers off; with them on, not measured here)",
)
_GPU_CLASS = WidthClass(
    1,
    None,
    "not measured on GPUs, whose kernels change with the width: where two tokens are nearly tied, text under "
    "speculation may differ from plain decoding (`localspec bench equality` shows whether it does)",
    measured=False,
)


def is_model_file(path: Path) -> bool:
    """Could this be a GGUF file, by name or first bytes?"""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def load(path: Path, settings: LoadSettings) -> LlamaModel:
    """Open a model. Raises members of the error tree."""
    check_file(path)
    check_settings(settings)
    check_is_whole(first_architecture(path))
    lib = native.library()
    has_gpu = bool(lib.llama_supports_gpu_offload())
    extra_buffers, notes = _extra_buffers(settings)
    gpu_layers = _gpu_layers(settings, has_gpu)
    weights = Weights(path, gpu_layers=gpu_layers, extra_buffers=extra_buffers)
    try:
        check_supported(weights)
        return _with_context(path, weights, settings, gpu_layers, notes)
    except BaseException:
        weights.close()
        raise


# ---------------------------------------------------------------- checks


def check_file(path: Path) -> None:
    """Raise ModelNotFoundError or ModelFileError for what llama.cpp need not see."""
    if not path.exists():
        raise ModelNotFoundError(f"no such file: {path}", fix="Check the path.")
    if path.is_dir():
        raise ModelFileError(f"{path} is a folder", expected="a .gguf file")
    try:
        with path.open("rb") as stream:
            magic = stream.read(len(_MAGIC))
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error}") from error
    if magic != _MAGIC:
        raise ModelFileError(f"{path.name} is not a GGUF file", got=f"first bytes {magic!r}", expected=repr(_MAGIC))


def first_architecture(path: Path) -> str:
    """`general.architecture` where it is the first entry, as converters write it; else an empty string."""
    with path.open("rb") as stream:
        start = stream.read(256)
    key, key_end = _text_at(start, 24)  # behind magic, version and two counts
    is_text = start[key_end : key_end + 4] == b"\x08\0\0\0"
    return _text_at(start, key_end + 4)[0] if key == "general.architecture" and is_text else ""


def _text_at(content: bytes, start: int) -> tuple[str, int]:
    """(text, where it ends)."""
    end = start + 8 + int.from_bytes(content[start : start + 8], "little")
    return content[start + 8 : end].decode(errors="replace"), end


def check_is_whole(architecture: str) -> None:
    """Raise UnsupportedModelError for a draft head: it reads another model's hidden states, so it cannot
    run alone, and llama.cpp may die trying."""
    if architecture in _DRAFT_HEADS:
        raise UnsupportedModelError(
            "the file is a draft head, not a model that writes by itself",
            got=architecture,
            fix="Give the model that the head was trained for, or a whole small model as drafter.",
        )


def check_settings(settings: LoadSettings) -> None:
    """Raise SettingError, naming the setting."""
    if settings.dtype is not None:
        raise SettingError(f"backend {NAME} has no setting dtype", expected=", ".join(sorted(OWN_SETTINGS)))
    for name, least, most in (
        ("context", 2, 1 << 24),
        ("num_sequences", 1, _MAX_SEQUENCES),
        ("gpu_layers", 0, 1 << 16),
        ("threads", 1, 512),
    ):
        value = getattr(settings, name)
        if value is not None and not least <= value <= most:
            raise SettingError(f"{name} out of range", got=value, expected=f"{least} to {most}")


def check_supported(weights: Weights) -> None:
    """Raise UnsupportedModelError for models whose cache cannot be rewound, or that are no decoders."""
    reasons = {
        "is_recurrent": "its state is recurrent, so tokens cannot be taken back",
        "is_hybrid": "part of its state is recurrent, so tokens cannot be taken back",
        "is_diffusion": "it is a diffusion model, which does not write from left to right",
        "has_encoder": "it has an encoder, which the core does not drive",
    }
    check_is_whole(weights.text("general.architecture"))
    found = [reason for fact, reason in reasons.items() if weights.number(fact)]
    if not weights.number("has_decoder"):
        found = ["it has no decoder"]
    if found:
        raise UnsupportedModelError(
            f"a model of architecture {weights.text('general.architecture')} cannot be used yet: {found[0]}",
            fix="Use a decoder-only transformer.",
        )


# ---------------------------------------------------------------- choices


def _extra_buffers(settings: LoadSettings) -> tuple[bool, tuple[str, ...]]:
    """(whether to use them, what to tell). Raises SettingError where they were asked for and break."""
    if settings.extra_buffers is False:
        return False, ()
    finding = probe.examine()
    if finding.verdict is probe.Verdict.WORK:
        return True, ()
    if settings.extra_buffers:
        raise SettingError(
            "extra_buffers cannot be used here", got=finding.detail or finding.verdict.value, fix=finding.note
        )
    return False, (finding.note,)


def _gpu_layers(settings: LoadSettings, has_gpu: bool) -> int:
    if settings.gpu_layers and not has_gpu:
        raise SettingError(
            "this build of llama.cpp has no GPU support",
            got=f"gpu_layers {settings.gpu_layers}",
            fix=f"Rebuild it, for CUDA: CMAKE_ARGS=-DGGML_CUDA=on {native.INSTALL_COMMAND}",
        )
    if settings.gpu_layers is None:
        return _ALL_LAYERS if has_gpu else 0
    return settings.gpu_layers


def _flash_attention(settings: LoadSettings, on_gpu: bool) -> int:
    if settings.flash_attention is None:
        return _FLASH_AUTO if on_gpu else _FLASH_OFF
    return _FLASH_ON if settings.flash_attention else _FLASH_OFF


# ---------------------------------------------------------------- the context


def _with_context(
    path: Path, weights: Weights, settings: LoadSettings, gpu_layers: int, notes: tuple[str, ...]
) -> LlamaModel:
    trained = weights.number("n_ctx_train")
    context_length = settings.context or min(trained, _DEFAULT_CONTEXT)
    if context_length > trained:
        notes += (f"context {context_length} is longer than the model was trained for ({trained})",)
    threads = settings.threads or num_cores()
    params = _parameters(settings, context_length, threads, gpu_layers > 0)

    def make_context() -> native.Context:
        native.forget_errors()
        try:
            return native.Context(weights.pointer, params, weights.vocab_size)
        except BackendError as error:
            raise _context_error(path, native.complaints(), error) from error

    memory = Memory(make_context, settings.num_sequences)
    capabilities = Capabilities(
        rewind=Rewind.FREE,
        # Without flash attention the CPU's kernels round a branch's rows otherwise than a chain's; on
        # GPUs that was not measured. `forward` takes trees all the same, only their last bits differ.
        trees=bool(settings.flash_attention) and not gpu_layers,
        max_width=_MAX_WIDTH,
        num_sequences=settings.num_sequences,
        width_class=_GPU_CLASS if gpu_layers else _CPU_CLASS,
        host_scores=True,
    )
    info = ModelInfo(
        name=weights.text("general.name") or path.stem,
        path=path,
        architecture=weights.text("general.architecture"),
        quantization=weights.quantization(),
        num_parameters=weights.number("n_params"),
        context_length=context_length,
        trained_context_length=trained,
        device=_device(gpu_layers, threads),
        backend=NAME,
        notes=notes,
    )
    return LlamaModel(weights, memory, info, capabilities)


def _parameters(settings: LoadSettings, context_length: int, threads: int, on_gpu: bool) -> Any:
    params = native.library().llama_context_default_params()
    params.n_ctx = context_length
    params.n_batch = params.n_ubatch = _MAX_BATCH
    params.n_seq_max = 2 + _MAX_WIDTH  # the sequence, each leaf of the widest tree, and a carrier for `keep`
    params.n_outputs_max = params.n_seq_max  # llama.cpp aborts if it is smaller; room for logits is made for so many
    params.kv_unified = True
    params.swa_full = True  # a window that forgets cannot be rewound
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = _flash_attention(settings, on_gpu)
    return params


def _context_error(path: Path, complaints: Sequence[str], error: BackendError) -> FailureError:
    words = native.quoted(complaints)
    if any("alloc" in line.lower() or "memory" in line.lower() for line in complaints):
        return OutOfMemoryError(
            f"the cache of {path.name} does not fit into memory: {words}", fix="Ask for a smaller context."
        )
    return BackendError(f"{error.what} for {path.name}: {words}")


def _device(gpu_layers: int, threads: int) -> str:
    if gpu_layers:
        return ", ".join(native.devices())
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
