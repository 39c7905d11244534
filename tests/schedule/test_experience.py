"""What a run learned of a pair is there in the next one, and counts for less than what that sees itself."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from localspec.drafters import make_drafter
from localspec.engine.session import Session
from localspec.pair import Pair
from localspec.protocols import HostTokens, Proposal
from localspec.sampling import SamplingParams
from localspec.schedule import store
from localspec.schedule.cost import Costs
from localspec.schedule.experience import Experience
from localspec.schedule.guard import Guard
from localspec.schedule.scheduled import Scheduled
from localspec.testing.reference import ReferenceModel
from tests.schedule.test_scheduled import PROMPT, Wrong, curve, session

COSTS = Costs(curve(10.0, 0.2), curve(1.0, 0.0), 0.1)


def learned(good: bool = True) -> Experience:
    """Of a draft model that is the target's twin, or of a drafter that is always wrong."""
    target = ReferenceModel(48, seed=5, sharpness=3.0)
    dear = make_drafter("draft_model:num=8", ReferenceModel(48, seed=5, sharpness=3.0)) if good else Wrong()
    one, experience = session(target, [make_drafter("suffix", None)], [dear], COSTS)
    with one:
        for seed in range(4):
            one.generate(PROMPT, SamplingParams(seed=seed, max_tokens=200, ignore_eos=True))
    experience.by_clock = True  # as a user's is
    return experience


def again(data: object) -> Experience:
    """A new process goes on from what was written."""
    experience = Experience(COSTS, ReferenceModel(48, seed=5).capabilities)
    experience.recall(json.loads(json.dumps(data)))
    return experience


@pytest.mark.parametrize("good", [True, False])
def test_what_is_recalled_is_what_was_known(good: bool) -> None:
    name = "draft_model" if good else Wrong.name
    before = learned(good)
    after = again(before.as_dict())
    assert after.recalled == before.as_dict()["rounds"] > 30
    old, new = before.record(name, True), after.record(name, True)
    assert new.guard.parked == old.guard.parked
    assert new.usual_value == pytest.approx(old.usual_value)
    assert new.trials.num == old.trials.num
    for log_q in (-3.0, -1.0, -0.1, -0.01):
        assert new.reliability.chances([log_q])[0] == pytest.approx(old.reliability.chances([log_q])[0], abs=0.15)
    assert again(after.as_dict()).as_dict()["rounds"] == after.recalled


def test_one_that_lost_is_not_believed_again() -> None:
    before = learned(good=False)
    assert before.record(Wrong.name, True).usual_value < 0.2
    target = ReferenceModel(48, seed=5, sharpness=3.0)
    drafted = []
    for experience in (again(before.as_dict()), Experience(COSTS, target.capabilities)):
        experience.by_clock = False
        with Session(target, Scheduled([], [Wrong()], experience)) as one:
            result = one.generate(PROMPT, SamplingParams(max_tokens=150, ignore_eos=True))
        drafted.append(result.stats.num_drafted)
    assert drafted[0] < 0.5 * drafted[1]


def test_what_trials_cost_before_is_still_owed() -> None:
    guard = Guard()
    for _ in range(40):
        guard.observe(0.0, 1.0, 1.0)
    guard.begin()
    assert guard.parked and guard.pays(2.0), "the first trial of an answer is made in advance"
    after = Guard()
    after.recall(json.loads(json.dumps(guard.as_dict())))
    after.begin()
    assert after.parked and not after.pays(2.0), "another process is no reason for another trial"
    for _ in range(300):
        after.idle(1.0, 1.0, 2.0)
    assert after.pays(2.0), "the share that is put aside has paid for the last one"


def test_today_outweighs_what_is_remembered() -> None:
    """Remembered as always right, and now always wrong: found out as quickly as within a run."""
    experience = again(learned(good=True).as_dict())
    record = experience.record("draft_model", True)
    before = record.reliability.chances([-0.05])[0]
    wrong = Proposal("draft_model", (HostTokens(np.array([3], np.int32)),), np.array([-1], np.int32), log_q=(-0.05,))
    for _ in range(60):
        record.reliability.observe(wrong.tree(), [4])
    assert before > 0.9 and record.reliability.chances([-0.05])[0] < 0.55


