"""`localspec bench expand`: a target with the cost of a larger model and the function of a small one."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click

_TYPES = "gguf: F32, F16, Q8_0, Q4_0; safetensors: float32, float16, bfloat16"


@click.command()
@click.argument("source")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--size", required=True, metavar="SIZE", help="0.5b, 1b or 8b.")
@click.option("--format", "form", metavar="FORMAT", help="gguf or safetensors [default: by OUTPUT's name].")
@click.option("--type", "kind", metavar="TYPE", help=f"{_TYPES} [default: Q4_0; bfloat16].")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random weights.")
@click.option(
    "--head", "heads", multiple=True, metavar="FOLDER", help="Also a head of SOURCE's, to OUTPUT-NAME[.gguf]."
)
@click.option("--force", is_flag=True, help="Replace OUTPUT.")
@click.option("--check", "num_check", type=click.IntRange(1, 40), metavar="N", help="Then ask both N prompts a domain.")
@click.option("--tokens", type=click.IntRange(min=1), default=48, show_default=True, help="Longest answer of --check.")
@click.option("--backend", default="auto", show_default=True, metavar="NAME", help="Of --check: llamacpp or mlx.")
@click.option("--dtype", metavar="TYPE", help="Of --check: compute type (MLX): float32, float16 or bfloat16.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def expand(
    source: str,
    output: Path,
    size: str,
    form: str | None,
    kind: str | None,
    seed: int,
    heads: Sequence[str],
    force: bool,
    num_check: int | None,
    tokens: int,
    backend: str,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Write OUTPUT: it costs what a model of SIZE costs and says what SOURCE says.

    SOURCE is a safetensors folder, a GGUF file or a bundled name (dense llama, qwen2 or qwen3). For measuring
    speed at realistic cost with true acceptance; it knows no more than SOURCE. Use SOURCE's draft model with it.
    --check compares greedy answers and logits with those of SOURCE; exits with 1 if an answer differs.
    """
    from localspec.bench.expand import Size, expand_head
    from localspec.bench.expand import expand as write
    from localspec.bench.expand.check import check
    from localspec.bench.prompts import load_prompts
    from localspec.commands.progress import progress_bar
    from localspec.loading import resolve_model
    from localspec.protocols import LoadSettings

    form = form or ("gguf" if output.suffix == ".gguf" else "safetensors")
    kind = kind or ("Q4_0" if form == "gguf" else "bfloat16")
    path = resolve_model(source)
    with progress_bar(f"writing {output.name}") as tell:
        done = write(path, output, Size.named(size), form, kind, seed=seed, force=force, on_bytes=tell)
    report, lines = done.as_dict(), done.lines()
    for name in heads:
        folder = resolve_model(name, "head")
        widened = output.with_name(f"{output.stem}-{folder.name}{'.gguf' if form == 'gguf' else ''}")
        expand_head(folder, widened, path, Size.named(size), output)
        lines.append(f"{widened}: the head for it, {'as wide' if form == 'gguf' else 'its weights as they were'}")
    equal = True
    if num_check is not None:
        prompts = load_prompts(per_domain=num_check)
        with progress_bar("comparing") as tell:
            found = check(path, done, prompts, tokens, backend, LoadSettings(dtype=dtype), tell)
        report["check"] = found.as_dict()
        lines.append(found.line())
        equal = found.num_equal == found.num_prompts
    click.echo(json.dumps(report, indent=2) if as_json else "\n".join(lines))
    sys.exit(0 if equal else 1)
