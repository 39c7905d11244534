"""What the terminal reads and shows: prompts, the chat program, streamed answers, the one-line summary,
doctor's tables."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from platformdirs import user_state_path
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from localspec.drafters import KINDS, DrafterSpec, Nothing
from localspec.engine.answer import Generation
from localspec.engine.chat import Chat
from localspec.engine.session import Progress, Stream
from localspec.engine.stats import Stats
from localspec.errors import LocalspecError, ModelNotFoundError, PromptError, SettingError
from localspec.exactness import AUTO as AUTO_EXACT
from localspec.exactness import Mode
from localspec.highlight import Highlight
from localspec.sampling import SamplingParams

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History

    from localspec.doctor import Report
    from localspec.pair import Pair
    from localspec.protocols import HeadInfo, ModelInfo
    from localspec.trace.file import TraceWriter

_LONG_PROMPT = 512  # tokens; reading fewer takes no time worth a sign of life

_HELP = """\
/help           this list
/reset          forget the conversation
/stats          what the last answer cost, and the session so far
/seed N         sample with this seed from now on (/seed alone: a new random one per answer)
/plain          switch speculation off and on; the text must stay the same
/drafts         switch the colouring of guessed tokens on and off
/exit           leave (or Ctrl-D)
Alt-Enter starts a new line, Ctrl-C stops an answer. A line that ends in \\ goes on in the next."""


def _console(*, stderr: bool = False) -> Console:
    """Shows text as it is: what users and models write is neither markup nor emoji codes, nor wrapped."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)


def loading(*, quiet: bool) -> AbstractContextManager[Status | None]:
    """A spinner on standard error while models are opened."""
    return nullcontext() if quiet else _console(stderr=True).status("loading models ...")


@contextmanager
def progress_bar() -> Iterator[Callable[[float, str], None]]:
    """A function that shows on standard error which share is done, 0 to 1, and what is being done."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Bar(*columns, console=_console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share, what: bar.update(task, completed=share, description=what)


@contextmanager
def prefill_line() -> Iterator[Progress]:
    """An `on_prefill` that shows on a terminal how far the reading of a long prompt is."""
    console = _console(stderr=True)
    status = console.status("")

    def show(done: int, total: int) -> None:
        if done >= total:
            status.stop()  # before the answer's first piece
        elif total > _LONG_PROMPT and console.is_terminal:
            status.update(f"reading the prompt: {done} of {total} tokens")
            status.start()

    try:
        yield show
    finally:
        status.stop()


# ---------------------------------------------------------------- reading


def decode_utf8(raw: bytes, what: str) -> str:
    """Text from UTF-8. Raises PromptError, which names `what` and the first wrong byte."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{what} is not valid UTF-8",
            got=f"byte 0x{raw[error.start]:02x} at offset {error.start}",
            fix="Convert it to UTF-8.",
        ) from None


def decode_argument(text: str, what: str) -> str:
    """An argument of the command line, in which Python keeps wrong bytes as surrogates. Raises PromptError."""
    return decode_utf8(os.fsencode(text), what)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from wherever it was given; must be valid UTF-8 and not empty."""
    if prompt is not None and file is not None:
        raise SettingError("a prompt was given twice", fix="Give either PROMPT or --file.")
    if file is not None:
        if not file.is_file():
            raise ModelNotFoundError(f"no such file: {file}", fix="Check the path.")
        raw = file.read_bytes()
    elif prompt is None or prompt == "-":
        raw = _standard_input(refuse_terminal=True).read()
    else:
        raw = os.fsencode(prompt)
    text = decode_utf8(raw, "the prompt")
    if not text.strip():
        raise PromptError("the prompt is empty", expected="some text")
    return text


def _standard_input(*, refuse_terminal: bool = False) -> BinaryIO:
    # None is what Python makes of a closed descriptor
    if sys.stdin is None or (refuse_terminal and sys.stdin.isatty()):
        raise PromptError("no prompt", fix="Give it as an argument, with --file, or on standard input.")
    return sys.stdin.buffer


def _joined(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their ends, joined where one ends in a backslash."""
    held = b""
    for line in lines:
        held += line.rstrip(b"\r\n")
        if held.endswith(b"\\"):
            held = held[:-1] + b"\n"
        else:
            yield held
            held = b""
    if held:
        yield held


