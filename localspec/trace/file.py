"""Trace files: written a line at a time, read back with every line checked."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from localspec import __version__
from localspec.drafters import DrafterSpec
from localspec.engine.answer import Generation
from localspec.engine.round import RoundResult
from localspec.engine.session import Session
from localspec.engine.stats import Stats
from localspec.errors import SettingError, TraceFileError
from localspec.pair import Pair
from localspec.protocols import Tokenizer
from localspec.sampling import SamplingParams
from localspec.trace.record import FORMAT, VERSION, Answer, Header, Round

_START = b'{"kind": "header"'


class TraceWriter:
    """Writes a run's rounds to `path`; None writes nothing.

    Opening checks that the file can be written, and leaves what stands there until `begin`. Every line is
    written at once and unbuffered: whatever ends the run, the rounds before it are in the file.
    Raises SettingError when opened, TraceFileError when writing fails later.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._tokenizer: Tokenizer | None = None
        self._num_rounds, self._num_answers = 0, 0
        if path is None:
            return
        try:
            if not path.parent.is_dir():
                raise SettingError(f"--trace: no such folder: {path.parent}", fix="Make it first.")
            self._is_new = not path.exists()
            if path.is_file() and _first_bytes(path) not in (b"", _START):
                raise SettingError(f"--trace: {path} is there already and is no trace", fix="Choose another name.")
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise SettingError(f"--trace: cannot write {path}", got=error.strerror, fix="Choose another.") from None

    def begin(self, pair: Pair, session: Session, spec: DrafterSpec, params: SamplingParams) -> None:
        """Write the header, in place of whatever the file held."""
        if self._path is None:
            return
        if stat.S_ISREG(self._path.stat().st_mode):
            self._file.truncate(0)
        self._tokenizer = pair.target.tokenizer
        self._write(header(pair, session, spec, params).as_dict())

    def on_round(self, result: RoundResult) -> None:
        """Write a round (a hook of `Session.stream`)."""
        if self._tokenizer is not None:
            self._num_rounds += 1
            self._write(Round.of(result, self._num_rounds, self._num_answers + 1, self._tokenizer).as_dict())

    def on_result(self, result: Generation) -> None:
        """Write how an answer ended (a hook of `Session.stream`)."""
        if self._tokenizer is not None:
            self._num_answers += 1
            self._write(Answer.of(result, self._num_answers).as_dict())

    def _write(self, data: Mapping[str, Any]) -> None:
        text = json.dumps(data, ensure_ascii=False, allow_nan=False)
        line = text.encode(errors="backslashreplace") + b"\n"  # lone surrogates of odd file names: JSON's own escapes
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise TraceFileError(f"cannot write to the trace {self._path}", got=error.strerror) from None

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            self._file.close()
            if self._is_new and self._tokenizer is None:  # nothing was run: leave nothing behind
                self._path.unlink()


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(_START))


def header(pair: Pair, session: Session, spec: DrafterSpec, params: SamplingParams) -> Header:
    """What a run of this session is."""
    sampling = {name: sorted(v) if isinstance(v, frozenset) else v for name, v in asdict(params).items()}
    sampling["logit_bias"] = {str(token): str(bias) for token, bias in params.logit_bias.items()}  # may be -inf
    return Header(
        localspec=__version__,
        target=pair.target.info.name,
        draft=None if pair.draft is None else pair.draft.info.name,
        backend=pair.target.info.backend,
        device=pair.target.info.device,
        drafter=_written(spec if spec.decides else spec.resolved(pair.draft)),
        acceptance=session.acceptance.name,
        width_class=str(session.exactness),
        exact=session.exactness.mode.value,
        sampling={name: value for name, value in sampling.items() if name != "seed"},
        seed=params.seed,
    )


