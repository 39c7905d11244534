"""`localspec bench`: parse, measure, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localspec.commands.expand import expand
from localspec.commands.models import open_models
from localspec.commands.options import F, apply_options, exact_option, in_a_folder, load_options
from localspec.commands.rounds import rounds
from localspec.commands.serving import serve, soak
from localspec.commands.speed import speed

if TYPE_CHECKING:
    from localspec.bench.cross import Report as CrossReport
    from localspec.bench.equality import Report
    from localspec.bench.grammar import Report as GrammarReport
    from localspec.bench.trees import Report as TreeReport
    from localspec.pair import Pair


def _print_workloads(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        from localspec.bench.workloads import listing

        click.echo(listing())
        ctx.exit()


@click.group()
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_workloads,
    help="Show the workloads of `bench speed`.",
)
def bench() -> None:
    """Measure: speed against plain decoding and other libraries, equality with plain, the core's own time."""


bench.add_command(expand)
bench.add_command(speed)
bench.add_command(rounds)
bench.add_command(serve)
bench.add_command(soak)


def workload_options(
    per_domain: int = 40, tokens: int = 96, temperatures: tuple[float, ...] = (0.0, 0.8)
) -> Callable[[F], F]:
    """Which prompts, how many, how long, and where to write; with these defaults."""
    options = [
        click.option(
            "--prompts",
            type=click.Path(path_type=Path, exists=True),
            help="JSON lines, or a folder of them and of texts [default: bundled held-out prompts].",
        ),
        click.option("--domain", "domains", multiple=True, help="chat, code or prose [default: all]."),
        click.option("--per-domain", type=click.IntRange(min=1), default=per_domain, show_default=True),
        click.option("--tokens", type=click.IntRange(min=1), default=tokens, show_default=True, help="Longest answer."),
        click.option(
            "--at",
            "temperatures",
            multiple=True,
            type=float,
            default=temperatures,
            show_default=True,
            help="Temperatures.",
        ),
        click.option(
            "--output",
            type=click.Path(path_type=Path, dir_okay=False, writable=True),
            callback=in_a_folder,
            help="Also write every measurement as JSON.",
        ),
    ]
    return lambda command: apply_options(options, command)


def drafters_option(*drafters: str, note: str = "") -> Callable[[F], F]:
    """Which drafters to measure; with these defaults."""
    return click.option(
        "--with", "drafters", multiple=True, default=drafters, show_default=True, help=f"Drafters{note}."
    )


@bench.command()
@workload_options()
@drafters_option("draft_model", "ngram")
@click.option("--resume", is_flag=True, help="Go on with the run that --output has a part of.")
@exact_option
@load_options
def equality(output: Path | None, resume: bool, **options: Any) -> None:
    """Compare text under speculation with plain decoding, token for token."""
    from localspec.bench.equality import Report, compare, table
    from localspec.errors import UsageError

    if resume and output is None:
        raise UsageError("--resume needs a file to go on from", fix="Name it with --output.")
    begun = None
    if resume and output is not None and output.exists():
        begun = Report.from_dict(json.loads(output.read_text()))

    def save(report: Report) -> None:  # after each prompt: long runs get cut off
        if output is not None:
            output.write_text(json.dumps(report.as_dict(), indent=1))

    prompts = _workload(options)
    with _open_for(options, options["drafters"]) as pair:
        asked = (options["drafters"], options["temperatures"], options["tokens"])
        report = compare(pair, prompts, *asked, save, begun, exact=options["exact"])
    _finish_bench(table(report), report.as_dict(), output)
    sys.exit(0 if report.all_equal else 1)


@bench.command()
@workload_options(per_domain=4, tokens=48)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    type=click.IntRange(1, 256),
    default=(4, 8, 16, 32),
    show_default=True,
    help="Nodes per round.",
)
@click.option("--with", "name", default="draft_model", show_default=True, help="Who guesses; or a head's kind.")
@load_options
def trees(
    temperatures: Sequence[float], budgets: Sequence[int], tokens: int, output: Path | None, name: str, **options: Any
) -> None:
    """Accepted length of chains and trees at equal budgets, by how they are guessed and accepted."""
    from localspec.bench.trees import measure, table
    from localspec.drafters import DrafterSpec

    def save(report: TreeReport) -> None:
        if output is not None:
            output.write_text(json.dumps(report.as_dict(), indent=1))

    prompts = _workload(options)
    with open_models(options, DrafterSpec.parse(f"{name}:shape=tree")) as pair:
        report = measure(pair, prompts, temperatures, budgets, tokens, save, name=name)
    _finish_bench(table(report), report.as_dict(), output)


