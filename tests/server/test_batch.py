"""Many requests, one model: each is answered as if it were alone, and what goes wrong with one stays with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest

from localspec.bench.soak import random_requests, run
from localspec.engine.answer import Generation
from localspec.errors import (
    BackendError,
    ClosedError,
    ContextOverflowError,
    OutOfMemoryError,
    PromptError,
    QueueFullError,
    SettingError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
)
from localspec.loading import get_backend, open_pair
from localspec.pair import Pair
from localspec.protocols import LoadSettings, Scores, Step, WidthClass
from localspec.sampling import SamplingParams
from localspec.server.batch import Batch, BatchSettings, Request
from localspec.server.speculation import Speculation
from localspec.server.ticket import Event, Finished, Pieces, PrefillProgress, Ticket
from localspec.testing.reference import ReferenceModel, ReferenceState

POISON = 61
NO_CACHE = BatchSettings(parallel=3, cache_bytes=0)


class Watched(ReferenceModel):
    """A reference model that can be held up, and breaks at one token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.widest = 0
        self.no_room = False

    def open(self) -> ReferenceState:
        if self.no_room:
            raise OutOfMemoryError("no room for another sequence")
        return super().open()

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        assert self.gate.wait(30)
        self.widest = max(self.widest, len(steps))
        for step in steps:
            if any(POISON in segment.numpy() for segment in step.tokens):
                raise BackendError("this token breaks the runtime")
        return super().forward(steps)


@pytest.fixture(scope="module")
def target() -> Watched:
    return Watched()


@pytest.fixture(scope="module")
def pair(target: Watched) -> Pair:
    return Pair(target, target.perturbed(0.2))


@pytest.fixture(autouse=True)
def _open_gate(target: Watched) -> Iterator[None]:
    yield
    target.gate.set()
    target.no_room = False
    assert target.num_open == 0, "a test left sequences open"


def request(
    tokens: Sequence[int], *, most: int = 12, seed: int = 0, temperature: float = 0.0, how: str = "auto"
) -> Request:
    params = SamplingParams(
        max_tokens=most, seed=seed, temperature=temperature, ignore_eos=True, logit_bias={POISON: -100.0}
    )
    return Request(tokens=tokens, params=params, speculation=Speculation.parse(how))


def alone(pair: Pair, one: Request) -> Generation:
    with pair.session("nothing") as session:
        return session.generate(list(one.tokens), one.params)


@contextmanager
def held(target: Watched) -> Iterator[None]:
    """No pass ends before the block does."""
    target.gate.clear()
    try:
        yield
    finally:
        target.gate.set()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


# ---------------------------------------------------------------- text


def test_every_text_is_that_of_the_same_request_alone() -> None:
    """Mixed lengths, seeds, settings, drafters and cancellations; more requests than places."""
    model = ReferenceModel()
    pair = Pair(model, model.perturbed(0.2))
    report = run(pair, random_requests(pair, 40, 40), at_once=5, cache_bytes=200_000)
    assert report.is_clean and not report.failed
    assert report.num_finished + report.num_cancelled == report.num_compared == 40
    assert report.num_cancelled  # whether a beginning was found is chance
    assert max(sample.kept_bytes for sample in report.samples) <= 200_000


def test_requests_share_a_forward(pair: Pair, target: Watched) -> None:
    target.widest = 0
    with Batch(pair, NO_CACHE) as batch:
        with held(target):
            tickets = [batch.submit(request([1, 2, 3 + number])) for number in range(3)]
        for ticket in tickets:
            ticket.result()
    assert target.widest == 3


def test_rejection_at_temperature_zero_gives_the_same_texts(pair: Pair) -> None:
    """Above it the texts are others of the same law."""
    requests = [request([1, 2, number], most=20, temperature=0.0) for number in range(5)]
    sampled = [request([1, 2, number], most=20, temperature=0.8, seed=number) for number in range(5)]
    with Batch(pair, BatchSettings(parallel=3, acceptance="rejection")) as batch:
        tickets = [batch.submit(one) for one in (*requests, *sampled)]
        answers = [ticket.result() for ticket in tickets]
    assert [answer.tokens for answer in answers[:5]] == [alone(pair, one).tokens for one in requests]
    assert all(answer.acceptance == "rejection" and len(answer.tokens) == 20 for answer in answers)


