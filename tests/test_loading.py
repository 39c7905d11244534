"""Names, paths and Hub ids are told apart; backends are found; pairs are checked."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import localspec
from localspec import loading
from localspec.errors import (
    BackendError,
    BackendMissingError,
    ModelNotFoundError,
    PairMismatchError,
    SettingError,
    UnknownNameError,
    UnsupportedModelError,
)
from localspec.pair import Pair
from localspec.preparation import MemoryPlanner, Quantizer
from localspec.protocols import BackendReport, LanguageModel, LoadSettings
from localspec.schedule.scheduled import Scheduled
from localspec.testing.files import write_gguf
from localspec.testing.reference import ReferenceModel


def test_importing_localspec_imports_nothing_else() -> None:
    import subprocess

    code = "import localspec, sys; assert not {'numpy', 'click'} & set(sys.modules); localspec.SamplingParams"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_everything_exported_exists() -> None:
    for name in localspec.__all__:
        assert getattr(localspec, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        localspec.no_such_name  # noqa: B018 - the access is what is tested


def test_our_backends_are_found_without_importing_their_runtimes() -> None:
    assert {"llamacpp", "mlx"} <= set(loading.backend_names())
    for name in ("llamacpp", "mlx"):
        assert loading.get_backend(name).name == name


def test_unknown_backends_are_refused_with_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'mlx'"):
        loading.get_backend("mxl")


def test_paths_names_and_hub_ids_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.gguf").write_bytes(b"")
    assert loading.resolve_model("mine.gguf") == Path("mine.gguf")
    assert loading.resolve_model("tiny", "draft").name == "draft.gguf"
    for text, error, words in (
        ("gone.gguf", ModelNotFoundError, "no such file"),
        ("./gone", ModelNotFoundError, "no such file"),
        ("a/b/c", ModelNotFoundError, "no such file"),
        ("org/model", ModelNotFoundError, "Hub id"),
        ("org/model:Q4_K_M", ModelNotFoundError, "Hub id"),
        ("tinny", UnknownNameError, "Did you mean 'tiny'"),
    ):
        with pytest.raises(error, match=words):
            loading.resolve_model(text)
    Path("tiny").mkdir()
    assert loading.resolve_model("tiny") == Path("tiny"), "what exists on disk comes first"


@dataclass
class FakeBackend:
    """Stands for a runtime that is, or is not, installed."""

    name: str
    installed: bool
    own_settings: frozenset[str] = frozenset({"threads"})
    planner: MemoryPlanner | None = None
    quantizer: Quantizer | None = None
    formats: tuple[str, ...] = ("gguf",)

    def report(self) -> BackendReport:
        return BackendReport(self.name, self.installed, "1", (), (), f"pip install {self.name}")

    def is_installed(self) -> bool:
        return self.installed

    def accepts(self, path: Path) -> bool:
        return path.suffix == ".gguf"

    def load(self, path: Path, settings: LoadSettings) -> LanguageModel:
        return ReferenceModel(16)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeBackend]:
    backends = {"one": FakeBackend("one", False), "two": FakeBackend("two", False)}
    monkeypatch.setattr(loading, "backend_names", lambda: list(backends))
    monkeypatch.setattr(loading, "get_backend", lambda name: backends[name])
    return backends


def test_a_missing_runtime_is_refused_with_the_command_that_installs_it(fakes: dict[str, FakeBackend]) -> None:
    with pytest.raises(BackendMissingError, match=r"pip install one.*pip install two"):
        loading.choose_backend("auto", Path("x.gguf"))
    with pytest.raises(BackendMissingError, match="pip install two"):
        loading.choose_backend("two", Path("x.gguf"))
    fakes["two"].installed = True
    assert loading.choose_backend("auto", Path("x.gguf")).name == "two"


def test_files_no_backend_reads_are_refused(fakes: dict[str, FakeBackend]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"\.gguf"):
        loading.choose_backend("auto", Path("x.onnx"))


def test_settings_a_backend_does_not_have_are_refused_not_dropped(fakes: dict[str, FakeBackend]) -> None:
    fakes["one"].installed = True
    loading.load_model(Path("x.gguf"), "one", LoadSettings(threads=2, context=64))
    with pytest.raises(SettingError, match="dtype"):
        loading.load_model(Path("x.gguf"), "one", LoadSettings(dtype="float16"))


class BrokenEntry:
    """An entry point whose package is damaged."""

    name, value = "broken", "their_package:BACKEND"

    def load(self) -> object:
        raise ModuleNotFoundError("No module named 'their_dependency'")


def test_a_broken_backend_of_somebody_else_is_named_and_does_not_stop_ours(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        loading, "entry_points", lambda group, name="broken": [BrokenEntry()] if name == "broken" else []
    )
    assert "broken" in loading.backend_names()
    with pytest.raises(BackendError, match="their_package"):
        loading.get_backend("broken")
    assert loading.choose_backend("auto", loading.bundled_path("tiny", "target")).name in ("llamacpp", "mlx")
    assert "their_package" in caplog.text


def test_a_draft_model_of_another_tokenizer_becomes_the_wrapper_and_the_pair_says_why() -> None:
    pair = Pair(ReferenceModel(257), ReferenceModel(100))
    with pair.session("draft_model:num=2") as session:
        assert session.drafter.name == "cross_tokenizer"
    [note] = pair.notes
    assert "token 99" in note and "cross_tokenizer" in note
    same = Pair(ReferenceModel(257), ReferenceModel(257))
    with same.session("draft_model:num=2") as session:
        assert session.drafter.name == "draft_model"
    assert not same.notes


def test_a_draft_model_may_not_guess_rows_the_target_does_not_have() -> None:
    loading.check_rows(ReferenceModel(257), ReferenceModel(100))
    with pytest.raises(PairMismatchError, match="more rows"):
        loading.check_rows(ReferenceModel(100), ReferenceModel(257))


def test_paths_that_cannot_be_paths_are_refused() -> None:
    for text in ("~nosuchuser/m.gguf", "x" * 5000):
        with pytest.raises(ModelNotFoundError, match="not a usable path"):
            loading.resolve_model(text)


def test_a_wrong_rule_leaves_no_sequence_open() -> None:
    """Old bug: the drafter's state stayed open."""
    draft = ReferenceModel(257)
    for _ in range(3):
        with pytest.raises(UnknownNameError):
            Pair(ReferenceModel(257), draft).session(acceptance="wlak")
    assert draft.num_open == 0


