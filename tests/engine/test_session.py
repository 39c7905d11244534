"""Sessions: reuse, stops, limits, cancelling, attribution and reports, on the reference backend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from localspec import noise
from localspec.drafters import DraftModel, Ngram, Nothing
from localspec.engine.answer import TARGET
from localspec.engine.chat import Chat
from localspec.engine.prefill import read_chunk
from localspec.engine.round import Lane, Room, run_round
from localspec.engine.session import Session
from localspec.engine.width import pad
from localspec.errors import PromptError, UnsupportedModelError
from localspec.pair import Pair
from localspec.protocols import Drafter, HostTokens, Rewind, Scores, Step, WidthClass, chain_parents
from localspec.sampling import Sampler, SamplingParams
from localspec.testing.reference import ReferenceModel, ReferenceState
from localspec.verify import Trial, Verdict, Walk

FREE = SamplingParams(temperature=0.9, seed=2, max_tokens=30, ignore_eos=True)


class Recorder(ReferenceModel):
    """Remembers the width of every pass."""

    widths: list[int]

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        if not hasattr(self, "widths"):
            self.widths = []
        self.widths.append(sum(step.num_tokens for step in steps))
        return super().forward(steps)


def model(context_length: int = 200, vocab_size: int = 257) -> Recorder:
    return Recorder(vocab_size, seed=3, context_length=context_length, width_class=WidthClass(3, 8))


def drafter_of(target: ReferenceModel) -> Drafter:
    return DraftModel(target.perturbed(0.2), num=5)


@pytest.mark.parametrize("make", [lambda target: Nothing(), drafter_of, lambda target: Ngram(num=20, min=1)])
def test_every_pass_stays_in_the_width_class(make: object) -> None:
    target = model()
    assert callable(make)
    with Session(target, make(target)) as session:
        session.generate([1, 2, 3, 1, 2, 3], FREE)
        session.generate([1], FREE)
    decoding = [width for width in target.widths if width <= 8]
    assert min(target.widths) >= 3 and len(decoding) >= 10
    assert max(target.widths) <= 8 or max(target.widths) == 5  # the prefill of the first prompt is 5 wide


class Watched(Walk):
    """Notes for each round how often choosing had to draw what noise is kept for a position."""

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def accept(self, trial: Trial) -> Verdict:
        before = noise.ceilings.cache_info().misses
        verdict = super().accept(trial)
        self.drawn.append(noise.ceilings.cache_info().misses - before)
        return verdict


def test_noise_is_drawn_while_a_device_runs_the_pass() -> None:
    texts, drawn = [], []
    for ahead in (False, True):
        noise.ceilings.cache_clear()
        target, rule = model(), Watched()
        target.capabilities = replace(target.capabilities, runs_ahead=ahead)
        with Session(target, drafter_of(target), acceptance=rule) as session:
            texts.append(session.generate([1, 2, 3], FREE).tokens)
        drawn.append(rule.drawn)
    assert texts[0] == texts[1]
    assert sum(drawn[0]) > 0 and not any(drawn[1]), "one token in a round was not guessed, and nobody drew for it"


@pytest.mark.parametrize("params", [SamplingParams(), replace(FREE, top_p=0.9)])
def test_noise_that_nobody_asks_for_is_not_drawn_ahead(params: SamplingParams) -> None:
    before = noise.ceilings.cache_info().misses
    Sampler(params, 71).draw_ahead(10, 8, 257)
    assert noise.ceilings.cache_info().misses == before


class Waited(ReferenceModel):
    """Counts who waits, and behind how many tokens."""

    def __init__(self) -> None:
        super().__init__(48, seed=5)
        self.waits = list[int]()

    def open(self) -> ReferenceState:
        state, waits = super().open(), self.waits
        wait = state.wait

        def counted() -> None:
            waits.append(state.length)
            wait()

        state.wait = counted  # type: ignore[method-assign]
        return state


def test_a_prompt_is_waited_for_once_when_all_of_it_is_read() -> None:
    """Else the first round would wait for it, and a device's time for reading would count as decoding."""
    model = Waited()
    state, prompt = model.open(), np.arange(30, dtype=np.int32)
    lengths = []
    while read_chunk(model, state, prompt, 12):
        lengths.append(state.length)
    assert lengths == [12, 24, 29] and model.waits == [29]
    assert not read_chunk(model, state, prompt, 12) and model.waits == [29]


