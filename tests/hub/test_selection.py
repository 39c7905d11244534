"""What runs, what fits, which files are taken; the list reads well at the width of the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from localspec import drafters
from localspec.errors import ModelNotFoundError, SettingError, UnknownNameError
from localspec.hub import selection
from localspec.hub.catalog import Catalog, Choice, KnownPair, Task, load_catalog
from localspec.hub.selection import (
    Located,
    Row,
    choice_for,
    fits,
    for_task,
    locate,
    memory_gb,
    missing,
    names_a_pair,
    parse_memory,
    select,
    suggest,
)
from localspec.hub.table import print_pair, print_pairs

GIB = 2**30


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return load_catalog(folder=tmp_path_factory.mktemp("none"))


def names(rows: list[Row]) -> set[str]:
    return {row.pair.name for row in rows}


# ---------------------------------------------------------------- runs, fits


def test_what_runs_follows_from_the_drafters_of_the_program(shipped: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = shipped.get("qwen3-8b-dspark")
    assert missing(pair) == ""
    monkeypatch.delitem(drafters.DRAFTERS, "dspark")
    assert "dspark" in missing(pair)
    kinds = {pair.drafter for pair in shipped.pairs}
    assert {pair.drafter for pair in shipped.pairs if missing(pair)} == kinds & {"dspark", "dfly"}


def test_unlike_tokenizers_need_their_own_drafter(shipped: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = replace(shipped.get("qwen3-4b"), tokenizer="cross")
    monkeypatch.delitem(drafters.DRAFTERS, "cross_tokenizer", raising=False)
    assert "cross_tokenizer" in missing(pair)
    monkeypatch.setitem(drafters.DRAFTERS, "cross_tokenizer", drafters.Nothing)
    assert missing(pair) == ""


@pytest.mark.parametrize(
    ("text", "size"),
    [("16G", 16 * GIB), ("16 GB", 16 * GIB), ("16gib", 16 * GIB), ("512M", 2**29), ("1.5T", 1536 * GIB)],
)
def test_sizes_are_read_as_memory_is_sold(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "16", "G", "-4G", "0G", "nanG", "16X", "1e3G", "9" * 400 + "G"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(SettingError, match="--memory"):
        parse_memory(text)


def test_memory_is_the_catalogs_or_estimated_from_both_models(shipped: Catalog) -> None:
    pair = shipped.get("qwen3-32b")
    choice = pair.choices[0]
    weights = 32.8 * 4.9 / 8 + 0.6 * 8.5 / 8
    assert memory_gb(pair, choice) == pytest.approx(weights * 1.1 + 0.5)
    assert memory_gb(pair, replace(choice, memory=3.0)) == 3.0
    unknown = replace(pair, draft_parameters=None)
    assert memory_gb(unknown, choice) == pytest.approx((32.8 * 4.9 / 8 + 2.0 * 8.5 / 8) * 1.1 + 0.5)
    inside = replace(choice, draft=None, draft_quantization="")
    assert memory_gb(pair, inside) == pytest.approx(32.8 * 4.9 / 8 * 1.1 + 0.5)


def test_more_memory_never_takes_a_pair_away(shipped: Catalog) -> None:
    sizes = [GIB * size for size in (4, 8, 16, 32, 64, 128, 1024)]
    fitting = [names([row for row in select(shipped, size) if row.fits]) for size in sizes]
    assert all(small <= large for small, large in itertools.pairwise(fitting))
    assert not fitting[0] & {"qwen3-32b"} and "qwen3-32b" in fitting[4]


def test_the_finest_quantisation_that_fits_is_taken(shipped: Catalog) -> None:
    pair = shipped.get("qwen3.8-27b-dflash2")
    taken = {size: select_one(shipped, pair, size).choice.quantization for size in (24, 36, 64)}
    assert taken == {24: "Q4_K_M", 36: "Q4_K_M", 64: "8bit"}
    assert not select_one(shipped, pair, 24).fits


def select_one(catalog: Catalog, pair: KnownPair, gib: int) -> Row:
    [row] = [row for row in select(catalog, gib * GIB) if row.pair == pair]
    return row


# ---------------------------------------------------------------- lists


def test_search_finds_by_target_family_kind_and_repository(shipped: Catalog) -> None:
    for text, name in (
        ("Qwen3-32B", "qwen3-32b"),
        ("MISTRAL", "mistral-small-3.1-24b"),
        ("eagle3 gpt", "gpt-oss-20b-eagle3"),
        ("deepseek-ai", "qwen3-8b-dspark"),
        ("Qwen2.5-0.5B", "qwen2.5-72b"),
    ):
        assert name in names(select(shipped, GIB, text=text)), text
    assert not select(shipped, GIB, text="qwen3 nonsense")


def test_filters_by_backend_and_kind_leave_their_own(shipped: Catalog) -> None:
    rows = select(shipped, 64 * GIB, backend="llamacpp", drafter="draft_model")
    assert rows
    assert {row.choice.backend for row in rows} == {"llamacpp"} and {row.pair.drafter for row in rows} == {
        "draft_model"
    }


def test_what_runs_and_fits_comes_first_largest_first(shipped: Catalog) -> None:
    rows = select(shipped, 32 * GIB)
    assert [row.rank for row in rows] == sorted(row.rank for row in rows)
    first = [row.pair.parameters for row in rows if row.rank == 0]
    assert first == sorted(first, reverse=True) and len(first) >= 5


@pytest.mark.parametrize("width", [80, 120, 200])
def test_no_line_of_the_list_is_wider_than_the_terminal_and_none_is_folded(
    shipped: Catalog, width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = select(shipped, 32 * GIB)
    print_pairs(rows, 32 * GIB, width=width)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    for row, line in zip(rows, lines[1:], strict=False):
        assert line.startswith(row.pair.name) and row.pair.drafter in line
        assert line.rstrip().endswith(("yes", "too big", "not yet")) if width == 80 else line.rstrip().endswith("no")
    text = " ".join(lines)
    assert "none tested here" in text and "not repeated here" in text
    assert lines[0].rstrip().endswith("tested") == (width > 80)


def test_every_pair_can_be_shown_in_80_columns(shipped: Catalog, capsys: pytest.CaptureFixture[str]) -> None:
    for pair in shipped.pairs:
        print_pair(pair, 16 * GIB, width=80)
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80
        assert pair.source in " ".join(text.split()) and "read, not tested here" in text
        assert ("localspec chat --pair" in text) == (not missing(pair))


# ---------------------------------------------------------------- one of them


def test_the_suggestion_runs_fits_and_is_not_doubtful(shipped: Catalog) -> None:
    row = suggest(shipped, 16 * GIB, ["llamacpp"])
    assert row is not None and row.pair.name == "qwen2.5-14b" and row.choice.backend == "llamacpp"
    assert fits(row.pair, row.choice, 16 * GIB) and not row.pair.doubt and not missing(row.pair)
    assert suggest(shipped, GIB, ["llamacpp", "mlx"]) is None
    for size in (8, 16, 24, 48, 96):
        row = suggest(shipped, size * GIB, ["llamacpp", "mlx"])
        assert row is not None and row.choice == choice_for(row.pair, size * GIB, ["llamacpp", "mlx"])
    assert suggest(shipped, 64 * GIB, []) is None


def test_a_faulty_catalog_of_the_users_is_named_where_a_pair_would_be_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.toml").write_text("schema = 9")
    monkeypatch.setattr("localspec.hub.catalog.user_folder", lambda: tmp_path)
    line = selection.suggestion(16 * GIB, ["llamacpp"])
    assert "mine.toml" in line and "schema" in line


def test_the_first_backend_that_has_files_is_taken(shipped: Catalog) -> None:
    pair = shipped.get("qwen3-32b")
    assert choice_for(pair, 64 * GIB, ["mlx", "llamacpp"]).backend == "mlx"
    assert choice_for(pair, 64 * GIB, ["llamacpp", "mlx"]).backend == "llamacpp"
    assert choice_for(pair, 64 * GIB, ["llamacpp", "mlx"], "4BIT").backend == "mlx"
    assert choice_for(pair, GIB, ["llamacpp"]).quantization == "Q4_K_M"


def test_what_cannot_be_opened_says_why(shipped: Catalog) -> None:
    unknown = replace(shipped.get("qwen3-8b-dspark"), drafter="dfly")
    with pytest.raises(SettingError, match="no drafter dfly"):
        choice_for(unknown, GIB, ["mlx"])
    with pytest.raises(SettingError, match="no files for backend mlx"):
        choice_for(shipped.get("qwen2.5-coder-7b"), GIB, ["mlx"])
    with pytest.raises(UnknownNameError, match="quantisation"):
        choice_for(shipped.get("qwen3-4b"), GIB, ["llamacpp"], "Q2_K")


def resolver(*known: str) -> Callable[[str], Path]:
    def resolve(text: str) -> Path:
        if text not in known:
            raise ModelNotFoundError("no such thing")
        return Path("/there") / text

    return resolve


def test_models_are_found_with_whatever_resolver_is_given(shipped: Catalog) -> None:
    pair = shipped.get("qwen3-4b")
    choice = pair.choices[0]
    assert choice.draft is not None
    found = locate(pair, choice, resolver(choice.target, choice.draft))
    assert found == Located(Path("/there") / choice.target, Path("/there") / choice.draft, ())
    beside = replace(choice, heads=("some/head",))
    found = locate(pair, beside, resolver(choice.target, choice.draft, "some/head"))
    assert found.heads == (Path("/there/some/head"),)
    inside = replace(choice, draft=None)
    assert locate(pair, inside, resolver(choice.target)).heads == (Path("/there") / choice.target,)


def test_a_task_has_a_drafter_of_its_own(shipped: Catalog) -> None:
    pair = replace(shipped.get("qwen3-4b"), tasks=(Task("code", "mlx", "some/coder", "4bit"),))
    mlx = choice_for(pair, 64 * GIB, ["mlx"])
    assert for_task(pair, mlx, "code") == replace(mlx, draft="some/coder", draft_quantization="4bit")
    with pytest.raises(UnknownNameError, match=r"task of pair qwen3-4b on mlx.*one of code"):
        for_task(pair, mlx, "coding")
    with pytest.raises(UnknownNameError, match="nothing of that kind"):
        for_task(pair, choice_for(pair, 64 * GIB, ["llamacpp"]), "code")


def test_a_missing_pair_names_the_command_for_each_model(shipped: Catalog) -> None:
    pair = shipped.get("qwen3-4b")
    choice = pair.choices[0]
    with pytest.raises(ModelNotFoundError) as caught:
        locate(pair, choice)
    for reference in (choice.target, choice.draft):
        assert f"`localspec pull {reference}`" in str(caught.value)
    with pytest.raises(ModelNotFoundError) as caught:
        locate(pair, choice, resolver(choice.target))
    assert f"pull {choice.draft}" in str(caught.value) and f"pull {choice.target}" not in str(caught.value)


def test_a_missing_path_is_not_to_be_pulled(shipped: Catalog) -> None:
    choice = Choice("llamacpp", "Q8_0", "/nowhere/a.gguf", "/nowhere/b.gguf", "Q8_0")
    with pytest.raises(ModelNotFoundError, match="Check the paths") as caught:
        locate(shipped.get("qwen3-4b"), choice)
    assert "pull" not in str(caught.value)


def test_only_what_is_no_path_no_bundled_name_and_no_hub_id_names_a_pair(tmp_path: Path) -> None:
    (tmp_path / "here").touch()
    assert names_a_pair("qwen2.5-14b") and names_a_pair("qwen2.5-14b:Q4_K_M") and names_a_pair("nosuch")
    for text in ("tiny", "org/name", "org/name:Q4_0", "model.gguf", "./x", "~/x", str(tmp_path / "here")):
        assert not names_a_pair(text), text
