"""From a path and settings to a model: every check that can be made before llama.cpp is asked, then
its own answers, translated.

Memory: each open sequence has a context of its own (`state.py` says why), made at the first need and kept
for the next one, with room for `context` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from localspec.formats.gguf import read_architecture, read_parts
from localspec.formats.summary import GGUF_HEADS
from localspec.protocols import Capabilities, LoadSettings, ModelInfo, Rewind, WidthClass

from . import native, probe, recurrent, selfcheck
from .memory import MAX_IDS, Memory
from .model import LlamaModel
from .planner import LlamaPlanner
from .processors import num_cores
from .state import LlamaState
from .streams import SLACK, Streams
from .taps import GUESSING_AHEAD
from .tokenizer import LlamaTokenizer
from .weights import Weights

NAME = "llamacpp"
OWN_SETTINGS = frozenset({"gpu_layers", "threads", "flash_attention", "extra_buffers", "cache_type"})

_MAGIC = b"GGUF"
_DEFAULT_CONTEXT = 4096
_MAX_WIDTH = 128
_MAX_TREE_WIDTH = MAX_IDS - 2  # the sequence's own id is its first leaf's, too; one is a carrier for `keep`
_MAX_BATCH = 512
_MAX_FLASH_BATCH = 63  # from 64 tokens on, flash attention on a CPU works in tiles and rounds otherwise
_MAX_SEQUENCES = 64
_STEP = 256
_ROWS_EACH = 8  # rows of logits that a sequence may have in a shared pass before it is cut
_ALL_LAYERS = 999
PLANNER = LlamaPlanner(
    width=_MAX_WIDTH,
    tree_width=_MAX_TREE_WIDTH,
    batch=_MAX_BATCH,
    flash_batch=_MAX_FLASH_BATCH,
    num_states=recurrent.NUM_IDS,
    slack=SLACK,
    rows_each=_ROWS_EACH,
)
_FLASH_AUTO, _FLASH_OFF, _FLASH_ON = -1, 0, 1
CACHE_TYPES = {"f16": 1, "bf16": 30}
"""ggml's numbers of the types that keys and values may be kept in: two bytes each."""

_CPU_CLASS = WidthClass(
    2,
    None,
    "llama.cpp on CPU runs other kernels at width 1; chains of 2, 3, 4, 5, 8 and 16 tokens had identical rows "
    "(bundled Q4_0 and Q8_0 models, contexts of 20 to 701 tokens, extra buffers off; with them on, not measured here); "
    "with flash attention passes of 64 and more would differ and are cut",
)
_EVEN_TYPES = frozenset({"F32", "F16", "Q8_0", "Q4_0"})
"""Types of tensors whose products were seen to be the same bits in passes of every width from 2 on."""

_MIXED_CLASS = WidthClass(
    2,
    None,
    "llama.cpp's CPU kernels for some types of tensors add up otherwise in passes of other widths (seen with Q4_K and "
    "Q6_K)",
    measured=False,
)
_GPU_CLASS = WidthClass(
    1,
    None,
    "not measured on GPUs, whose kernels change with the width: where two tokens are nearly tied, text under "
    "speculation may differ from plain decoding (`localspec bench equality` shows whether it does)",
    measured=False,
)
_TREES_NEED_FLASH = (
    "token trees are exact on a CPU only with --flash-attention: without it attention sums over a branch's cells in "
    "another order than over a chain's"
)
_ONE_PASS = "it was loaded to run many sequences in one pass (batch), in which each is a chain"
_TREES_OF_RECURRENT = "its recurrent layers run one chain at a time, so token trees are not verified"
_NO_SNAPSHOTS = {"deepseek4": "llama.cpp cannot keep a snapshot of its compressed cache beside the sequence"}


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
    architecture = read_architecture(path)
    check_is_whole(architecture)
    lib = native.library()
    has_gpu = bool(lib.llama_supports_gpu_offload())
    extra_buffers, notes = choose_extra_buffers(settings)
    gpu_layers = choose_gpu_layers(settings, has_gpu)
    may_guess = architecture in GUESSING_AHEAD  # the layer may be wanted as a head
    weights = Weights(path, gpu_layers=gpu_layers, extra_buffers=extra_buffers, mtp=may_guess)
    try:
        check_supported(weights)
        _check_trees_are_possible(weights, settings)
        return _checked(_with_context(path, weights, settings, gpu_layers, notes), settings)
    except BaseException:
        weights.close()
        raise


