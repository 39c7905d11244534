"""`localspec bench speed`: parse, measure, write, print."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from localspec.commands.models import load_settings, open_models
from localspec.commands.options import exact_option, in_a_folder, load_options

if TYPE_CHECKING:
    from localspec.bench.contenders import Contender
    from localspec.bench.runs import RunLog
    from localspec.bench.workloads import Workload
    from localspec.drafters import DrafterSpec
    from localspec.pair import Pair
    from localspec.peers import PeerLibrary, PeerMode

_CONFIGS = ("auto", "draft_model", "ngram")


@click.command()
@click.option(
    "--config",
    "--with",
    "configs",
    multiple=True,
    metavar="DRAFTER",
    help="A configuration, written as --drafter is. Repeatable [default: auto, draft_model, ngram; with --grid none].",
)
@click.option("--workload", "--domain", "workloads", multiple=True, help="See `bench --list` [default: all].")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, exists=True),
    help="Your own: JSON lines, or a folder of them and of texts [default: bundled held-out prompts].",
)
@click.option("--per-workload", "--per-domain", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=96, show_default=True, help="Longest answer.")
@click.option(
    "--at", "temperatures", multiple=True, type=float, default=(0.0, 0.8), show_default=True, help="Temperatures."
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--against",
    multiple=True,
    metavar="LIBRARY[:num=N]",
    help="Another library's own decoding on the same files: mlx-lm, llama-cpp-python. Repeatable.",
)
@click.option("--grid", "with_grid", is_flag=True, help="Also try a grid of static configurations; find the best.")
@click.option(
    "--ignore-eos/--stop-at-eos",
    default=None,
    help="Go on to --tokens past the model's own end [default: with --against, so that all write as many].",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False, writable=True),
    callback=in_a_folder,
    metavar="FOLDER",
    help="Write every run as it comes, then a report (JSON, Markdown) and pictures.",
)
@click.option(
    "--expand",
    "size",
    metavar="SIZE",
    help="Measure at the cost of a larger target that says what the named one says: 0.5b, 1b, 8b (`bench expand`).",
)
@click.option("--resume", is_flag=True, help="Go on with the benchmark that --output holds.")
@click.option(
    "--fresh", is_flag=True, help="Drafter auto as in a pair's very first run: nothing learned before, nothing kept."
)
@click.option("--plots/--no-plots", default=None, help="Draw pictures into --output [default: if matplotlib is there].")
@exact_option
@load_options
def speed(
    configs: Sequence[str],
    against: Sequence[str],
    with_grid: bool,
    output: Path | None,
    size: str | None,
    resume: bool,
    plots: bool | None,
    **options: Any,
) -> None:
    """Time configurations against plain decoding and other libraries, side by side in one run."""
    from localspec.bench import speed as bench
    from localspec.bench.runs import RunLog
    from localspec.bench.speed_report import RUNS
    from localspec.bench.workloads import load_workloads
    from localspec.drafters import DrafterSpec
    from localspec.loading import get_backend

    names = list(dict.fromkeys(configs)) or ([] if with_grid else list(_CONFIGS))
    specs = [DrafterSpec.parse(name) for name in names]
    libraries = _libraries(against)
    _check_output(output, resume, plots)
    load_workloads(options["prompts"], options["workloads"])  # a wrong name is told before the models are read
    notes: list[str] = []
    with ExitStack() as stack:
        if size is not None:
            options = _expanded(options, size, stack)
        pair = stack.enter_context(_open(options, specs))
        if not configs:
            known = [name for name, spec in zip(names, specs, strict=True) if pair.draft or not spec.needs_draft]
            names = [*known, *(head.info.kind for head in pair.heads)] if names else names
        strangers = _Strangers(pair, options, stack)
        workloads = _workloads(options, pair, strangers, notes)
        contenders, static = _ours(pair, names, with_grid, strangers, stack, notes, options["exact"])
        for rival in _rivals(pair, options, libraries, notes):
            stack.callback(rival.close)
            contenders.append(rival)
        exactness = pair.exactness(options["exact"])
        decides = exactness.leaves_room and any(spec.decides for spec in specs)
        backend = pair.target.info.backend
        conditions = bench.describe(
            pair,
            workloads,
            contenders,
            runtime={backend: get_backend(backend).report().version}
            | {library.name: library.version() for library, _ in libraries},
            max_tokens=options["tokens"],
            ignore_eos=bool(libraries) if options["ignore_eos"] is None else options["ignore_eos"],
            repeats=options["repeats"],
            temperatures=list(dict.fromkeys(options["temperatures"])),
            grid=static,
            notes=notes,
            experience=pair.experience_with(exactness).recalled if decides else 0,
            exact=options["exact"],
        )
        if output is not None:
            output.mkdir(exist_ok=True)
        log = stack.enter_context(RunLog(conditions, output and output / RUNS, resume=resume))
        complete = False
        try:
            with _progress() as on_run:
                bench.measure(log, pair, workloads, contenders, on_run)
            complete = True
        finally:
            _finish(log, output, plots, complete)


def _check_output(output: Path | None, resume: bool, plots: bool | None) -> None:
    """Raise SettingError and UsageError for what could not be written later."""
    from localspec.bench.plots import require
    from localspec.bench.speed_report import RUNS
    from localspec.errors import SettingError, UsageError

    if output is None:
        for name, given in (("--resume", resume), ("--plots", bool(plots))):
            if given:
                raise SettingError(f"{name} needs --output", fix="Say which folder.")
        return
    if not resume and (output / RUNS).exists():
        raise SettingError(
            f"{output} holds a benchmark already", fix="Give another --output, or go on with that one: --resume."
        )
    if resume and not (output / RUNS).exists():
        raise SettingError(f"{output} holds no benchmark to go on with", fix="Leave --resume out.")
    if plots is not False:
        try:
            require()
        except UsageError as error:
            if plots:
                raise
            click.echo(f"no pictures: {error}", err=True)


def _libraries(against: Sequence[str]) -> list[tuple[PeerLibrary, list[PeerMode]]]:
    """Each library that --against names, with its modes. Raises UnknownNameError, SettingError, BackendMissingError."""
    from localspec.loading import get_peer
    from localspec.peers import PeerMode

    modes: dict[str, list[PeerMode]] = {}
    for text in dict.fromkeys(against):
        mode = PeerMode.parse(text)
        modes.setdefault(mode.library, []).append(mode)
    return [(get_peer(name), named) for name, named in modes.items()]


def _expanded(options: dict[str, Any], size: str, stack: ExitStack) -> dict[str, Any]:
    """The options with a target of that size's cost in the place of the one they name: in Q4_0 for a GGUF file, in
    bfloat16 for a folder. It goes when the stack does."""
    from localspec.bench.expand import Size, expand, expand_head
    from localspec.commands.models import named_models
    from localspec.commands.progress import progress_bar
    from localspec.copies import is_self, make_copy
    from localspec.loading import (
        BUNDLED,
        bundled_names,
        bundled_path,
        choose_backend,
        is_early_exit,
        resolve_model,
    )

    wanted = Size.named(size)
    named = named_models(options)
    target, draft = named.target or BUNDLED, named.draft
    source = resolve_model(target, "target")
    if draft is None and target in bundled_names():
        draft = str(bundled_path(target, "draft"))
    form, kind = ("gguf", "Q4_0") if source.is_file() else ("safetensors", "bfloat16")
    name = f"{source.stem}-{size}" + (".gguf" if form == "gguf" else "")
    output = Path(stack.enter_context(TemporaryDirectory(prefix="localspec-"))) / name
    with progress_bar(f"writing {name}") as tell:
        expand(source, output, wanted, form, kind, on_bytes=tell)
    heads = []
    if is_self(draft) and draft is not None:  # not into the user's cache: the target goes, too
        draft = str(make_copy(output, choose_backend(named.backend, output), draft, folder=output.parent))
    for number, head in enumerate(named.heads):
        if is_early_exit(head):
            heads.append(head)
            continue
        widened = output.parent / (f"head-{number}.gguf" if form == "gguf" else f"head-{number}")
        expand_head(Path(head), widened, source, wanted, output)
        heads.append(str(widened))
    changed = {"target": str(output), "draft": draft, "heads": heads, "backend": named.backend}
    return {**options, **changed, "pair": None, "task": None, "catalog": None}


def _open(options: dict[str, Any], specs: Sequence[DrafterSpec]) -> Pair:
    """A pair with room for everybody: plain twice, each configuration on its own and, with another draft model, once
    more, and one for whatever the grid tries."""
    return open_models(options, *specs, num_sequences=3 + sum(2 + len(spec.others) for spec in specs) + len(specs))


def _workloads(options: dict[str, Any], pair: Pair, strangers: _Strangers, notes: list[str]) -> list[Workload]:
    """Those asked for, or all that can be run. Raises what stands in the way of one that was named."""
    from localspec.bench.workloads import load_workloads
    from localspec.errors import LocalspecError

    loaded = load_workloads(
        options["prompts"], options["workloads"], options["per_workload"], has_draft=pair.draft is not None
    )
    if any(work.foreign_draft for work in loaded):
        try:
            strangers.pair()  # what is missing for it is told now, not after an hour
        except LocalspecError as error:
            if options["workloads"]:
                raise
            notes.append(f"the workload stranger was left out: {error}")
            return [work for work in loaded if not work.foreign_draft]
    return loaded


def _ours(
    pair: Pair,
    names: Sequence[str],
    with_grid: bool,
    strangers: _Strangers,
    stack: ExitStack,
    notes: list[str],
    exact: str,
) -> tuple[list[Contender], list[str]]:
    """(plain decoding, the configurations named, the grid's others; the names of the grid's)."""
    from localspec.bench.contenders import Kind, Own, plain_contenders
    from localspec.bench.grid import grid
    from localspec.drafters import make_drafter

    for name in names:
        make_drafter(name, pair.drafting, pair.heads).close()  # a setting out of range is told now
    static, left_out = grid(pair) if with_grid else ([], [])
    notes += left_out
    contenders = plain_contenders(pair, exact)
    contenders += (Own(name, Kind.CONFIG, name, pair, strangers.pair, exact=exact) for name in names)
    others = (name for name in static if name not in names)
    contenders += (Own(name, Kind.GRID, name, pair, strangers.pair, keep=False, exact=exact) for name in others)
    for contender in contenders:
        stack.callback(contender.close)
    return contenders, static


class _Strangers:
    """The pair with a draft model that was trained on something else, made when it is first asked for."""

    def __init__(self, pair: Pair, options: dict[str, Any], stack: ExitStack) -> None:
        self._pair, self._options, self._stack = pair, options, stack
        self._made: Pair | None = None

    def pair(self) -> Pair:
        """The same target with the stranger. Raises UsageError where there is no draft model to make it from."""
        from localspec.bench.stranger import write_stranger
        from localspec.errors import UsageError
        from localspec.loading import load_model
        from localspec.pair import Pair

        if self._made is None:
            draft, target = self._pair.draft, self._pair.target
            if draft is None:
                raise UsageError(
                    "the workload `stranger` is about a draft model, and there is none",
                    fix="Name one with --draft, or leave the workload out with --workload.",
                )
            folder = self._stack.enter_context(TemporaryDirectory(prefix="localspec-"))
            path = write_stranger(draft.info.path, Path(folder), draft.tokenizer)
            settings = load_settings(
                self._options,
                num_sequences=draft.capabilities.num_sequences,
                context=draft.info.context_length,
            )
            model = load_model(path, draft.info.backend, settings)
            self._stack.callback(model.close)
            self._made = Pair(target, model, heads=self._pair.heads)
        return self._made


def _rivals(
    pair: Pair, options: dict[str, Any], libraries: Sequence[tuple[PeerLibrary, list[PeerMode]]], notes: list[str]
) -> Iterator[Contender]:
    """What other libraries bring."""
    from localspec.bench.contenders import Rival

    settings = load_settings(options, context=pair.target.info.context_length)
    draft = None if pair.draft is None else pair.draft.info.path
    for library, modes in libraries:
        peers = library.open(pair.target.info.path, draft, settings, modes)
        if len(peers) == 1:
            notes.append(f"{library.name} has no speculative mode for these files")
        yield from (Rival(peer, pair.target.tokenizer.stop_tokens) for peer in peers)


def _finish(log: RunLog, output: Path | None, plots: bool | None, complete: bool) -> None:
    """Print and write what was measured, all of it or not."""
    from localspec.bench.plots import draw
    from localspec.bench.speed_report import markdown, write_report
    from localspec.bench.summary import summarize
    from localspec.errors import UsageError

    if not log.runs:
        return
    summary = summarize(log, complete=complete)
    click.echo(markdown(summary))
    if output is None:
        return
    write_report(output, summary, log.runs, [])  # before anything that takes time
    if plots is not False:
        try:
            pictures = draw(summary, output)
        except UsageError:  # no matplotlib, which was said at the start
            return
        write_report(output, summary, log.runs, pictures)
    click.echo(f"wrote {output}", err=True)


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, markup=False, emoji=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total, label: progress.update(task, completed=done, total=total, description=label)
