"""`localspec kept`: what localspec keeps on this machine, and how to get rid of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

_KINDS = ("sessions", "copies", "measurements")


@dataclass(frozen=True, slots=True)
class Lot:
    """Some of what is kept. kind: one of those that can be deleted.  about: whose it is."""

    kind: str
    folder: str
    about: str
    num_things: int
    num_bytes: int


@click.command()
@click.option("--delete", multiple=True, type=click.Choice([*_KINDS, "all"]), help="Delete all of a kind. Repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def kept(delete: Sequence[str], as_json: bool) -> None:
    """List what localspec keeps: sessions (with --remember only), copies of models with fewer bits
    (--draft self), and measurements of this machine.

    Models from the Hub lie in the Hub's cache, which is not localspec's: `hf cache`.
    """
    deleted = {}
    for kind in _KINDS:
        if kind in delete or "all" in delete:
            deleted[kind] = _DELETE[kind]()
    lots = [lot for kind in _KINDS for lot in _LIST[kind]()]
    if as_json:
        click.echo(json.dumps({"deleted": deleted, "kept": [asdict(lot) for lot in lots]}, indent=2))
        return
    for kind, count in deleted.items():
        click.echo(f"deleted {count} {kind}")
    for lot in lots:
        about = f" of {lot.about}" if lot.about else ""
        click.echo(f"{lot.num_things} {lot.kind}{about}, {lot.num_bytes / 1024:,.1f} KiB: {lot.folder}")
    if not lots:
        click.echo("nothing is kept")


def _sessions() -> list[Lot]:
    from localspec.history.store import listing

    return [Lot("sessions", str(one.folder), one.name, one.num_sessions, one.num_bytes) for one in listing()]


def _delete_sessions() -> int:
    from localspec.history.store import forget

    return forget()


def _measurements() -> list[Lot]:
    from localspec.schedule.store import default_folder

    return _files_in("measurements", default_folder())


def _delete_measurements() -> int:
    from localspec.schedule.store import default_folder

    return _delete_folder(_measurements(), default_folder())


def _copies() -> list[Lot]:
    from localspec.copies import default_folder

    return _files_in("copies", default_folder())


def _delete_copies() -> int:
    from localspec.copies import default_folder

    return _delete_folder(_copies(), default_folder())


def _files_in(kind: str, folder: Path) -> list[Lot]:
    """Files and folders of a place as one lot, if there are any."""
    things = list(folder.iterdir()) if folder.is_dir() else []
    files = [file for thing in things for file in (thing.rglob("*") if thing.is_dir() else [thing]) if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return [Lot(kind, str(folder), "", len(things), size)] if things else []


def _delete_folder(lots: Sequence[Lot], folder: Path) -> int:
    from localspec.errors import DiskError

    try:
        if folder.is_dir():
            shutil.rmtree(folder)
    except OSError as error:
        raise DiskError(f"{folder} could not be deleted: {error}", fix="Delete it yourself.") from error
    return sum(lot.num_things for lot in lots)


_LIST: dict[str, Callable[[], list[Lot]]] = {
    "sessions": _sessions,
    "copies": _copies,
    "measurements": _measurements,
}
_DELETE: dict[str, Callable[[], int]] = {
    "sessions": _delete_sessions,
    "copies": _delete_copies,
    "measurements": _delete_measurements,
}