def open_tokenizer(path: Path) -> LlamaTokenizer:
    """The tokenizer of a file, which may hold nothing else. Raises members of the error tree."""
    check_file(path)
    return LlamaTokenizer(Weights(path, gpu_layers=0, extra_buffers=False, vocab_only=True))


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


def check_is_whole(architecture: str) -> None:
    """Raise UnsupportedModelError for a draft head: it reads another model's hidden states, so it cannot
    run alone, and llama.cpp may die trying."""
    if architecture in GGUF_HEADS:
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
    if settings.cache_type not in (None, *CACHE_TYPES):
        raise SettingError("unknown cache_type", got=settings.cache_type, expected=" or ".join(CACHE_TYPES))


def check_supported(weights: Weights) -> None:
    """Raise UnsupportedModelError for models whose cache cannot be rewound, or that are no decoders."""
    reasons = {
        "is_diffusion": "it is a diffusion model, which does not write from left to right",
        "has_encoder": "it has an encoder, which the core does not drive",
    }
    architecture = weights.text("general.architecture")
    check_is_whole(architecture)
    found = [reason for fact, reason in reasons.items() if weights.number(fact)]
    if architecture in _NO_SNAPSHOTS:
        found.append(f"{_NO_SNAPSHOTS[architecture]}, so tokens cannot be taken back")
    if not weights.number("has_decoder"):
        found = ["it has no decoder"]
    if found:
        raise UnsupportedModelError(
            f"a model of architecture {architecture} cannot be used yet: {found[0]}",
            fix="Use a decoder-only transformer.",
        )


# ---------------------------------------------------------------- choices


def choose_extra_buffers(settings: LoadSettings) -> tuple[bool, tuple[str, ...]]:
    """(whether to use extra CPU buffers, what to tell). Raises SettingError where they were asked for and break."""
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


def choose_gpu_layers(settings: LoadSettings, has_gpu: bool) -> int:
    """Layers on the GPU. Raises SettingError where some are asked for and there is none."""
    if settings.gpu_layers and not has_gpu:
        raise SettingError(
            "this build of llama.cpp has no GPU support",
            got=f"gpu_layers {settings.gpu_layers}",
            fix=f"Rebuild it, for CUDA: CMAKE_ARGS=-DGGML_CUDA=on {native.INSTALL_COMMAND}",
        )
    if settings.gpu_layers is None:
        return _ALL_LAYERS if has_gpu else 0
    return settings.gpu_layers


def is_recurrent(weights: Weights) -> bool:
    """Does any layer keep a state that depends on the path by which it was reached?"""
    return bool(weights.number("is_recurrent") or weights.number("is_hybrid"))


def _flash_attention(settings: LoadSettings, on_gpu: bool) -> int:
    """llama.cpp's value for it. Raises SettingError where trees are asked for and what they need is ruled out."""
    if settings.trees and not on_gpu:
        if settings.flash_attention is False:
            raise SettingError(
                "trees and flash_attention=False exclude each other on a CPU",
                got="trees, no flash attention",
                fix="Leave flash_attention to the backend, or load without trees.",
            )
        return _FLASH_ON
    if settings.flash_attention is None:
        return _FLASH_AUTO if on_gpu else _FLASH_OFF
    return _FLASH_ON if settings.flash_attention else _FLASH_OFF


def _check_trees_are_possible(weights: Weights, settings: LoadSettings) -> None:
    """Raise UnsupportedModelError where trees are asked for and can never be had."""
    if settings.trees and is_recurrent(weights):
        raise UnsupportedModelError(
            f"a model of architecture {weights.text('general.architecture')} cannot verify token trees: "
            f"{_TREES_OF_RECURRENT}",
            fix="Load it without trees; drafters then propose chains.",
        )


# ---------------------------------------------------------------- the context


