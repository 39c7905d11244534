"""Pairs with trained heads: order of loading, what is taken for a head, names of drafters, what `auto` uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from localspec import loading
from localspec.drafters import Combined, DrafterSpec, HeadDrafter, make_drafter
from localspec.errors import HeadFileError, UnknownNameError, UsageError
from localspec.formats import summary
from localspec.pair import Pair
from localspec.preparation import MemoryPlanner, Quantizer
from localspec.protocols import BackendReport, DraftHead, LanguageModel, LoadSettings, Tokenizer
from localspec.sampling import SamplingParams
from localspec.schedule.scheduled import Scheduled
from localspec.testing.files import write_gguf
from localspec.testing.reference import ReferenceModel
from localspec.testing.reference_head import ReferenceBlockHead, ReferenceHead

log: list[str] = []


class _Target(ReferenceModel):
    def __init__(self, name: str) -> None:
        super().__init__(64, seed=5, context_length=300)
        self._what = name

    def close(self) -> None:
        log.append(f"close {self._what}")


class _Backend:
    """Loads reference models, and reference heads by the name of their file."""

    name = "reference"
    own_settings = frozenset({"threads"})
    planner: MemoryPlanner | None = None
    quantizer: Quantizer | None = None
    formats = ("gguf",)

    def report(self) -> BackendReport:
        return BackendReport(self.name, True, "1", (), (), "")

    def is_installed(self) -> bool:
        return True

    def accepts(self, path: Path) -> bool:
        return path.suffix == ".gguf"

    def open_tokenizer(self, path: Path) -> Tokenizer:
        return ReferenceModel(64).tokenizer

    def load(self, path: Path, settings: LoadSettings) -> LanguageModel:
        log.append(f"load {path.stem}")
        return _Target(path.stem)

    def load_head(self, path: Path, target: LanguageModel) -> DraftHead:
        assert isinstance(target, ReferenceModel) and not target.num_open
        log.append(f"head {path.stem}")
        if path.stem == "broken":
            raise HeadFileError("broken.gguf lacks a tensor", got="fc.weight")
        made = (ReferenceBlockHead if "block" in path.stem else ReferenceHead)(target)
        made.close = lambda: log.append(f"close {path.stem}")  # type: ignore[method-assign]
        return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With files that are told apart by their names."""
    backend = _Backend()
    monkeypatch.setattr(loading, "backend_names", lambda: ["reference"])
    monkeypatch.setattr(loading, "get_backend", lambda name: backend)
    first = write_gguf(tmp_path / "target.gguf").read_bytes()
    for name in ("draft", "block", "block2", "steps", "broken"):
        (tmp_path / f"{name}.gguf").write_bytes(first)
    told = summary.summarize

    def summarize(path: Path) -> summary.ModelSummary:
        from dataclasses import replace

        return replace(told(path), drafter_kind=None if path.stem in ("target", "draft") else "dspark")

    for name in ("summarize", "summarize_head"):
        monkeypatch.setattr(loading, name, summarize)
    log.clear()
    return tmp_path


def opened(folder: Path, draft: str | None = None, *heads: str) -> Pair:
    return loading.open_pair(
        str(folder / "target.gguf"),
        None if draft is None else str(folder / f"{draft}.gguf"),
        heads=[str(folder / f"{head}.gguf") for head in heads],
    )


def test_heads_are_loaded_behind_the_target_and_closed_before_it(folder: Path) -> None:
    with opened(folder, "draft", "block", "steps") as pair:
        assert [head.info.kind for head in pair.heads] == ["dspark", "eagle3"]
    assert log == [
        *("load target", "head block", "head steps", "load draft"),
        *("close block", "close steps", "close target", "close draft"),
    ]


def test_a_head_that_is_named_as_draft_model_is_a_head(folder: Path) -> None:
    with opened(folder, "block", "block", "steps") as pair:
        assert pair.draft is None
        assert [head.info.kind for head in pair.heads] == ["dspark", "eagle3"]


def test_what_was_opened_before_a_fault_is_closed(folder: Path) -> None:
    with pytest.raises(HeadFileError, match=r"fc\.weight"):
        opened(folder, "draft", "block", "broken")
    assert log == ["load target", "head block", "head broken", "close block", "close target"]
    log.clear()
    with pytest.raises(UsageError, match="two heads of kind dspark"):
        opened(folder, None, "block", "block2")
    assert log == ["load target", "head block", "head block2", "close block2", "close block", "close target"]


def test_drafters_have_the_names_of_their_heads(folder: Path) -> None:
    with opened(folder, "draft", "block", "steps") as pair:
        for name in ("dspark", "eagle3", "dspark:shape=tree,num=9", "dspark:num=3,min_prob=0.1"):
            pair.check_drafter(DrafterSpec.parse(name))
            with pair.session(name) as session:
                assert isinstance(session.drafter, HeadDrafter) and session.drafter.name == name.partition(":")[0]
                assert session.generate("hello", SamplingParams(max_tokens=8, ignore_eos=True)).stats.num_tokens == 8
        with pair.session("dspark:num=3+draft_model") as session:
            assert isinstance(session.drafter, Combined)
        with pytest.raises(UsageError, match=r"'medusa' needs such a head .*got dspark, eagle3.*--head"):
            pair.check_drafter(DrafterSpec.parse("ngram+medusa"))
        with pytest.raises(UsageError, match="'medusa' needs such a head"):
            pair.session("medusa")
        with pytest.raises(UnknownNameError, match="setting of drafter dspark"):
            pair.session("dspark:colour=3")
    with pytest.raises(UsageError, match="none loaded"):
        make_drafter("dspark", None)


def test_auto_uses_all_that_the_pair_has(folder: Path) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    with opened(folder, "draft", "block", "steps") as pair, pair.session() as session:
        assert isinstance(session.drafter, Scheduled)
        assert [part.name for part in session.drafter.parts][-3:] == ["draft_model", "dspark", "eagle3"]
        assert set(pair.experience.live.costs.heads) == {"dspark", "eagle3"}
        with pair.session("nothing") as plain:
            assert session.generate("hello", params).tokens == plain.generate("hello", params).tokens
    with opened(folder, None, "steps") as pair:
        assert pair.drafter("auto:num=3").name == "eagle3"
        pair.check_drafter(DrafterSpec.parse("auto:num=3"))
