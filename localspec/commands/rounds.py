"""`localspec bench rounds`: where the time of a speed benchmark's configurations went."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
def rounds(folder: Path) -> None:
    """Say where the time of each configuration went, by kinds of rounds. FOLDER: --output of `bench speed`."""
    from localspec.bench.rounds import pace_table, paces, parts, table
    from localspec.bench.runs import read_runs
    from localspec.bench.speed_report import RUNS
    from localspec.errors import SettingError

    runs = read_runs(folder / RUNS)
    found = parts(runs)
    if not found:
        raise SettingError(
            f"the runs in {folder} have no rounds beside plain decoding's",
            fix="Measure again: localspec bench speed --output FOLDER. Versions before this one wrote none down.",
        )
    click.echo(f"{pace_table(paces(runs))}\n\n{table(found)}")