def _with_context(
    path: Path, weights: Weights, settings: LoadSettings, gpu_layers: int, notes: tuple[str, ...]
) -> LlamaModel:
    trained = weights.number("n_ctx_train")
    context_length = settings.context or min(trained, _DEFAULT_CONTEXT)
    if context_length > trained:
        notes += (f"context {context_length} is longer than the model was trained for ({trained})",)
    threads = settings.threads or num_cores()
    on_gpu, replays = gpu_layers > 0, is_recurrent(weights)
    flash = _flash_attention(settings, on_gpu)
    max_width = _MAX_TREE_WIDTH if settings.trees else _MAX_WIDTH
    if settings.trees and not on_gpu and settings.flash_attention is None:
        notes += ("flash attention is on because token trees need it; on a CPU that makes each pass slower",)
    cache_type = settings.cache_type or "f16"
    params = _parameters(context_length, threads, flash)
    params.type_k = params.type_v = CACHE_TYPES[cache_type]
    tiled = flash == _FLASH_ON and not on_gpu and cache_type == "f16"
    longest = _MAX_FLASH_BATCH if tiled else _MAX_BATCH
    params.n_batch = params.n_ubatch = longest
    params.n_seq_max = recurrent.NUM_IDS if replays else max_width + 2
    params.n_outputs_max = max_width + 2  # llama.cpp aborts if it is below n_seq_max; room for so many rows is made
    window = max(0, weights.number("n_swa"))
    batches, said = _batching(settings, replays, window)
    notes += said
    if batches:
        _use_streams(params, context_length, settings.num_sequences)

    def make_context() -> native.Context:
        native.forget_errors()
        try:
            return native.Context(weights.pointer, params, weights.vocab_size, window, longest)
        except BackendError as error:
            raise context_error(path, native.complaints(), error) from error

    memory = (
        Streams(make_context(), settings.num_sequences, LlamaState)
        if batches
        else Memory(make_context, settings.num_sequences, recurrent.RecurrentState if replays else LlamaState)
    )
    exact_trees = (flash == _FLASH_ON or on_gpu) and not replays and not batches
    limits = (_ONE_PASS,) if batches else _limits(replays, exact_trees)
    capabilities = Capabilities(
        rewind=Rewind.REPLAY if replays else Rewind.FREE,
        trees=not replays and not batches,
        exact_trees=exact_trees,
        batches=batches,
        limits=limits,
        max_width=max_width,
        max_leaves=None if replays or batches else params.n_seq_max - 1,  # one id is kept free to carry a kept branch
        num_sequences=settings.num_sequences,
        width_class=_GPU_CLASS if on_gpu else _CPU_CLASS if _is_even(path) else _MIXED_CLASS,
        host_scores=True,
        runs_ahead=on_gpu,
        reuses_passes=on_gpu and native.captures_passes(),
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
        runtime=f"llama-cpp-python {native.version()}, build {native.build()}",
        options=(
            ("threads", threads),
            ("flash_attention", "auto" if flash == _FLASH_AUTO else flash == _FLASH_ON),
            ("extra_buffers", weights.extra_buffers),
            ("gpu_layers", gpu_layers),
            ("cache_type", cache_type),
        ),
    )
    return LlamaModel(weights, memory, info, capabilities)


def _batching(settings: LoadSettings, replays: bool, window: int) -> tuple[bool, tuple[str, ...]]:
    """(do sequences become streams of one context, what to tell). Raises SettingError beside trees."""
    if not settings.batch:
        return False, ()
    if settings.trees:
        raise SettingError(
            "trees and batch exclude each other with llama.cpp",
            got="both",
            expected="one of them: sequences that share a pass verify chains only",
            fix="Guess chains, or serve one request at a time (--parallel 1).",
        )
    why = "its recurrent layers" if replays else "its sliding windows" if window else ""
    if not why:
        return True, ()
    return False, (f"several requests are run one after another, not in one pass: {why} need a context of their own",)