def test_later_turns_prefill_only_what_is_new() -> None:
    target = model()
    with Session(target, drafter_of(target)) as session:
        first = session.generate([1, 2, 3, 4], FREE)
        history = session.tokens.tolist()
        second = session.generate([*history, 9, 9], FREE)
        assert second.stats.num_reused == len(history) - 1
        assert second.stats.num_prefilled == 2
        with Session(target, Nothing()) as fresh:
            assert fresh.generate([*history, 9, 9], FREE).tokens == second.tokens
        assert first.stats.num_reused == 0


def test_the_same_seed_gives_the_same_text_and_a_missing_one_is_reported() -> None:
    target = model()
    with Session(target, drafter_of(target)) as session:
        a = session.generate([1, 2], FREE)
        b = session.generate([1, 2], FREE)
        c = session.generate([1, 2], replace(FREE, seed=None))
        assert a.tokens == b.tokens
        assert session.generate([1, 2], replace(FREE, seed=c.seed)).tokens == c.tokens


def test_max_tokens_is_never_exceeded() -> None:
    target = model()
    for count in (1, 2, 3, 7):
        with Session(target, drafter_of(target)) as session:
            result = session.generate([1, 2], replace(FREE, max_tokens=count))
            assert len(result.tokens) == count and result.finish_reason == "length"


@pytest.mark.parametrize("prompt_length", [1, 20, 37, 38])
def test_a_full_context_ends_the_answer_at_the_same_token_for_every_drafter(prompt_length: int) -> None:
    target = model(context_length=40)
    prompt = list(range(1, prompt_length + 1))
    results = []
    for drafter in (Nothing(), drafter_of(target), Ngram(min=1)):
        with Session(target, drafter) as session:
            results.append(session.generate(prompt, replace(FREE, max_tokens=None)))
    assert len({result.tokens for result in results}) == 1
    assert {result.finish_reason for result in results} == {"context"}
    assert "context of 40 tokens is full" in results[0].note and len(results[0].tokens) >= 1


def test_prompts_that_cannot_be_used_are_refused_and_the_session_goes_on() -> None:
    target = model(context_length=40)
    with Session(target, drafter_of(target)) as session:
        before = session.generate([1, 2, 3], FREE)
        for prompt, words in (([], "empty"), (list(range(39)), "too long"), ([999], "vocabulary"), ("", "empty")):
            with pytest.raises(PromptError, match=words):
                session.generate(prompt, FREE)
        assert session.generate([1, 2, 3], FREE).tokens == before.tokens


def test_stop_tokens_end_the_answer_and_are_not_shown() -> None:
    target = model()
    with Session(target, Nothing()) as session:
        free = session.generate([1, 2], FREE)
    stop = free.tokens[6]
    first = free.tokens.index(stop)
    for drafter in (Nothing(), drafter_of(target)):
        with Session(target, drafter) as session:
            result = session.generate([1, 2], replace(FREE, stop_tokens=frozenset({stop})))
            assert result.tokens == free.tokens[: first + 1] and result.finish_reason == "stop"


