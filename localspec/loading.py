"""Finding backends, telling names from paths, and opening a pair. The only file that knows how
backends are found: ours lie in the folder `backends/` beside this package (loaded by location, so a
user's own folder of that name cannot shadow them), others register in the entry-point group
`localspec.backends`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import platform
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from localspec.compatibility import check_draft, check_head, check_whole
from localspec.copies import is_self, make_copy
from localspec.drafters import AUTO
from localspec.errors import (
    BackendError,
    BackendMissingError,
    ModelNotFoundError,
    NotPulledError,
    PairMismatchError,
    SettingError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
)
from localspec.formats import summarize, summarize_head
from localspec.memory import Part, look, settle
from localspec.pair import Pair
from localspec.peers import PeerLibrary
from localspec.protocols import Backend, DraftHead, LanguageModel, LoadSettings
from localspec.schedule.store import class_for, options_for

_log = logging.getLogger("localspec.loading")
_HOME = Path(__file__).resolve().parent.parent
_APPLE_SILICON = sys.platform == "darwin" and platform.machine() == "arm64"
_PREFERENCE = ("mlx", "llamacpp") if _APPLE_SILICON else ("llamacpp", "mlx")
_COMMON_SETTINGS = frozenset({"context", "num_sequences", "trees", "batch"})
_READABLE = (".gguf", ".safetensors")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?(:[^:@]+)?")

BUNDLED = "tiny"
"""Name of the pair that comes with localspec."""

EARLY_EXIT = "early_exit"
"""In the place of a head's path: the target's own first layers; with how many of them, `early_exit:layers=N`."""

TARGET, DRAFT, HEAD = "target", "draft model", "head"
"""Roles of the parts of a memory plan."""


# ---------------------------------------------------------------- backends


def backend_names() -> list[str]:
    """Every known backend, best first on this machine; installed or not."""
    own = {path.parent.name for path in (_HOME / "backends").glob("*/__init__.py")}
    others = {entry.name for entry in entry_points(group="localspec.backends")} - own
    return [name for name in _PREFERENCE if name in own] + sorted((own - set(_PREFERENCE)) | others)


def installed_backends() -> list[str]:
    """Those of them whose runtime is installed here, best first."""
    return [backend.name for backend in _loadable(backend_names()) if backend.is_installed()]


def get_backend(name: str) -> Backend:
    """The backend of that name. Does not import its runtime. Raises UnknownNameError."""
    folder = _HOME / "backends" / name
    if (folder / "__init__.py").is_file():
        return cast(Backend, _load_package(f"localspec_backend_{name}", folder).BACKEND)
    for entry in entry_points(group="localspec.backends", name=name):
        try:
            return cast(Backend, entry.load())
        except Exception as error:  # somebody else's package: whatever it raises, name it
            raise BackendError(
                f"backend {name!r} does not load ({entry.value}): {error}", fix="Repair or uninstall its package."
            ) from error
    raise UnknownNameError.among("backend", name, backend_names())


def peer_names() -> list[str]:
    """Libraries whose own decoding benchmarks can run beside ours (`localspec.peers`)."""
    return [library.name for library in _peers()]


def get_peer(name: str) -> PeerLibrary:
    """The library of that name. Does not import it. Raises UnknownNameError, BackendMissingError."""
    for library in _peers():
        if library.name == name:
            if not library.version():
                command = get_backend(library.backend).report().install_command
                raise BackendMissingError(f"{name} is not installed", fix=f"Install it with `{command}`.")
            return library
    raise UnknownNameError.among("library", name, peer_names())


def _peers() -> list[PeerLibrary]:
    found = []
    for path in sorted((_HOME / "backends").glob("*/peer.py")):
        name = f"localspec_backend_{path.parent.name}"
        _load_package(name, path.parent)
        found.append(cast(PeerLibrary, importlib.import_module(f"{name}.peer").PEER))
    return found


def readable_formats(name: str = AUTO) -> tuple[str, ...]:
    """What a backend reads, best first; with "auto" what the installed ones read, the best one's first.

    Raises UnknownNameError, and BackendMissingError where "auto" finds none installed.
    """
    if name != AUTO:
        return get_backend(name).formats
    installed = [backend for backend in _loadable(backend_names()) if backend.is_installed()]
    if not installed:
        raise BackendMissingError("no backend is installed", fix="`localspec doctor` says how to install one.")
    return tuple(dict.fromkeys(kind for backend in installed for kind in backend.formats))


def _load_package(module_name: str, folder: Path) -> ModuleType:
    """Import a package from a folder under a name of our own."""
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(
        module_name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def choose_backend(name: str, path: Path) -> Backend:
    """The backend asked for, or with "auto" the best installed one that takes the file.

    Raises BackendMissingError (with the command that installs it) and UnsupportedModelError.
    """
    candidates = _loadable(backend_names()) if name == AUTO else [get_backend(name)]
    accepting = [backend for backend in candidates if backend.accepts(path)]
    if not accepting:
        raise UnsupportedModelError(
            f"{path} is not a model that backend {' or '.join(backend.name for backend in candidates)} reads",
            expected="a .gguf file, or for MLX also a folder with config.json and .safetensors files",
        )
    installed = [backend for backend in accepting if backend.is_installed()]
    if not installed:
        commands = " or ".join(f"`{backend.report().install_command}`" for backend in accepting)
        names = " or ".join(backend.name for backend in accepting)
        raise BackendMissingError(f"backend {names} is not installed", fix=f"Install it with {commands}.")
    return installed[0]


def _loadable(names: Sequence[str]) -> list[Backend]:
    """Those that load; a broken one of somebody else's must not stop ours."""
    backends = []
    for name in names:
        try:
            backends.append(get_backend(name))
        except BackendError as error:
            _log.warning("left out: %s", error)
    return backends