@bench.command()
@click.option("--other", required=True, metavar="MODEL", help="Draft model of another tokenizer.")
@workload_options(per_domain=4, tokens=48, temperatures=(0.0,))
@drafters_option(
    "draft_model:num=5",
    "cross_tokenizer:num=5,mode=bytes",
    "cross_tokenizer:num=5,mode=intersection",
    note="; `cross_tokenizer` is run by the other draft model, all else by the target's own",
)
@click.option(
    "--cut",
    "cuts",
    multiple=True,
    type=click.FloatRange(0.0, 1.0, min_open=True),
    help="Also the own draft model, as if so much of text were in both vocabularies.",
)
@load_options
def cross(
    other: str,
    cuts: Sequence[float],
    temperatures: Sequence[float],
    drafters: Sequence[str],
    tokens: int,
    output: Path | None,
    **options: Any,
) -> None:
    """Accepted length with a draft model of another tokenizer against one of the target's own."""
    from localspec.bench.cross import measure, table
    from localspec.drafters import DrafterSpec
    from localspec.loading import load_model, resolve_model
    from localspec.protocols import LoadSettings

    def save(report: CrossReport) -> None:
        if output is not None:
            output.write_text(json.dumps(report.as_dict(), indent=1))

    prompts = _workload(options)
    specs = [DrafterSpec.parse(text) for text in drafters]
    trees = any(spec.asks_for_trees for spec in specs)
    num_sequences = len(drafters) + len(cuts) + 2  # each drafter's, the own one's as if foreign, and one alone
    with open_models(options, *specs, num_sequences=num_sequences) as pair:
        settings = LoadSettings(context=pair.target.info.context_length, num_sequences=num_sequences, trees=trees)
        model = load_model(resolve_model(other, "draft"), options["backend"], settings)
        try:
            report = measure(pair, model, prompts, drafters, temperatures, tokens, cuts, save)
        finally:
            model.close()
    _finish_bench(table(report), report.as_dict(), output)


@bench.command()
@click.option("--schemas", type=click.IntRange(min=1), default=200, show_default=True, help="Random JSON schemas.")
@click.option("--tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Longest answer.")
@click.option(
    "--at", "temperatures", multiple=True, type=float, default=(0.0, 0.8), show_default=True, help="Temperatures."
)
@drafters_option("draft_model", "auto")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    callback=in_a_folder,
    help="Also write every measurement as JSON.",
)
@load_options
def grammar(
    schemas: int,
    tokens: int,
    temperatures: Sequence[float],
    drafters: Sequence[str],
    output: Path | None,
    **options: Any,
) -> None:
    """Answers in JSON of random schemas: are they valid, equal to plain decoding, and what is accepted?"""
    from localspec.bench.grammar import measure, table

    def save(report: GrammarReport) -> None:
        if output is not None:
            output.write_text(json.dumps(report.as_dict(), indent=1))

    with _open_for(options, drafters) as pair:
        report = measure(pair, schemas, drafters, temperatures, tokens, save)
    _finish_bench(table(report), report.as_dict(), output)
    sys.exit(1 if report.wrong else 0)


@bench.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--backend", default="auto", show_default=True, metavar="NAME", help="auto, llamacpp or mlx.")
@click.option("--fuzz", type=click.IntRange(min=0), default=0, help="Random strings to translate between all pairs.")
@click.option("--length", "lengths", multiple=True, type=click.IntRange(min=64), help="Time a round at this context.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    callback=in_a_folder,
    help="Also write every measurement as JSON.",
)
def tokenizers(files: Sequence[Path], backend: str, fuzz: int, lengths: Sequence[int], output: Path | None) -> None:
    """How much the vocabularies of FILES share; with --fuzz and --length whether translation holds and costs."""
    from localspec.bench.prompts import load_prompts
    from localspec.bench.tokenizers import measure, open_vocabularies, table
    from localspec.errors import SettingError

    if len(files) < 2:
        raise SettingError("one vocabulary has nothing to be compared with", expected="at least two files")
    report = measure(open_vocabularies(files, backend), load_prompts(), fuzz, lengths)
    _finish_bench(table(report), report.as_dict(), output)


@bench.command()
@click.option("--vocabulary", type=click.IntRange(min=100), default=151_936, show_default=True)
@click.option("--nodes", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--trees", is_flag=True, help="Trees of up to eight levels, their growing counted, instead of chains.")
def core(vocabulary: int, nodes: int, rounds: int, trees: bool) -> None:
    """Time the core's own work per round, outside model calls."""
    from localspec.bench.core_time import measure, table

    click.echo(table(measure(vocabulary, nodes, rounds, trees=trees)))


def _workload(options: dict[str, Any]) -> list[Any]:
    from localspec.bench.prompts import load_prompts

    return load_prompts(options["prompts"], options["domains"], options["per_domain"])


def _open_for(options: dict[str, Any], drafters: Sequence[str]) -> Pair:
    """A pair for a benchmark: a draft sequence per drafter, and one of the target to look at differences."""
    from localspec.drafters import DrafterSpec

    specs = [DrafterSpec.parse(text) for text in drafters]
    return open_models(options, *specs, num_sequences=1 + sum(1 + len(spec.others) for spec in specs))


def _finish_bench(text: str, data: dict[str, Any], output: Path | None) -> None:
    click.echo(text)
    if output is not None:
        output.write_text(json.dumps(data, indent=1))