@pytest.mark.slow
def test_many_sequences_of_llama_cpp_in_one_pass_give_the_texts_of_each_alone() -> None:
    """The bundled pair: 24 requests, six at once, one in ten cancelled."""
    if not get_backend("llamacpp").is_installed():
        pytest.skip("needs llama.cpp: pip install llama-cpp-python")
    with open_pair(backend="llamacpp", settings=LoadSettings(context=256, num_sequences=6, batch=True)) as tiny:
        assert tiny.target.capabilities.batches
        report = run(tiny, random_requests(tiny, 24, 48), at_once=6)
    assert report.is_clean, report
    assert report.num_compared == 24


# ---------------------------------------------------------------- events


def test_events_tell_the_whole_story(pair: Pair) -> None:
    """Progress, then a `Pieces` per round whose tokens and texts join to the answer, then one end."""
    with Batch(pair, BatchSettings(parallel=1, chunk=4)) as batch:
        events = list(batch.submit(request(range(1, 12), how="ngram")).events())
    progress = [event for event in events if isinstance(event, PrefillProgress)]
    assert [(event.done, event.total) for event in progress] == [(4, 10), (8, 10), (10, 10)]
    rounds = [event for event in events if isinstance(event, Pieces)]
    last = events[-1]
    assert isinstance(last, Finished) and len(progress) + len(rounds) + 1 == len(events)
    assert [token for event in rounds for token in event.tokens] == list(last.generation.tokens)
    pieces = [piece for event in rounds for piece in event.pieces] + list(last.pieces)
    assert "".join(piece.text for piece in pieces) == last.generation.text
    timings = last.timings
    assert timings.first_token_ms is not None
    assert 0 <= timings.queued_ms <= timings.first_token_ms <= timings.total_ms


def test_a_width_is_a_limit_of_each_round(pair: Pair) -> None:
    narrow = Request(
        tokens=[5, 6] * 10,
        params=SamplingParams(max_tokens=20, ignore_eos=True),
        speculation=Speculation.parse("ngram:num=8", width=2),
    )
    with Batch(pair, NO_CACHE) as batch:
        ticket = batch.submit(narrow)
        rounds = [event.round for event in ticket.events() if isinstance(event, Pieces)]
    assert max(one.record.num_nodes for one in rounds) <= 2


# ---------------------------------------------------------------- cancelling


def test_a_waiting_request_can_be_cancelled(pair: Pair, target: Watched) -> None:
    with Batch(pair, BatchSettings(parallel=1)) as batch:
        with held(target):
            first = batch.submit(request([1, 2, 3]))
            waiting = batch.submit(request([4, 5, 6]))
            waiting.cancel()
        assert [type(event) for event in waiting.events()] == [Finished]
        assert first.result().finish_reason == "length"
        assert batch.status().ended == {"cancelled": 1, "length": 1}


def test_a_running_request_can_be_cancelled_and_its_place_is_free(pair: Pair) -> None:
    """It ends within a round, with the beginning of its text."""
    whole = request([7, 8, 9], most=60)
    with Batch(pair, BatchSettings(parallel=1)) as batch:
        tickets: list[Ticket] = []

        def cancel_at_first(event: Event) -> None:
            events.append(event)
            if isinstance(event, Pieces):
                tickets[0].cancel()

        events: list[Event] = []
        with held(pair.target):  # type: ignore[arg-type]
            tickets.append(batch.submit(whole, cancel_at_first))
        follower = batch.submit(request([7, 8, 9, 10])).result()
    assert follower.finish_reason == "length"
    last = events[-1]
    assert isinstance(last, Finished) and last.generation.finish_reason == "cancelled"
    assert sum(isinstance(event, Pieces) for event in events) == 1
    assert last.generation.tokens == alone(pair, whole).tokens[: len(last.generation.tokens)]