def test_it_is_kept_in_a_file_and_a_broken_one_is_left_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target, draft = ReferenceModel(48, seed=5), ReferenceModel(48, seed=5)

    def make() -> Experience:
        return Experience(COSTS, target.capabilities)

    store.set_automatic(True)
    try:
        store.keep_experience(target, draft, (), make(), tmp_path)
        assert not list(tmp_path.iterdir()), "nothing was learned"
        store.keep_experience(target, draft, (), learned(), tmp_path)
        [file] = tmp_path.iterdir()
        assert store.experience_for(target, draft, (), make, tmp_path).recalled > 30
        assert not store.experience_for(target, None, (), make, tmp_path).recalled, "another pair"
        other = Costs(curve(11.0, 0.2), curve(1.0, 0.0), 0.1)
        fresh = store.experience_for(target, draft, (), lambda: Experience(other, target.capabilities), tmp_path)
        assert not fresh.recalled, "times were corrections of another table"
        whole = file.read_text()
        for place, spoilt in (("look_ms", "x"), ("look_ms", float("nan")), ("live", [])):
            caplog.clear()
            stored = json.loads(whole)
            stored["found"][place] = spoilt
            file.write_text(json.dumps(stored))
            with caplog.at_level(logging.WARNING):
                broken = store.experience_for(target, draft, (), make, tmp_path)
            assert not broken.recalled and not broken.as_dict()["records"], "nothing of half a file"
            assert len(caplog.records) == 1 and not file.exists()
        store.set_automatic(False)
        store.keep_experience(target, draft, (), learned(), tmp_path)
        assert not list(tmp_path.iterdir()), "measuring is not allowed"
    finally:
        store.set_automatic(False)


def test_a_pair_that_is_closed_knows_more_when_it_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "default_folder", lambda: tmp_path)
    monkeypatch.setattr(store, "_automatic", True)

    def run(remembers: bool) -> int:
        with Pair(ReferenceModel(48, seed=5, sharpness=3.0), ReferenceModel(48, seed=5, sharpness=3.0)) as pair:
            vars(pair)["costs"] = COSTS
            pair.remembers_speed = remembers
            recalled = pair.experience.recalled
            with pair.session() as one:
                one.generate(PROMPT, SamplingParams(max_tokens=200, ignore_eos=True))
            return recalled

    assert run(False) == 0 and not list(tmp_path.iterdir())
    assert run(True) == 0
    first = run(True)
    assert first > 30 and run(True) > first


def test_times_are_recalled_as_little() -> None:
    """A draft model that takes 3 ms more than its passes, and a width that takes half as much again as in the table:
    known from the first, and given up within some rounds."""
    before = Experience(COSTS, ReferenceModel(48, seed=5).capabilities)
    times = before.times("draft_model")
    for count in (1, 2, 3) * 30:
        times.observe(times.prices(0, 1).chain(count), 3.0 + count, 1)
        for width, share in ((2, 1.0), (4, 1.5)):
            before.live.observe_verify(width, 0, share * COSTS.target.at(width, 0))
    after = again(before.as_dict())
    assert after.times("draft_model").prices(0, 1).chain(3) == pytest.approx(6.0, rel=0.15)
    assert after.live.verify_ms(4, 0) > 1.25 * COSTS.target.at(4, 0)
    for _ in range(30):
        for width in (2, 4):
            after.live.observe_verify(width, 0, COSTS.target.at(width, 0))
    assert after.live.verify_ms(4, 0) == pytest.approx(COSTS.target.at(4, 0), rel=0.1)


# ---------------------------------------------------------------- what time is worth


def at_ten_milliseconds() -> Experience:
    return Experience(Costs(curve(10.0, 0.2), None, 0.0), ReferenceModel(48).capabilities)


def test_sampled_text_is_not_judged_by_how_fast_greedy_text_went() -> None:
    """One that went four times as fast as plain decoding made every guess of the other look too dear."""
    experience = at_ten_milliseconds()
    plain = 1.0 / experience.plain_ms(0)
    for _ in range(100):
        experience.observe(4, 10.0, plain=False, greedy=True)
    assert experience.rate(0, greedy=True) > 3.0 * plain
    assert experience.rate(0, greedy=False) == experience.rate(0, greedy=None) == plain


def test_what_time_is_worth_follows_another_answer_within_some_rounds() -> None:
    slow, kept = at_ten_milliseconds(), at_ten_milliseconds()
    for experience in (slow, kept):
        for _ in range(100):
            experience.observe(4, 10.0, plain=False, greedy=True)
    slow.begin(greedy=True)
    assert slow.rate(0, greedy=True) == pytest.approx(kept.rate(0, greedy=True))  # until something else is seen
    for experience in (slow, kept):
        for _ in range(12):
            experience.observe(2, 10.0, plain=False, greedy=True)
    assert slow.rate(0, greedy=True) < 0.27 < kept.rate(0, greedy=True)


def test_at_the_start_of_answers_one_that_lost_is_asked_ever_more_seldom_and_one_that_pays_always() -> None:
    """Old error: a few rounds of each answer, which is much of a short one."""
    record = Experience(COSTS, ReferenceModel(48).capabilities).record("draft_model", True)
    asked = []
    for number in range(16):
        record.usual_value = -1.0
        record.begin(-0.4)
        if record.usual_value > -0.4:
            asked.append(number)
    assert asked == [0, 1, 3, 6, 10, 14]
    record.usual_value = 0.2
    record.begin(-0.4)
    assert record.usual_value == 0.2
    record.usual_value = -1.0
    record.begin(-0.4)
    assert record.usual_value == -0.2, "it paid in the meantime"
