"""`localspec bench serve` and `bench soak`: many requests at once, timed and compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from localspec.commands.models import open_models
from localspec.commands.options import in_a_folder, load_options

_EXACT = {"exact": "class"}  # what a server promises by itself
_output = click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    callback=in_a_folder,
    help="Also write every measurement as JSON.",
)


@click.command()
@click.option(
    "--at-once",
    multiple=True,
    type=click.IntRange(1, 64),
    default=(1, 2, 4, 8, 16),
    show_default=True,
    help="Requests in flight.",
)
@click.option("--tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Longest answer.")
@click.option("--at", "temperature", type=float, default=0.0, show_default=True, help="Temperature.")
@click.option("--turns", type=click.IntRange(min=1), default=3, show_default=True, help="Runs each way.")
@click.option("--requests", type=click.IntRange(min=1), default=12, show_default=True, help="Requests of a run.")
@click.option("--per-domain", type=click.IntRange(min=1), default=8, show_default=True, help="Held-out prompts.")
@_output
@load_options
def serve(
    at_once: Sequence[int],
    tokens: int,
    temperature: float,
    turns: int,
    requests: int,
    per_domain: int,
    output: Path | None,
    **options: Any,
) -> None:
    """Time to the first token and throughput of many requests at once, speculative against plain batching."""
    from localspec.bench.prompts import load_prompts
    from localspec.bench.serving import Run, measure, table
    from localspec.drafters import DrafterSpec

    def tell(run: Run) -> None:
        click.echo(f"{run.at_once:3d} at once, {run.how:5}: {run.tokens_per_second:7.1f} tok/s", err=True)

    auto = DrafterSpec.parse("auto")
    with open_models(options | _EXACT, auto, num_sequences=max(at_once), batch=True) as pair:
        report = measure(
            pair,
            load_prompts(per_domain=per_domain),
            at_once,
            max_tokens=tokens,
            temperature=temperature,
            turns=turns,
            per_run=requests,
            on_run=tell,
        )
    click.echo(table(report))
    if output is not None:
        output.write_text(json.dumps(report.as_dict(), indent=1))


@click.command()
@click.option("--requests", type=click.IntRange(min=1), default=500, show_default=True, help="Different ones.")
@click.option("--at-once", type=click.IntRange(1, 64), default=16, show_default=True, help="Requests in flight.")
@click.option(
    "--minutes", type=click.FloatRange(min=0.0), default=0.0, help="Ask them again until so many minutes are over."
)
@click.option("--longest", type=click.IntRange(min=8), default=96, show_default=True, help="Prompt and answer.")
@click.option("--seed", type=int, default=0, show_default=True)
@_output
@load_options
def soak(
    requests: int, at_once: int, minutes: float, longest: int, seed: int, output: Path | None, **options: Any
) -> None:
    """Random requests, one in ten cancelled: is every text that of the same request alone, and is nothing left over?

    Ctrl-C ends it with what there is, and --output is written along the way.
    """
    from localspec.bench.soak import Report, as_dict, progress_line, random_requests, run, table
    from localspec.drafters import DrafterSpec

    def save(report: Report) -> None:
        if output is not None:
            output.write_text(json.dumps(as_dict(report), indent=1))

    def tell(report: Report, alone: int) -> None:
        click.echo(progress_line(report, alone), err=True)
        save(report)

    auto = DrafterSpec.parse("auto")
    with open_models(options | _EXACT, auto, num_sequences=at_once, batch=True) as pair:
        asked = random_requests(pair, requests, longest, seed)
        report = run(pair, asked, at_once=at_once, seconds=60.0 * minutes, on_progress=tell)
    save(report)
    click.echo(table(report))
    sys.exit(1 if not report.is_clean else 130 if report.interrupted else 0)