# ---------------------------------------------------------------- names


def bundled_names() -> list[str]:
    """Names of the pairs that come with localspec."""
    return sorted(path.parent.name for path in (_HOME / "models").glob("*/target.gguf"))


def bundled_path(name: str, role: str) -> Path:
    """File of a bundled pair; role is "target" or "draft"."""
    return _HOME / "models" / name / f"{role}.gguf"


def resolve_model(text: str, role: str = "target", find_pulled: Callable[[str], Path] | None = None) -> Path:
    """A path, a bundled name or a Hub id, told apart.

    What exists on disk is a path. A bundled name means that pair's file for `role`. What looks like a
    Hub id is given to `find_pulled`, which answers with a path or raises; this layer knows no Hub
    (`localspec.hub.resolver.find_model` is this function with one). Anything else is refused with what
    it looked like. Raises ModelNotFoundError and UnknownNameError.
    """
    try:
        path = Path(text).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, an unknown ~user, a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelNotFoundError(f"not a usable path: {text[:80]}: {reason}", fix="Check the path.") from None
    if text in bundled_names():
        return bundled_path(text, role)
    looks_like_id = _HUB_ID.fullmatch(text) is not None
    only_an_id = looks_like_id and any(mark in text for mark in ":@")
    like_a_path = path.suffix in (".gguf", ".safetensors") or text.startswith((".", "/", "~")) or text.count("/") > 1
    if like_a_path and not only_an_id:
        raise ModelNotFoundError(f"no such file or folder: {text}", fix="Check the path.")
    if looks_like_id and find_pulled is not None:
        return find_pulled(text)
    if looks_like_id:
        raise NotPulledError(
            f"{text} looks like a Hub id, and there is no such folder here",
            fix=f"Run `localspec pull {text}`, then give the path that it prints.",
        )
    raise UnknownNameError.among("model", text, bundled_names())


# ---------------------------------------------------------------- pairs


def open_pair(
    target: str | None = None,
    draft: str | None = None,
    *,
    backend: str = AUTO,
    settings: LoadSettings | None = None,
    check_memory: bool = True,
    use_tuned: bool = True,
    heads: Sequence[str] = (),
) -> Pair:
    """Open a target and, if they are named, its draft model and trained heads; with no target the bundled pair. draft:
    "self" or "self:KIND" is a copy of the target with fewer bits (`localspec.copies`), which is made the first time.

    The draft model gets the target's context length; a head that is named as `draft` is taken as a head. Where no
    context is named and memory does not allow the usual one, a shorter one is chosen and said in `Pair.notes`.
    check_memory: refuse what does not fit (`localspec.memory`).  use_tuned: where no runtime option is given, load with
    those that `localspec tune` found best, and stay in the width class that it found. Raises members of the error tree;
    what was opened before an error is closed again.
    """
    settings = settings or LoadSettings()
    if target is None:
        target = BUNDLED
    if draft is None and target in bundled_names() and not Path(target).exists():
        draft = target
    target_path = resolve_model(target, "target")
    if draft is not None and is_self(draft):
        named: Path | None = make_copy(target_path, choose_backend(backend, target_path), draft)
    else:
        named = None if draft is None else resolve_model(draft, "draft")
    exits = [exit_layers(head) for head in heads if is_early_exit(head)]
    files = [resolve_model(head, HEAD) for head in heads if not is_early_exit(head)]
    draft_path, head_paths = sort_out(named, files)
    parts = plan_parts(target_path, draft_path, backend, head_paths)
    found = check_pair(parts)
    if check_memory:
        settings, said = settle(parts, settings, look())
        found += said
    tuned, noted = _tuned(target_path, draft_path, backend, settings) if use_tuned else (settings, ())
    with ExitStack() as opened:
        try:
            model = load_model(target_path, backend, tuned)
            settings, found = tuned, (*found, *noted)
        except (SettingError, BackendError) as error:
            if tuned is settings:
                raise
            model = load_model(target_path, backend, settings)
            found = (
                *found,
                f"the options that `localspec tune` found do not work any more ({error.what}): run it again",
            )
        opened.callback(model.close)
        if use_tuned:
            model.capabilities = replace(model.capabilities, width_class=class_for(model))
        loaded: list[DraftHead] = []
        runtime = choose_backend(backend, target_path)
        for path in head_paths:
            loaded.append(runtime.load_head(path, model))
            opened.callback(loaded[-1].close)
        for layers in exits:
            loaded.append(runtime.early_exit(model, layers))
            opened.callback(loaded[-1].close)
        check_kinds(loaded)
        pair = Pair(model, None, found, loaded)
        if draft_path is not None:
            # a drafter's trees need not be exact, so it is spared what that costs
            own = replace(settings, context=model.info.context_length, trees=False)
            pair.draft = load_model(draft_path, backend, own)
            opened.callback(pair.draft.close)
            if pair.drafting is not None and pair.drafting.relation.same:
                check_rows(model, pair.draft)
        opened.pop_all()
        return pair


