"""From a safetensors folder to what a backend runs best: a GGUF file, or an MLX folder with fewer bits; then
a check that source and result say the same. A trained head becomes a GGUF head for llama.cpp.

The result is written beside the place where it is wanted and moved there when it is whole, so a broken
conversion leaves nothing behind that looks like a model.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localspec.drafters import DrafterSpec, make_drafter
from localspec.engine.session import Session
from localspec.errors import (
    BackendMissingError,
    HeadFileError,
    ModelFileError,
    ModelNotFoundError,
    SettingError,
    UnsupportedModelError,
)
from localspec.formats import summarize
from localspec.formats.conversion import QUANTIZATIONS, Checkpoint, check_architecture, write_gguf_file
from localspec.formats.head_conversion import write_head_gguf
from localspec.loading import get_backend, load_model
from localspec.memory import look, size
from localspec.preparation import Quantizer
from localspec.protocols import HostTokens, LanguageModel, LoadSettings, Step, chain_parents
from localspec.sampling import SamplingParams
from localspec.verify import make_acceptance

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time there was",
    "To sort a list in Python,",
    "Water boils when",
    "import numpy as np\n",
)
"""What source and result continue, greedily."""

NUM_TOKENS = 24
"""Tokens of each continuation."""

LEAST_F16 = 0.97
"""Share of tokens on which an F16 or F32 file must agree with its source; near-ties may fall otherwise, since the
two runtimes round differently."""

_PLAIN = ("F32", "F16")
_BACKENDS = {"gguf": "llamacpp", "mlx": "mlx"}
_DEFAULTS = {"gguf": "Q4_K_M", "mlx": "4bit"}
_HEAD_DEFAULT = "F16"  # heads are small, and what they lose is acceptance

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt, its tokens, and what the source says behind it."""

    prompt: str
    ids: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a result agrees with its source's greedy continuations of `PROMPTS`.

    num_same: of `num_tokens`, those that the result would say itself behind the same text.  num_alike: of
    `num_prompts`, those with no other token, whose greedy text is the source's.
    """

    num_tokens: int
    num_same: int
    num_prompts: int
    num_alike: int

    @property
    def share(self) -> float:
        return self.num_same / max(1, self.num_tokens)


@dataclass(frozen=True, slots=True)
class Report:
    """What was written. agreement is None where it was not checked, `unchecked` says why."""

    output: Path
    quantization: str
    source_bytes: int
    output_bytes: int
    agreement: Agreement | None
    unchecked: str = ""

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.output}: {self.quantization}, {size(self.output_bytes)} from {size(self.source_bytes)}"
        if self.agreement is None:
            yield f"not compared with the source: {self.unchecked}"
            return
        said = self.agreement
        yield (
            f"of {said.num_tokens} tokens that the source says, the result says {said.num_same} behind the same text "
            f"({said.share:.0%}); {said.num_alike} of {said.num_prompts} answers are alike"
        )


def convert(
    source: Path,
    output: Path,
    *,
    form: str | None = None,
    quantization: str | None = None,
    force: bool = False,
    check: bool = True,
    target: Path | None = None,
    on_progress: Say = lambda text: None,
) -> Report:
    """Convert a safetensors folder. form: gguf or mlx (None: by the output's name).  target: for a trained head, the
    model that it was trained for, which has its tokenizer.

    Raises SettingError, UnsupportedModelError (naming the architectures that are known), ModelFileError (also
    where an F16 or F32 file does not say what its source says; it is not left behind), and what backends raise.
    """
    form = form or ("gguf" if output.suffix == ".gguf" else "mlx")
    if form not in _BACKENDS:
        raise SettingError("unknown form", got=form, expected=" or ".join(_BACKENDS))
    if not source.is_dir():
        raise ModelNotFoundError(f"{source} is no folder", expected="a folder with config.json and safetensors files")
    is_head = summarize(source).drafter_kind is not None
    kind = quantization or (_HEAD_DEFAULT if is_head else _DEFAULTS[form])
    if is_head:
        _check_head(form, kind, target)
    elif target is not None:
        raise SettingError("only a trained head needs a target", got=f"{source.name}, a model that writes by itself")
    quantizer = None if is_head else _quantizer(form, kind)
    if output.exists() and not force:
        raise SettingError(f"{output} exists", fix="Give another name, or --force to replace it.")
    if output.exists() and output.is_dir() != (form == "mlx"):
        raise SettingError(f"{output} is not what --force may replace", expected=f"an earlier {form} model")
    if output.is_dir() and not (output / "config.json").is_file() and any(output.iterdir()):
        raise SettingError(f"{output} is a folder with other things in it", fix="Give another name.")
    if output.resolve() == source.resolve() or output.resolve() in source.resolve().parents:
        raise SettingError("the output would replace the source", got=output)
    with _workplace(output) as work:
        made = work / output.name
        if is_head:
            assert target is not None
            _write_head(source, made, target, kind, on_progress)
        elif form == "gguf":
            _write_gguf(source, made, kind, quantizer, on_progress)
        else:
            assert quantizer is not None
            quantizer.write(source, made, kind, on_progress)
        agreement, reason = None, "it was not asked for"
        if is_head:
            reason = "a head says nothing by itself"
        elif check:
            agreement, reason = _compare(source, made, form, on_progress)
        if agreement is not None and kind in _PLAIN and agreement.share < LEAST_F16:
            raise ModelFileError(
                f"the {kind} file does not say what {source.name} says, so it was not kept",
                got=f"{agreement.share:.0%} of tokens equal",
                expected=f"at least {LEAST_F16:.0%}",
            )
        _move(made, output)
    return Report(output, kind, _bytes(source), _bytes(output), agreement, reason)


def _check_head(form: str, kind: str, target: Path | None) -> None:
    """Raise SettingError for what heads are not converted to, or without a target."""
    if form != "gguf":
        raise SettingError("a trained head is converted to GGUF only", got=form, fix="MLX reads the folder as it is.")
    if kind not in QUANTIZATIONS:
        raise SettingError("unknown quantization for a head", got=kind, expected=", ".join(QUANTIZATIONS))
    if target is None:
        raise SettingError(
            "a trained head needs its target's tokenizer",
            fix="Name the model that it was trained for with --target, a GGUF file or a folder.",
        )


def _write_head(source: Path, output: Path, target: Path, kind: str, say: Say) -> None:
    try:
        write_head_gguf(
            output, source, target, kind, on_tensor=lambda done, total: say(f"writing tensor {done} of {total}")
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:  # a configuration that lacks something
        raise HeadFileError(f"{source.name} cannot be converted", got=f"{type(error).__name__}: {error}") from error


def _quantizer(form: str, kind: str) -> Quantizer | None:
    """Who makes it; None where our own writer does. Raises SettingError."""
    quantizer = get_backend(_BACKENDS[form]).quantizer
    names = quantizer.names if quantizer is not None else ()
    plain = _PLAIN if form == "gguf" else ()
    if kind not in (*plain, *names):
        raise SettingError(f"unknown quantization for {form}", got=kind, expected=", ".join((*plain, *names)))
    backend = get_backend(_BACKENDS[form])
    if kind not in plain and not backend.is_installed():
        raise BackendMissingError(
            f"backend {backend.name}, which quantises, is not installed",
            fix=f"Install it with `{backend.report().install_command}`.",
        )
    return None if kind in plain else quantizer


@contextmanager
def _workplace(output: Path) -> Iterator[Path]:
    """A folder on the output's own disk, gone afterwards whatever happens."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as work:
        yield Path(work)


def _move(made: Path, output: Path) -> None:
    """Into place in one step; a folder that is replaced is set aside first, since folders cannot be swapped."""
    if not output.is_dir():
        made.replace(output)
        return
    aside = made.with_name(f"{made.name}.old")
    output.replace(aside)
    try:
        made.replace(output)
    except OSError:
        aside.replace(output)
        raise
    shutil.rmtree(aside)


def _write_gguf(source: Path, output: Path, kind: str, quantizer: Quantizer | None, say: Say) -> None:
    checkpoint = Checkpoint.from_folder(source)
    check_architecture(checkpoint.config)
    plain = output if quantizer is None else output.with_name(f"{output.name}.f16")
    try:
        write_gguf_file(
            plain,
            checkpoint,
            kind if quantizer is None else "F16",
            name=source.resolve().name,
            on_tensor=lambda done, total: say(f"writing tensor {done} of {total}"),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:  # a configuration or tokenizer that lacks something
        raise ModelFileError(f"{source.name} cannot be converted", got=f"{type(error).__name__}: {error}") from error
    if quantizer is not None:
        quantizer.write(plain, output, kind, say)
        plain.unlink()


# ---------------------------------------------------------------- the check


def _compare(source: Path, made: Path, form: str, say: Say) -> tuple[Agreement | None, str]:
    """(agreement, or why there is none). The source runs on MLX in float32, whose rounding is the smallest."""
    reference, reader = get_backend("mlx"), get_backend(_BACKENDS[form])
    if not reference.is_installed():
        return None, f"MLX reads the source, and is not installed: {reference.report().install_command}"
    if not reader.is_installed():
        return None, f"{reader.name} reads the result, and is not installed"
    needed, usable = 4 * summarize(source).num_parameters, look().usable
    if usable is not None and needed > usable:
        return None, f"the source takes {size(needed)} in float32, and {size(usable)} are usable"
    say("asking the source")
    try:
        texts = continuations(source, say)
    except UnsupportedModelError as error:
        return None, str(error)
    say("asking the result")
    return agreement(made, reader.name, texts), ""


def continuations(source: Path, say: Say = lambda text: None) -> list[Text]:
    """What the source makes of `PROMPTS`, greedily."""
    model = load_model(source, "mlx", LoadSettings(dtype="float32"))
    try:
        texts = []
        for number, prompt in enumerate(PROMPTS, start=1):
            say(f"{source.name}: prompt {number} of {len(PROMPTS)}")
            ids = model.tokenizer.encode(prompt, special=True).tolist()
            drafter = make_drafter(DrafterSpec.parse("nothing"), None)
            with Session(model, drafter, acceptance=make_acceptance("walk")) as session:
                result = session.generate(ids, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS))
            texts.append(Text(prompt, tuple(ids), tuple(result.tokens)))
        return texts
    finally:
        model.close()


def agreement(result: Path, backend: str, texts: Sequence[Text]) -> Agreement:
    """How far a model would say the same texts. One that reads a prompt in other tokens agrees with none of it."""
    model = load_model(result, backend)
    try:
        same = [_num_same(model, text) for text in texts]
    finally:
        model.close()
    lengths = [len(text.answer) for text in texts]
    return Agreement(sum(lengths), sum(same), len(texts), sum(map(int.__eq__, same, lengths)))


def _num_same(model: LanguageModel, text: Text) -> int:
    if model.tokenizer.encode(text.prompt, special=True).tolist() != list(text.ids) or not text.answer:
        return 0
    tokens = np.array([*text.ids, *text.answer[:-1]], np.int32)
    state = model.open()
    try:
        rows = tuple(range(len(text.ids) - 1, len(tokens)))
        [scores] = model.forward([Step(state, (HostTokens(tokens),), chain_parents(state, len(tokens)), rows)])
        return int(np.count_nonzero(scores.argmax().numpy() == np.array(text.answer)))
    finally:
        state.close()


def _bytes(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
