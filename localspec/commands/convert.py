"""`localspec convert`: from one format to another, or to fewer bits."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("source", metavar="FOLDER|ORG/NAME")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--to", "form", type=click.Choice(["gguf", "mlx"]), help="[default: by OUTPUT's name]")
@click.option(
    "--quantize",
    "-q",
    metavar="TYPE",
    help="GGUF: F32, F16, Q8_0, Q4_K_M, Q4_0, Q3_K_M, Q2_K; MLX: 8bit, 4bit, 3bit, 2bit.",
)
@click.option("--target", metavar="MODEL", help="For a trained head: the model it was trained for.")
@click.option("--force", is_flag=True, help="Replace OUTPUT.")
@click.option("--check/--no-check", default=True, help="Compare what source and result say.")
def convert(
    source: str, output: Path, form: str | None, quantize: str | None, target: str | None, force: bool, check: bool
) -> None:
    """Convert a safetensors folder to GGUF or fewer bits.

    Says afterwards how far the result's greedy text agrees with the source's. A trained head (DSpark, DFlash, EAGLE-3)
    becomes a GGUF head for llama.cpp, with the tokenizer of its --target, a GGUF file or a folder.
    """
    from localspec.hub.console import status
    from localspec.hub.convert import convert as run
    from localspec.hub.resolver import find_model

    folder = find_model(source, formats=("safetensors",))
    beside = None if target is None else find_model(target, formats=("gguf", "safetensors"))
    with status() as say:
        report = run(
            folder,
            output,
            form=form,
            quantization=quantize,
            force=force,
            check=check,
            target=beside,
            on_progress=say,
        )
    for line in report.lines():
        click.echo(line)
