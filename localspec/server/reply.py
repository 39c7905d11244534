"""An answer on its way from rounds to text and tool calls, as clients read it."""

from __future__ import annotations

from dataclasses import dataclass, field

from localspec.engine.answer import Generation, Piece
from localspec.engine.round import TokenLogprob
from localspec.protocols import Tokenizer
from localspec.server.calls import CallArguments, CallBegin, CallReader, Delta, TextDelta
from localspec.server.ticket import Finished, Pieces, Timings
from localspec.trace.record import Round

TOOL_CALLS = "tool_calls"


@dataclass(slots=True)
class Call:
    """A tool call as far as it is written. arguments: JSON."""

    id: str
    name: str
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Written:
    """What a round added: deltas for the client, tokens with their log-probabilities, and the round if asked for."""

    deltas: tuple[Delta, ...]
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    round: dict[str, object] | None = None


@dataclass(slots=True)
class Reply:
    """An answer in the making, and then the finished one. reader: finds the tool calls, where tools were offered."""

    tokenizer: Tokenizer
    reader: CallReader | None = None
    show_rounds: bool = False
    logprobs: list[TokenLogprob] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    rounds: list[dict[str, object]] = field(default_factory=list)
    _generation: Generation | None = None
    _timings: Timings | None = None

    @property
    def text(self) -> str:
        """What was said besides the calls."""
        return "".join(delta.text for delta in self.deltas if isinstance(delta, TextDelta))

    @property
    def generation(self) -> Generation:
        """How the engine reports it. Raises ValueError before the answer is finished."""
        if self._generation is None:
            raise ValueError("the answer is not finished")
        return self._generation

    @property
    def timings(self) -> Timings:
        """Raises ValueError before the answer is finished."""
        if self._timings is None:
            raise ValueError("the answer is not finished")
        return self._timings

    @property
    def finish_reason(self) -> str:
        """The engine's word, or TOOL_CALLS."""
        return TOOL_CALLS if self.calls and self.generation.finish_reason == "stop" else self.generation.finish_reason

    def take(self, event: Pieces) -> Written:
        """Take in a round."""
        deltas = self._read("".join(piece.text for piece in event.pieces))
        if event.logprobs is not None:
            self.logprobs += event.logprobs
        shown = self._shown(event) if self.show_rounds else None
        if shown is not None:
            self.rounds.append(shown)
        return Written(deltas, event.tokens, event.logprobs, shown)

    def finish(self, event: Finished) -> Written:
        """Take in the end."""
        self._generation, self._timings = event.generation, event.timings
        deltas = self._read("".join(piece.text for piece in event.pieces))
        if self.reader is not None:
            deltas += self._note(self.reader.finish())
        held: dict[str, object] = {"pieces": [_piece(piece) for piece in event.pieces]}
        return Written(deltas, round=held if self.show_rounds and event.pieces else None)

    def _read(self, text: str) -> tuple[Delta, ...]:
        if not text:
            return ()
        return self._note([TextDelta(text)] if self.reader is None else self.reader.push(text))

    def _note(self, deltas: list[Delta]) -> tuple[Delta, ...]:
        self.deltas += deltas
        for delta in deltas:
            if isinstance(delta, CallBegin):
                self.calls.append(Call(delta.id, delta.name))
            elif isinstance(delta, CallArguments):
                self.calls[delta.index].arguments += delta.text
        return tuple(deltas)

    def _shown(self, event: Pieces) -> dict[str, object]:
        """The round as a trace writes it, and the text that came out of it by who guessed it."""
        drawn = Round.of(event.round, len(self.rounds) + 1, 1, self.tokenizer).as_dict()
        return {**drawn, "tokens": list(event.tokens), "pieces": [_piece(piece) for piece in event.pieces]}


def _piece(piece: Piece) -> dict[str, object]:
    return {"text": piece.text, "source": piece.source, "rank": piece.rank}
