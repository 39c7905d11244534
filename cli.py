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


def load_options(command: F) -> F:
    """What to load."""
    options = [
        click.option(
            "--target", "-m", "--model", metavar="MODEL", help="Path or bundled name [default: the bundled pair]."
        ),
        click.option(
            "--draft",
            "-md",
            "--draft-model",
            "--model-draft",
            "--spec-draft-model",
            metavar="MODEL",
            help="Draft model of the same tokenizer.",
        ),
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
        click.option("--check-memory/--no-check-memory", default=True, help="Refuse what does not fit; see `fit`."),
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
            help="auto, draft_model, ngram or nothing; e.g. ngram:max=4,num=8, draft_model:num=16,shape=tree, or "
            "draft_model+ngram for both in one tree.",
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
    from localspec.terminal import ChatProgram, decode_argument
    from localspec.trace.file import TraceWriter

    system = system and decode_argument(system, "--system")
    params = _sampling(options, default_temperature=0.7)
    spec = _drafter_spec(options)
    with TraceWriter(trace) as writer, _open(options, spec) as pair:
        program = ChatProgram(
            pair,
            spec,
            params,
            acceptance=options["acceptance"],
            system=system,
            show_drafts=show_drafts,
            colour=_has_colour(),
            trace=writer,
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


def _tokens(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    """A number of tokens: 8192, or 32k for 32 * 1024."""
    if text is None:
        return None
    digits, factor = (text[:-1], 1024) if text[-1:] in "kK" else (text, 1)
    if not digits.isdecimal() or not 8 <= int(digits[:12]) * factor <= 1 << 24:
        raise click.BadParameter(f"{text!r} is no number of tokens, such as 8192 or 32k")
    return int(digits) * factor


@main.command()
@click.argument("target", default="tiny")
@click.option("--draft", "-md", metavar="MODEL", help="Draft model.")
@click.option("--context", "-c", callback=_tokens, metavar="N", help="Tokens of context, e.g. 8192 or 32k.")
@click.option("--backend", default="auto", show_default=True, metavar="NAME", help="auto, llamacpp or mlx.")
@click.option("--conversations", type=click.IntRange(1, 64), default=1, show_default=True, help="Open at once.")
@click.option("--trees", is_flag=True, help="Load so that token trees can be verified.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def fit(
    target: str,
    draft: str | None,
    context: int | None,
    backend: str,
    conversations: int,
    trees: bool,
    as_json: bool,
) -> None:
    """Say what memory TARGET and a draft model would take, from file headers; nothing is loaded. Exits with 1
    if they do not fit."""
    from localspec.hub.fit import examine
    from localspec.protocols import LoadSettings
    from localspec.terminal import print_fit

    settings = LoadSettings(trees=trees)
    found = examine(target, draft, context=context, backend=backend, settings=settings, num_sequences=conversations)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
    else:
        print_fit(found)
    sys.exit(0 if found.plan.fits else 1)


@main.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--to", "form", type=click.Choice(["gguf", "mlx"]), help="[default: by OUTPUT's name]")
@click.option("--quantize", "-q", metavar="TYPE", help="GGUF: F32, F16, Q8_0, Q4_0, Q4_K_M; MLX: 4bit, 8bit.")
@click.option("--force", is_flag=True, help="Replace OUTPUT.")
@click.option("--check/--no-check", default=True, help="Compare what source and result say.")
def convert(source: Path, output: Path, form: str | None, quantize: str | None, force: bool, check: bool) -> None:
    """Convert SOURCE, a safetensors folder, to a GGUF file or an MLX folder with fewer bits."""
    from localspec.hub.convert import convert as run
    from localspec.terminal import progress

    with progress() as say:
        report = run(source, output, form=form, quantization=quantize, force=force, check=check, on_progress=say)
    for line in report.lines():
        click.echo(line)


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


def _open(options: dict[str, Any], *specs: DrafterSpec, quiet: bool = False, num_sequences: int = 1) -> Pair:
    """Load the pair that the options name, fit for these drafters, with a sign of life on the terminal."""
    from localspec.loading import open_pair
    from localspec.protocols import LoadSettings
    from localspec.terminal import loading

    names = ("context", "threads", "gpu_layers", "flash_attention", "extra_buffers", "dtype")
    trees = any(spec.asks_for_trees for spec in specs)
    settings = LoadSettings(num_sequences=num_sequences, trees=trees, **{name: options[name] for name in names})
    with loading(quiet=quiet):
        return open_pair(
            options["target"],
            options["draft"],
            backend=options["backend"],
            settings=settings,
            check_memory=options["check_memory"],
        )


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
    return {**result.as_dict(), **described}


if __name__ == "__main__":
    main()
