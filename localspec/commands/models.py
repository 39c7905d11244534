"""From the options of a command to an opened pair: named, in the catalog, or on the Hub."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from localspec.drafters import DrafterSpec
    from localspec.hub.catalog import Choice, KnownPair
    from localspec.pair import Pair
    from localspec.protocols import LoadSettings

Find = Callable[[str, str, str], Path]


def open_models(
    options: dict[str, Any],
    *specs: DrafterSpec,
    quiet: bool = False,
    num_sequences: int = 1,
    batch: bool = False,
    offer_pull: bool = False,
) -> Pair:
    """Load the pair that the options name, fit for these drafters, with a sign of life on the terminal."""
    from localspec.exactness import AUTO
    from localspec.loading import open_pair
    from localspec.terminal import loading
    from localspec.verify import WALK

    trees = any(spec.asks_for_trees for spec in specs)
    settings = load_settings(options, num_sequences=num_sequences, trees=trees, batch=batch)
    named = named_models(options, offer_pull=offer_pull)
    with loading(quiet=quiet) as status:
        draft = _own_copy(named, say=_ignore if status is None else status.update)
        pair = open_pair(
            named.target,
            draft,
            backend=named.backend,
            settings=settings,
            check_memory=options["check_memory"],
            heads=named.heads,
        )
        if status is not None:
            status.update("measuring what is not known here (once) ...")
        pair.remembers_speed = not options.get("fresh")
        try:  # before a session takes the sequence that measuring needs
            exactness = pair.exactness(options.get("exact", AUTO), acceptance=options.get("acceptance", WALK))
            if exactness.leaves_room and any(spec.decides for spec in specs):
                _ = pair.experience_with(exactness)
            if options.get("remember") and any(spec.remembers for spec in specs):
                pair.remember(options["remember_size"] << 20)
        except BaseException:
            pair.close()
            raise
        return pair


def _own_copy(named: Named, say: Callable[[str], None]) -> str | None:
    """The draft model's path, where it is a copy of the target, which is made now if it has to be."""
    from localspec.copies import is_self, make_copy
    from localspec.loading import BUNDLED, choose_backend, resolve_model

    if named.draft is None or not is_self(named.draft):
        return named.draft
    path = resolve_model(named.target or BUNDLED, "target")
    return str(make_copy(path, choose_backend(named.backend, path), named.draft, on_progress=say))


def _ignore(_: str) -> None:
    pass


def load_settings(options: dict[str, Any], **more: Any) -> LoadSettings:
    """How to load, as the options say. more: other fields of `LoadSettings`."""
    from localspec.protocols import LoadSettings

    names = ("context", "threads", "gpu_layers", "flash_attention", "extra_buffers", "cache_type", "dtype")
    return LoadSettings(**({name: options[name] for name in names} | more))


@dataclass(frozen=True, slots=True)
class Named:
    """What the options name: paths, or bundled names."""

    target: str | None
    draft: str | None
    heads: tuple[str, ...]
    backend: str


def named_models(options: dict[str, Any], find: Find | None = None, *, offer_pull: bool = False) -> Named:
    """Target, draft model, heads and backend as named, or those of the catalog's pair, with the heads that are named
    beside it.

    find: from (name or path, role, backend) to the model [default: on this machine].  offer_pull: on a terminal,
    ask whether to fetch what is not here.
    """
    from localspec.errors import SettingError

    find = find or partial(_find, offer_pull=offer_pull and options["pair"] is None)
    if options["pair"] is None:
        if options["catalog"] is not None:
            raise SettingError("--catalog only says where pairs are looked for", fix="Name one with --pair.")
        if options["task"] is not None:
            raise SettingError("--task chooses among the drafters of a pair", fix="Name one with --pair.")
        backend = options["backend"]
        target, draft = (_locate(options[role], role, backend, find) for role in ("target", "draft"))
        return Named(target, draft, _heads(options, backend, find), backend)
    if options["target"] is not None or options["draft"] is not None:
        raise SettingError("--pair names both models", fix="Leave out --target and --draft, or --pair.")
    return _models_of_pair(options, find, offer_pull)


