"""What was measured is kept, found again, and never trusted further than it can be understood."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from localspec.errors import SettingError
from localspec.protocols import Scores, Step, WidthClass
from localspec.schedule import bound, measure, store
from localspec.schedule.cost import Costs, Curve
from localspec.testing.reference import ReferenceModel

COSTS = Costs(Curve((1, 2), (64,), ((1.0, 1.5),)), None, 0.2, "by localspec tune", ("a note",))


class Counting(ReferenceModel):
    """Knows how often it was run, and has a file to be known by."""

    def __init__(self, file: Path) -> None:
        super().__init__(64, context_length=96)
        if not file.exists():
            file.write_bytes(b"weights")
        self.num_passes = 0
        self.widths: list[int] = []
        self.info = replace(self.info, path=file, runtime="numpy 1", options=(("threads", 1),))

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        self.num_passes += 1
        self.widths += [step.num_tokens for step in steps]
        return super().forward(steps)


@pytest.fixture(autouse=True)
def _measuring_is_allowed_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_automatic", True)
    monkeypatch.setattr(store, "quick", lambda *pair, **hooks: measure.quick(*pair, seconds=0.0, **hooks))
    monkeypatch.setattr(store, "measure_bound", lambda target, **hooks: bound.measure(target, seconds=0.0, **hooks))


@pytest.fixture
def model(tmp_path: Path) -> Counting:
    return Counting(tmp_path / "model.gguf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_the_second_load_measures_nothing(model: Counting, folder: Path) -> None:
    first = store.load_or_measure(model, folder=folder)
    assert first.measured == "in short at first load" and model.num_passes > 0
    model.num_passes = 0
    assert store.load_or_measure(model, folder=folder) == first
    assert model.num_passes == 0


def test_what_each_process_must_build_for_a_width_is_built_before_the_first_answer(
    model: Counting, folder: Path
) -> None:
    model.capabilities = replace(model.capabilities, width_steps=(1, 16, 64))
    first = store.load_or_measure(model, folder=folder)
    model.widths.clear()
    assert store.load_or_measure(model, folder=folder) == first
    assert {1, 16}.issubset(model.widths), "64 is more than half of its context"
    model.open().close()  # the sequence was given back


def test_what_tune_found_is_preferred_and_not_replaced(model: Counting, folder: Path) -> None:
    store.load_or_measure(model, folder=folder)
    store.keep_costs(model, None, COSTS, folder)
    assert store.load_or_measure(model, folder=folder) == COSTS


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{]",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"format": 1}',
        b'{"format": 99, "key": {}, "found": {}}',
        b'{"format": "2", "key": {}, "found": {}}',
        b'{"format": 2, "key": {}, "found": {}}',
    ],
)
def test_a_corrupted_file_is_measured_anew_with_one_warning(
    content: bytes, model: Counting, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = store.load_or_measure(model, folder=folder)
    [file] = folder.iterdir()
    file.write_bytes(content)
    model.num_passes = 0
    with caplog.at_level(logging.WARNING):
        again = store.load_or_measure(model, folder=folder)
        store.load_or_measure(model, folder=folder)
    assert model.num_passes > 0 and again.target.widths == first.target.widths
    [warning] = caplog.records
    assert str(file) in warning.message
    assert json.loads(file.read_bytes())["format"] == store.FORMAT


@pytest.mark.parametrize("wrong", [{"ms": [[1.0]]}, {"ms": [[-1.0, 1.0]]}, {"widths": [2, 1]}, {"ms": None}])
def test_costs_that_make_no_sense_are_measured_anew(
    wrong: dict[str, Any], model: Counting, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.load_or_measure(model, folder=folder)
    [file] = folder.iterdir()
    stored = json.loads(file.read_text())
    stored["found"]["target"].update(widths=[1, 2], contexts=[64], ms=[[1.0, 2.0]])
    stored["found"]["target"].update(wrong)
    file.write_text(json.dumps(stored))
    with caplog.at_level(logging.WARNING):
        store.load_or_measure(model, folder=folder)
    assert len(caplog.records) == 1


def older(file: Path) -> None:
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "format": 1}))


@pytest.mark.parametrize("kind", ["in short", "by tune"])
def test_costs_of_an_earlier_version_are_measured_anew_without_a_warning(
    kind: str, model: Counting, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "by tune":
        store.keep_costs(model, None, COSTS, folder)
    else:
        store.load_or_measure(model, folder=folder)
    [file] = folder.iterdir()
    older(file)
    model.num_passes = 0
    with caplog.at_level(logging.WARNING):
        found = store.load_or_measure(model, folder=folder)
        assert model.num_passes > 0 and found.measured == "in short at first load"
        model.num_passes = 0
        assert store.load_or_measure(model, folder=folder) == found and model.num_passes == 0
    assert not caplog.records


def test_other_files_runtimes_options_devices_and_draft_models_are_other_entries(tmp_path: Path, folder: Path) -> None:
    model = Counting(tmp_path / "model.gguf")
    store.keep_costs(model, None, COSTS, folder)

    def is_known(other: ReferenceModel, draft: ReferenceModel | None = None) -> bool:
        return store.load_or_measure(other, draft, folder=folder) == COSTS

    assert is_known(model)
    for change in ({"runtime": "numpy 2"}, {"options": (("threads", 2),)}, {"device": "another"}):
        other = Counting(tmp_path / "model.gguf")
        other.info = replace(other.info, **change)
        assert not is_known(other), change
    assert not is_known(model, Counting(tmp_path / "draft.gguf"))
    (tmp_path / "model.gguf").write_bytes(b"weighty")
    assert not is_known(Counting(tmp_path / "model.gguf"))


def test_a_folder_of_weights_is_known_by_its_files(tmp_path: Path, folder: Path) -> None:
    weights = tmp_path / "model"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    model = Counting(weights)
    store.keep_costs(model, None, COSTS, folder)
    assert store.load_or_measure(model, folder=folder) == COSTS
    (weights / "config.json").write_text("[]")
    assert store.load_or_measure(model, folder=folder) != COSTS


def test_nothing_is_measured_where_it_is_not_allowed(
    model: Counting, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_automatic", False)
    assert store.load_or_measure(model, folder=folder).measured == ""
    assert model.num_passes == 0 and not folder.exists(), "assumptions are not kept"
    store.keep_costs(model, None, COSTS, folder)
    assert store.load_or_measure(model, folder=folder) == COSTS


def test_a_cache_that_cannot_be_written_costs_time_only(model: Counting, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert store.load_or_measure(model, folder=tmp_path / "file" / "cache").measured


def test_processes_that_write_at_once_leave_a_whole_file(model: Counting, folder: Path) -> None:
    """Four writers of a long entry, one reader: whatever is there can be read at any time."""
    long = replace(COSTS, notes=tuple(f"note {number}" for number in range(2000)))
    store.keep_costs(model, None, long, folder)
    script = (
        "import sys, json\n"
        "from pathlib import Path\n"
        "from localspec.schedule import store\n"
        "file, stored = Path(sys.argv[1]), json.loads(Path(sys.argv[1]).read_text())\n"
        "for _ in range(30): store._write(file, stored['key'], stored['found'])\n"
    )
    [file] = folder.iterdir()
    writers = [subprocess.Popen([sys.executable, "-c", script, str(file)]) for _ in range(4)]
    while any(writer.poll() is None for writer in writers):
        assert store.load_or_measure(model, folder=folder) == long
    assert [writer.returncode for writer in writers] == [0] * 4
    assert list(folder.iterdir()) == [file], "temporary files are gone"


# ---------------------------------------------------------------- options and classes


def test_winning_options_are_found_for_the_same_pair_only(tmp_path: Path, folder: Path) -> None:
    target, draft = tmp_path / "a.gguf", tmp_path / "b.gguf"
    for file in (target, draft):
        file.write_bytes(file.name.encode())
    assert store.options_for(target, "llamacpp", draft, folder) == {}
    options: dict[str, bool | int] = {"threads": 3, "flash_attention": False}
    store.keep_report(target, "llamacpp", draft, options, {"any": "thing"}, folder)
    assert store.options_for(target, "llamacpp", draft, folder) == options
    assert store.find_report(target, "llamacpp", draft, folder) == (options, {"any": "thing"})
    assert store.options_for(target, "llamacpp", None, folder) == {}
    assert store.options_for(target, "mlx", draft, folder) == {}
    assert store.options_for(draft, "llamacpp", draft, folder) == {}


def test_options_of_an_earlier_version_still_hold_but_its_report_does_not(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.keep_report(tmp_path, "llamacpp", None, {"threads": 3}, {"any": "thing"}, folder)
    [file] = folder.iterdir()
    older(file)
    with caplog.at_level(logging.WARNING):
        assert store.options_for(tmp_path, "llamacpp", None, folder) == {"threads": 3}
        assert store.find_report(tmp_path, "llamacpp", None, folder) is None
    assert not caplog.records


def test_classes_and_bounds_of_an_earlier_version_still_hold(model: Counting, folder: Path) -> None:
    narrower = WidthClass(2, 8, "looked at", True)
    store.keep_class(model, narrower, folder)
    found = store.load_or_measure_bound(model, folder=folder)
    for file in folder.iterdir():
        older(file)
    model.num_passes = 0
    assert store.class_for(model, folder) == narrower and store.load_or_measure_bound(model, folder=folder) == found
    assert model.num_passes == 0


def test_options_that_are_none_are_refused_with_one_warning(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.keep_report(tmp_path, "llamacpp", None, {"threads": 3}, {}, folder)
    [file] = folder.iterdir()
    file.write_text(file.read_text().replace("3", '"three"'))
    with caplog.at_level(logging.WARNING):
        assert store.options_for(tmp_path, "llamacpp", None, folder) == {}
        assert store.options_for(tmp_path, "llamacpp", None, folder) == {}
    assert len(caplog.records) == 1


def test_a_measured_class_holds_until_the_backend_says_something_else(model: Counting, folder: Path) -> None:
    claimed = model.capabilities.width_class
    assert store.class_for(model, folder) == claimed
    narrower = WidthClass(2, 8, "looked at", True)
    store.keep_class(model, narrower, folder)
    assert store.class_for(model, folder) == narrower
    model.capabilities = replace(model.capabilities, width_class=WidthClass(4))
    assert store.class_for(model, folder) == WidthClass(4)


def test_a_bound_is_measured_once_and_that_of_tune_counts_more(model: Counting, folder: Path) -> None:
    first = store.load_or_measure_bound(model, folder=folder)
    assert model.num_passes > 0 and store.knows_bound(model, folder)
    model.num_passes = 0
    assert store.load_or_measure_bound(model, folder=folder) == first and model.num_passes == 0
    better = replace(first, num_rows=first.num_rows + 1)
    store.keep_bound(model, better, folder)
    assert store.load_or_measure_bound(model, folder=folder) == better


def test_a_damaged_bound_is_measured_anew_with_one_warning(
    model: Counting, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = store.load_or_measure_bound(model, folder=folder)
    [file] = folder.iterdir()
    data = json.loads(file.read_text())
    data["found"]["block"] = 0
    file.write_text(json.dumps(data))
    with caplog.at_level(logging.WARNING, logger="localspec.schedule"):
        assert store.load_or_measure_bound(model, folder=folder).block == first.block
    assert len(caplog.records) == 1


def test_a_bound_is_not_guessed(model: Counting, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_automatic", False)
    assert not store.knows_bound(model, folder)
    with pytest.raises(SettingError, match="measuring is switched off"):
        store.load_or_measure_bound(model, folder=folder)
