"""The command line: parse, call, print. Everything else is imported when a command needs it."""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

if TYPE_CHECKING:
    from localspec.bench.cross import Report as CrossReport
    from localspec.bench.equality import Report
    from localspec.bench.trees import Report as TreeReport
    from localspec.drafters import DrafterSpec
    from localspec.engine.session import Generation
    from localspec.loading import Pair
    from localspec.sampling import SamplingParams

F = TypeVar("F", bound=Callable[..., Any])

# llama.cpp's names of methods -> ours
_SPEC_TYPES = {
    "none": "nothing",
    "draft-simple": "draft_model",
    "ngram-simple": "ngram",
    "ngram-map-k": "ngram",
    "ngram-mod": "ngram",
}


class Commands(click.Group):
    """Turns errors of our own tree into one line and an exit code; shows tracebacks with --debug."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Usage errors exit with 2, failures with 1."""
        from localspec.errors import LocalspecError

        try:
            return super().invoke(ctx)
        except (LocalspecError, MemoryError) as error:
            if ctx.params.get("debug"):
                raise
            message = str(error) or "out of memory. Choose a smaller model or a shorter --context."
            _complain(message)
            ctx.exit(error.exit_code if isinstance(error, LocalspecError) else 1)
        except KeyboardInterrupt:
            if ctx.params.get("debug"):
                raise
            click.echo("stopped", err=True)
            ctx.exit(130)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:  # a mistake of ours, or of what runs beneath us
            closed_pipe = isinstance(error, OSError) and error.errno == errno.EPIPE  # click ends quietly then
            if closed_pipe or ctx.params.get("debug"):
                raise
            message = " ".join(f"unexpected: {type(error).__name__}: {error}".split())
            _complain(f"{message} (run `localspec --debug {ctx.invoked_subcommand} ...` to see where)")
            ctx.exit(1)


def _complain(message: str) -> None:
    click.echo(click.style("error: ", fg="red", bold=True, reset=True) + message, err=True)


def _print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        from localspec import __version__

        click.echo(f"localspec, version {__version__}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks, and the log of localspec and its runtimes.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
def main(debug: bool) -> None:
    """Run local language models faster, without changing a word of what they say.

    `localspec chat` works at once, offline, on a small bundled pair.
    """
    import logging

    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR, format="%(name)s: %(message)s")
    # our own warnings are for people; llama.cpp's are about things nobody can act on
    for name, level in (("localspec", logging.WARNING), ("localspec.llamacpp", logging.ERROR)):
        logging.getLogger(name).setLevel(logging.DEBUG if debug else level)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not _is_utf8(stream):
            stream.reconfigure(errors="replace")


def _is_utf8(stream: io.TextIOBase | TextIO) -> bool:
    return codecs.lookup(stream.encoding or "ascii").name == "utf-8"


def catalog_option(command: F) -> F:
    """A catalog over those that are always read."""
    help_text = "A catalog of your own, over localspec's."
    path = click.Path(path_type=Path, dir_okay=False)
    return click.option("--catalog", type=path, metavar="FILE", help=help_text)(command)


def load_options(command: F) -> F:
    """What to load."""
    options = [
        click.option(
            "--target",
            "-m",
            "--model",
            "-hf",
            "--hf-repo",
            metavar="MODEL",
            help="Path, bundled name, or pulled ORG/NAME[:QUANT] [default: the bundled pair].",
        ),
        click.option(
            "--draft",
            "-md",
            "--draft-model",
            "--model-draft",
            "--spec-draft-model",
            "-hfd",
            "--hf-repo-draft",
            "--spec-draft-hf",
            metavar="MODEL",
            help="Draft model; of another tokenizer, too.",
        ),
        click.option("--pair", metavar="NAME[:QUANTISATION]", help="Both from the catalog; see `localspec pairs`."),
        catalog_option,
        click.option("--backend", default="auto", show_default=True, metavar="NAME", help="auto, llamacpp or mlx."),
        click.option(
            "--context", "-c", "--ctx-size", type=click.IntRange(min=8), metavar="N", help="Tokens of context."
        ),
        click.option("--threads", "-t", type=click.IntRange(min=1), metavar="N", help="CPU threads (llama.cpp)."),
        click.option(
            "--gpu-layers",
            "-ngl",
            type=click.IntRange(min=0),
            metavar="N",
            help="Layers on the GPU (llama.cpp) [default: all].",
        ),
        click.option(
            "--flash-attention/--no-flash-attention", "-fa", default=None, help="Flash attention (llama.cpp)."
        ),
        click.option("--extra-buffers/--no-extra-buffers", default=None, help="Repacked CPU weights (llama.cpp)."),
        click.option("--dtype", metavar="TYPE", help="Compute type (MLX): float32, float16 or bfloat16."),
    ]
    return _apply(options, command)


