"""From the options of a command to an opened pair: named, in the catalog, or on the Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from localspec.drafters import DrafterSpec
    from localspec.loading import Pair
    from localspec.protocols import LoadSettings


def open_models(
    options: dict[str, Any],
    *specs: DrafterSpec,
    quiet: bool = False,
    num_sequences: int = 1,
    offer_pull: bool = False,
) -> Pair:
    """Load the pair that the options name, fit for these drafters, with a sign of life on the terminal."""
    from localspec.loading import open_pair
    from localspec.terminal import loading

    trees = any(spec.asks_for_trees for spec in specs)
    settings = load_settings(options, num_sequences=num_sequences, trees=trees)
    target, draft, backend = _models(options, offer_pull)
    with loading(quiet=quiet):
        return open_pair(target, draft, backend=backend, settings=settings)


def load_settings(options: dict[str, Any], **more: Any) -> LoadSettings:
    """How to load, as the options say. more: other fields of `LoadSettings`."""
    from localspec.protocols import LoadSettings

    names = ("context", "threads", "gpu_layers", "flash_attention", "extra_buffers", "dtype")
    return LoadSettings(**({name: options[name] for name in names} | more))


def _models(options: dict[str, Any], offer_pull: bool) -> tuple[str | None, str | None, str]:
    """Target, draft model and backend as named, or those of the catalog's pair.

    offer_pull: on a terminal, ask whether to fetch what is not here.
    """
    from localspec.doctor import memory_bytes
    from localspec.errors import SettingError
    from localspec.hub.catalog import load_catalog
    from localspec.hub.selection import choice_for, locate

    if options["pair"] is None:
        if options["catalog"] is not None:
            raise SettingError("--catalog only says where pairs are looked for", fix="Name one with --pair.")
        target, draft = (_locate(options[role], role, options["backend"], offer_pull) for role in ("target", "draft"))
        return target, draft, options["backend"]
    if options["target"] is not None or options["draft"] is not None:
        raise SettingError("--pair names both models", fix="Leave out --target and --draft, or --pair.")
    name, _, quantization = options["pair"].partition(":")
    pair = load_catalog(options["catalog"]).get(name)
    choice = choice_for(pair, memory_bytes(), allowed_backends(options), quantization or None)
    found, helper = locate(pair, choice, lambda text: _find(text, "target", choice.backend, offer_pull))
    return str(found), None if helper is None else str(helper), choice.backend


def allowed_backends(options: dict[str, Any]) -> list[str]:
    """Backends that may be taken, best first."""
    from localspec.loading import backend_names, installed_backends

    if options["backend"] != "auto":
        return [options["backend"]]
    return installed_backends() or backend_names()  # with none installed, opening says how to install one


def _locate(text: str | None, role: str, backend: str, offer_pull: bool) -> str | None:
    """The path of a model; bundled names stay as they are, because they name pairs."""
    from localspec.loading import bundled_names

    if text is None or text in bundled_names():
        return text
    return str(_find(text, role, backend, offer_pull))


def _find(text: str, role: str, backend: str, offer_pull: bool) -> Path:
    from localspec.errors import NotPulledError
    from localspec.hub.resolver import find_model

    try:
        return find_model(text, role, backend)
    except NotPulledError as error:
        if not offer_pull or not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
            raise
        if not click.confirm(f"{error.what}. Pull it now?", err=True):
            raise
        return pull_model(text, None, backend)


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
