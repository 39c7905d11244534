"""From what a user wrote to a model on this machine. Nothing is fetched here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from localspec.errors import HubMissingError, ModelFileError, NotPulledError
from localspec.loading import readable_formats, resolve_model

from . import trust
from .cache import RepoCache, files_below
from .choice import GGUF, INDEX, choose_format, choose_gguf, weight_files
from .client import Hub
from .name import MAIN, HubName


@dataclass(frozen=True, slots=True)
class Found:
    """A complete model in the Hub cache."""

    path: Path
    commit: str


def find_model(
    text: str,
    role: str = "target",
    backend: str = "auto",
    hub: Hub | None = None,
    formats: Sequence[str] | None = None,
) -> Path:
    """The model that `text` means: what is on disk under that path, a bundled name, or a Hub id in the Hub
    cache or in LM Studio's folders, in this order.

    role: "target" or "draft", for bundled names.  backend: whose format is preferred where a repository
    has several.  formats: instead, those that will do. Raises NotPulledError for a Hub id that is not here
    (with the command that fetches it), else what `loading.resolve_model` raises.
    """
    return resolve_model(text, role, partial(find_pulled, backend=backend, hub=hub, formats=formats))


def find_pulled(
    text: str, *, backend: str = "auto", hub: Hub | None = None, formats: Sequence[str] | None = None
) -> Path:
    """The model of a Hub id that is on this machine. Raises NotPulledError and SettingError."""
    name, hub, formats = HubName.parse(text), hub or Hub(), formats or readable_formats(backend)
    problems = []
    try:
        found = find_in_cache(hub, name, formats)
        if found is not None:
            return found.path
        others = RepoCache(hub.root, name.repo).revisions()
        if others:
            problems.append(f"pulled were {', '.join(f'{name.repo}@{other}' for other in others[:8])}")
    except (HubMissingError, ModelFileError) as error:
        problems.append(f"in the Hub cache: {error}")
    for folder in [] if name.revision else lm_studio_folders():
        try:
            if (folder / name.repo).is_dir():
                return _model_in(folder / name.repo, files_below(folder / name.repo, folder), name, formats)
        except (HubMissingError, ModelFileError) as error:
            problems.append(f"in {folder}: {error}")
    raise NotPulledError(
        f"no such file or folder, and Hub id {name} is not on this machine",
        got="; ".join(problems) or None,
        fix=f"Run `localspec pull {name}`.",
    )


def find_in_cache(hub: Hub, name: HubName, formats: Sequence[str]) -> Found | None:
    """The model in the Hub cache, None if that revision was not pulled.

    Raises HubMissingError and ModelFileError if the revision is here, and that model not or not all of it.
    """
    cache = RepoCache(hub.root, name.repo)
    commit = cache.commit_of(name.revision or MAIN)
    if commit is None:
        return None
    return Found(_model_in(cache.snapshot(commit), cache.names(commit), name, formats), commit)


def lm_studio_folders() -> list[Path]:
    """Where LM Studio keeps models, as publisher/repository/file, today and formerly."""
    folders = (Path.home() / ".lmstudio" / "models", Path.home() / ".cache" / "lm-studio" / "models")
    return [folder for folder in folders if folder.is_dir()]


def _model_in(folder: Path, names: Sequence[str], name: HubName, formats: Sequence[str]) -> Path:
    """The complete model among these files."""
    if choose_format(names, name.choice, formats, name.repo) == GGUF:
        return folder / choose_gguf(names, name.choice, name.repo).files[0]
    index = trust.read_json(folder / INDEX, f"{INDEX} of {name.repo}") if INDEX in names else None
    weight_files(names, index, name.repo)
    return folder