def test_a_stop_string_cuts_text_and_cache_alike_for_every_drafter() -> None:
    """What lies behind the stop string is forgotten: the next turn starts from the same tokens."""
    target = model(vocab_size=257)
    with Session(target, Nothing()) as session:
        text = session.generate([65, 66], FREE).text
    stop = text[5:7]
    kept = []
    for drafter in (Nothing(), drafter_of(target), Ngram(min=1)):
        with Session(target, drafter) as session:
            result = session.generate([65, 66], replace(FREE, stop=(stop,)))
            assert result.text == text[: text.index(stop)] and result.stop_string == stop
            kept.append(session.tokens.tolist())
            follow = session.generate([*kept[-1], 70], FREE).tokens
            with Session(target, Nothing()) as fresh:
                assert fresh.generate([*kept[-1], 70], FREE).tokens == follow
    assert kept[0] == kept[1] == kept[2]


def test_pieces_join_to_the_text_and_say_who_guessed() -> None:
    target = model()
    with Session(target, DraftModel(ReferenceModel(257, seed=3), num=4)) as session:
        stream = session.stream([65, 66], replace(FREE, stop=("zzzzz",)))
        pieces = list(stream)
        assert "".join(piece.text for piece in pieces) == stream.result.text
        assert {piece.source for piece in pieces} == {"draft_model", TARGET}
        assert stream.result.sources.count("draft_model") == stream.result.stats.num_accepted
        assert len(stream.result.sources) == len(stream.result.tokens)


def test_a_reader_that_stops_reading_leaves_the_session_usable() -> None:
    target = model()
    with Session(target, drafter_of(target)) as session:
        stream = session.stream([1, 2, 3], FREE)
        for _ in zip(range(4), stream, strict=False):
            pass
        stream.close()
        with Session(target, Nothing()) as fresh:
            assert session.generate([1, 2, 3], FREE).tokens == fresh.generate([1, 2, 3], FREE).tokens


def test_a_new_answer_ends_the_one_that_is_still_being_written() -> None:
    """Old bug: two live streams shared one cache, and the first went on with wrong words."""
    target = model()
    with Session(target, drafter_of(target)) as session:
        first = session.stream([1, 2, 3], FREE)
        head = [next(iter(first)) for _ in range(2)]
        second = session.generate([9, 8], FREE)
        assert list(first) == [] and first.result.finish_reason == "cancelled"
        assert first.result.text.startswith("".join(piece.text for piece in head))
        with Session(target, Nothing()) as fresh:
            assert fresh.generate([9, 8], FREE).tokens == second.tokens


def test_a_stream_that_never_began_has_no_result_and_one_that_failed_raises_again() -> None:
    target = Failing(257, seed=3)
    with Session(target, Nothing()) as session:
        unread = session.stream([1], FREE)
        unread.close()
        with pytest.raises(ValueError, match="closed before"):
            unread.result  # noqa: B018 - the access is what is tested
        target.countdown = 3
        failing = session.stream([1, 2], FREE)
        with pytest.raises(KeyboardInterrupt):
            list(failing)
        with pytest.raises(KeyboardInterrupt):
            failing.result  # noqa: B018


def test_a_round_without_room_is_not_blamed_on_the_drafter() -> None:
    target = model()
    with Session(target, drafter_of(target)) as session:
        assert session.generate([1, 2], replace(FREE, max_tokens=1)).plain_because == "no round had room for a guess"


def test_a_model_that_cannot_take_tokens_back_decodes_plainly_only() -> None:
    target = model()
    target.capabilities = replace(target.capabilities, rewind=Rewind.NEVER, limits=("layer 3 is a black hole",))
    with pytest.raises(UnsupportedModelError, match=r"black hole.*--plain"):
        Session(target, Ngram())
    with pytest.raises(UnsupportedModelError, match="take tokens back"):
        DraftModel(target)
    with Session(target, Nothing()) as session:
        assert session.generate([1, 2], FREE).tokens


class Failing(ReferenceModel):
    """Fails in its n-th pass, as a device may."""

    countdown = -1

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        self.countdown -= 1
        if self.countdown == 0:
            raise KeyboardInterrupt
        return super().forward(steps)


