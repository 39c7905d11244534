"""From a safetensors folder to what a backend runs best: a GGUF file, or an MLX folder with fewer bits; then
a check that source and result say the same.

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

from localspec.drafters import DrafterSpec, make_drafter
from localspec.engine.session import Session
from localspec.errors import (
    BackendMissingError,
    ModelFileError,
    ModelNotFoundError,
    SettingError,
    UnsupportedModelError,
)
from localspec.formats.conversion import Checkpoint, check_architecture, write_gguf_file
from localspec.loading import get_backend, load_model
from localspec.memory import size
from localspec.preparation import Quantizer
from localspec.protocols import LanguageModel, LoadSettings
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

LEAST_F16 = 0.9
"""Share of tokens on which an F16 or F32 file must agree with its source; near-ties may fall otherwise, since the
two runtimes round differently."""

_PLAIN = ("F32", "F16")
_BACKENDS = {"gguf": "llamacpp", "mlx": "mlx"}
_DEFAULTS = {"gguf": "Q4_K_M", "mlx": "4bit"}

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far greedy continuations of `PROMPTS` agree with the source's.

    num_equal: tokens before the first difference, over all prompts.  num_same: prompts without one.
    """

    num_tokens: int
    num_equal: int
    num_prompts: int
    num_same: int

    @property
    def share(self) -> float:
        return self.num_equal / max(1, self.num_tokens)


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
            f"greedy text against the source: {said.num_equal} of {said.num_tokens} tokens before the first difference "
            f"({said.share:.0%}), {said.num_same} of {said.num_prompts} prompts equal"
        )


def convert(
    source: Path,
    output: Path,
    *,
    form: str | None = None,
    quantization: str | None = None,
    force: bool = False,
    check: bool = True,
    on_progress: Say = lambda text: None,
) -> Report:
    """Convert a safetensors folder. form: gguf or mlx (None: by the output's name).

    Raises SettingError, UnsupportedModelError (naming the architectures that are known), ModelFileError (also
    where an F16 or F32 file does not say what its source says; it is not left behind), and what backends raise.
    """
    form = form or ("gguf" if output.suffix == ".gguf" else "mlx")
    if form not in _BACKENDS:
        raise SettingError("unknown form", got=form, expected=" or ".join(_BACKENDS))
    kind = quantization or _DEFAULTS[form]
    quantizer = _quantizer(form, kind)
    if not source.is_dir():
        raise ModelNotFoundError(f"{source} is no folder", expected="a folder with config.json and safetensors files")
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
        if form == "gguf":
            _write_gguf(source, made, kind, quantizer, on_progress)
        else:
            assert quantizer is not None
            quantizer.write(source, made, kind, on_progress)
        agreement, reason = None, "it was not asked for"
        if check:
            agreement, reason = _compare(source, made, form, on_progress)
        if agreement is not None and kind in _PLAIN and agreement.share < LEAST_F16:
            raise ModelFileError(
                f"the {kind} file does not say what {source.name} says, so it was not kept",
                got=f"{agreement.share:.0%} of tokens equal",
                expected=f"at least {LEAST_F16:.0%}",
            )
        _move(made, output)
    return Report(output, kind, _bytes(source), _bytes(output), agreement, reason)


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
    reference = get_backend("mlx")
    if not reference.is_installed():
        return None, f"MLX reads the source, and is not installed: {reference.report().install_command}"
    if not get_backend(_BACKENDS[form]).is_installed():
        return None, f"{_BACKENDS[form]} reads the result, and is not installed"
    say("asking the source")
    try:
        wanted = continuations(source, "mlx", LoadSettings(num_sequences=1, dtype="float32"), say)
    except UnsupportedModelError as error:
        return None, str(error)
    say("asking the result")
    got = continuations(made, _BACKENDS[form], LoadSettings(num_sequences=1), say)
    return agreement(wanted, got), ""


def continuations(path: Path, backend: str, settings: LoadSettings, say: Say) -> list[list[int]]:
    """Greedy tokens behind each of `PROMPTS`."""
    model = load_model(path, backend, settings)
    try:
        answers = []
        for number, prompt in enumerate(PROMPTS, start=1):
            say(f"{path.name}: prompt {number} of {len(PROMPTS)}")
            answers.append(_continue(model, prompt))
        return answers
    finally:
        model.close()


def _continue(model: LanguageModel, prompt: str) -> list[int]:
    drafter = make_drafter(DrafterSpec.parse("nothing"), None)
    with Session(model, drafter, acceptance=make_acceptance("walk")) as session:
        result = session.stream(prompt, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)).result
        return [int(token) for token in result.tokens]


def agreement(wanted: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> Agreement:
    """Tokens up to the first difference of each continuation: behind it the two answer different prompts."""
    num_equal = num_same = 0
    for mine, other in zip(wanted, got, strict=True):
        same = 0
        for left, right in zip(mine, other, strict=False):
            if left != right:
                break
            same += 1
        num_equal += same
        num_same += list(mine) == list(other)
    return Agreement(sum(map(len, wanted)), num_equal, len(wanted), num_same)


def _bytes(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