# ---------------------------------------------------------------- limits and failures


def test_a_full_queue_says_when_to_try_again(pair: Pair, target: Watched) -> None:
    with Batch(pair, BatchSettings(parallel=1, queue=1)) as batch:
        with held(target):
            tickets = [batch.submit(request([1, 2]))]
            wait_for(lambda: batch.status().num_active == 1)
            tickets.append(batch.submit(request([1, 2])))
            with pytest.raises(QueueFullError) as full:
                batch.submit(request([1, 2]))
            assert full.value.retry_after_s >= 1.0
        assert [ticket.result().finish_reason for ticket in tickets] == ["length"] * 2
        assert batch.submit(request([1, 2])).result().finish_reason == "length"


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: request([]), PromptError),
        (lambda: request([1] * 600), ContextOverflowError),
        (lambda: request([64]), PromptError),
        (lambda: request([1], how="ngram:nmu=3"), UnknownNameError),
        (lambda: request([1], how="draft_model:num=x"), SettingError),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(
    pair: Pair, make: Callable[[], Request], error: type[Exception]
) -> None:
    with Batch(pair, NO_CACHE) as batch, pytest.raises(error):
        batch.submit(make())


def test_a_drafter_needs_its_model_and_trees_need_a_target_that_verifies_them(target: Watched) -> None:
    with Batch(Pair(target, None), NO_CACHE) as batch, pytest.raises(UsageError, match="needs a draft model"):
        batch.submit(request([1], how="draft_model"))
    chains = ReferenceModel()
    chains.capabilities = replace(chains.capabilities, exact_trees=False)
    with Batch(Pair(chains, None), NO_CACHE) as batch, pytest.raises(UnsupportedModelError):
        batch.submit(request([1], how="ngram:shape=tree"))


def test_a_failing_request_ends_alone(pair: Pair) -> None:
    """It breaks the pass that all share; the others get their texts."""
    good = [request([1, 2, 3, number]) for number in range(3)]
    bad = Request(tokens=[1, 2, POISON], params=SamplingParams(max_tokens=5))
    with Batch(pair, BatchSettings(parallel=4)) as batch:
        with held(pair.target):  # type: ignore[arg-type]
            tickets = [batch.submit(one) for one in (*good, bad)]
        for one, ticket in zip(good, tickets, strict=False):
            assert ticket.result().tokens == alone(pair, one).tokens
        with pytest.raises(BackendError, match="breaks the runtime"):
            tickets[-1].result()
        assert batch.status().ended == {"length": 3, "failed": 1}
        assert batch.submit(good[0]).result().tokens == alone(pair, good[0]).tokens


def test_a_place_that_finds_no_memory_fails_its_request_only(pair: Pair, target: Watched) -> None:
    """A copy that cannot be put back; then memory is there again."""
    long = list(range(1, 60))
    with Batch(pair, BatchSettings(parallel=1, cache_bytes=1 << 20)) as batch:
        batch.submit(request(long)).result()
        batch.submit(request([40] * 50)).result()  # the first one's tokens are copied out
        assert batch.status().num_kept == 1
        target.no_room = True
        ticket = batch.submit(request([*long, 2]))
        with pytest.raises(OutOfMemoryError):
            ticket.result()
        target.no_room = False
        again = request([*long, 2])
        assert batch.submit(again).result().tokens == alone(pair, again).tokens


def test_a_listener_that_breaks_ends_its_own_request(pair: Pair) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("no")

    with Batch(pair, BatchSettings(parallel=2)) as batch:
        batch.submit(request([1, 2, 3], most=50), broken)
        other = request([4, 5, 6])
        assert batch.submit(other).result().tokens == alone(pair, other).tokens
        wait_for(lambda: batch.status().ended == {"cancelled": 1, "length": 1})