@pytest.mark.parametrize("countdown", [1, 2, 4])
def test_an_interrupted_pass_leaves_nothing_pending(countdown: int) -> None:
    target = Failing(257, seed=3)
    with Session(target, drafter_of(target)) as session:
        target.countdown = countdown
        with pytest.raises(KeyboardInterrupt):
            session.generate([1, 2, 3], FREE)
        target.countdown = -1
        with Session(target, Nothing()) as fresh:
            assert session.generate([1, 2, 3], FREE).tokens == fresh.generate([1, 2, 3], FREE).tokens


@pytest.mark.parametrize("host_scores", [True, False])
def test_logprobs_are_the_models_own_and_the_same_for_every_drafter(host_scores: bool) -> None:
    target = model()
    target.capabilities = replace(target.capabilities, host_scores=host_scores)
    params = replace(FREE, logprobs=3, top_k=10, presence_penalty=0.5)
    answers = []
    for drafter in (Nothing(), drafter_of(target)):
        with Session(target, drafter) as session:
            answers.append(session.generate([1, 2], params))
    assert answers[0].logprobs == answers[1].logprobs and answers[0].logprobs is not None
    for item, token in zip(answers[0].logprobs, answers[0].tokens, strict=True):
        assert item.token == token and item.logprob < 0 and len(item.top) == 3
        assert item.top[0][1] >= item.top[1][1] >= item.top[2][1]


def test_the_report_is_json_and_adds_up() -> None:
    target = model()
    with Session(target, drafter_of(target)) as session:
        report = json.loads(json.dumps(session.generate([1, 2, 3], replace(FREE, logprobs=1)).as_dict()))
    stats = report["stats"]
    assert stats["num_tokens"] == len(report["tokens"]) == stats["num_rounds"] + stats["num_accepted"]
    assert sum(stats["widths"].values()) == stats["num_rounds"]
    assert stats["accepted_length"] == pytest.approx(stats["num_tokens"] / stats["num_rounds"], abs=1e-3)
    assert report["plain_because"] is None and report["width_class"] == "3 to 8"


def test_plain_decoding_says_why() -> None:
    with Session(model(), Nothing()) as session:
        assert "proposed nothing" in str(session.generate([1], FREE).plain_because)


def test_cancelling_during_prefill_ends_the_answer_before_it_begins() -> None:
    target = model(context_length=4000)
    prompt = np.random.default_rng(0).integers(0, 256, 1500).tolist()
    with Session(target, Nothing()) as session:
        seen: list[tuple[int, int]] = []

        def progress(done: int, total: int) -> None:
            seen.append((done, total))
            stream.cancel()

        stream = session.stream(prompt, FREE, on_prefill=progress)
        assert stream.result.finish_reason == "cancelled" and stream.result.tokens == ()
        assert seen == [(512, 1499)]


# ---------------------------------------------------------------- several lanes, padding


def test_lanes_in_one_pass_say_what_each_says_alone() -> None:
    """The server's way of using the loop: one verify pass for many sequences."""
    target = model()
    prompts = [[1, 2, 3], [9, 8], [5, 5, 5, 5]]
    alone = []
    for prompt in prompts:
        with Session(target, drafter_of(target)) as session:
            alone.append(list(session.generate(prompt, FREE).tokens))
    lanes = []
    for prompt in prompts:
        session = Session(target, drafter_of(target))
        stream = session.stream(prompt, replace(FREE, max_tokens=1))
        assert stream.result.tokens
        session._state.truncate(len(prompt) - 1)
        session._context.truncate(len(prompt))
        session.drafter.begin(session._context)
        lanes.append(Lane(session._state, session._context, session.drafter, Sampler(FREE, 2), Walk(), frozenset()))
    while min(len(lane.context) - len(prompt) for lane, prompt in zip(lanes, prompts, strict=True)) < 20:
        run_round(target, lanes, [Room(4, 4)] * 3)
    for lane, prompt, want in zip(lanes, prompts, alone, strict=True):
        got = lane.context.tokens[len(prompt) :].tolist()
        assert got[:20] == want[:20]