def _heads(options: dict[str, Any], backend: str, find: Find) -> tuple[str, ...]:
    from localspec.loading import is_early_exit

    return tuple(text if is_early_exit(text) else str(find(text, "head", backend)) for text in options["heads"])


def _models_of_pair(options: dict[str, Any], find: Find, offer_pull: bool) -> Named:
    """As `named_models`. Asks once for all models, because one is of no use without the others."""
    from localspec.errors import ModelNotFoundError
    from localspec.hub.selection import locate, memory_gb

    pair, choice = chosen_pair(options)

    def located() -> Named:
        found = locate(pair, choice, lambda text: find(text, "target", choice.backend))
        heads = (*map(str, found.heads), *_heads(options, choice.backend, find))
        return Named(str(found.target), None if found.draft is None else str(found.draft), heads, choice.backend)

    try:
        return located()
    except ModelNotFoundError as error:
        question = f"{error.what}. Pull it now? (about {memory_gb(pair, choice):.1f} GB of memory in use)"
        if not offer_pull or not _may_ask() or not click.confirm(question, err=True):
            raise
    pull_pair(choice)
    return located()


def chosen_pair(options: dict[str, Any]) -> tuple[KnownPair, Choice]:
    """The pair that --pair names, and which of its files suit this machine."""
    from localspec.doctor import memory_bytes
    from localspec.hub.catalog import load_catalog
    from localspec.hub.selection import choice_for, for_task

    name, _, quantization = options["pair"].partition(":")
    pair = load_catalog(options["catalog"]).get(name)
    choice = choice_for(pair, memory_bytes(), allowed_backends(options), quantization or None)
    task = options.get("task")
    return pair, choice if task is None else for_task(pair, choice, task)


def allowed_backends(options: dict[str, Any]) -> list[str]:
    """Backends that may be taken, best first."""
    from localspec.loading import backend_names, installed_backends

    if options["backend"] != "auto":
        return [options["backend"]]
    return installed_backends() or backend_names()  # with none installed, opening says how to install one


def _locate(text: str | None, role: str, backend: str, find: Find) -> str | None:
    """The path of a model; bundled names stay as they are, because they name pairs."""
    from localspec.copies import is_self
    from localspec.loading import bundled_names

    if text is None or text in bundled_names() or (role == "draft" and is_self(text)):
        return text
    return str(find(text, role, backend))


def _find(text: str, role: str, backend: str, offer_pull: bool) -> Path:
    from localspec.errors import NotPulledError
    from localspec.hub.resolver import find_model

    try:
        return find_model(text, role, backend)
    except NotPulledError as error:
        if not offer_pull or not _may_ask() or not click.confirm(f"{error.what}. Pull it now?", err=True):
            raise
        return pull_model(text, None, backend)


def _may_ask() -> bool:
    """Is there somebody who reads and types?"""
    return bool(sys.stdin and sys.stdin.isatty() and sys.stderr.isatty())


def pull_pair(choice: Choice, *, verify: bool = False) -> list[Path]:
    """Fetch what a catalog's choice names; the paths of target, draft model and heads. Paths of the user's own are
    left."""
    named = (choice.target, choice.draft, *choice.heads)
    names = [name for name in named if name is not None and not name.startswith(("/", "~"))]
    return [pull_model(name, None, choice.backend, verify=verify) for name in names]


def pull_model(text: str, revision: str | None, backend: str, *, verify: bool = False) -> Path:
    """Fetch a model, with bars on the terminal; its path."""
    from localspec.hub.console import PullProgress, pulled_line
    from localspec.hub.name import HubName
    from localspec.hub.pull import pull as fetch

    name = HubName.parse(text, revision)
    with PullProgress() as progress:
        pulled = fetch(name, backend=backend, watcher=progress, verify=verify)
    click.echo(click.style(pulled_line(pulled), dim=True), err=True)
    return pulled.path