# ---------------------------------------------------------------- answers


def print_stream(stream: Stream, highlight: Highlight | None = None) -> Generation:
    """Print an answer as it is written; Ctrl-C ends it, a second Ctrl-C ends the program.

    The very text: not through rich, which expands tabs and drops control characters. Marks were asked for by
    name, so they are written to files and pipes too.
    """
    with _cancel_on_interrupt(stream):
        for piece in stream:
            sys.stdout.write(piece.text if highlight is None else highlight.mark(piece))
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return stream.result


@contextmanager
def _cancel_on_interrupt(stream: Stream) -> Iterator[None]:
    """Between rounds is the only place where stopping leaves nothing half done."""

    def handle(signum: int, frame: object) -> None:
        if stream.cancelled:
            raise KeyboardInterrupt
        stream.cancel()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def summary(result: Generation) -> str:
    """One line about one answer."""
    stats = result.stats
    parts = [f"{len(result.tokens)} tokens", f"{stats.tokens_per_second:.1f} tokens/s"]
    if result.plain_because is None:
        parts.append(f"{stats.accepted_length:.2f} per round (bonus counted)")
        parts.append(f"{stats.num_accepted} of {stats.num_drafted} guesses accepted")
        if stats.num_from_branches:
            parts.append(f"{stats.num_from_branches} of them not the first for their place")
        parts.append(f"drafter {result.drafter}{_counted(stats)}")
    else:
        parts.append(f"plain: {result.plain_because}")
    if stats.num_reused:
        parts.append(f"{stats.num_reused} prompt tokens reused")
    if stats.num_replayed:
        parts.append(f"{stats.num_replayed} tokens run again to take guesses back")
    if result.exact == Mode.GUARDED.value:
        parts.append(f"guarded: {stats.num_rechecked} re-checked, {stats.num_changed} changed")
    elif result.exact == Mode.OFF.value:
        parts.append("exactness off: near-ties may fall otherwise than in plain decoding")
    parts.append(f"seed {result.seed}")
    if result.finish_reason == "length":
        parts.append("stopped at --max-tokens")
    elif result.finish_reason == "cancelled":
        parts.append("cancelled")
    if result.note:
        parts.append(result.note)
    return " · ".join(parts)


def _counted(stats: Stats) -> str:
    """What the drafter counted, in brackets."""
    counts = [f"{name.replace('_', ' ')} {count}" for name, count in stats.drafter_counts.items() if count]
    return f" ({', '.join(counts)})" if counts else ""


def describe(info: ModelInfo) -> str:
    """One model in a few words."""
    size = f"{info.num_parameters / 1e6:.0f}M" if info.num_parameters < 1e9 else f"{info.num_parameters / 1e9:.1f}B"
    return f"{info.name} ({info.architecture}, {info.quantization}, {size}) on {info.backend}, {info.device}"


def describe_head(info: HeadInfo) -> str:
    """One trained head in a few words."""
    ahead = "" if info.levels is None else f", {info.levels} tokens ahead"
    return f"{info.name} ({info.kind}, {info.num_parameters / 1e6:.0f}M{ahead})"


def notes(pair: Pair) -> list[str]:
    """What was worked around for the target and the draft model, each thing once."""
    return list(pair.notes)


# ---------------------------------------------------------------- chat


