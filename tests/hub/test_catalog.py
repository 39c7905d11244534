"""The shipped catalog is valid and sourced; a fault in a catalog is one error that names file, pair and field."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from localspec.drafters import DRAFTERS
from localspec.errors import CatalogFileError, UnknownNameError
from localspec.hub import catalog
from localspec.hub.catalog import BITS, IN_TARGET, KINDS, Catalog, KnownPair, load_catalog, read_file, read_text

README = Path(__file__).resolve().parents[2] / "models" / "README.md"

ENTRY = """\
schema = 1
family = "tests"

[[pair]]
name = "alpha"
target = "Alpha-7B"
parameters = 7
drafter = "draft_model"
draft = "Alpha-1B"
tokenizer = "same"
source = "somebody"
tested = false

  [[pair.choice]]
  backend = "llamacpp"
  target = "some/Alpha-7B-GGUF:Q4_K_M"
  draft = "some/Alpha-1B-GGUF:q8_0"

  [[pair.choice]]
  backend = "mlx"
  target = "some/Alpha-7B-4bit"
  quantization = "4bit"
  draft = "/models/alpha"
  draft_quantization = "bf16"

  [[pair.speed]]
  ratio = [1.1, 1.5]
  hardware = "a computer"
  source = "somebody"
"""

WITH_HEADS = (
    ENTRY.replace(
        'target = "some/Alpha-7B-4bit"',
        'heads = ["some/alpha-dspark", "~/heads/eagle"]\n  target = "some/Alpha-7B-4bit"',
    )
    + """
  [[pair.task]]
  name = "code"
  backend = "mlx"
  draft = "some/Alpha-1B-code"
  draft_quantization = "bf16"