def test_what_was_opened_before_an_error_is_closed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    class Model(ReferenceModel):
        def close(self) -> None:
            closed.append(self.info.name)

    def broken(*_: object) -> None:
        raise PairMismatchError("they do not fit")

    monkeypatch.setattr(loading, "load_model", lambda *_: Model(257))
    monkeypatch.setattr(loading, "check_rows", broken)
    with pytest.raises(PairMismatchError):
        loading.open_pair("tiny")
    assert closed == ["reference", "reference"]


def test_a_target_alone_makes_a_pair_without_a_draft_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "some.gguf")
    monkeypatch.setattr(loading, "load_model", lambda *_: ReferenceModel(257))
    with loading.open_pair(str(path)) as pair, pair.session() as session:
        assert pair.draft is None and isinstance(session.drafter, Scheduled)
        assert [part.name for part in session.drafter.parts] == ["suffix", "grammar"]
        assert np.array_equal(session.tokens, [])


def test_options_that_tune_found_are_used_unless_one_is_given_and_left_where_they_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "some.gguf")
    asked: list[LoadSettings] = []

    def load(_: Path, __: str, settings: LoadSettings) -> ReferenceModel:
        asked.append(settings)
        if settings.extra_buffers:
            raise SettingError("extra_buffers cannot be used here")
        return ReferenceModel(257)

    monkeypatch.setattr(loading, "load_model", load)
    monkeypatch.setattr(loading, "options_for", lambda *_: {"threads": 1, "flash_attention": True})
    with loading.open_pair(str(path), backend="llamacpp") as pair:
        assert (asked[-1].threads, asked[-1].flash_attention) == (1, True)
        assert any("found by `localspec tune`" in note for note in pair.notes)
    with loading.open_pair(str(path), backend="llamacpp", settings=LoadSettings(threads=2)) as pair:
        assert (asked[-1].threads, asked[-1].flash_attention) == (2, None)
    with loading.open_pair(str(path), backend="llamacpp", use_tuned=False):
        assert asked[-1].threads is None

    monkeypatch.setattr(loading, "options_for", lambda *_: {"extra_buffers": True})
    with loading.open_pair(str(path), backend="llamacpp") as pair:
        assert asked[-1].extra_buffers is None
        assert any("do not work any more" in note for note in pair.notes)
    with pytest.raises(SettingError):
        loading.open_pair(str(path), backend="llamacpp", settings=LoadSettings(extra_buffers=True))