class ChatProgram:
    """`localspec chat`: reads messages and commands, prints answers and their summaries."""

    def __init__(
        self,
        pair: Pair,
        spec: DrafterSpec,
        params: SamplingParams,
        *,
        acceptance: str = "walk",
        exact: str = AUTO_EXACT,
        system: str | None = None,
        show_drafts: bool = False,
        colour: bool = True,
        trace: TraceWriter,
        hint: str = "",
    ) -> None:
        self.console = _console()
        self.params = params
        self.show_drafts = show_drafts
        self.colour = colour
        self.pair = pair
        self.session = pair.session(spec, acceptance=acceptance, exact=exact)
        self.chat = Chat(self.session, system)
        self.trace = trace
        self.hint = hint
        trace.begin(pair, self.session, spec, params)
        fallback = "auto" if self.session.drafter.name == Nothing.name else "nothing"
        self._other_drafter = pair.drafter(fallback, exact=exact, acceptance=acceptance)  # what /plain switches to
        self._results: list[Generation] = []

    def run(self) -> None:
        """Until end of input or /exit."""
        self._greet()
        try:
            for message in self._messages():
                if message.startswith("/"):
                    if not self._command(message):
                        break
                elif message.strip():
                    self._answer(message)
        finally:
            self.session.close()
            self._other_drafter.close()

    def _greet(self) -> None:
        self.console.print(f"target  {describe(self.pair.target.info)}", style="dim")
        if self.pair.draft is not None:
            self.console.print(f"draft   {describe(self.pair.draft.info)}", style="dim")
        for head in self.pair.heads:
            self.console.print(f"head    {describe_head(head.info)}", style="dim")
        for note in notes(self.pair):
            self.console.print(f"note    {note}", style="dim")
        if self.hint:
            self.console.print(f"pairs   {self.hint}", style="dim")
        context = self.pair.target.info.context_length
        self.console.print(f"drafter {self.session.drafter.name} · context {context} tokens · /help\n", style="dim")

    def _messages(self) -> Iterator[str]:
        """What the user types, a message at a time."""
        if sys.stdin is None or not sys.stdin.isatty():
            yield from self._messages_of(_standard_input())
            return
        prompt = _prompt_session(self.console)
        while True:
            try:
                message = prompt.prompt("> ")
                while message.endswith("\\"):
                    message = message[:-1] + "\n" + prompt.prompt("… ")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            yield message

    def _messages_of(self, stream: BinaryIO) -> Iterator[str]:
        for raw in _joined(stream):
            try:
                message = decode_utf8(raw, "the message")
            except PromptError as error:  # the conversation goes on, without this message
                self.console.print(f"error: {error}", style="red")
            else:
                yield message

    def _answer(self, message: str) -> None:
        highlight = Highlight(colour=self.colour) if self.show_drafts else None
        try:
            with prefill_line() as on_prefill:
                stream = self.chat.say(
                    message,
                    self.params,
                    on_prefill=on_prefill,
                    on_round=self.trace.on_round,
                    on_result=self.trace.on_result,
                )
                result = print_stream(stream, highlight)
        except LocalspecError as error:  # the conversation goes on, without this turn
            self.console.print(f"error: {error}", style="red")
            if "context" in str(error):
                self.console.print("/reset starts a new conversation.", style="dim")
            return
        self._results.append(result)
        self.console.print(summary(result), style="dim")
        if highlight is not None and (legend := highlight.legend(result.stats)):
            self.console.print(legend, style="dim")
        if result.finish_reason == "context":
            self.console.print("/reset starts a new conversation.", style="dim")
        self.console.print()

    def _command(self, line: str) -> bool:
        """Carry out a /command; False ends the program."""
        name, _, argument = line.strip().partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name == "/help":
            self.console.print(_HELP)
        elif name == "/reset":
            self.chat.reset()
            self.console.print("forgotten", style="dim")
        elif name == "/stats":
            self._show_stats()
        elif name == "/seed":
            self._set_seed(argument.strip())
        elif name == "/plain":
            self.session.drafter, self._other_drafter = self._other_drafter, self.session.drafter
            self.console.print(f"drafter: {self.session.drafter.name}", style="dim")
        elif name == "/drafts":
            self.show_drafts = not self.show_drafts
            self.console.print(f"guessed tokens are {'coloured' if self.show_drafts else 'not coloured'}", style="dim")
        else:
            self.console.print(f"unknown command {name}; /help lists them", style="red")
        return True

    def _set_seed(self, text: str) -> None:
        if text and not text.isdecimal():
            self.console.print(f"/seed takes a whole number, got {text!r}", style="red")
            return
        try:
            self.params = replace(self.params, seed=int(text) if text else None)
        except LocalspecError as error:
            self.console.print(str(error), style="red")
            return
        self.console.print(f"seed: {text or 'a new one for each answer'}", style="dim")

    def _show_stats(self) -> None:
        if not self._results:
            self.console.print("nothing answered yet", style="dim")
            return
        self.console.print(stats_table(self._results), soft_wrap=False)