def test_whatever_breaks_no_ticket_stays_open(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the batch itself: all who are in it fail, and the next request is answered."""

    def broken(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    one = request([1, 2, 3])
    with Batch(pair, BatchSettings(parallel=2)) as batch:
        with held(pair.target):  # type: ignore[arg-type]
            tickets = [batch.submit(one) for _ in range(4)]
            with monkeypatch.context() as patch:
                patch.setattr(batch, "_round", broken)
                pair.target.gate.set()  # type: ignore[attr-defined]
                for ticket in tickets:
                    with pytest.raises(RuntimeError, match="a fault of ours"):
                        ticket.result()
        assert batch.is_working
        assert batch.submit(one).result().tokens == alone(pair, one).tokens
    assert not batch.is_working


# ---------------------------------------------------------------- the cache


def test_a_conversation_goes_on_where_it_stopped(pair: Pair) -> None:
    """The next turn reads what is new only, and the answer is that without a cache."""
    first = request([*range(1, 40)], temperature=0.7, seed=3)
    with Batch(pair, BatchSettings(parallel=2)) as batch:
        answer = batch.submit(first).result()
        second = request([*first.tokens, *answer.tokens, 9, 9])
        then = batch.submit(second).result()
        assert batch.status().num_cached_tokens == then.stats.num_reused
    assert then.stats.num_reused == len(first.tokens) + len(answer.tokens) - 1
    assert then.tokens == alone(pair, second).tokens


def test_the_cache_survives_a_cancelled_request(pair: Pair) -> None:
    start = [*range(1, 50)]
    with Batch(pair, BatchSettings(parallel=1)) as batch:
        with held(pair.target):  # type: ignore[arg-type]
            ticket = batch.submit(request(start, most=100), lambda event: _cancel_at_pieces(event, tickets))
            tickets = [ticket]
        wait_for(lambda: batch.status().ended == {"cancelled": 1})
        assert batch.submit(request([*start, 7])).result().stats.num_reused >= len(start) - 1


def _cancel_at_pieces(event: Event, tickets: Sequence[Ticket]) -> None:
    if isinstance(event, Pieces):
        tickets[0].cancel()


def test_neighbours_that_share_a_beginning_read_it_once(pair: Pair, target: Watched) -> None:
    start = [*range(1, 50)]
    requests = [request([*start, number], seed=number) for number in range(3)]
    with Batch(pair, BatchSettings(parallel=3, cache_bytes=0)) as batch:
        with held(target):
            tickets = [batch.submit(one) for one in requests]
        answers = [ticket.result() for ticket in tickets]
    reused = sorted(answer.stats.num_reused for answer in answers)
    assert reused[0] == 0 and reused[1:] == [len(start), len(start)]
    assert [answer.tokens for answer in answers] == [alone(pair, one).tokens for one in requests]


class Counted(ReferenceModel):
    """A draft model that counts what it reads."""

    num_read = 0

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        self.num_read += sum(step.num_tokens for step in steps)
        return super().forward(steps)


@pytest.mark.parametrize("how", ["auto", "draft_model:num=3", "draft_model:num=3+ngram"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_draft_model_does_not_read_again_what_was_kept(target: Watched, how: str, cached: bool) -> None:
    """Two conversations that take turns in one place; how much is kept changes no text."""
    draft = Counted()
    pair = Pair(target, draft)
    turns = [[*range(1, 60)], [*range(60, 1, -2), *range(1, 60, 2)]]
    with Batch(pair, BatchSettings(parallel=1, cache_bytes=1 << 24 if cached else 0)) as batch:
        read = []
        for turn in (*turns, *([*turn, 7, 7] for turn in turns)):
            before = draft.num_read
            one = request([token % POISON for token in turn], most=1, how=how)
            assert batch.submit(one).result().tokens == alone(pair, one).tokens
            read.append(draft.num_read - before)
        kept = batch.status()
    assert min(read[:2]) >= 50
    assert (max(read[2:]) < 20) if cached else (min(read[2:]) >= 50)
    assert (0 < kept.kept_draft_bytes < kept.kept_bytes) == cached
    assert draft.num_open == 0


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["llamacpp", "mlx"])
def test_what_real_draft_models_have_read_is_put_back(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not get_backend(backend).is_installed():
        pytest.skip(f"needs the backend {backend}")
    starts = [[*range(300, 420)], [*range(900, 1020)]]
    read = [0]
    with open_pair(backend=backend, settings=LoadSettings(context=256, num_sequences=2, batch=True)) as tiny:
        assert tiny.draft is not None
        forward = tiny.draft.forward

        def counted(steps: Sequence[Step]) -> list[Scores]:
            read[0] += sum(step.num_tokens for step in steps)
            return forward(steps)

        monkeypatch.setattr(tiny.draft, "forward", counted)
        with Batch(tiny, BatchSettings(parallel=1)) as batch:
            answers = []
            for turn, more in enumerate(([], [], [7, 8], [7, 8])):
                before = read[0]
                params = SamplingParams(temperature=0.8, seed=turn, max_tokens=4)
                how = Speculation.parse("draft_model:num=2")
                asked = Request(tokens=[*starts[turn % 2], *more], params=params, speculation=how)
                answers.append((asked, batch.submit(asked).result()))
                assert read[0] - before < 20 if more else read[0] - before >= 119
        with tiny.session("nothing", exact="class") as session:
            for asked, answer in answers:
                assert answer.tokens == session.generate(asked.tokens, asked.params).tokens


# ---------------------------------------------------------------- the end


def test_closing_finishes_what_runs_if_it_is_given_time(pair: Pair, target: Watched) -> None:
    batch = Batch(pair, BatchSettings(parallel=1))
    tickets = [batch.submit(request([1, 2, number])) for number in range(4)]
    batch.close(drain_s=60)
    assert [ticket.result().finish_reason for ticket in tickets] == ["length"] * 4
    with pytest.raises(ClosedError):
        batch.submit(request([1]))
    batch.close()


def test_closing_without_time_cancels(pair: Pair, target: Watched) -> None:
    batch = Batch(pair, BatchSettings(parallel=1))
    with held(target):
        tickets = [batch.submit(request([1, 2, number], most=400)) for number in range(3)]
        closing = threading.Thread(target=batch.close)
        closing.start()
        wait_for(lambda: all(ticket.cancelled for ticket in tickets))
    closing.join(30)
    assert [ticket.result().finish_reason for ticket in tickets] == ["cancelled"] * 3


def test_a_batch_needs_its_sequences(target: Watched) -> None:
    with pytest.raises(BackendError, match="too many open"):
        Batch(Pair(target, None), BatchSettings(parallel=40))


def test_close_choices_are_not_rechecked_here_and_nobody_believes_so() -> None:
    with pytest.raises(SettingError, match=r"not re-checked(?s:.*)localspec tune"):
        BatchSettings(exact="guarded")
    with pytest.raises(UnknownNameError):
        BatchSettings(exact="auto")


def test_with_exactness_off_passes_are_of_any_width() -> None:
    """And every answer says that nothing is promised."""
    target = Watched()
    target.capabilities = replace(target.capabilities, width_class=WidthClass(4, 4, "pretended"))
    pair = Pair(target, target.perturbed(0.2))
    for exact, most in (("class", 3), ("off", 8)):
        with Batch(pair, BatchSettings(parallel=2, exact=exact)) as batch:
            answer = batch.submit(request([1, 2, 3], most=30, how="draft_model:num=8,guess=greedy")).result()
        assert answer.exact == exact
        assert len(answer.stats.drafted_by_depth) == most


def test_bad_settings_are_refused() -> None:
    for name, value in (("parallel", 0), ("queue", -1), ("cache_bytes", -1), ("chunk", 0)):
        with pytest.raises(SettingError, match=name):
            replace(BatchSettings(), **{name: value})  # type: ignore[arg-type]
    with pytest.raises(SettingError):
        Speculation.parse("ngram", width=0)
    with pytest.raises(SettingError):
        Speculation.parse("off", width=2)
    assert Speculation.parse("off").drafter.name == "nothing"