def draft_options(command: F) -> F:
    """How to draft."""
    options = [
        click.option(
            "--drafter",
            default="auto",
            show_default=True,
            metavar="NAME[:SETTING=VALUE,...]",
            help="auto, draft_model, cross_tokenizer, ngram, nothing; e.g. ngram:max=4,num=8, "
            "draft_model:num=16,shape=tree, or draft_model+ngram for both in one tree.",
        ),
        click.option("--spec-type", type=click.Choice(sorted(_SPEC_TYPES)), help="llama.cpp's name of a drafter."),
        click.option(
            "--num-draft",
            "--num-draft-tokens",
            "--spec-draft-n-max",
            "--draft-max",
            "--draft-n",
            "num_draft",
            type=int,
            metavar="N",
            help="Tokens guessed per round (the drafter's `num`).",
        ),
        click.option(
            "--draft-min-prob",
            "--spec-draft-p-min",
            "--draft-p-min",
            "draft_min_prob",
            type=float,
            metavar="P",
            help="Stop a guess below this probability (the draft model's `min_prob`).",
        ),
        click.option("--plain", is_flag=True, help="Decode without speculation, in the same width class."),
        click.option(
            "--acceptance",
            default="walk",
            show_default=True,
            metavar="RULE",
            help="walk (text equals --plain) or rejection (equal in distribution).",
        ),
    ]
    return _apply(options, command)


def sampling_options(command: F) -> F:
    """How the target samples."""
    options = [
        click.option("--temperature", "--temp", type=float, metavar="T", help="0 takes the best token."),
        click.option("--top-k", type=int, default=0, metavar="N", help="Keep the N best tokens; 0 keeps all."),
        click.option("--top-p", type=float, default=1.0, metavar="P", help="Keep the best tokens up to this mass."),
        click.option(
            "--min-p",
            type=float,
            default=0.0,
            metavar="P",
            help="Keep tokens of at least P times the best one's probability.",
        ),
        click.option("--repetition-penalty", "--repeat-penalty", type=float, default=1.0, metavar="X"),
        click.option("--presence-penalty", type=float, default=0.0, metavar="X"),
        click.option("--frequency-penalty", type=float, default=0.0, metavar="X"),
        click.option("--logit-bias", multiple=True, metavar="ID=BIAS", help="Add to a token's logit. Repeatable."),
        click.option("--seed", "-s", type=int, metavar="N", help="Same seed, same text [default: random, printed]."),
        click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text. Repeatable."),
        click.option("--max-tokens", "-n", "--n-predict", type=int, metavar="N", help="Longest answer."),
        click.option("--ignore-eos", is_flag=True, help="Go on past the model's own end."),
    ]
    return _apply(options, command)


def view_options(command: F) -> F:
    """How to see what was guessed."""
    options = [
        click.option(
            "--show-drafts",
            is_flag=True,
            help="Colour the tokens that were guessed ahead; underline those that were not the first guess.",
        ),
        click.option(
            "--trace",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="Write every round to FILE, for `localspec trace`.",
        ),
    ]
    return _apply(options, command)