def stats_table(results: list[Generation]) -> Table:
    """The last answer, and the sums of speculative and of plain answers side by side."""
    table = Table(box=None, pad_edge=False)
    groups = {"last answer": results[-1:]}
    groups["speculative"] = [r for r in results if r.plain_because is None]
    groups["plain"] = [r for r in results if r.plain_because is not None]
    table.add_column("")
    for name in groups:
        table.add_column(name, justify="right")
    rows: list[tuple[str, list[str]]] = []

    def row(label: str, values: list[str]) -> None:
        rows.append((label, values))

    stats = [[r.stats for r in group] for group in groups.values()]
    totals = [
        (
            sum(s.num_tokens for s in group),
            sum(s.num_rounds for s in group),
            sum(s.num_drafted for s in group),
            sum(s.num_accepted for s in group),
            sum(s.draft_ms for s in group),
            sum(s.verify_ms for s in group),
            sum(s.host_ms for s in group),
            sum(s.prefill_ms for s in group),
            sum(s.num_replayed for s in group),
            sum(s.recheck_ms for s in group),
            sum(s.num_rechecked for s in group),
        )
        for group in stats
    ]

    def decode(total: tuple[float, ...]) -> float:
        return total[4] + total[5] + total[6] + total[9]

    row("answers", [str(len(group)) for group in groups.values()])
    row("tokens", [str(t[0]) for t in totals])
    row("tokens/s", [_ratio(1e3 * t[0], decode(t), 1) for t in totals])
    row("tokens per round (bonus counted)", [_ratio(t[0], t[1], 2) for t in totals])
    row("guesses accepted", [_ratio(100 * t[3], t[2], 0, "%") for t in totals])
    row("time drafting", [_ratio(100 * t[4], decode(t), 0, "%") for t in totals])
    row("time verifying", [_ratio(100 * t[5], decode(t), 0, "%") for t in totals])
    row("time on the host", [_ratio(100 * t[6], decode(t), 1, "%") for t in totals])
    row("prefill", [f"{t[7]:.0f} ms" for t in totals])
    if any(t[9] for t in totals):
        row("time re-checking", [_ratio(100 * t[9], decode(t), 0, "%") for t in totals])
        row("choices re-checked", [str(t[10]) for t in totals])
    if totals[1][8]:
        row("tokens run again", [str(t[8]) for t in totals])
    depths = results[-1].stats.acceptance_by_depth
    row("accepted by depth", [" ".join(f"{100 * rate:.0f}%" for rate in depths) or "-", "", ""])
    for label, values in rows:
        table.add_row(label, *values)
    return table


def _ratio(value: float, base: float, digits: int, unit: str = "") -> str:
    return f"{value / base:.{digits}f}{unit}" if base else "-"


def _prompt_session(console: Console) -> PromptSession[str]:
    """An editor with history; Alt-Enter makes a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(history=_history(console), key_bindings=bindings)


def _history(console: Console) -> History:
    """What was typed before, kept in the user's state folder; where that cannot be written, until the end."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = user_state_path("localspec", appauthor=False) / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a+b").close()
    except OSError as error:
        console.print(f"note    what you type is not kept for the next chat: {error}", style="dim")
        return InMemoryHistory()
    return FileHistory(str(path))


# ---------------------------------------------------------------- doctor


def print_doctor(report: Report) -> None:
    """Doctor's findings as tables."""
    console = _console()
    console.print(f"localspec {report.version} · Python {report.python} · {report.platform}")
    console.print(f"processor: {report.processor}, {report.num_cores} cores, {report.memory_gib:.0f} GiB of memory")
    for backend in report.backends:
        state = backend.version if backend.installed else f"not installed: {backend.install_command}"
        console.print(Text.assemble("\n", (backend.name, "bold"), f"  {state}"))
        for device in backend.devices:
            console.print(f"  device: {device}")
        for note in backend.notes:
            console.print(f"  note: {note}")
    console.print("\nbundled pair: " + report.bundled)
    console.print("chat uses: " + report.choice)
    console.print("drafters: " + ", ".join(name for name in report.drafters if name not in KINDS))
    console.print("with a trained head of that kind (--head): " + ", ".join(KINDS))
