"""The speed benchmark: who runs when, what comes out, and what an interruption leaves. No times are asserted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from localspec.bench import plots, speed
from localspec.bench.contenders import PLAIN, PLAIN_ONE, Kind, Own, digest, plain_contenders
from localspec.bench.grid import family, grid
from localspec.bench.prompts import Prompt
from localspec.bench.runs import Answer, Run, RunLog
from localspec.bench.speed_report import markdown, write_report
from localspec.bench.summary import Summary, summarize
from localspec.bench.workloads import Workload
from localspec.errors import PromptError
from localspec.exactness import Bound
from localspec.loading import open_pair
from localspec.pair import Pair
from localspec.protocols import LoadSettings, WidthClass
from localspec.sampling import SamplingParams, Tolerance
from localspec.testing.reference import ReferenceModel

SETTINGS: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True, "repeats": 2, "temperatures": [0.0, 0.8]}


class Fixed:
    """A contender whose answers are given; `order` records who ran."""

    def __init__(self, name: str, kind: Kind, ms: float, order: list[str]) -> None:
        self.name, self.kind, self._ms, self._order = name, kind, ms, order

    def takes(self, workload: Workload) -> bool:
        return not (workload.foreign_draft and self.kind is Kind.PEER)

    def answer(self, workload: Workload, tokens: Sequence[int], params: SamplingParams) -> Answer:
        self._order.append(self.name)
        parts = {} if self.kind is Kind.PEER else {"draft_ms": 1.0, "verify_ms": self._ms - 2.0, "host_ms": 1.0}
        depths = {"drafted_by_depth": [4, 2], "accepted_by_depth": [2]} if self.kind is Kind.CONFIG else {}
        return Answer(10, 10, self._ms, "00000000", 5, 8, 4, **parts, **depths)  # type: ignore[arg-type]

    def close(self) -> None:
        pass


@pytest.fixture
def pair() -> Iterator[Pair]:
    target = ReferenceModel(257, width_class=WidthClass(2, 8))
    with Pair(target, target.perturbed(0.1)) as opened:
        yield opened


def workloads(*names: str) -> list[Workload]:
    return [
        Workload(name, f"about {name}", tuple(Prompt(f"{name}-{i}", name, f"ab{i}", None) for i in range(2)))
        for name in names
    ]


def conditions(pair: Pair, works: Sequence[Workload], contenders: Sequence[Any], **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"runtime": {}, "grid": [], "notes": []}
    return speed.describe(pair, works, contenders, **(base | SETTINGS | more))


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_everybody_stands_at_every_place_equally_often(count: int) -> None:
    names: list[Any] = [chr(65 + number) for number in range(count)]
    turns = [speed.in_order(names, turn) for turn in range(2 * count)]
    for place in range(count):
        assert Counter(turn[place] for turn in turns) == dict.fromkeys(names, 2)
    for one in names:
        for other in names:
            if one != other:
                assert sum(turn.index(one) < turn.index(other) for turn in turns) == count


def test_contenders_alternate_within_one_run(pair: Pair) -> None:
    order: list[str] = []
    contenders = [Fixed("a", Kind.PLAIN, 10.0, order), Fixed("b", Kind.CONFIG, 10.0, order)]
    works = workloads("chat")
    log = RunLog(conditions(pair, works, contenders, temperatures=[0.0], repeats=2))
    speed.measure(log, pair, works, contenders)
    assert [run.contender for run in log.runs] == ["a", "b", "b", "a", "b", "a", "a", "b"]
    assert order[:4] == ["a", "b", "a", "b"], "all are warmed up before anything is timed"
    assert len(order) == len(log.runs) + 2


def test_all_are_warmed_up_for_greedy_and_for_sampled_text(pair: Pair) -> None:
    order: list[str] = []
    contenders = [Fixed("a", Kind.PLAIN, 10.0, order), Fixed("b", Kind.CONFIG, 10.0, order)]
    works = workloads("chat")
    log = RunLog(conditions(pair, works, contenders, temperatures=[0.0, 0.5, 0.8], repeats=1))
    speed.measure(log, pair, works, contenders)
    assert order[:8] == ["a", "b", "a", "b", "a", "b", "a", "b"], "two of T = 0, and before those of T = 0.5 again"
    assert len(order) == len(log.runs) + 4, "T = 0.8 needs no other kernels"


def test_a_prompt_without_room_is_refused_before_anything_runs(pair: Pair) -> None:
    order: list[str] = []
    work = Workload("chat", "", (Prompt("short", "chat", "a", None), Prompt("long", "chat", "a" * 5000, None)))
    contenders = [Fixed("a", Kind.PLAIN, 10.0, order)]
    log = RunLog(conditions(pair, [work], contenders))
    with pytest.raises(PromptError, match="prompt long of chat is too long"):
        speed.measure(log, pair, [work], contenders)
    assert not order


# ---------------------------------------------------------------- figures


def measured(pair: Pair, *, grid_names: Sequence[str] = ()) -> Summary:
    """Known times: plain 20 ms an answer, width 1 16 ms, ours 8, a library 12, a grid of 10, 7 and 40."""
    order: list[str] = []
    contenders = [
        Fixed(PLAIN, Kind.PLAIN, 20.0, order),
        Fixed(PLAIN_ONE, Kind.PLAIN, 16.0, order),
        Fixed("draft_model", Kind.CONFIG, 8.0, order),
        Fixed("other plain", Kind.PEER, 12.0, order),
        *(Fixed(name, Kind.GRID, ms, order) for name, ms in zip(grid_names, (10.0, 7.0, 40.0), strict=False)),
    ]
    works = [*workloads("chat"), Workload("stranger", "about", workloads("x")[0].prompts, foreign_draft=True)]
    log = RunLog(conditions(pair, works, contenders, grid=list(grid_names)))
    speed.measure(log, pair, works, contenders)
    return summarize(log, complete=True)


def test_speed_is_against_the_faster_plain(pair: Pair) -> None:
    rows = {row.contender: row for row in measured(pair).find("chat", 0.8)}
    assert {row.against for row in rows.values()} == {PLAIN_ONE}
    assert rows["draft_model"].tokens_per_second.value == pytest.approx(1250.0)
    speedups = {name: row.speedup.value for name, row in rows.items() if row.speedup is not None}
    assert speedups == pytest.approx({PLAIN: 0.8, PLAIN_ONE: 1.0, "draft_model": 2.0, "other plain": 16 / 12})
    assert rows["draft_model"].accepted_length == 2.0, "10 tokens in 5 rounds"
    assert rows["draft_model"].share_accepted == 0.5
    assert rows["draft_model"].acceptance_by_depth == (0.5, 0.0)
    assert rows["draft_model"].split_ms == pytest.approx({"draft": 0.1, "verify": 0.6, "host": 0.1})
    assert rows["other plain"].split_ms == {}
    assert (rows["draft_model"].num_same_text, rows["draft_model"].num_compared) == (4, 4)


def test_libraries_do_not_run_what_needs_another_draft_model(pair: Pair) -> None:
    assert "other plain" not in [row.contender for row in measured(pair).find("stranger", 0.0)]


def test_the_oracle_is_the_best_static_configuration(pair: Pair) -> None:
    names = ["draft_model:num=2", "draft_model:num=4", "ngram:num=2"]
    summary = measured(pair, grid_names=names)
    assert {oracle.contender for oracle in summary.oracles} == {"draft_model:num=4"}
    rows = {row.contender: row for row in summary.find("chat", 0.0)}
    shares = {name: row.of_best.value for name, row in rows.items() if row.of_best is not None}
    assert shares["draft_model"] == pytest.approx(7 / 8), "a named configuration is compared with it"
    assert shares["draft_model:num=4"] == 1.0
    text = markdown(summary)
    assert "| chat | draft_model:num=4 | 2.29x (2.29 to 2.29) | - | 88% (88% to 88%) |" in text


def test_the_best_is_also_picked_on_the_other_repeats(pair: Pair) -> None:
    took = {PLAIN: (4.0, 4.0), "ngram:num=2": (1.0, 2.0), "ngram:num=4": (2.1, 1.1), "auto": (1.5, 1.5)}
    order: list[str] = []
    contenders = [
        Fixed(name, Kind.PLAIN if name == PLAIN else Kind.GRID if ":" in name else Kind.CONFIG, 1.0, order)
        for name in took
    ]
    works = workloads("chat")
    log = RunLog(conditions(pair, works, contenders, temperatures=[0.0], grid=["ngram:num=2", "ngram:num=4"]))
    for name, by_repeat in took.items():
        for repeat, ms in enumerate(by_repeat):
            log.runs.append(Run("chat", "chat-0", 0.0, name, repeat, Answer(10, 10, 10 * ms, "0")))
    summary = summarize(log, complete=True)
    auto = {row.contender: row for row in summary.rows}["auto"]
    assert auto.of_best is not None and auto.of_picked is not None
    assert auto.of_best.value == pytest.approx(1.0), "the best took 1 and 2 ms"
    assert auto.of_picked.value == pytest.approx(2.05 / 1.5), (
        "the other repeat says the other one, which takes 2.1 and 2"
    )
    assert "auto, of the best picked on the other repeats" in markdown(summary)

    log.runs[:] = [run for run in log.runs if run.repeat == 0]
    summary = summarize(log, complete=True)
    assert {row.of_picked for row in summary.rows} == {None}, "one repeat leaves nothing to pick by"
    assert "picked on the other" not in markdown(summary).split("Tokens per second")[0]


def test_plain_can_be_the_best_static_configuration(pair: Pair) -> None:
    order: list[str] = []
    slow = [Fixed(PLAIN, Kind.PLAIN, 5.0, order), Fixed("ngram:num=2", Kind.GRID, 10.0, order)]
    works = workloads("chat")
    log = RunLog(conditions(pair, works, slow, grid=["ngram:num=2"]))
    speed.measure(log, pair, works, slow)
    assert {oracle.contender for oracle in summarize(log, complete=True).oracles} == {PLAIN}


def test_the_json_has_the_schema_that_the_docs_name(pair: Pair, tmp_path: Path) -> None:
    summary = measured(pair, grid_names=["draft_model:num=2"])
    run = Run("chat", "chat-0", 0.0, PLAIN, 0, Answer(1, 1, 1.0, "0"))
    write_report(tmp_path, summary, [run], [])
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert set(data) == {"schema", "conditions", "complete", "rows", "oracles", "runs"}
    assert data["schema"] == 1
    assert {"started", "localspec", "runtime", "target", "draft", "width_class", "contenders", "workloads"} <= set(
        data["conditions"]
    )
    row = data["rows"][0]
    assert set(row["tokens_per_second"]) == {"value", "low", "high"}
    assert {"workload", "temperature", "contender", "kind", "speedup", "against", "accepted_length"} <= set(row)
    assert data["runs"][0]["contender"] == PLAIN
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Speed is against the faster of the two." in text and "2 repeats, alternating order" in text


def test_pictures_are_drawn_from_the_figures(pair: Pair, tmp_path: Path) -> None:
    summary = measured(pair, grid_names=["draft_model:num=2", "draft_model:num=4", "ngram:num=2"])
    names = plots.draw(summary, tmp_path)
    assert names == ["speed.png", "time.png", "depth.png", "grid.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    shown = [text.get_text() for axis in plots.speed_figure(summary).axes for text in axis.texts]
    assert shown.count("2.00x") == 4 and "0.80x" in shown, "one per panel"
    ticks = [tick.get_text() for tick in plots.speed_figure(summary).axes[0].get_yticklabels()]
    assert ticks == [PLAIN, PLAIN_ONE, "draft_model", "other plain", "best of the grid"]


# ---------------------------------------------------------------- interruption


def test_an_interrupted_benchmark_keeps_and_continues(pair: Pair, tmp_path: Path) -> None:
    order: list[str] = []
    path = tmp_path / "runs.jsonl"
    works = workloads("chat", "code")

    def stop_after(count: int) -> Callable[[int, int, str], None]:
        def on_run(done: int, total: int, label: str) -> None:
            if done == count:
                raise KeyboardInterrupt

        return on_run

    contenders = [Fixed(PLAIN, Kind.PLAIN, 20.0, order), Fixed("ngram", Kind.CONFIG, 10.0, order)]
    described = conditions(pair, works, contenders)
    with RunLog(described, path) as log, pytest.raises(KeyboardInterrupt):
        speed.measure(log, pair, works, contenders, stop_after(5))
    kept = log.runs
    assert len(kept) == 5 and len(path.read_text(encoding="utf-8").splitlines()) == 6
    text = markdown(summarize(log, complete=False))
    assert text.startswith("**Interrupted") and "| chat |" in text and "| code |" not in text
    with RunLog(described, path, resume=True) as log:
        speed.measure(log, pair, works, contenders)
    assert log.runs[:5] == kept
    assert len(log.runs) == len({run.key for run in log.runs}) == 2 * 2 * 2 * 2 * 2


# ---------------------------------------------------------------- real contenders


def test_contenders_of_ours_give_the_text_of_plain_decoding(pair: Pair) -> None:
    """Each on its own session; at width 1 the reference model has the same bits, a real one may not."""
    [work] = workloads("chat")
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=24, ignore_eos=True)
    contenders = plain_contenders(pair)
    assert [one.name for one in contenders] == [PLAIN, PLAIN_ONE]
    contenders += [
        Own("draft_model", Kind.CONFIG, "draft_model", pair, lambda: pair),
        Own("ngram:num=2", Kind.GRID, "ngram:num=2", pair, lambda: pair, keep=False),
    ]
    answers = [one.answer(work, [97, 98, 97, 98], params) for one in contenders]
    assert len({answer.digest for answer in answers}) == 1
    assert [answer.num_rounds for answer in answers[:2]] == [24, 24]
    assert (answers[2].num_rounds or 24) < 24
    for answer in answers:
        assert answer.num_tokens == answer.num_timed == 24
        assert answer.draft_ms is not None and answer.verify_ms is not None and answer.host_ms is not None
        assert answer.draft_ms + answer.verify_ms + answer.host_ms == pytest.approx(answer.decode_ms)
        assert answer.rounds is not None and len(answer.rounds) == answer.num_rounds
        nodes, accepted, _, draft_ms, verify_ms, _ = map(sum, zip(*answer.rounds, strict=True))
        assert (nodes, accepted) == (answer.num_drafted, answer.num_accepted)
        assert draft_ms == pytest.approx(answer.draft_ms, abs=0.01)
        assert verify_ms == pytest.approx(answer.verify_ms, abs=0.01)
    for one in contenders:
        one.close()
    assert isinstance(pair.target, ReferenceModel) and pair.target.num_open == 0


def test_only_plain_at_width_one_leaves_the_width_class(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    original = ReferenceModel.forward

    def watched(self: ReferenceModel, steps: Any) -> Any:
        widths.extend(step.num_tokens for step in steps)
        return original(self, steps)

    monkeypatch.setattr(ReferenceModel, "forward", watched)
    [work] = workloads("chat")
    for contender, expected in zip(plain_contenders(pair), (2, 1), strict=True):
        widths.clear()
        contender.answer(work, [97, 98], SamplingParams(max_tokens=4, ignore_eos=True))
        assert set(widths) == {expected}


def test_where_the_class_holds_width_one_there_is_one_plain() -> None:
    with Pair(ReferenceModel(257), None) as pair:
        assert [one.name for one in plain_contenders(pair)] == [PLAIN]


def test_guarded_plain_stands_beside_plain_at_width_one_and_rechecks_are_reported() -> None:
    with Pair(ReferenceModel(257, sharpness=1.0), None) as guarded:
        guarded.bound = Bound(Tolerance(1.0, 1.0), 8, 64)
        lookup = Own("ngram", Kind.CONFIG, "ngram", guarded, lambda: guarded, exact="guarded")
        contenders = [*plain_contenders(guarded, "guarded"), lookup]
        assert [one.name for one in contenders] == [PLAIN, PLAIN_ONE, "ngram"]
        works = workloads("chat")
        settings = {"max_tokens": 12, "ignore_eos": True, "repeats": 1, "temperatures": [0.0], "grid": [], "notes": []}
        conditions = speed.describe(guarded, works, contenders, runtime={}, exact="guarded", **settings)
        assert conditions["exact"] == "guarded" and conditions["padding"] == 8
        with RunLog(conditions) as log:
            speed.measure(log, guarded, works, contenders)
        summary = summarize(log, complete=True)
        rechecked = {row.contender: row.num_rechecked for row in summary.rows}
        assert rechecked[PLAIN] > 0 == rechecked[PLAIN_ONE]
        assert "Re-checked choices per 100 tokens: chat, plain" in markdown(summary)
        for one in contenders:
            one.close()


def test_digests_tell_texts_apart() -> None:
    assert digest([1, 23]) != digest([12, 3]) and digest((1, 2)) == digest([1, 2])


@pytest.mark.real
def test_the_grid_is_what_the_pair_can_do() -> None:
    with open_pair(backend="llamacpp", settings=LoadSettings(num_sequences=2, threads=1, context=128)) as pair:
        names, notes = grid(pair)
        kinds = {family(name)[0] for name in names}
        assert kinds == {"chain", "lookup"} and any("trees left out" in note for note in notes)
    settings = LoadSettings(num_sequences=2, threads=1, context=128, flash_attention=True)
    with open_pair(backend="llamacpp", settings=settings) as pair:
        names, notes = grid(pair)
        assert {family(name) for name in names} >= {("tree", 16), ("chain", 4), ("lookup", 8)} and not notes
        for name in names:  # every one of them can be opened and used
            contender = Own(name, Kind.GRID, name, pair, lambda: pair, keep=False)
            contender.answer(workloads("chat")[0], [50, 60, 50, 60], SamplingParams(max_tokens=4))