def _has_colour() -> bool:
    """Do escape codes mean anything to whoever reads? (no-color.org; terminals that call themselves dumb)"""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _apply(options: Sequence[Callable[[Any], Any]], command: F) -> F:
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@load_options
@draft_options
@sampling_options
@click.option("--system", metavar="TEXT", help="System message.")
@view_options
def chat(system: str | None, show_drafts: bool, trace: Path | None, **options: Any) -> None:
    """Talk to a model. With no options: the bundled pair, offline."""
    from localspec.doctor import memory_bytes
    from localspec.hub.selection import suggestion
    from localspec.terminal import ChatProgram, decode_argument
    from localspec.trace.file import TraceWriter

    named = any(options[name] is not None for name in ("target", "draft", "pair"))
    system = system and decode_argument(system, "--system")
    params = _sampling(options, default_temperature=0.7)
    spec = _drafter_spec(options)
    with TraceWriter(trace) as writer, _open(options, spec, offer_pull=True) as pair:
        program = ChatProgram(
            pair,
            spec,
            params,
            acceptance=options["acceptance"],
            system=system,
            show_drafts=show_drafts,
            colour=_has_colour(),
            trace=writer,
            hint="" if named else suggestion(memory_bytes(), _backends(options)),
        )
        program.run()


@main.command()
@click.argument("prompt", required=False)
@click.option("--file", "-f", type=click.Path(path_type=Path, dir_okay=False), help="Read the prompt from a file.")
@click.option("--raw", is_flag=True, help="Continue the text as it stands, without the chat template.")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the text and all statistics.")
@click.option(
    "--logprobs", type=int, metavar="N", help="With --json: log-probabilities, with N alternatives per token."
)
@view_options
@load_options
@draft_options
@sampling_options
def generate(
    prompt: str | None,
    file: Path | None,
    raw: bool,
    system: str | None,
    as_json: bool,
    logprobs: int | None,
    show_drafts: bool,
    trace: Path | None,
    **options: Any,
) -> None:
    """Answer one PROMPT (argument, --file, or standard input)."""
    import secrets
    from dataclasses import replace
    from functools import partial

    from localspec.engine.template import render
    from localspec.errors import SettingError
    from localspec.highlight import Highlight
    from localspec.terminal import decode_argument, notes, prefill_line, print_stream, read_prompt, summary
    from localspec.trace.file import TraceWriter

    if logprobs is not None and not as_json:
        raise SettingError("--logprobs is printed with --json only", fix="Add --json.")
    if show_drafts and as_json:
        raise SettingError("--show-drafts colours text, and --json prints none", fix="Leave one out; see `sources`.")
    text = read_prompt(prompt, file)
    system = system and decode_argument(system, "--system")
    params = replace(_sampling(options, default_temperature=0.0), logprobs=logprobs)
    if trace is not None and params.seed is None:  # the trace's first line names it
        params = replace(params, seed=secrets.randbits(32))
    spec = _drafter_spec(options)
    with (
        TraceWriter(trace) as writer,
        _open(options, spec, quiet=as_json) as pair,
        pair.session(spec, acceptance=options["acceptance"]) as session,
    ):
        if not raw and pair.target.tokenizer.chat_template is not None:
            messages = [{"role": "system", "content": system}] if system else []
            text = render(pair.target.tokenizer, [*messages, {"role": "user", "content": text}])
        elif system:
            raise SettingError(
                "--system needs a chat template", fix="Leave --raw out, or put the text into the prompt."
            )
        writer.begin(pair, session, spec, params)
        stream = partial(session.stream, text, params, on_round=writer.on_round, on_result=writer.on_result)
        if as_json:
            report = _report(pair, stream().result)
            click.echo(json.dumps(report, indent=2, ensure_ascii=not _is_utf8(sys.stdout)))
            return
        highlight = Highlight(colour=_has_colour()) if show_drafts else None
        with prefill_line() as on_prefill:
            answer = stream(on_prefill=on_prefill)
            for note in notes(pair):
                click.echo(click.style(f"note: {note}", dim=True), err=True)
            result = print_stream(answer, highlight)
        legend = highlight.legend(result.stats) if highlight is not None else ""
        for line in filter(None, (summary(result), legend)):
            click.echo(click.style(line, dim=True), err=True)