def _written(spec: DrafterSpec) -> str:
    """As on the command line."""
    settings = ",".join(f"{name}={value}" for name, value in spec.settings.items())
    return "+".join([spec.name + (f":{settings}" if settings else ""), *map(_written, spec.others)])


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace file's content. note: what is missing at its end, if anything."""

    header: Header
    rounds: tuple[Round, ...]
    answers: tuple[Answer, ...]
    note: str

    def stats(self) -> Stats:
        """Sums over all rounds, prefill unknown."""
        stats = Stats()
        for entry in self.rounds:
            stats.add(entry.record())
        return stats

    def round(self, number: int) -> Round:
        """The round of that number. Raises SettingError, saying how many there are."""
        if not 1 <= number <= len(self.rounds):
            raise SettingError(
                "no such round", got=number, expected=f"1 to {len(self.rounds)}" if self.rounds else "none: it is empty"
            )
        return self.rounds[number - 1]

    def text_before(self, entry: Round) -> bytes:
        """What its answer said before a round, the anchor last."""
        said = [r.emitted for r in self.rounds[: entry.number - 1] if r.answer == entry.answer]
        return b"".join(token.raw for tokens in said for token in tokens) or entry.anchor.raw

    def telling(self) -> Round | None:
        """The round with most to see: of the largest trees one where a later guess was taken, or where some
        guesses were taken and some were not."""

        def interest(entry: Round) -> tuple[int, bool, bool, int]:
            is_mixed = 0 < len(entry.path) < len(entry.nodes)
            return len(entry.nodes), any(entry.record().accepted_ranks), is_mixed, len(entry.path)

        return max(self.rounds, key=interest, default=None)


def read_trace(path: Path) -> Trace:
    """A trace. A last line that was cut off is left out and noted.

    Raises TraceFileError for anything that is not a trace of a known version, naming the line.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TraceFileError(f"cannot read {path}", got=error.strerror, fix="Check the path.") from None
    lines = raw.split(b"\n")
    first = _header(path, lines[0])
    rounds: list[Round] = []
    answers: list[Answer] = []
    note = ""
    for number, line in enumerate(lines[1:], start=2):
        is_last = number == len(lines)  # ended by no newline: nothing is there, or it was cut off
        if is_last and not line:
            break
        try:
            _add(json.loads(line), rounds, answers)
        except (ValueError, OverflowError, RecursionError) as error:
            if not is_last:
                raise TraceFileError(f"{path}, line {number} is damaged", got=str(error)) from None
            note = f"the last line ({number}) is cut off and left out"
    if not note and len(answers) < (rounds[-1].answer if rounds else 1):
        note = "the run was cut off before the end of its answer"
    return Trace(first, tuple(rounds), tuple(answers), note)


def _header(path: Path, line: bytes) -> Header:
    what = f"{path} is not a trace"
    fix = "Write one with `localspec generate --trace FILE`."
    try:
        data = json.loads(line)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"no {FORMAT} header")
    except (ValueError, RecursionError):
        begin = repr(line[:40].decode(errors="replace")) if line else "an empty first line"
        raise TraceFileError(what, got=begin, expected=f"a {FORMAT} header", fix=fix) from None
    if data.get("version") != VERSION:
        raise TraceFileError(
            f"{path} is a trace of an unknown version",
            got=data.get("version"),
            expected=VERSION,
            fix="Update localspec.",
        )
    try:
        return Header.from_dict(data)
    except ValueError as error:
        raise TraceFileError(f"{path}, line 1 is damaged", got=str(error)) from None


def _add(data: object, rounds: list[Round], answers: list[Answer]) -> None:
    """Sort a line in. Raises ValueError unless it is the next round or answer."""
    if not isinstance(data, dict):
        raise ValueError(f"not an object: {str(data)[:60]!r}")
    kind = data.get("kind")
    if kind == "round":
        entry = Round.from_dict(data)
        if (entry.number, entry.answer) != (len(rounds) + 1, len(answers) + 1):
            raise ValueError(f"round {entry.number} of answer {entry.answer} stands out of order")
        rounds.append(entry)
    elif kind == "answer":
        answer = Answer.from_dict(data)
        if answer.number != len(answers) + 1:
            raise ValueError(f"answer {answer.number} stands out of order")
        answers.append(answer)
    else:
        raise ValueError(f"a line of the kind {str(kind)[:60]!r}")