def is_early_exit(head: str) -> bool:
    """Is a part of the target meant? What exists on disk is a path, whatever its name."""
    return head.partition(":")[0] == EARLY_EXIT and not Path(head).exists()


def exit_layers(head: str) -> int | None:
    """How many layers `early_exit:layers=N` names; None for `early_exit` alone. Raises SettingError."""
    _, _, setting = head.partition(":")
    name, _, value = setting.partition("=")
    if not setting:
        return None
    if name != "layers" or not value.isdecimal():
        raise SettingError("not a head that is known", got=head, expected=f"{EARLY_EXIT}:layers=N")
    return int(value)


def sort_out(draft: Path | None, heads: Sequence[Path]) -> tuple[Path | None, tuple[Path, ...]]:
    """(draft model, heads): a head that was named as draft model is one. Raises as `formats.summarize`."""
    if draft is not None and (draft.is_dir() or draft.suffix in _READABLE) and summarize(draft).drafter_kind:
        return None, (draft, *(head for head in heads if head != draft))
    return draft, tuple(heads)


def check_kinds(heads: Sequence[DraftHead]) -> None:
    """Raise UsageError for two heads of one kind: their drafters would have one name."""
    for place, head in enumerate(heads):
        if any(other.info.kind == head.info.kind for other in heads[:place]):
            raise UsageError(f"two heads of kind {head.info.kind}", got=head.info.name, fix="Name one of them.")


def _tuned(
    target: Path, draft: Path | None, backend: str, settings: LoadSettings
) -> tuple[LoadSettings, tuple[str, ...]]:
    """The settings with the options that `localspec tune` found best, if none of these was given; and what to tell."""
    chosen = choose_backend(backend, target)
    defaults = LoadSettings()
    if any(getattr(settings, name) != getattr(defaults, name) for name in (*chosen.own_settings, "trees")):
        return settings, ()
    options = options_for(target, chosen.name, draft)
    if not options:
        return settings, ()
    words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in options.items())
    changes: dict[str, Any] = dict(options)
    return replace(settings, **changes), (f"runtime options found by `localspec tune`: {words}",)


def plan_parts(target: Path, draft: Path | None = None, backend: str = AUTO, heads: Sequence[Path] = ()) -> list[Part]:
    """What a memory plan is made from; without the models whose backend cannot tell. Raises as `choose_backend`
    and `formats.summarize`."""
    own = choose_backend(backend, target).planner
    found = [(TARGET, target, own)]
    if draft is not None:
        found.append((DRAFT, draft, choose_backend(backend, draft).planner))
    parts = [Part(role, summarize(path), planner) for role, path, planner in found if planner is not None]
    # heads run on the target's backend, and what lies in the target's own file is counted there
    apart = () if own is None else tuple(path for path in heads if path != target)
    return parts + [Part(HEAD, summarize_head(path), own) for path in apart if own is not None]


def check_pair(parts: Sequence[Part]) -> tuple[str, ...]:
    """What headers say against a target, its draft model and its heads, from `plan_parts`. Returns doubts; raises
    PairMismatchError and UnsupportedModelError. What only a backend can read is left to it."""
    models = {part.role: part.model for part in parts}
    target, draft = models.get(TARGET), models.get(DRAFT)
    if target is None:
        return ()
    check_whole(target, TARGET)
    found = () if draft is None else check_draft(target, draft)
    return found + tuple(doubt for part in parts if part.role == HEAD for doubt in check_head(target, part.model))


def load_model(path: Path, backend: str = AUTO, settings: LoadSettings | None = None) -> LanguageModel:
    """Open one model. Settings that the chosen backend does not have are refused, not dropped."""
    settings = settings or LoadSettings()
    chosen = choose_backend(backend, path)
    given = {field.name for field in fields(settings) if getattr(settings, field.name) != field.default}
    foreign = given - chosen.own_settings - _COMMON_SETTINGS
    if foreign:
        raise SettingError(
            f"backend {chosen.name} has no setting {', '.join(sorted(foreign))}",
            expected=", ".join(sorted(chosen.own_settings | _COMMON_SETTINGS)),
        )
    return chosen.load(path, settings)


def check_rows(target: LanguageModel, draft: LanguageModel) -> None:
    """Raise PairMismatchError if the draft model could guess a padding row that the target does not have."""
    if draft.vocab_size > target.vocab_size:
        raise PairMismatchError(
            "the draft model has more rows of logits than the target",
            got=draft.vocab_size,
            expected=f"at most {target.vocab_size}",
            fix="Choose a draft model whose vocabulary is not padded further than the target's.",
        )