@main.command("trace")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--round", "number", type=int, metavar="N", help="Draw this round [default: all, and the most telling].")
@click.option(
    "--svg", type=click.Path(path_type=Path, dir_okay=False), metavar="OUT", help="Also write the round as a picture."
)
def show_trace(file: Path, number: int | None, svg: Path | None) -> None:
    """Draw what was guessed and what was taken, from a FILE that `generate --trace` wrote."""
    from localspec.trace.console import show_trace as show
    from localspec.trace.file import read_trace

    show(read_trace(file), number, svg)


def pairs_options(command: F) -> F:
    """Which pairs, for which machine."""
    options = [
        click.option("--memory", metavar="SIZE", help="For a machine with so much, e.g. 16G [default: this machine]."),
        click.option("--backend", metavar="NAME", help="Only pairs with files for it: llamacpp or mlx."),
        click.option("--drafter", metavar="KIND", help="Only this kind, e.g. draft_model, dspark, eagle3."),
        catalog_option,
        click.option("--json", "as_json", is_flag=True, help="Print one JSON list."),
    ]
    return _apply(options, command)


@main.group(invoke_without_command=True)
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


@main.command()
@click.argument("name", metavar="ORG/NAME[:QUANT]")
@click.option("--revision", metavar="REV", help="Branch, tag or commit [default: main].")
@click.option("--backend", default="auto", show_default=True, metavar="NAME", help="Whose format to fetch.")
@click.option("--verify", is_flag=True, help="Also check what is already here against its checksums.")
def pull(name: str, revision: str | None, backend: str, verify: bool) -> None:
    """Fetch a model from the Hub into its cache, and print its path.

    Safetensors and GGUF only, no code, checksums compared. Ctrl-C keeps what has arrived; the same
    command goes on from there. QUANT is a quantisation or a file name. HF_TOKEN, HF_HOME, HF_HUB_CACHE,
    HF_ENDPOINT and HF_HUB_OFFLINE mean what they always mean.
    """
    click.echo(_pull(name, revision, backend, verify=verify))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Say what is installed, what each backend can do here, and what was worked around."""
    from localspec.doctor import examine
    from localspec.terminal import print_doctor

    report = examine()
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
    else:
        print_doctor(report)


@main.group()
def bench() -> None:
    """Measure: speed against plain decoding, equality with it, the core's own time."""


def _in_a_folder(_: click.Context, __: click.Parameter, output: Path | None) -> Path | None:
    """Refuse before an hour of measuring, not after it."""
    from localspec.errors import SettingError

    if output is not None and not output.parent.is_dir():
        raise SettingError(f"--output: no such folder: {output.parent}", fix="Make it first.")
    return output


def bench_options(command: F) -> F:
    """Which prompts, how many, how long."""
    options = [
        click.option(
            "--prompts",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            help="JSON lines [default: bundled held-out prompts].",
        ),
        click.option("--domain", "domains", multiple=True, help="chat, code or prose [default: all]."),
        click.option("--per-domain", type=click.IntRange(min=1), default=40, show_default=True),
        click.option("--tokens", type=click.IntRange(min=1), default=96, show_default=True, help="Longest answer."),
        click.option(
            "--at",
            "temperatures",
            multiple=True,
            type=float,
            default=(0.0, 0.8),
            show_default=True,
            help="Temperatures.",
        ),
        click.option(
            "--with", "drafters", multiple=True, default=("draft_model", "ngram"), show_default=True, help="Drafters."
        ),
        click.option(
            "--output",
            type=click.Path(path_type=Path, dir_okay=False, writable=True),
            callback=_in_a_folder,
            help="Also write every measurement as JSON.",
        ),
    ]
    return _apply(options, command)


@bench.command()
@bench_options
@load_options
def equality(output: Path | None, **options: Any) -> None:
    """Compare text under speculation with plain decoding, token for token."""
    from localspec.bench.equality import compare, table

    def save(report: Report) -> None:  # after each prompt: long runs get cut off
        if output is not None:
            output.write_text(json.dumps(report.as_dict(), indent=1))

    prompts = _workload(options)
    with _open_for(options, options["drafters"]) as pair:
        report = compare(pair, prompts, options["drafters"], options["temperatures"], options["tokens"], save)
    _finish_bench(table(report), report.as_dict(), output)
    sys.exit(0 if report.all_equal else 1)


