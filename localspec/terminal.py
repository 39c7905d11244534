"""What the terminal shows: the chat program, streamed answers, the one-line summary, doctor's tables."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from platformdirs import user_state_path
from rich.console import Console
from rich.table import Table
from rich.text import Text

from localspec.drafters import DrafterSpec, Nothing, make_drafter
from localspec.engine.chat import Chat
from localspec.engine.session import TARGET, Generation, Piece, Stream
from localspec.errors import LocalspecError
from localspec.sampling import SamplingParams

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from localspec.doctor import Report
    from localspec.loading import Pair
    from localspec.protocols import ModelInfo

_DRAFTED = "bold green"

_HELP = """\
/help           this list
/reset          forget the conversation
/stats          what the last answer cost, and the session so far
/seed N         sample with this seed from now on (/seed alone: a new random one per answer)
/plain          switch speculation off and on; the text must stay the same
/drafts         switch the colouring of guessed tokens on and off
/exit           leave (or Ctrl-D)
Alt-Enter starts a new line, Ctrl-C stops an answer. A line that ends in \\ goes on in the next."""


def loading(*, quiet: bool) -> AbstractContextManager[object]:
    """A spinner on standard error while models are opened."""
    return nullcontext() if quiet else Console(stderr=True).status("loading models ...")


def print_stream(stream: Stream, *, show_drafts: bool) -> Generation:
    """Print an answer as it is written; Ctrl-C ends it, a second Ctrl-C ends the program."""
    # colours were asked for by name, so they are written to files and pipes too
    console = Console(highlight=False, soft_wrap=True, force_terminal=True if show_drafts else None)
    with _cancel_on_interrupt(stream):
        for piece in stream:
            _print_piece(console, piece, show_drafts)
    console.print()
    return stream.result


def _print_piece(console: Console, piece: Piece, show_drafts: bool) -> None:
    style = _DRAFTED if show_drafts and piece.source != TARGET else ""
    console.print(Text(piece.text, style=style), end="", soft_wrap=True)
    console.file.flush()


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
        parts.append(f"drafter {result.drafter}")
    else:
        parts.append(f"plain: {result.plain_because}")
    if stats.num_reused:
        parts.append(f"{stats.num_reused} prompt tokens reused")
    parts.append(f"seed {result.seed}")
    if result.finish_reason == "length":
        parts.append("stopped at --max-tokens")
    elif result.finish_reason == "cancelled":
        parts.append("cancelled")
    if result.note:
        parts.append(result.note)
    return " · ".join(parts)


def describe(info: ModelInfo) -> str:
    """One model in a few words."""
    size = f"{info.num_parameters / 1e6:.0f}M" if info.num_parameters < 1e9 else f"{info.num_parameters / 1e9:.1f}B"
    return f"{info.name} ({info.architecture}, {info.quantization}, {size}) on {info.backend}, {info.device}"


class ChatProgram:
    """`localspec chat`: reads messages and commands, prints answers and their summaries."""

    def __init__(
        self,
        pair: Pair,
        spec: DrafterSpec,
        params: SamplingParams,
        *,
        acceptance: str = "walk",
        system: str | None = None,
        show_drafts: bool = False,
    ) -> None:
        self.console = Console(highlight=False)
        self.params = params
        self.show_drafts = show_drafts
        self.pair = pair
        self.session = pair.session(spec, acceptance=acceptance)
        self.chat = Chat(self.session, system)
        fallback = "auto" if isinstance(self.session.drafter, Nothing) else "nothing"
        self._other_drafter = make_drafter(fallback, pair.draft)  # what /plain switches to
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
        for note in self.pair.target.info.notes:
            self.console.print(Text(f"note    {note}", style="dim"), soft_wrap=True)
        context = self.pair.target.info.context_length
        self.console.print(f"drafter {self.session.drafter.name} · context {context} tokens · /help\n", style="dim")

    def _messages(self) -> Iterator[str]:
        """What the user types, a message at a time."""
        if not sys.stdin.isatty():
            yield from _joined(line.rstrip("\n") for line in sys.stdin)
            return
        prompt = _prompt_session()
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

    def _answer(self, message: str) -> None:
        try:
            result = print_stream(self.chat.say(message, self.params), show_drafts=self.show_drafts)
        except LocalspecError as error:  # the conversation goes on, without this turn
            self.console.print(Text(f"error: {error}", style="red"))
            if "context" in str(error):
                self.console.print("/reset starts a new conversation.", style="dim")
            return
        self._results.append(result)
        self.console.print(Text(summary(result), style="dim"), soft_wrap=True)
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
            self.console.print(Text(str(error), style="red"))
            return
        self.console.print(f"seed: {text or 'a new one for each answer'}", style="dim")

    def _show_stats(self) -> None:
        if not self._results:
            self.console.print("nothing answered yet", style="dim")
            return
        self.console.print(stats_table(self._results))


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
        )
        for group in stats
    ]
    row("answers", [str(len(group)) for group in groups.values()])
    row("tokens", [str(t[0]) for t in totals])
    row("tokens/s", [_ratio(1e3 * t[0], t[4] + t[5] + t[6], 1) for t in totals])
    row("tokens per round (bonus counted)", [_ratio(t[0], t[1], 2) for t in totals])
    row("guesses accepted", [_ratio(100 * t[3], t[2], 0, "%") for t in totals])
    row("time drafting", [_ratio(100 * t[4], t[4] + t[5] + t[6], 0, "%") for t in totals])
    row("time verifying", [_ratio(100 * t[5], t[4] + t[5] + t[6], 0, "%") for t in totals])
    row("time on the host", [_ratio(100 * t[6], t[4] + t[5] + t[6], 1, "%") for t in totals])
    row("prefill", [f"{t[7]:.0f} ms" for t in totals])
    depths = results[-1].stats.acceptance_by_depth
    row("accepted by depth", [" ".join(f"{100 * rate:.0f}%" for rate in depths) or "-", "", ""])
    for label, values in rows:
        table.add_row(label, *values)
    return table


def _ratio(value: float, base: float, digits: int, unit: str = "") -> str:
    return f"{value / base:.{digits}f}{unit}" if base else "-"


def _joined(lines: Iterator[str]) -> Iterator[str]:
    """Lines, joined where one ends in a backslash."""
    held = ""
    for line in lines:
        if line.endswith("\\"):
            held += line[:-1] + "\n"
        else:
            yield held + line
            held = ""
    if held:
        yield held


def _prompt_session() -> PromptSession[str]:
    """An editor with history; Alt-Enter makes a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    folder = user_state_path("localspec", appauthor=False)
    folder.mkdir(parents=True, exist_ok=True)
    return PromptSession(history=FileHistory(str(folder / "chat_history")), key_bindings=bindings)


def print_doctor(report: Report) -> None:
    """Doctor's findings as tables."""
    console = Console(highlight=False)
    console.print(f"localspec {report.version} · Python {report.python} · {report.platform}")
    console.print(f"processor: {report.processor}, {report.num_cores} cores, {report.memory_gib:.0f} GiB of memory")
    for backend in report.backends:
        state = backend.version if backend.installed else f"not installed: {backend.install_command}"
        console.print(Text.assemble("\n", (backend.name, "bold"), f"  {state}"))
        for device in backend.devices:
            console.print(f"  device: {device}")
        for note in backend.notes:
            console.print(Text(f"  note: {note}"))
    console.print("\nbundled pair: " + report.bundled)
    console.print("chat uses: " + report.choice)