def _use_streams(params: Any, context_length: int, num_sequences: int) -> None:
    cells = -(-(context_length + SLACK) // _STEP) * _STEP  # llama.cpp deals them out in this step
    params.kv_unified = False
    params.n_seq_max = num_sequences
    params.n_ctx = cells * num_sequences
    params.n_batch = params.n_ubatch = _MAX_BATCH
    params.n_outputs_max = max(int(params.n_outputs_max), _ROWS_EACH * num_sequences)


def _limits(replays: bool, exact_trees: bool) -> tuple[str, ...]:
    if replays:
        return (_TREES_OF_RECURRENT, "it cannot forget tokens: what was kept since a snapshot is run again")
    if exact_trees:
        return ()
    return (_TREES_NEED_FLASH,)


def _parameters(context_length: int, threads: int, flash_attention: int) -> Any:
    params = native.library().llama_context_default_params()
    params.n_ctx = context_length
    params.kv_unified = True
    params.swa_full = True  # a window that forgets cannot be rewound
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = flash_attention
    return params


# ---------------------------------------------------------------- the model's own word


def _checked(model: LlamaModel, settings: LoadSettings) -> LlamaModel:
    """The model with promises that its own rows confirm. Raises UnsupportedModelError."""
    try:
        if model.info.context_length < selfcheck.CONTEXT:
            return _unchecked(model, settings)
        if model.capabilities.rewind is Rewind.REPLAY:
            return _with_replay(model)
        if model.capabilities.batches:
            return _with_one_pass(model)
        return _with_trees(model, settings)
    except BaseException:
        model.close()
        raise


def _is_even(path: Path) -> bool:
    """Is every matrix of a type whose products do not depend on how many rows there are?"""
    tensors = (tensor for _, header in read_parts(path) for tensor in header.tensors.values())
    return all(tensor.kind in _EVEN_TYPES for tensor in tensors if len(tensor.shape) > 1)


def _may_round(model: LlamaModel) -> bool:
    """Is it known beforehand that rows change with the width of a pass, whatever is done about it?"""
    return not model.capabilities.width_class.measured and dict(model.info.options)["gpu_layers"] != 0


def _unchecked(model: LlamaModel, settings: LoadSettings) -> LlamaModel:
    """Without room for the checks nothing is promised."""
    said = f"a context of {model.info.context_length} tokens is too short to check it"
    if settings.trees:
        raise SettingError("no room to check trees", got=said, expected=f"context of {selfcheck.CONTEXT} or more")
    if model.capabilities.rewind is Rewind.REPLAY:
        return _unsure(model, said)
    if model.capabilities.exact_trees:
        model.capabilities = replace(model.capabilities, exact_trees=False, limits=(said,))
    return model


def _unsure(model: LlamaModel, said: str) -> LlamaModel:
    unsure = replace(model.capabilities.width_class, measured=False, evidence=said)
    limits = (*model.capabilities.limits, f"{said}: near-ties may fall otherwise under speculation")
    model.capabilities = replace(model.capabilities, width_class=unsure, limits=limits)
    return model


def _with_replay(model: LlamaModel) -> LlamaModel:
    difference = selfcheck.replay_difference(model)
    if not difference:
        return model
    if not selfcheck.is_rounding(difference):
        raise UnsupportedModelError(
            f"{model.info.name} gave other rows after tokens were taken back, so nothing it says could be trusted",
            got=f"a difference of {difference:.2g} standard deviations",
            fix="Use another model, or another build of llama.cpp.",
        )
    said = f"rows after a replay differed by {difference:.1e} standard deviations from plain decoding's"
    return _unsure(model, said)


def _with_trees(model: LlamaModel, settings: LoadSettings) -> LlamaModel:
    """Where the class promises bits, a tree must keep them; elsewhere it may round, no more."""
    if not model.capabilities.exact_trees:
        return model
    difference = selfcheck.tree_difference(model)
    if not difference or (_may_round(model) and selfcheck.is_rounding(difference)):
        return model
    said = f"rows of a token tree were {difference:.1e} standard deviations away from those of a chain"
    if settings.trees:
        raise UnsupportedModelError(f"{model.info.name} cannot verify token trees exactly: {said}", fix="Load without.")
    model.capabilities = replace(model.capabilities, exact_trees=False, limits=(said,))
    return model


def _with_one_pass(model: LlamaModel) -> LlamaModel:
    """As with trees: bits where they are promised, rounding elsewhere; else each sequence gets passes of its own."""
    if model.capabilities.num_sequences < 2:
        return model
    difference = selfcheck.batch_difference(model)
    if not difference or (_may_round(model) and selfcheck.is_rounding(difference)):
        return model
    said = f"rows of sequences in one pass were {difference:.1e} standard deviations away from those of each alone"
    note = f"several requests are run one after another, not in one pass: {said}"
    model.capabilities = replace(model.capabilities, batches=False, limits=(*model.capabilities.limits, said))
    model.info = replace(model.info, notes=(*model.info.notes, note))
    return model


def context_error(path: Path, complaints: Sequence[str], error: BackendError) -> FailureError:
    """llama.cpp's complaints about a context as a member of the error tree."""
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