@bench.command()
@bench_options
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@load_options
def speed(output: Path | None, repeats: int, **options: Any) -> None:
    """Time each drafter against plain decoding, side by side in one run."""
    from localspec.bench.speed import measure, table

    prompts = _workload(options)
    with _open_for(options, options["drafters"]) as pair:
        report = measure(pair, prompts, options["drafters"], options["temperatures"], options["tokens"], repeats)
    _finish_bench(table(report), report.as_dict(), output)


@bench.command()
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="JSON lines [default: bundled held-out prompts].",
)
@click.option("--domain", "domains", multiple=True, help="chat, code or prose [default: all].")
@click.option("--per-domain", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=48, show_default=True, help="Longest answer.")
@click.option(
    "--at", "temperatures", multiple=True, type=float, default=(0.0, 0.8), show_default=True, help="Temperatures."
)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    type=click.IntRange(1, 256),
    default=(4, 8, 16, 32),
    show_default=True,
    help="Nodes per round.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    callback=_in_a_folder,
    help="Also write every measurement as JSON.",
)
@load_options
def trees(
    temperatures: Sequence[float], budgets: Sequence[int], tokens: int, output: Path | None, **options: Any
) -> None:
    """Accepted length of chains and trees at equal budgets, by how they are guessed and accepted."""
    from localspec.bench.trees import measure, table
    from localspec.drafters import DrafterSpec

    def save(report: TreeReport) -> None:
        if output is not None:
            output.write_text(json.dumps(report.as_dict(), indent=1))

    prompts = _workload(options)
    with _open(options, DrafterSpec.parse("draft_model:shape=tree")) as pair:
        report = measure(pair, prompts, temperatures, budgets, tokens, save)
    _finish_bench(table(report), report.as_dict(), output)


