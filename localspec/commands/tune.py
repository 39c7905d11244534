"""`localspec tune`: parse, measure, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from localspec.commands.models import named_models
from localspec.commands.options import load_options

_QUICK_SECONDS = 8.0


@click.command()
@load_options
@click.option("--fresh", is_flag=True, help="Measure again, whatever is stored.")
@click.option("--quick", is_flag=True, help="Do not vary options; measure those that the backend chooses, in short.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=1.0),
    metavar="S",
    help="Time it may take, about [default: 45, with --quick 8].",
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.png", help="Draw the curves.")
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.json", help="Write everything as JSON."
)
@click.argument("model", required=False, metavar="[TARGET]")
def tune(
    model: str | None,
    fresh: bool,
    quick: bool,
    seconds: float | None,
    plot: Path | None,
    output: Path | None,
    **options: Any,
) -> None:
    """Measure what a pair's passes cost here, find the runtime options that suit it, and keep both.

    With no options: the bundled pair. What is given (say --threads) is fixed, what is not is tried. Nothing else should
    run meanwhile. What was found is used from then on; the same command prints it again.
    """
    from localspec.errors import SettingError
    from localspec.protocols import LoadSettings
    from localspec.terminal import progress_bar
    from localspec.tune.plot import check_plot, draw
    from localspec.tune.report import text_of
    from localspec.tune.search import Plan
    from localspec.tune.search import tune as search

    if model is not None and options["target"] is not None:
        raise SettingError("the target is named twice", got=f"{model}, --target {options['target']}")
    if options["heads"]:
        raise SettingError("heads are measured when they are first loaded", got="--head", fix="Leave --head out.")
    options["target"] = options["target"] if model is None else model
    for name, file in (("--plot", plot), ("--output", output)):
        if file is not None and not file.parent.is_dir():
            raise SettingError(f"{name}: no such folder: {file.parent}", fix="Make it first.")
    if plot is not None:
        check_plot(plot)
    named = named_models(options)
    names = ("context", "threads", "gpu_layers", "flash_attention", "extra_buffers", "cache_type", "dtype")
    settings = LoadSettings(num_sequences=1, **{name: options[name] for name in names})
    plan = Plan(seconds or (_QUICK_SECONDS if quick else Plan().seconds), search=not quick, fresh=fresh)
    with progress_bar() as on_progress:
        result = search(
            named.target, named.draft, backend=named.backend, settings=settings, plan=plan, on_progress=on_progress
        )
    click.echo(text_of(result))
    if output is not None:
        output.write_text(json.dumps(result.as_dict(), indent=1))
    if plot is not None:
        draw(result, plot)
