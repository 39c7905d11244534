"""`localspec pairs` and `localspec pull`: what is known, and how it gets here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from localspec.commands.fit import fit
from localspec.commands.models import chosen_pair, pull_model, pull_pair
from localspec.commands.options import F, apply_options, catalog_option


def pairs_options(command: F) -> F:
    """Which pairs, for which machine."""
    options = [
        click.option("--memory", metavar="SIZE", help="For a machine with so much, e.g. 16G [default: this machine]."),
        click.option("--backend", metavar="NAME", help="Only pairs with files for it: llamacpp or mlx."),
        click.option("--drafter", metavar="KIND", help="Only this kind, e.g. draft_model, dspark, eagle3."),
        catalog_option,
        click.option("--json", "as_json", is_flag=True, help="Print one JSON list."),
    ]
    return apply_options(options, command)


@click.group(invoke_without_command=True)
@pairs_options
@click.pass_context
def pairs(ctx: click.Context, /, **options: Any) -> None:
    """List known pairs: what fits this machine and what this version can run."""
    from localspec.errors import SettingError

    if ctx.invoked_subcommand is None:
        _print_pairs("", options)
    elif any(options.values()):
        raise SettingError(
            f"options of `pairs` stand before `{ctx.invoked_subcommand}`",
            fix="Write them behind it, where it has them.",
        )


@pairs.command("search")
@click.argument("text")
@pairs_options
def search_pairs(text: str, **options: Any) -> None:
    """List the pairs that have every word of TEXT in a name, model, family, kind or repository."""
    _print_pairs(text, options)


@pairs.command("show")
@click.argument("name")
@click.option("--memory", metavar="SIZE", help="For a machine with so much, e.g. 16G [default: this machine].")
@catalog_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show_pair(name: str, memory: str | None, catalog: Path | None, as_json: bool) -> None:
    """Print all that is known about one pair."""
    from localspec.hub.catalog import load_catalog
    from localspec.hub.selection import row_of
    from localspec.hub.table import print_pair

    pair = load_catalog(catalog).get(name)
    size = _machine_memory(memory)
    if as_json:
        click.echo(json.dumps(row_of(pair, pair.choices, size).as_dict(), indent=2))
    else:
        print_pair(pair, size)


@pairs.command("check")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def check_pairs(file: Path) -> None:
    """Check a catalog of your own: every field, and which of ours it replaces."""
    from localspec.hub.catalog import load_catalog, read_file

    own = {pair.name for pair in read_file(file)}
    click.echo(f"{file}: {len(own)} pair{'s' if len(own) > 1 else ''}, valid")
    for name, origin in load_catalog(file).replaced:
        if name in own:
            click.echo(f"{name} replaces that of {origin}")


pairs.add_command(fit)


def _print_pairs(text: str, options: dict[str, Any]) -> None:
    from localspec.errors import UnknownNameError
    from localspec.hub.catalog import KINDS, load_catalog
    from localspec.hub.selection import select
    from localspec.hub.table import print_pairs
    from localspec.loading import backend_names

    for option, known in (("backend", backend_names()), ("drafter", list(KINDS))):
        if options[option] not in (None, *known):
            raise UnknownNameError.among(option, options[option], known)
    memory = _machine_memory(options["memory"])
    catalog = load_catalog(options["catalog"])
    rows = select(catalog, memory, text=text, backend=options["backend"], drafter=options["drafter"])
    if options["as_json"]:
        click.echo(json.dumps([row.as_dict() for row in rows], indent=2))
    else:
        print_pairs(rows, memory)


def _machine_memory(text: str | None) -> int:
    from localspec.doctor import memory_bytes
    from localspec.errors import SettingError
    from localspec.hub.selection import parse_memory

    memory = memory_bytes() if text is None else parse_memory(text)
    if not memory:
        raise SettingError("this machine does not say how much memory it has", fix="Give it with --memory.")
    return memory


@click.command()
@click.argument("name", metavar="ORG/NAME[:QUANT]|PAIR[:QUANT]")
@click.option("--revision", metavar="REV", help="Branch, tag or commit [default: main].")
@click.option("--backend", default="auto", show_default=True, metavar="NAME", help="Whose format to fetch.")
@click.option("--verify", is_flag=True, help="Also check what is already here against its checksums.")
@catalog_option
def pull(name: str, revision: str | None, backend: str, verify: bool, catalog: Path | None) -> None:
    """Fetch a model, or a pair of the catalog.

    It goes from the Hub into its cache, and its path is printed. Safetensors and GGUF only, no code, checksums
    compared. Ctrl-C keeps what has arrived; the same command goes on from there. QUANT is a quantisation or a file
    name. HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and HF_HUB_OFFLINE mean what they always mean.
    """
    from localspec.errors import SettingError
    from localspec.hub.selection import names_a_pair

    if not names_a_pair(name):
        paths = [pull_model(name, revision, backend, verify=verify)]
    elif revision is not None:
        raise SettingError("a pair's models have revisions of their own", got=revision, fix="Pull them one by one.")
    else:
        _, choice = chosen_pair({"pair": name, "catalog": catalog, "backend": backend})
        paths = pull_pair(choice, verify=verify)
    for path in paths:
        click.echo(path)
