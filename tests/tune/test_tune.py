"""The search over runtime options: what it tries, what it keeps, what it says."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import localspec.tune.search as search_module
from cli import main
from localspec.errors import SettingError
from localspec.host_scores import HostScores
from localspec.pair import Pair
from localspec.protocols import Capabilities, LoadSettings, Rewind, WidthClass
from localspec.schedule import store
from localspec.schedule.classes import Classes
from localspec.schedule.cost import Costs, Curve
from localspec.schedule.score import LOOKUP_CHANCE, RANK_CHANCES, Best, best
from localspec.testing.reference import ReferenceModel
from localspec.tune.options import choices, combinations, described, joining
from localspec.tune.plot import check_plot, draw
from localspec.tune.report import text_of
from localspec.tune.result import Candidate
from localspec.tune.result import Result as Found
from localspec.tune.search import Plan, tune

OWN = frozenset({"gpu_layers", "threads", "flash_attention", "extra_buffers"})


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["tune", *arguments])


# ---------------------------------------------------------------- what is tried


def loaded(**options: bool | int | str) -> ReferenceModel:
    model = ReferenceModel(64, context_length=128)
    model.info = replace(model.info, options=tuple(options.items()))
    return model


def test_every_open_option_is_varied_the_backends_choice_first() -> None:
    model = loaded(threads=2, flash_attention=False, extra_buffers=True, gpu_layers=0)
    tried = choices(model, OWN, LoadSettings())
    assert tried == {"threads": [2, 1], "flash_attention": [False, True], "extra_buffers": [True, False]}
    sets = combinations(tried)
    assert len(sets) == 8 and sets[0] == {"threads": 2, "flash_attention": False, "extra_buffers": True}


def test_what_is_given_or_does_not_matter_is_not_varied() -> None:
    model = loaded(threads=8, flash_attention=False, extra_buffers=False, gpu_layers=0)
    assert choices(model, OWN, LoadSettings(threads=8)) == {"flash_attention": [False, True]}
    assert choices(model, OWN, LoadSettings(threads=8, flash_attention=False)) == {}
    assert choices(model, frozenset({"dtype"}), LoadSettings()) == {}
    on_gpu = loaded(threads=8, flash_attention="auto", extra_buffers=True, gpu_layers=999)
    assert choices(on_gpu, OWN, LoadSettings()) == {"flash_attention": [True, False]}


def test_many_cores_are_tried_by_quarters_and_options_one_by_one() -> None:
    model = loaded(threads=16, flash_attention=False, extra_buffers=True, gpu_layers=0)
    tried = choices(model, OWN, LoadSettings())
    assert tried["threads"] == [16, 12, 8, 4]
    sets = combinations(tried)
    assert len(sets) == 1 + 3 + 1 + 1 and all(len(options) == 3 for options in sets)


def test_a_cache_that_may_join_width_one_is_tried_where_it_lies_outside() -> None:
    own, model = OWN | {"cache_type"}, loaded(threads=2, flash_attention=False, extra_buffers=True, gpu_layers=0)
    model.capabilities = replace(model.capabilities, width_class=WidthClass(2))
    tried = choices(model, own, LoadSettings())
    assert joining(model, own, LoadSettings(), tried) == {
        "threads": 2, "flash_attention": True, "extra_buffers": True, "cache_type": "bf16",
    }  # fmt: skip
    assert joining(model, OWN, LoadSettings(), tried) is None, "the backend has no such option"
    assert joining(model, own, LoadSettings(cache_type="f16"), tried) is None, "the user decided"
    assert joining(model, own, LoadSettings(flash_attention=False), tried) is None
    on_gpu = loaded(threads=2, flash_attention=True, extra_buffers=True, gpu_layers=99)
    assert joining(on_gpu, own, LoadSettings(), tried) is None
    model.capabilities = replace(model.capabilities, width_class=WidthClass(1))
    assert joining(model, own, LoadSettings(), tried) is None, "nothing to join"


def test_options_are_described_in_words() -> None:
    assert described({"flash_attention": True, "cache_type": "bf16"}) == "flash attention, bf16 cache"
    assert described({"threads": 1, "flash_attention": False}) == "1 thread, no flash attention"
    assert described({}) == "as the backend chooses"


# ---------------------------------------------------------------- the score


def costs(target: tuple[float, ...], draft: float | None = 0.5) -> Costs:
    widths = (1, 2, 3, 4, 8, 16)
    drafting = None if draft is None else Curve((1, 16), (64,), ((draft, draft),))
    return Costs(Curve(widths, (64,), (target,)), drafting, 0.0)


KNOWN = Capabilities(Rewind.FREE, True, 64, 1, WidthClass(2), True, exact_trees=False)


def test_the_score_is_that_of_the_best_chain() -> None:
    found = best(costs((10.0, 10.0, 10.0, 10.0, 50.0, 100.0)), KNOWN)
    expected = 1.0 + sum(RANK_CHANCES[0] ** depth for depth in (1, 2, 3))
    assert (found.num_nodes, found.is_tree) == (3, False)
    assert found.tokens_per_second == pytest.approx(1e3 * expected / (10.0 + 3 * 0.5))
    assert found.plain_tokens_per_second == pytest.approx(100.0)


def test_plain_is_padded_into_the_class_and_wins_where_width_costs() -> None:
    found = best(costs((10.0, 15.0, 90.0, 120.0, 240.0, 500.0), draft=50.0), KNOWN)
    assert found.num_nodes == 0 and str(found) == "plain"
    assert found.tokens_per_second == pytest.approx(1e3 / 15.0)


def test_trees_are_scored_where_they_are_exact() -> None:
    flat = costs((10.0, 10.0, 10.0, 10.0, 10.0, 10.0), draft=3.0)
    chain, tree = best(flat, KNOWN), best(flat, replace(KNOWN, exact_trees=True))
    assert not chain.is_tree and tree.is_tree
    assert tree.tokens_per_second > chain.tokens_per_second


def test_widths_outside_the_class_are_not_scored() -> None:
    flat = costs((10.0, 10.0, 10.0, 10.0, 10.0, 10.0), draft=0.1)
    assert best(flat, replace(KNOWN, width_class=WidthClass(2, 3))).num_nodes == 2


def test_without_a_draft_model_guesses_cost_nothing_and_hit_less() -> None:
    found = best(costs((10.0, 10.0, 10.0, 10.0, 90.0, 90.0), draft=None), KNOWN)
    assert found.expected == pytest.approx(1.0 + sum(LOOKUP_CHANCE**depth for depth in (1, 2, 3)))


# ---------------------------------------------------------------- the whole of it, on a pair that costs nothing


class Toy(ReferenceModel):
    """Its rows change with flash attention from width 4 on, which its backend does not know."""

    def __init__(self, file: Path, settings: LoadSettings) -> None:
        super().__init__(64, context_length=128, width_class=WidthClass(1, None, "assumed"))
        flash = bool(settings.flash_attention)
        self.info = replace(
            self.info,
            path=file,
            runtime="numpy",
            options=(("threads", settings.threads or 1), ("flash_attention", flash)),
        )
        self.flash = flash

    def forward(self, steps: Any) -> Any:
        scores = super().forward(steps)
        if not self.flash or steps[0].num_tokens < 4 or not scores[0].num_rows:
            return scores
        rows = scores[0].rows(range(scores[0].num_rows)).copy()
        rows[:, 3] += 1e-3
        return [HostScores(rows, self.generation)]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[LoadSettings]:
    """Settings that pairs were opened with."""
    (tmp_path / "toy").write_bytes(b"toy")
    seen: list[LoadSettings] = []

    def open_toy(target: object, draft: object, *, backend: str, settings: LoadSettings, use_tuned: bool) -> Pair:
        assert not use_tuned, "what an earlier run found would be measured as the backend's choice"
        seen.append(settings)
        if settings.flash_attention is False and settings.threads is None and len(seen) > 1:
            raise SettingError("this one cannot be loaded")
        return Pair(Toy(tmp_path / "toy", settings), None)

    class Own:
        own_settings = frozenset({"flash_attention"})

    monkeypatch.setattr(search_module, "open_pair", open_toy)
    monkeypatch.setattr(search_module, "get_backend", lambda name: Own)
    monkeypatch.setattr(store, "default_folder", lambda: tmp_path / "cache")
    return seen


def test_a_set_that_cannot_be_loaded_is_left_out_and_a_false_class_is_cut(
    opened: list[LoadSettings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = tune("toy", None, plan=Plan(seconds=0.2))
    assert [one.failed != "" for one in result.candidates] == [True, False]
    winner = result.winner
    assert winner.options == {"flash_attention": True} and winner.width_class is not None
    assert winner.width_class in (
        WidthClass(1, 3, winner.width_class.evidence),
        WidthClass(4, None, winner.width_class.evidence),
    )
    assert "were said to give equal rows" in caplog.text, "a contradiction is said aloud"
    assert "were said to give equal rows" in text_of(result)
    assert store.options_for(tmp_path / "toy", "reference") == {"flash_attention": True}
    toy = Toy(tmp_path / "toy", LoadSettings(flash_attention=True))
    assert store.class_for(toy) == winner.width_class
    assert store.load_or_measure(toy) == winner.costs


def test_a_set_that_is_hardly_better_does_not_replace_the_backends_choice() -> None:
    nothing = Classes((1,), ((1,),), ())

    def candidate(speed: float) -> Candidate:
        return Candidate({}, best=Best(speed, 50.0, 1, 1, False, 1.7), classes=nothing)

    first, hardly, clearly = candidate(100.0), candidate(102.0), candidate(110.0)
    assert Found("t", None, "b", "r", True, [first, hardly]).winner is first
    assert Found("t", None, "b", "r", True, [first, hardly, clearly]).winner is clearly


def test_what_plain_decoding_takes_counts_as_much_as_speculation() -> None:
    nothing, class_ = Classes((1,), ((1,),), ()), WidthClass(1)

    def candidate(speed: float, plain: float, may_join: bool = False) -> Candidate:
        best, costs = Best(speed, plain, 3, 3, False, 2.5), store.load_or_measure(Toy(Path("toy"), LoadSettings()))
        return Candidate({}, "", costs, best, class_, nothing, may_join=may_join)

    first, steady = candidate(166.0, 66.0), candidate(160.0, 90.0)
    assert Found("t", None, "b", "r", True, [first, steady]).winner is steady
    joined = Found("t", None, "b", "r", True, [first, candidate(160.0, 100.0, may_join=True)])
    assert joined.winner is first, "what rounds otherwise is not chosen unasked"
    assert "with --flash-attention --cache-type bf16 the class is 1 to any: 160 tokens/s, plain 100" in text_of(joined)
    poor = Found("t", None, "b", "r", True, [first, candidate(100.0, 66.0, may_join=True)])
    assert "bf16" not in text_of(poor)


def test_a_second_run_reads_what_is_stored_unless_it_is_to_be_fresh(opened: list[LoadSettings]) -> None:
    first = tune("toy", None, plan=Plan(seconds=0.2))
    opened.clear()
    again = tune("toy", None, plan=Plan(seconds=0.2))
    assert len(opened) == 1 and again.as_dict() == first.as_dict()
    opened.clear()
    tune("toy", None, plan=Plan(seconds=0.2, fresh=True))
    assert len(opened) > 1


def test_what_was_fixed_does_not_become_the_default(opened: list[LoadSettings], tmp_path: Path) -> None:
    tune("toy", None, settings=LoadSettings(num_sequences=1, flash_attention=True), plan=Plan(seconds=0.2))
    assert store.options_for(tmp_path / "toy", "reference") == {}
    tune("toy", None, plan=Plan(seconds=0.2, search=False))
    assert store.options_for(tmp_path / "toy", "reference") == {}


def test_the_report_says_what_width_one_would_have_said(opened: list[LoadSettings]) -> None:
    text = text_of(tune("toy", None, plan=Plan(seconds=0.2)))
    for words in (
        "tokens/s are predicted",
        "widths of bit-identical rows",
        "would have said something else in",
        "(best)",
    ):
        assert words in text, text


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def found() -> Found:
    """The bundled pair, measured for half a second."""
    return tune(
        None, None, backend="llamacpp", settings=LoadSettings(context=256, threads=1), plan=Plan(0.5, search=False)
    )


@pytest.mark.real
def test_a_result_survives_its_json(found: Found) -> None:
    assert Found.from_dict(json.loads(json.dumps(found.as_dict()))).as_dict() == found.as_dict()


@pytest.mark.real
def test_the_picture_is_a_picture(found: Found, tmp_path: Path) -> None:
    draw(found, tmp_path / "curves.png")
    content = (tmp_path / "curves.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert width > 2 * height, "two panels at least: target and draft model"


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localspec.tune.plot.find_spec", lambda name: None)
    result = run("--plot", str(tmp_path / "curves.png"))
    assert result.exit_code == 2 and 'pip install "localspec[plot]"' in result.stderr


@pytest.mark.parametrize("option", ["--plot", "--output"])
def test_a_file_in_no_folder_is_refused_before_measuring(option: str, tmp_path: Path) -> None:
    result = run(option, str(tmp_path / "none" / "curves.png"))
    assert result.exit_code == 2 and "no such folder" in result.stderr


def test_a_picture_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"ends in \.png"):
        check_plot(tmp_path / "curves.txt")


def test_a_target_named_twice_is_refused() -> None:
    result = run("tiny", "--target", "tiny")
    assert result.exit_code == 2 and "named twice" in result.stderr


@pytest.mark.real
def test_the_command_measures_prints_and_writes(tmp_path: Path) -> None:
    output = tmp_path / "tune.json"
    arguments = ["--backend", "llamacpp", "--context", "256", "--threads", "1", "--quick", "--seconds", "1"]
    result = run(*arguments, "--output", str(output))
    assert result.exit_code == 0, result.output
    assert "localspec tiny target with localspec tiny draft" in result.stdout
    stored = json.loads(output.read_text())
    assert stored["candidates"][0]["costs"]["target"]["widths"][:2] == [1, 2]
