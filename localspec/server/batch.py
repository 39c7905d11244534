"""Many requests, one model: every round verifies what was guessed for all of them in one forward.

One thread owns the models and does all passes. Between rounds it lets requests in, reads a chunk of one waiting
prompt, and lets go of what has ended; whoever submits, cancels or asks for the status does so from any thread. No
HTTP in here.

A request's text does not depend on its neighbours: its noise is keyed by its own seed, its rows are the bits that it
would get alone (`Capabilities.batches`), and under the walk no schedule can change what is emitted.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

import numpy as np

from localspec.constraint import constrain
from localspec.drafters import Nothing
from localspec.engine.answer import Answer, check_prompt
from localspec.engine.gather import Gathered
from localspec.engine.prefill import PREFILL_CHUNK, read_chunk
from localspec.engine.prefix import encode_prompt
from localspec.engine.round import Lane, Room, RoundResult, run_round
from localspec.engine.slots import Slots
from localspec.errors import ClosedError, LocalspecError, QueueFullError, SettingError, UnknownNameError
from localspec.exactness import Mode
from localspec.pair import Pair
from localspec.sampling import SamplingParams
from localspec.schedule.experience import Experience
from localspec.schedule.shared import SharedBudget
from localspec.server.seat import Seat
from localspec.server.speculation import Speculation
from localspec.server.ticket import OnEvent, Ticket
from localspec.types import TokenIds
from localspec.verify import make_acceptance

_PATIENCE = 1.0  # prompt tokens that a millisecond of waiting outweighs when prompts compete
_SMOOTHING = 0.1
_LONG_AGO_S = 10.0
_EXACT = (Mode.CLASS.value, Mode.OFF.value)

_log = logging.getLogger("localspec.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """parallel: requests that are answered at once.  queue: requests that may wait for that.  cache_bytes: for copies
    of earlier prompts and answers, beside what lies in the places themselves.  chunk: prompt tokens read between two
    rounds.  acceptance: "walk" (a request's text is that of plain decoding) or "rejection" (equal in distribution).
    exact: "class" (passes stay in the width class) or "off" (of any width, and no text is promised)."""

    parallel: int = 4
    queue: int = 64
    cache_bytes: int = 1 << 30
    chunk: int = PREFILL_CHUNK
    acceptance: str = "walk"
    exact: str = Mode.CLASS.value

    def __post_init__(self) -> None:
        for name, value, least in (
            ("parallel", self.parallel, 1),
            ("queue", self.queue, 0),
            ("cache_bytes", self.cache_bytes, 0),
            ("chunk", self.chunk, 1),
        ):
            if value < least:
                raise SettingError(f"{name} out of range", got=value, expected=f"at least {least}")
        make_acceptance(self.acceptance)
        if self.exact == Mode.GUARDED.value:
            raise SettingError(
                "close choices are not re-checked where requests share passes and beginnings",
                got=f"exact {self.exact}",
                expected="class, or off",
                fix="Let `localspec tune` look for a width class, or ask one at a time (`localspec chat`).",
            )
        if self.exact not in _EXACT:
            raise UnknownNameError.among("exactness of a server", self.exact, _EXACT)

    @property
    def num_sequences(self) -> int:
        """What `LoadSettings.num_sequences` must be at least."""
        return self.parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """tokens: the whole prompt, encoded.  params: a seed that is not set is drawn, and reported."""

    tokens: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    speculation: Speculation = field(default_factory=Speculation)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStatus:
    """Gauges, then sums since the start. num_kept, kept_bytes: copies in the prefix cache; kept_draft_bytes: of these,
    what draft models have read.  tokens_per_second: of all requests together, over the last rounds; 0 where nothing
    runs."""

    num_active: int
    num_waiting: int
    num_slots: int
    queue: int
    num_kept: int
    kept_bytes: int
    kept_draft_bytes: int
    tokens_per_second: float
    ended: Mapping[str, int]  # finish reason, or "failed" -> requests
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated: int
    num_rounds: int
    num_drafted: int
    num_accepted: int
    drafted_by_depth: tuple[int, ...]
    accepted_by_depth: tuple[int, ...]


@dataclass(slots=True)
class _Totals:
    """What `BatchStatus` sums up."""

    ended: Counter[str] = field(default_factory=Counter)
    prompt: int = 0
    cached: int = 0
    generated: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    rate: float = 0.0
    counted_at: float = 0.0
    request_s: float = 1.0

    def add_round(self, results: Sequence[RoundResult], seconds: float) -> None:
        """One pass over all."""
        self.rounds += 1
        emitted = sum(result.record.num_emitted for result in results)
        self.generated += emitted
        for result in results:
            record = result.record
            self.drafted += record.num_nodes
            self.accepted += record.num_accepted
            for counts, depth in (
                (self.drafted_by_depth, record.drafted_depth),
                (self.accepted_by_depth, record.num_accepted),
            ):
                counts.extend([0] * (depth - len(counts)))
                for level in range(depth):
                    counts[level] += 1
        now = emitted / max(seconds, 1e-9)
        self.rate = now if not self.rate else self.rate + _SMOOTHING * (now - self.rate)
        self.counted_at = monotonic()


class Batch:
    """Owns a pair's sequences until it is closed; the pair itself stays the caller's.

    The pair must have been opened with room for `BatchSettings.num_sequences` sequences in either model. Raises
    BackendError if it was not.
    """

    def __init__(self, pair: Pair, settings: BatchSettings | None = None) -> None:
        self.pair, self.settings = pair, settings or BatchSettings()
        self._acceptance = make_acceptance(self.settings.acceptance)
        self._exactness = pair.exactness(self.settings.exact)
        draft = pair.draft
        # on a lazy device nobody waits between the passes of a chain, so there is nothing to gather
        gathers = draft is not None and draft.capabilities.batches and draft.capabilities.host_scores
        self._gathered = Gathered(draft, self.settings.parallel) if draft is not None and gathers else None
        self._drafting = pair if self._gathered is None else pair.drafting_with(self._gathered)
        self._changed = threading.Condition()
        self._waiting: deque[Seat] = deque()
        self._seats: list[Seat] = []
        self._totals = _Totals()
        self._closing = False
        self._started = threading.Event()
        self._broken: BaseException | None = None
        self._slots: Slots | None = None
        self._thread = threading.Thread(target=self._work, name="localspec-batch", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._broken is not None:
            raise self._broken

    # ------------------------------------------------------------ from any thread

    @property
    def is_working(self) -> bool:
        """False once nobody is let in any more: it is closing, or has broken down."""
        return self._thread.is_alive() and not self._closing

    def encode(self, text: str) -> TokenIds:
        """[T] tokens of a prompt. Depends on the text alone, not on what is cached: else the same request could
        be answered otherwise because of somebody else's conversation."""
        return encode_prompt(self.pair.target.tokenizer, text)

    def submit(self, request: Request, on_event: OnEvent | None = None) -> Ticket:
        """Let a request in. on_event: see `Ticket`.

        Raises QueueFullError, PromptError, ContextOverflowError, SettingError and UnsupportedModelError for what
        cannot be answered, ClosedError once the batch is closing.
        """
        target, params = self.pair.target, request.params
        tokens = np.array(request.tokens, np.int32)
        check_prompt(target, tokens, self._exactness)
        self.pair.check_drafter(request.speculation.drafter)
        answer = Answer.begin(target, tokens, params, constrain(target, params.grammar), self._exactness)
        ticket = Ticket(on_event, self._notice)
        seat = Seat(ticket, answer, tokens, request.speculation, self._acceptance.name)
        with self._changed:
            if self._closing:
                raise ClosedError()
            room = self.settings.queue + self.settings.parallel - len(self._seats)
            if len(self._waiting) >= room:
                rounds = 1 + len(self._waiting) // self.settings.parallel
                raise QueueFullError(len(self._waiting), max(1.0, rounds * self._totals.request_s))
            self._waiting.append(seat)
            self._changed.notify()
        return ticket

    def status(self) -> BatchStatus:
        """Gauges and counters as they are now."""
        slots, totals = self._slots, self._totals
        is_fresh = monotonic() - totals.counted_at < _LONG_AGO_S and self._seats
        return BatchStatus(
            num_active=len(self._seats),
            num_waiting=len(self._waiting),
            num_slots=self.settings.parallel,
            queue=self.settings.queue,
            num_kept=0 if slots is None else slots.num_kept,
            kept_bytes=0 if slots is None else slots.num_bytes,
            kept_draft_bytes=0 if slots is None else slots.draft_bytes,
            tokens_per_second=totals.rate if is_fresh else 0.0,
            ended=dict(totals.ended),
            num_prompt_tokens=totals.prompt,
            num_cached_tokens=totals.cached,
            num_generated=totals.generated,
            num_rounds=totals.rounds,
            num_drafted=totals.drafted,
            num_accepted=totals.accepted,
            drafted_by_depth=tuple(totals.drafted_by_depth),
            accepted_by_depth=tuple(totals.accepted_by_depth),
        )

    def close(self, *, drain_s: float = 0.0) -> None:
        """Let nobody in any more, finish within `drain_s` seconds what was let in, cancel the rest. Twice does
        nothing."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(drain_s)
        if self._thread.is_alive():
            with self._changed:
                for seat in (*self._waiting, *self._seats):
                    seat.ticket.cancelled = True
                self._changed.notify()
            self._thread.join()

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _notice(self, _: Ticket) -> None:
        """A ticket was cancelled; a batch that sleeps must know."""
        with self._changed:
            self._changed.notify()

    # ------------------------------------------------------------ the thread

    @property
    def experience(self) -> Experience:
        """What its rounds have learned."""
        return self.pair.experience_with(self._exactness)

    def _work(self) -> None:
        try:
            _ = self.experience  # measuring, where it is due, needs a free sequence
            self._slots = Slots(self.pair.target, self.settings.parallel, self.settings.cache_bytes)
        except BaseException as error:
            self._broken = error
            self._started.set()
            return
        self._started.set()
        try:
            while self._wait():
                try:
                    self._let_go_of_cancelled()
                    self._let_in()
                    self._read()
                    self._round()
                except Exception as error:  # nothing that one request did gets this far: no ticket may stay open
                    _log.exception("the batch broke; all requests in it fail")
                    self._fail_all(error)
        finally:
            with self._changed:
                self._closing = True
            try:
                self._fail_all(ClosedError())  # there is nobody left unless something ended the thread
            finally:
                self._slots.close()
            self.experience.lately = None
            if self._gathered is not None:
                self._gathered.close()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False once nothing ever will be."""
        with self._changed:
            while not self._waiting and not self._seats:
                if self._closing:
                    return False
                self._changed.wait()
            return True

    def _let_go_of_cancelled(self) -> None:
        with self._changed:
            gone = [seat for seat in self._waiting if seat.ticket.cancelled]
            for seat in gone:
                self._waiting.remove(seat)
        for seat in gone:
            self._totals.ended[seat.finish().finish_reason] += 1
        for seat in self._seats:
            seat.answer.cancelled |= seat.ticket.cancelled
        for seat in [seat for seat in self._seats if seat.answer.cancelled and not seat.ready]:
            self._end(seat)

    def _let_in(self) -> None:
        """Give free places to those who have waited longest."""
        while len(self._seats) < self.settings.parallel:
            with self._changed:
                if not self._waiting:
                    return
                self._seats.append(self._waiting.popleft())

    def _read(self) -> None:
        """A chunk of one prompt: the shortest, unless a longer one has waited for it. Its place is chosen only now,
        when neighbours that share a beginning may have read it."""
        unread = [seat for seat in self._seats if not seat.ready]
        if not unread:
            return
        seat = min(unread, key=lambda one: one.num_unread - _PATIENCE * one.waited_ms())
        try:
            if seat.slot is None:
                self._take_slot(seat)
            assert seat.slot is not None
            chunk, widths = self.settings.chunk, self._exactness.widths
            if read_chunk(self.pair.target, seat.slot.state, seat.prompt, chunk, widths=widths):
                seat.tell_progress()
            if not seat.num_unread:
                assert seat.slot.drafter is not None
                seat.slot.drafter.begin(seat.answer.context)
                seat.get_ready()
        except Exception as error:
            self._break_off(seat, error)

    def _take_slot(self, seat: Seat) -> None:
        assert self._slots is not None
        running = [(one.slot, one.answer.context.tokens) for one in self._seats if one.slot is not None]
        slot = self._slots.take(seat.prompt, running)
        seat.sit(slot)
        spec = seat.speculation
        slot.draft_with(spec.key, lambda: self._drafting.drafter(spec.drafter, exact=self.settings.exact))
        seat.answer.stats.num_reused = slot.state.length  # none, if the drafter has to see them read
        self._totals.prompt += len(seat.prompt)
        self._totals.cached += seat.answer.stats.num_reused

    # ------------------------------------------------------------ rounds

    def _round(self) -> None:
        """One round of all that are ready."""
        going: list[tuple[Seat, Room]] = []
        for seat in [seat for seat in self._seats if seat.ready]:
            room = seat.room()
            if room is None:
                self._end(seat)
            else:
                going.append((seat, room))
        if not going:
            return
        started = monotonic()
        results = self._run(going)
        if results:
            self._totals.add_round([result for _, result in results], monotonic() - started)
        for seat, result in results:
            if result.failure is not None:
                self._break_off(seat, result.failure)
                continue
            seat.take(result)
            if seat.answer.finish_reason is not None:
                self._end(seat)

    def _run(self, going: Sequence[tuple[Seat, Room]]) -> list[tuple[Seat, RoundResult]]:
        """Results of a round. Where the pass of all fails each goes alone, and only those that fail again have."""
        try:
            lanes = [self._lane(seat) for seat, _ in going]
            context = sum(len(lane.context) for lane in lanes) // len(lanes)
            together = self.pair.target.capabilities.batches
            guesses = any(seat.speculation.drafter.name != Nothing.name for seat, _ in going)
            gather = self._gathered.run if self._gathered is not None and guesses else None
            shared = SharedBudget(self.experience, len(lanes), context, together=together, gather=gather)
            results = run_round(self.pair.target, lanes, [room for _, room in going], shared)
            return list(zip((seat for seat, _ in going), results, strict=True))
        except Exception as error:
            if len(going) == 1:
                self._break_off(going[0][0], error)
                return []
            _log.warning("a round of %d requests failed, each goes alone: %s", len(going), error)
            return [one for pair in going for one in self._run([pair])]

    def _lane(self, seat: Seat) -> Lane:
        assert seat.slot is not None and seat.slot.drafter is not None
        return seat.answer.lane(seat.slot.state, seat.slot.drafter, self._acceptance)

    # ------------------------------------------------------------ endings

    def _end(self, seat: Seat) -> None:
        """The answer has ended: its place is free, and keeps what it holds."""
        self._seats.remove(seat)
        if seat.slot is not None:
            assert self._slots is not None
            self._slots.give_back(seat.slot, seat.answer.context.tokens)
        if seat.answer.finish_reason is None:
            seat.answer.room()  # names the reason: it was cancelled
        self._totals.ended[seat.finish().finish_reason] += 1
        self._totals.request_s += _SMOOTHING * (seat.waited_ms() / 1e3 - self._totals.request_s)

    def _fail_all(self, error: Exception) -> None:
        """Every request ends with this error, and every place starts anew."""
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        for seat in [*self._seats, *waiting]:
            if seat not in self._seats:
                self._seats.append(seat)
            self._break_off(seat, error)

    def _break_off(self, seat: Seat, error: Exception) -> None:
        """This request has failed, no other."""
        if not isinstance(error, LocalspecError):
            _log.error("a request failed", exc_info=error)
        self._seats.remove(seat)
        if seat.slot is not None:
            assert self._slots is not None
            seat.slot.use(None)
            self._slots.discard(seat.slot)
        seat.fail(error)
        self._totals.ended["failed"] += 1
