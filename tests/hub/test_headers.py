"""What a model takes is known before it is fetched: its headers are read from the Hub, and little else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localspec.errors import HubError, HubMissingError, HubOfflineError, ModelFileError, UntrustedModelError
from localspec.formats import summarize
from localspec.hub.client import Hub
from localspec.hub.headers import fetch_headers
from localspec.hub.name import HubName
from localspec.hub.pull import pull
from tests.hub.conftest import CATALOG, Program
from tests.hub.loopback import Cut, LoopbackHub, NoRanges, Status

NAME = HubName.parse("tiny/model-GGUF")


@pytest.fixture
def large(root: Path) -> Path:
    """A file whose weights are much more than its header."""
    return root / "models" / "tiny" / "target.gguf"


def headers(hub: Hub, tmp_path: Path, name: HubName = NAME) -> tuple[Path, int]:
    found = fetch_headers(name, tmp_path / "headers", hub=hub)
    return found.path, found.num_bytes


def test_headers_say_what_the_pulled_model_says(loopback: LoopbackHub, hub: Hub, tmp_path: Path, large: Path) -> None:
    loopback.add("tiny/model-GGUF", {"model.gguf": large})
    path, num_bytes = headers(hub, tmp_path)
    assert num_bytes < large.stat().st_size / 4
    asked, whole = summarize(path).as_dict(), summarize(large).as_dict()
    assert {**asked, "path": ""} == {**whole, "path": ""}
    assert not list(hub.root.glob("models--*/blobs/*")), "the cache is for whole files"
    pull(NAME, hub=hub)


def test_a_server_without_ranges_is_left_early(loopback: LoopbackHub, hub: Hub, tmp_path: Path, large: Path) -> None:
    loopback.add("tiny/model-GGUF", {"model.gguf": large})
    loopback.fault("model.gguf", NoRanges(), times=None)
    path, num_bytes = headers(hub, tmp_path)
    assert num_bytes < large.stat().st_size / 4 and summarize(path).num_parameters == summarize(large).num_parameters


def test_a_folder_needs_configuration_index_and_the_beginning_of_its_files(
    loopback: LoopbackHub, hub: Hub, tmp_path: Path, mlx_files: dict[str, bytes]
) -> None:
    loopback.add("tiny/model", mlx_files)
    with loopback.watched() as seen:
        path, _ = headers(hub, tmp_path, HubName.parse("tiny/model"))
    names = {request.path.split("?")[0].rsplit("/", 1)[-1] for request in seen if "/resolve/" in request.path}
    assert names == {name for name in mlx_files if name.endswith(("config.json", ".index.json")) or "-of-" in name} - {
        "tokenizer_config.json"
    }
    assert summarize(path).num_parameters == summarize(pull(HubName.parse("tiny/model"), hub=hub).path).num_parameters


def test_a_split_file_is_one_model(
    loopback: LoopbackHub, hub: Hub, tmp_path: Path, split_files: dict[str, Path], root: Path
) -> None:
    loopback.add("tiny/model-GGUF", split_files)
    path, _ = headers(hub, tmp_path)
    assert summarize(path).num_parameters == summarize(root / "models" / "tiny" / "draft.gguf").num_parameters


def test_broken_connections_are_tried_again(loopback: LoopbackHub, hub: Hub, tmp_path: Path, large: Path) -> None:
    loopback.add("tiny/model-GGUF", {"model.gguf": large})
    loopback.fault("model.gguf", Cut(after=1000))
    loopback.fault("model.gguf", Status(503))
    headers(hub, tmp_path)
    loopback.fault("model.gguf", Cut(after=1000), times=None)
    with pytest.raises(HubError, match=r"broke|ended early"):
        headers(hub, tmp_path)


def test_bad_headers_and_repositories_are_refused(
    loopback: LoopbackHub, hub: Hub, tmp_path: Path, large: Path, mlx_files: dict[str, bytes]
) -> None:
    loopback.add("tiny/model-GGUF", {"model.gguf": large.read_bytes()[:2000]})
    with pytest.raises(ModelFileError, match="truncated"):
        headers(hub, tmp_path)
    with pytest.raises(HubMissingError):
        headers(hub, tmp_path, HubName.parse("tiny/nothing"))
    own_code = json.dumps({**json.loads(mlx_files["config.json"]), "auto_map": {"AutoModel": "x.Model"}})
    loopback.add("tiny/code", {**mlx_files, "config.json": own_code.encode()})
    with pytest.raises(UntrustedModelError, match="own code"):
        headers(hub, tmp_path, HubName.parse("tiny/code"))


def test_offline_nobody_is_asked(
    loopback: LoopbackHub, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with loopback.watched() as seen, pytest.raises(HubOfflineError):
        headers(hub, tmp_path)
    assert not seen


@pytest.mark.slow
def test_the_program_plans_pairs_before_and_after_they_are_pulled(
    loopback: LoopbackHub, program: Program, root: Path
) -> None:
    tiny = root / "models" / "tiny"
    files = {"tiny-Q4_0.gguf": tiny / "target.gguf", "tiny-draft-Q8_0.gguf": tiny / "draft.gguf"}
    loopback.add("tiny/pair-GGUF", files)
    catalog = program.home / "own.toml"
    catalog.write_text(CATALOG)
    fit = ("pairs", "fit", "loopback", "--catalog", str(catalog), "--context", "2k", "--json")
    offline = program.run(*fit, HF_HUB_OFFLINE="1")
    assert offline.returncode == 1 and "localspec pull tiny/pair-GGUF:Q4_0" in offline.stderr
    before = program.run(*fit)
    assert before.returncode == 0, before.stderr
    assert before.stderr.count("headers were read from the Hub") == 2 and not program.blobs()
    pulled = program.run("pull", "loopback", "--catalog", str(catalog))
    assert pulled.returncode == 0 and len(pulled.stdout.splitlines()) == len(program.blobs()) == 2, pulled.stderr
    after = program.run(*fit, HF_HUB_OFFLINE="1")
    bundled = program.run("fit", "--backend", "llamacpp", "--context", "2k", "--json")
    totals = [json.loads(run.stdout)["total"] for run in (before, after, bundled)]
    assert after.returncode == 0 and not after.stderr and len(set(totals)) == 1
    named = ("--pair", "loopback", "--catalog", str(catalog), "--drafter", "draft_model")
    answer = program.run("generate", "Once", *named, "--max-tokens", "4", HF_HUB_OFFLINE="1")
    assert answer.returncode == 0 and "drafter draft_model" in answer.stderr, answer.stderr