@bench.command()
@click.option("--other", required=True, metavar="MODEL", help="Draft model of another tokenizer.")
@click.option("--prompts", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="JSON lines.")
@click.option("--domain", "domains", multiple=True, help="chat, code or prose [default: all].")
@click.option("--per-domain", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=48, show_default=True, help="Longest answer.")
@click.option(
    "--at", "temperatures", multiple=True, type=float, default=(0.0,), show_default=True, help="Temperatures."
)
@click.option(
    "--with",
    "drafters",
    multiple=True,
    default=("draft_model:num=5", "cross_tokenizer:num=5,mode=bytes", "cross_tokenizer:num=5,mode=intersection"),
    show_default=True,
    help="Drafters; `cross_tokenizer` is run by the other draft model, all else by the target's own.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    callback=_in_a_folder,
    help="Also write every measurement as JSON.",
)
@load_options
def cross(
    other: str,
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
    with _open(options, *specs, num_sequences=len(drafters) + 1) as pair:
        settings = LoadSettings(context=pair.target.info.context_length, num_sequences=len(drafters) + 1, trees=trees)
        model = load_model(resolve_model(other, "draft"), options["backend"], settings)
        try:
            report = measure(pair, model, prompts, drafters, temperatures, tokens, save)
        finally:
            model.close()
    _finish_bench(table(report), report.as_dict(), output)


@bench.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--backend", default="auto", show_default=True, metavar="NAME", help="auto, llamacpp or mlx.")
@click.option("--fuzz", type=click.IntRange(min=0), default=0, help="Random strings to translate between all pairs.")
@click.option("--length", "lengths", multiple=True, type=click.IntRange(min=64), help="Time a round at this context.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    callback=_in_a_folder,
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
    return _open(options, *specs, num_sequences=1 + sum(1 + len(spec.others) for spec in specs))


def _finish_bench(text: str, data: dict[str, Any], output: Path | None) -> None:
    click.echo(text)
    if output is not None:
        output.write_text(json.dumps(data, indent=1))


def _open(
    options: dict[str, Any],
    *specs: DrafterSpec,
    quiet: bool = False,
    num_sequences: int = 1,
    offer_pull: bool = False,
) -> Pair:
    """Load the pair that the options name, fit for these drafters, with a sign of life on the terminal."""
    from localspec.loading import open_pair
    from localspec.protocols import LoadSettings
    from localspec.terminal import loading

    names = ("context", "threads", "gpu_layers", "flash_attention", "extra_buffers", "dtype")
    trees = any(spec.asks_for_trees for spec in specs)
    settings = LoadSettings(num_sequences=num_sequences, trees=trees, **{name: options[name] for name in names})
    target, draft, backend = _models(options, offer_pull)
    with loading(quiet=quiet):
        return open_pair(target, draft, backend=backend, settings=settings)


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
    choice = choice_for(pair, memory_bytes(), _backends(options), quantization or None)
    found, helper = locate(pair, choice, lambda text: _find(text, "target", choice.backend, offer_pull))
    return str(found), None if helper is None else str(helper), choice.backend


def _backends(options: dict[str, Any]) -> list[str]:
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
        return _pull(text, None, backend)


def _pull(text: str, revision: str | None, backend: str, *, verify: bool = False) -> Path:
    """Fetch a model, with bars on the terminal; its path."""
    from localspec.hub.console import PullProgress, pulled_line
    from localspec.hub.name import HubName
    from localspec.hub.pull import pull as fetch

    name = HubName.parse(text, revision)
    with PullProgress() as progress:
        pulled = fetch(name, backend=backend, watcher=progress, verify=verify)
    click.echo(click.style(pulled_line(pulled), dim=True), err=True)
    return pulled.path


def _drafter_spec(options: dict[str, Any]) -> DrafterSpec:
    """Fold --plain and the spellings of other programs into one specification."""
    from localspec.drafters import DrafterSpec
    from localspec.errors import SettingError

    spec = DrafterSpec.parse(options["drafter"])
    if options["spec_type"] is not None:
        if options["drafter"] != "auto":
            raise SettingError("--spec-type and --drafter both name a drafter", fix="Give one of them.")
        spec = DrafterSpec.parse(_SPEC_TYPES[options["spec_type"]])
    extra = {"num": options["num_draft"], "min_prob": options["draft_min_prob"]}
    given = {name: str(value) for name, value in extra.items() if value is not None}
    if options["plain"]:
        if given or options["drafter"] != "auto" or options["spec_type"] is not None:
            raise SettingError("--plain leaves nothing to draft", fix="Leave out --plain, or the drafter's options.")
        return DrafterSpec.parse("nothing")
    return spec.with_settings(given)


def _sampling(options: dict[str, Any], *, default_temperature: float) -> SamplingParams:
    from localspec.errors import SettingError
    from localspec.sampling import SamplingParams

    bias = {}
    for item in options["logit_bias"]:
        token, _, value = item.partition("=")
        try:
            bias[int(token)] = float(value)
        except ValueError:
            raise SettingError("--logit-bias", got=item, expected="TOKEN_ID=NUMBER") from None
    names = (
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "max_tokens",
        "ignore_eos",
    )
    temperature = options["temperature"] if options["temperature"] is not None else default_temperature
    return SamplingParams(
        temperature=temperature, logit_bias=bias, stop=tuple(options["stop"]), **{name: options[name] for name in names}
    )


def _report(pair: Pair, result: Generation) -> dict[str, Any]:
    models = {"target": pair.target.info, "draft": pair.draft.info if pair.draft else None}
    described = {
        role: info
        and {
            "path": str(info.path),
            "architecture": info.architecture,
            "quantization": info.quantization,
            "backend": info.backend,
            "device": info.device,
            "context_length": info.context_length,
            "notes": list(info.notes),
        }
        for role, info in models.items()
    }
    relation = None if pair.drafting is None else pair.drafting.relation.as_dict()
    return {**result.as_dict(), **described, "vocabularies": relation}


if __name__ == "__main__":
    main()
