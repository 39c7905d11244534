"""What the core sees of MLX before a model is loaded. Imports nothing heavy at the top."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from localspec.errors import (
    BackendMissingError,
    LocalspecError,
    ModelNotFoundError,
    SettingError,
)
from localspec.protocols import BackendReport, DraftHead, LanguageModel, LoadSettings, Tokenizer

from .border import translated
from .planner import MlxPlanner
from .quantizer import MlxQuantizer

if TYPE_CHECKING:
    from .scores import Ledger

_PACKAGES = ("mlx", "mlx-lm", "tokenizers")
_FOREIGN_SETTINGS = ("gpu_layers", "threads", "flash_attention", "extra_buffers", "cache_type")


def install_command() -> str:
    """The command that installs the runtime on this machine."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "pip install mlx mlx-lm"
    extra = "mlx-cuda" if Path("/proc/driver/nvidia").exists() else "mlx-cpu"
    return f'pip install "localspec[{extra}]"'


class MlxBackend:
    """`protocols.Backend` over mlx and mlx-lm."""

    name = "mlx"
    own_settings = frozenset({"dtype"})
    planner = MlxPlanner()
    quantizer = MlxQuantizer()
    formats = ("safetensors", "gguf")

    def __init__(self) -> None:
        self._ledger: Ledger | None = None

    def is_installed(self) -> bool:
        """Looks for the packages; imports at most the empty parent package `mlx`."""
        try:
            return all(find_spec(name) is not None for name in ("mlx.core", "mlx_lm", "tokenizers"))
        except (ImportError, ValueError):
            return False

    def report(self) -> BackendReport:
        """Versions and devices here."""
        installed = self.is_installed()
        versions, devices, notes = _versions(), tuple[str, ...](), list[str]()
        if installed:
            try:
                with translated("asking MLX for its devices"):
                    devices = _devices()
            except LocalspecError as error:
                notes.append(str(error))
        else:
            missing = [name for name in _PACKAGES if name not in versions]
            notes.append(f"not installed: {', '.join(missing) or 'mlx.core'}. Run: {install_command()}")
        if devices and all(device.startswith("cpu") for device in devices):
            notes.append("MLX runs on the CPU here: right for checking results, slow for use.")
        text = ", ".join(f"{name} {version}" for name, version in versions.items())
        return BackendReport(self.name, installed, text, devices, tuple(notes), install_command())

    def accepts(self, path: Path) -> bool:
        """A folder with config.json and safetensors files, or a file that begins like GGUF."""
        try:
            if path.is_dir():
                return (path / "config.json").is_file() and any(path.glob("*.safetensors"))
            with path.open("rb") as file:
                return file.read(4) == b"GGUF"
        except OSError:
            return False

    def open_tokenizer(self, path: Path) -> Tokenizer:
        """The tokenizer of a folder or GGUF file. Raises members of the error tree only."""
        if not path.exists():
            raise ModelNotFoundError("no such model", got=path, expected="a model folder or a .gguf file")
        with translated(f"opening the tokenizer of {path.name}"):
            if path.is_dir():
                from .tokenizer import open_folder_tokenizer

                return open_folder_tokenizer(path)
            from localspec.formats.gguf import read_header

            from .gguf_tokenizer import open_gguf_tokenizer

            return open_gguf_tokenizer(read_header(path).metadata)

    def load(self, path: Path, settings: LoadSettings) -> LanguageModel:
        """Open a safetensors folder or a GGUF file.

        Raises SettingError, ModelNotFoundError, BackendMissingError, ModelFileError,
        UnsupportedModelError or OutOfMemoryError.
        """
        _check_settings(settings)
        if not path.exists():
            raise ModelNotFoundError("no such model", got=path, expected="a model folder or a .gguf file")
        if not self.is_installed():
            raise BackendMissingError("MLX is not installed", fix=f"Run: {install_command()}")
        try:
            from .loader import open_model
            from .scores import Ledger
        except (ImportError, OSError) as error:  # a wheel whose native libraries are absent
            fix = f"Run: {install_command()}"
            raise BackendMissingError("MLX is installed but cannot be imported", got=error, fix=fix) from error
        with translated(f"loading {path.name}"):
            if self._ledger is None:
                self._ledger = Ledger()
            return cast("LanguageModel", open_model(path, settings, self._ledger))

    def load_head(self, path: Path, target: LanguageModel) -> DraftHead:
        """Open a trained head from a safetensors folder.

        Raises ModelNotFoundError, HeadFileError, PairMismatchError, UnsupportedModelError or OutOfMemoryError.
        """
        from .heads import load_head
        from .model import MlxModel

        if not isinstance(target, MlxModel):
            raise SettingError("a head runs where its target does", got=target.info.backend, expected=self.name)
        with translated(f"loading {path.name}"):
            return load_head(path, target)

    def early_exit(self, target: LanguageModel, layers: int | None) -> DraftHead:
        """See `Backend.early_exit`."""
        from .early_exit import EarlyExit
        from .model import MlxModel

        if not isinstance(target, MlxModel):
            raise SettingError("a head runs where its target does", got=target.info.backend, expected=self.name)
        with translated("looking at the target's first layers"):
            return cast("DraftHead", EarlyExit(target, layers))


def _check_settings(settings: LoadSettings) -> None:
    for name in _FOREIGN_SETTINGS:
        value = getattr(settings, name)
        if value is not None:
            raise SettingError(
                f"the mlx backend has no setting {name}", got=value, expected="None", fix="Leave it out."
            )
    if settings.context is not None and settings.context < 1:
        raise SettingError("context out of range", got=settings.context, expected="at least 1")
    if settings.num_sequences < 1:
        raise SettingError("num_sequences out of range", got=settings.num_sequences, expected="at least 1")
    known = ("file", "float32", "float16", "bfloat16")
    if settings.dtype is not None and settings.dtype not in known:
        raise SettingError("unknown dtype", got=settings.dtype, expected=f"one of {', '.join(known)}")


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _devices() -> tuple[str, ...]:
    """The device that models will run on."""
    from .device import describe_device

    return (describe_device(),)


BACKEND = MlxBackend()
