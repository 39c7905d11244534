"""`localspec fit`: does it fit this machine? Also `localspec pairs fit`."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from localspec.commands.models import named_models
from localspec.commands.options import catalog_option


def _tokens(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    """A number of tokens: 8192, or 32k for 32 * 1024."""
    if text is None:
        return None
    digits, factor = (text[:-1], 1024) if text[-1:] in "kK" else (text, 1)
    if not digits.isdecimal() or not 8 <= int(digits[:12]) * factor <= 1 << 24:
        raise click.BadParameter(f"{text!r} is no number of tokens, such as 8192 or 32k")
    return int(digits) * factor


@click.command()
@click.argument("name", required=False, metavar="[NAME|PATH]")
@click.option("--draft", "-md", metavar="MODEL", help="Draft model, where NAME is no pair.")
@click.option("--head", "heads", multiple=True, metavar="MODEL", help="Trained head for it. Repeatable.")
@click.option("--pair", metavar="NAME[:QUANTISATION]", help="The same as a pair's name alone.")
@catalog_option
@click.option("--context", "-c", callback=_tokens, metavar="N", help="Tokens of context, e.g. 8192 or 32k.")
@click.option("--backend", default="auto", show_default=True, metavar="NAME", help="auto, llamacpp or mlx.")
@click.option("--conversations", type=click.IntRange(1, 64), default=1, show_default=True, help="Open at once.")
@click.option("--trees", is_flag=True, help="Load so that token trees can be verified.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def fit(
    name: str | None,
    draft: str | None,
    heads: Sequence[str],
    pair: str | None,
    catalog: Path | None,
    context: int | None,
    backend: str,
    conversations: int,
    trees: bool,
    as_json: bool,
) -> None:
    """Say what memory a pair or model takes.

    File headers say it; nothing is loaded. NAME is a pair of the catalog, a path, or ORG/NAME[:QUANT]; without
    one, the bundled pair. Of models that are not on this machine the headers are read from the Hub, a few MB. Exits
    with 1 if it does not fit.
    """
    from localspec.copies import is_self
    from localspec.errors import SettingError
    from localspec.hub.fit import examine
    from localspec.hub.selection import names_a_pair
    from localspec.hub.table import print_fit
    from localspec.loading import is_early_exit
    from localspec.protocols import LoadSettings

    if name is not None and pair is None and draft is None and names_a_pair(name):
        name, pair = None, name
    if pair is None and catalog is not None and name is not None:
        raise SettingError("--catalog only says where pairs are looked for", got=name, expected="a pair's name")
    if is_self(draft):
        raise SettingError(
            "`fit` reads headers, and a copy of the target has none before it is made",
            got=draft,
            fix="Open the pair once with it; `localspec kept` then says where the copy lies.",
        )
    heads = tuple(head for head in heads if not is_early_exit(head))  # which takes no memory of its own
    options = {"target": name, "draft": draft, "heads": heads, "pair": pair, "catalog": catalog, "backend": backend}
    options["task"] = None
    with tempfile.TemporaryDirectory(prefix="localspec-") as folder:
        find = partial(_find, Path(folder))
        named = named_models(options, find)
        found = examine(
            named.target,
            named.draft,
            heads=named.heads,
            context=context,
            backend=named.backend,
            settings=LoadSettings(trees=trees),
            num_sequences=conversations,
        )
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
    else:
        print_fit(found)
    sys.exit(0 if found.plan.fits else 1)


def _find(folder: Path, text: str, role: str, backend: str) -> Path:
    """The model on this machine, or its headers below `folder`."""
    from localspec.errors import HubOfflineError, NotPulledError
    from localspec.hub.headers import fetch_headers
    from localspec.hub.name import HubName
    from localspec.hub.resolver import find_model

    try:
        return find_model(text, role, backend)
    except NotPulledError as error:
        try:
            headers = fetch_headers(HubName.parse(text), folder, backend=backend, on_wait=_say)
        except HubOfflineError as reason:
            raise NotPulledError(error.what, got=reason.what, fix=error.fix) from None
    _say(f"{text} is not on this machine; its headers were read from the Hub, {headers.num_bytes / 1e6:.1f} MB")
    return headers.path


def _say(text: str) -> None:
    click.echo(click.style(text, dim=True), err=True)