"""
)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return load_catalog(folder=tmp_path_factory.mktemp("none"))


# ---------------------------------------------------------------- what is shipped


@pytest.mark.parametrize("path", catalog.own_files(), ids=lambda path: str(path.stem))
def test_every_shipped_file_is_valid_and_named_for_its_family(path: Path) -> None:
    assert {pair.family for pair in read_file(path)} == {path.stem}


def test_there_are_at_least_forty_pairs_of_ten_families_with_sources(shipped: Catalog) -> None:
    assert len(shipped.pairs) >= 40
    assert len({pair.family for pair in shipped.pairs}) >= 10
    assert all(pair.source and all(speed.source for speed in pair.speeds) for pair in shipped.pairs)
    backends = [choice.backend for pair in shipped.pairs for choice in pair.choices]
    assert set(backends) == {"mlx", "llamacpp"} and min(backends.count(name) for name in set(backends)) >= 15


def test_names_are_unique_and_leave_room_in_a_table_of_80_columns(shipped: Catalog) -> None:
    names = [pair.name for pair in shipped.pairs]
    assert len(names) == len(set(names))
    assert max(map(len, names)) <= 25


def test_nothing_shipped_claims_to_be_tested(shipped: Catalog) -> None:
    """Their models cannot be had where localspec is tested; whoever runs one may change this."""
    assert not any(pair.tested for pair in shipped.pairs)


def test_every_guessing_drafter_of_the_program_that_takes_a_model_is_a_kind() -> None:
    assert "draft_model" in DRAFTERS and "draft_model" in KINDS
    assert set(IN_TARGET) <= set(KINDS)


def test_the_readme_explains_every_field_and_its_example_is_valid() -> None:
    text = README.read_text(encoding="utf-8")
    example = text.split("```toml")[1].split("```")[0]
    [pair] = read_text(example, "README")
    assert len(pair.choices) == 2 and pair.ratio == (1.81, 1.81)
    kinds = (KnownPair, catalog.Choice, catalog.Speed, catalog.Task)
    names = {field for kind in kinds for field in kind.__dataclass_fields__}
    assert not {name for name in names - {"origin", "choices", "speeds", "tasks"} if f"`{name}`" not in text}
    assert all(f"`{kind}`" in text for kind in KINDS)


# ---------------------------------------------------------------- reading


def test_a_pair_is_read_as_written() -> None:
    [pair] = read_text(ENTRY, "file")
    assert (pair.name, pair.family, pair.parameters, pair.origin) == ("alpha", "tests", 7.0, "file")
    first, second = pair.choices
    assert (first.target, first.quantization) == ("some/Alpha-7B-GGUF:Q4_K_M", "Q4_K_M")
    assert first.draft_quantization == "Q8_0", "quantisations are spelled as BITS spells them"
    assert (second.draft, second.draft_quantization) == ("/models/alpha", "bf16")
    assert pair.ratio == (1.1, 1.5)
    assert pair.as_dict()["choices"][0]["backend"] == "llamacpp"


def test_a_reference_may_name_a_revision_and_a_file() -> None:
    text = changed(':Q4_K_M"', '@main:sub/a.gguf"\n  quantization = "q4_k_m"')
    assert read_text(text, "file")[0].choices[0].target == "some/Alpha-7B-GGUF@main:sub/a.gguf"
    assert read_text(text, "file")[0].choices[0].quantization == "Q4_K_M"


def changed(old: str, new: str) -> str:
    assert ENTRY.count(old) >= 1, old
    return ENTRY.replace(old, new, 1)


FAULTS = [
    ("schema = 1\n", "schema = 2\n", ["schema", "got 2", "expected 1", "Update localspec"]),
    ("schema = 1\n", "", ["schema", "got nothing"]),
    ("schema = 1\n", "schema = true\n", ["schema", "whole number"]),
    ('family = "tests"', 'family = "Tests!"', ["family", "lower-case"]),
    ('family = "tests"', 'familly = "tests"', ["familly", "Did you mean 'family'"]),
    ('name = "alpha"', 'name = "Al pha"', ["pair 1", "name", "lower-case"]),
    ('name = "alpha"\n', "", ["pair 1", "name", "got nothing"]),
    ("parameters = 7", "parameters = -7", ["alpha", "parameters", "above 0"]),
    ("parameters = 7", "parameters = inf", ["alpha", "parameters", "above 0"]),
    ("parameters = 7", "parameters = nan", ["alpha", "parameters", "above 0"]),
    ("parameters = 7", "parameters = 1" + "0" * 4000, ["alpha", "parameters", "above 0"]),
    ("parameters = 7", "parameters = 1" + "0" * 5000, ["not TOML"]),
    ("parameters = 7", 'parameters = "7"', ["alpha", "parameters", "got '7'"]),
    ("parameters = 7", "parameters = true", ["alpha", "parameters", "got True"]),
    ("parameters = 7", "paramters = 7", ["alpha", "paramters", "Did you mean 'parameters'"]),
    ('drafter = "draft_model"', 'drafter = "draftmodel"', ["alpha", "drafter", "Did you mean 'draft_model'"]),
    ('drafter = "draft_model"', "drafter = 3", ["alpha", "drafter", "one of draft_model"]),
    ('tokenizer = "same"', 'tokenizer = "other"', ["alpha", "tokenizer", "same, cross"]),
    ('source = "somebody"\n', "", ["alpha", "source", "got nothing"]),
    ('source = "somebody"', 'source = ""', ["alpha", "source", "one line of text"]),
    ('source = "somebody"', 'source = "a\\u001b[31m"', ["alpha", "source", "one line of text"]),
    ('source = "somebody"', f'source = "{"x" * 301}"', ["alpha", "source", "at most 300"]),
    ("tested = false", 'tested = "no"', ["alpha", "tested", "true or false"]),
    ("tested = false\n", "", ["alpha", "tested", "got nothing"]),
    ('backend = "llamacpp"', "backend = 1", ["choice 1", "backend"]),
    ('target = "some/Alpha-7B-GGUF:Q4_K_M"', 'target = "Alpha"', ["choice 1", "target", "OWNER/NAME"]),
    ('target = "some/Alpha-7B-GGUF:Q4_K_M"', 'target = "../Alpha:Q4_K_M"', ["choice 1", "target", "OWNER/NAME"]),
    ('target = "some/Alpha-7B-GGUF:Q4_K_M"', 'target = "a/..:Q4_K_M"', ["choice 1", "target", "OWNER/NAME"]),
    (":Q4_K_M", ":Q4_K_X", ["choice 1", "quantization", "got nothing", "one of f32"]),
    (":Q4_K_M", ":../x.gguf", ["choice 1", "target", "OWNER/NAME:FILE"]),
    (":Q4_K_M", ":a/../x.gguf", ["choice 1", "target", "OWNER/NAME:FILE"]),
    ('draft = "some', 'quantization = "Q8_0"\n  draft = "some', ["choice 1", "quantization", "Q4_K_M, as target says"]),
    (":Q4_K_M", "", ["choice 1", "quantization", "got nothing"]),
    ('quantization = "4bit"', 'quantization = "4 bits"', ["choice 2", "quantization", "one of f32"]),
    ('  draft = "some/Alpha-1B-GGUF:q8_0"\n', "", ["choice 1", "draft", "Only mtp may do without"]),
    ('  backend = "mlx"', '  memory = 0\n  backend = "mlx"', ["choice 2", "memory", "above 0"]),
    ("ratio = [1.1, 1.5]", "ratio = [1.5, 1.1]", ["speed 1", "ratio", "lowest and the highest"]),
    ("ratio = [1.1, 1.5]", "ratio = [1.1]", ["speed 1", "ratio"]),
    ("ratio = [1.1, 1.5]", 'ratio = ["1", 2]', ["speed 1", "ratio"]),
    ('hardware = "a computer"\n', "", ["speed 1", "hardware", "got nothing"]),
    ('hardware = "a computer"', 'hardware = ["a"]', ["speed 1", "hardware", "one line"]),
    ("[[pair]]", "[pair]", ["pair", "[[...pair]]"]),
    ("schema = 1", "schema 1", ["not TOML"]),
]


@pytest.mark.parametrize(("old", "new", "words"), FAULTS, ids=lambda value: repr(value)[:40])
def test_a_fault_is_one_line_that_names_file_and_field(old: str, new: str, words: list[str]) -> None:
    with pytest.raises(CatalogFileError) as caught:
        read_text(changed(old, new), "mine.toml")
    line = str(caught.value)
    assert line.startswith("mine.toml") and "\n" not in line and line.isprintable()
    assert len(line) < 700
    for word in words:
        assert word in line, line


def test_whatever_one_field_is_turned_into_the_answer_is_a_pair_or_our_error() -> None:
    """Every field of a valid catalog, at every depth, replaced by every kind of value and removed."""
    values: list[Any] = [0, -1, 2.5, "", "x", "a/b:c", True, [], [1, 2], {}, {"a": 1}, [{}], [[{}]], 10**300]
    num_refused = 0
    for place in places(tomllib.loads(ENTRY)):
        for value in [*values, None]:
            data = tomllib.loads(ENTRY)
            holder: Any = data
            for key in place[:-1]:
                holder = holder[key]
            if value is None:
                del holder[place[-1]]
            else:
                holder[place[-1]] = value
            num_refused += refused(data)
    assert num_refused > 200


def places(node: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, value in items for found in [(*before, key), *places(value, (*before, key))]]


def refused(data: dict[str, Any]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tomllib.loads", lambda _: data)
        try:
            read_text("", "mine.toml")
        except CatalogFileError as error:
            line = str(error)
        else:
            return 0
    assert line.startswith("mine.toml") and "\n" not in line
    return 1


@pytest.mark.parametrize(
    "raw", [b"\xff\xfe", b"\x00", b"[" * 100_000, b"x = 1\n" * 300_000], ids=lambda raw: repr(raw[:8])
)
def test_a_file_that_is_no_catalog_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(raw)
    with pytest.raises(CatalogFileError, match=r"mine\.toml"):
        read_file(path)


def test_a_missing_file_a_folder_and_a_device_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path, Path("/dev/zero")):
        with pytest.raises(CatalogFileError):
            read_file(path)


def test_bits_grow_with_precision() -> None:
    assert BITS["Q4_K_M"] < BITS["Q8_0"] < BITS["bf16"] == 16


# ---------------------------------------------------------------- whose pair it is


def test_a_users_pair_replaces_ours_and_says_so(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(ENTRY.replace('"alpha"', '"qwen3-4b"'))
    known = load_catalog(folder=tmp_path)
    assert known.get("qwen3-4b").origin == str(mine)
    assert known.replaced == (("qwen3-4b", "localspec (qwen3.toml)"),)
    assert len(known.pairs) == len(load_catalog(folder=tmp_path / "none").pairs)


def test_a_named_file_wins_over_the_users_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.toml").write_text(ENTRY)
    named = tmp_path / "named.toml"
    named.write_text(ENTRY)
    assert load_catalog(named, folder=folder).get("alpha").origin == str(named)


def test_two_of_the_users_files_may_not_name_the_same_pair(tmp_path: Path) -> None:
    for name in ("a.toml", "b.toml"):
        (tmp_path / name).write_text(ENTRY)
    with pytest.raises(CatalogFileError, match="as well"):
        load_catalog(folder=tmp_path)


def test_a_name_twice_in_one_file_is_refused() -> None:
    body = ENTRY.split("[[pair]]", 1)[1]
    with pytest.raises(CatalogFileError, match="twice"):
        read_text(f"{ENTRY}\n[[pair]]{body}", "mine.toml")


def test_an_unknown_name_gets_the_nearest(shipped: Catalog) -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean .*qwen2\.5-14b"):
        shipped.get("qwen25-14b")


# ---------------------------------------------------------------- heads and tasks


def test_choices_may_name_heads_and_pairs_drafters_for_a_task() -> None:
    [pair] = read_text(WITH_HEADS, "mine.toml")
    assert [choice.heads for choice in pair.choices] == [(), ("some/alpha-dspark", "~/heads/eagle")]
    [task] = pair.tasks
    assert (task.name, task.backend, task.draft, task.draft_quantization) == (
        *("code", "mlx", "some/Alpha-1B-code"),
        "bf16",
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            'heads = ["some/alpha-dspark", "~/heads/eagle"]',
            'heads = "some/alpha-dspark"',
            "heads.*list of repositories",
        ),
        ('"~/heads/eagle"', '"../eagle"', "heads.*list of repositories"),
        ('name = "code"', 'name = "Code!"', r"task 1, field 'name'"),
        ('draft = "some/Alpha-1B-code"', "", r"task 1, field 'draft'"),
    ],
)
def test_faults_of_heads_and_tasks_are_named(old: str, new: str, words: str) -> None:
    assert old in WITH_HEADS
    with pytest.raises(CatalogFileError, match=words):
        read_text(WITH_HEADS.replace(old, new), "mine.toml")