def test_padding_adds_nodes_nobody_scores() -> None:
    target = model()
    state = target.open()
    step = Step(state, (HostTokens(np.array([4], np.int32)),), chain_parents(state, 1))
    padded = pad(step, WidthClass(4))
    assert padded.num_tokens == 4 and padded.rows == (0,) and padded.parents.tolist() == [-1, 0, 1, 2]
    assert pad(step, WidthClass(1)) is step and pad(padded, WidthClass(4)) is padded


# ---------------------------------------------------------------- chat


def test_a_conversation_reuses_the_cache_of_earlier_turns() -> None:
    target = model(context_length=600)
    with Session(target, drafter_of(target)) as session:
        chat = Chat(session, "be brief")
        ascii_only = dict.fromkeys(range(128, 256), -10000.0)  # other bytes would not come back as they were
        params = replace(FREE, ignore_eos=False, max_tokens=12, logit_bias=ascii_only)
        first = chat.say("hello", params).result
        second = chat.say("again", params).result
        assert second.stats.num_reused >= first.num_prompt_tokens + len(first.tokens) - 1
        assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
        chat.reset()
        assert len(chat.messages) == 1
        assert chat.say("hello", params).result.tokens == first.tokens


def test_a_turn_that_fails_leaves_the_conversation_as_it_was() -> None:
    target = model(context_length=80)
    with Session(target, Nothing()) as session:
        chat = Chat(session)
        assert chat.say("hi", replace(FREE, max_tokens=4)).result.tokens
        before = list(chat.messages)
        for text in ("", "x" * 100):
            with pytest.raises(PromptError):
                chat.say(text, FREE)
        assert chat.messages == before


def test_an_unfinished_answer_joins_the_conversation_before_the_next_turn() -> None:
    """Old bug: closing the old stream later overwrote the newer turn."""
    target = model(context_length=600)
    with Session(target, Nothing()) as session:
        chat = Chat(session)
        old = chat.say("hi", FREE)
        next(iter(old))
        assert chat.say("again", replace(FREE, max_tokens=3)).result.tokens
        old.close()
        assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2


def test_a_cancelled_answer_joins_the_conversation() -> None:
    target = model(context_length=600)
    with Session(target, Nothing()) as session:
        chat = Chat(session)
        stream = chat.say("hi", FREE)
        for count, _ in enumerate(stream):
            if count == 2:
                stream.cancel()
        assert stream.result.finish_reason == "cancelled"
        assert chat.messages[-1]["content"] == stream.result.text != ""


def test_where_passes_are_one_token_wide_the_answer_says_why() -> None:
    target = ReferenceModel(64, width_class=WidthClass(1, 1, "wider ones do not pay here", plain_only=True))
    with Session(target, drafter_of(target)) as session:
        result = session.generate([1, 2, 3], replace(FREE, max_tokens=5))
    assert result.plain_because == "passes are one token wide: wider ones do not pay here"
    assert result.stats.num_drafted == 0 and len(result.tokens) == 5


def test_where_no_pass_may_hold_a_guess_nobody_is_asked_and_nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    target = ReferenceModel(64, width_class=WidthClass(1, 1, "wider ones do not pay here", plain_only=True))
    draft = target.perturbed(0.2)
    monkeypatch.setattr(draft, "open", lambda: pytest.fail("the draft model would read each prompt in vain"))
    with Pair(target, draft) as pair, pair.session() as session:
        result = session.generate([1, 2, 3], replace(FREE, max_tokens=5))
        assert "costs" not in vars(pair)
    assert (result.drafter, result.plain_because) == ("auto", "passes are one token wide: wider ones do not pay here")
    assert len(result.tokens) == 5
