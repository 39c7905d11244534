"""The command line: parse, call, print. Everything else is imported when a command needs it."""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from localspec.commands.audit import audit
from localspec.commands.bench import bench
from localspec.commands.convert import convert
from localspec.commands.fit import fit
from localspec.commands.kept import kept
from localspec.commands.models import allowed_backends, open_models
from localspec.commands.options import (
    chosen_grammar,
    draft_options,
    drafter_spec,
    grammar_options,
    load_options,
    remember_options,
    sampling_options,
    sampling_params,
    view_options,
)
from localspec.commands.pairs import pairs, pull
from localspec.commands.serve import serve
from localspec.commands.tune import tune

if TYPE_CHECKING:
    from localspec.engine.answer import Generation
    from localspec.pair import Pair


_REMEMBER = "LOCALSPEC_REMEMBER"


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
    if os.environ.get("LOCALSPEC_MEASURE") == "0":  # measure nothing at first load
        from localspec.schedule.store import set_automatic

        set_automatic(False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not _is_utf8(stream):
            stream.reconfigure(errors="replace")


def _is_utf8(stream: io.TextIOBase | TextIO) -> bool:
    return codecs.lookup(stream.encoding or "ascii").name == "utf-8"


def _has_colour() -> bool:
    """Do escape codes mean anything to whoever reads? (no-color.org; terminals that call themselves dumb)"""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@main.command()
@load_options
@draft_options
@remember_options(_REMEMBER)
@sampling_options
@grammar_options
@click.option("--system", metavar="TEXT", help="System message.")
@view_options
def chat(system: str | None, show_drafts: bool, trace: Path | None, **options: Any) -> None:
    """Talk to a model. With no options: the bundled pair, offline."""
    from dataclasses import replace

    from localspec.doctor import memory_bytes
    from localspec.hub.selection import suggestion
    from localspec.terminal import ChatProgram, decode_argument
    from localspec.trace.file import TraceWriter

    named = any(options[name] is not None for name in ("target", "draft", "pair")) or options["heads"]
    system = system and decode_argument(system, "--system")
    params = replace(sampling_params(options, default_temperature=0.7), grammar=chosen_grammar(options))
    spec = drafter_spec(options)
    with TraceWriter(trace) as writer, open_models(options, spec, offer_pull=True) as pair:
        program = ChatProgram(
            pair,
            spec,
            params,
            acceptance=options["acceptance"],
            exact=options["exact"],
            system=system,
            show_drafts=show_drafts,
            colour=_has_colour(),
            trace=writer,
            hint="" if named else suggestion(memory_bytes(), allowed_backends(options)),
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
@remember_options(_REMEMBER)
@sampling_options
@grammar_options
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

    from localspec.engine.template import render, thought_end
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
    grammar = chosen_grammar(options)
    params = replace(sampling_params(options, default_temperature=0.0), logprobs=logprobs, grammar=grammar)
    if trace is not None and params.seed is None:  # the trace's first line names it
        params = replace(params, seed=secrets.randbits(32))
    spec = drafter_spec(options)
    with (
        TraceWriter(trace) as writer,
        open_models(options, spec, quiet=as_json) as pair,
        pair.session(spec, acceptance=options["acceptance"], exact=options["exact"]) as session,
    ):
        if not raw and pair.target.tokenizer.chat_template is not None:
            messages = [{"role": "system", "content": system}] if system else []
            text = render(pair.target.tokenizer, [*messages, {"role": "user", "content": text}])
            if grammar is not None:
                params = replace(params, grammar=grammar.behind(thought_end(text)))
        elif system:
            raise SettingError(
                "--system needs a chat template", fix="Leave --raw out, or put the text into the prompt."
            )
        writer.begin(pair, session, spec, params)
        stream = partial(session.stream, text, params, on_round=writer.on_round, on_result=writer.on_result)
        if as_json:
            result = stream().result
            click.echo(json.dumps(_report(pair, result), indent=2, ensure_ascii=not _is_utf8(sys.stdout)))
            if result.complete is False:
                sys.exit(1)
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
        if result.complete is False:
            sys.exit(1)


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
    heads = [
        {"path": str(head.info.path), "kind": head.info.kind, "notes": list(head.info.notes)} for head in pair.heads
    ]
    return {**result.as_dict(), **described, "heads": heads, "vocabularies": relation}


for command in (audit, bench, convert, fit, kept, pairs, pull, serve, tune):
    main.add_command(command)


if __name__ == "__main__":
    main()
