"""What a hostile repository can try, and that nothing of it reaches the disk outside the cache, or a model's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from localspec.errors import DiskError, HubError, HubMissingError, LocalspecError, ModelFileError, UntrustedModelError
from localspec.hub.client import Hub
from localspec.hub.name import HubName
from localspec.hub.pull import pull
from localspec.hub.resolver import find_model
from tests.hub.loopback import LoopbackHub

NAME = HubName.parse("evil/model")
SHA = "ab" * 32


def listing(loopback: LoopbackHub, *names: str, **changes: Any) -> None:
    """Have the Hub list these names for content that is harmless."""
    loopback.add(NAME.repo, {"m.gguf": b"GGUF"})
    entry = {"size": 4, "blobId": "0" * 40, "lfs": {"sha256": SHA, "size": 4, "pointerSize": 1}} | changes
    loopback.repos[NAME.repo].siblings = [{"rfilename": name} | entry for name in names]


def refused(hub: Hub, kind: type[LocalspecError], words: str) -> None:
    outside = {path for path in hub.root.parent.rglob("*") if not path.is_relative_to(hub.root)}
    with pytest.raises(kind, match=words) as caught:
        pull(NAME, hub=hub)
    assert str(caught.value).isprintable()
    assert outside == {path for path in hub.root.parent.rglob("*") if not path.is_relative_to(hub.root)}
    assert not [path for path in hub.root.rglob("*") if path.suffix != ".lock" and not path.is_dir()]


@pytest.mark.parametrize(
    "name",
    [
        "../../../outside.gguf",
        "/tmp/outside.gguf",
        "a/../../outside.gguf",
        "a//outside.gguf",
        "./m.gguf",
        "..",
        "",
        "C:\\outside.gguf",
        "C:outside.gguf",
        "a\\..\\..\\outside.gguf",
        "\\\\host\\share\\m.gguf",
        "m.gguf\0.txt",
        "m\x1b[2J.gguf",
        "m\n.gguf",
        "m\u202efugg.gguf",
        "m\udc80.gguf",
        "x" * 500 + ".gguf",
    ],
)
def test_names_that_leave_the_cache_refuse_the_repository(loopback: LoopbackHub, hub: Hub, name: str) -> None:
    listing(loopback, "good-Q4_0.gguf", name)
    refused(hub, UntrustedModelError, "evil/model lists a file whose name")
    assert len(loopback.requests) == 1, "nothing was fetched"


@pytest.mark.parametrize(
    "changes",
    [
        {"lfs": {"sha256": "../../../../outside", "size": 4, "pointerSize": 1}},
        {"lfs": {"sha256": SHA.upper(), "size": 4, "pointerSize": 1}},
        {"lfs": {"sha256": 7, "size": 4, "pointerSize": 1}},
        {"lfs": {"sha256": SHA, "size": -1, "pointerSize": 1}},
        {"lfs": {"sha256": SHA, "size": "4", "pointerSize": 1}},
        {"lfs": None, "blobId": "../x"},
        {"lfs": None, "blobId": None},
    ],
)
def test_checksums_become_file_names_and_must_be_checksums(
    loopback: LoopbackHub, hub: Hub, changes: dict[str, Any]
) -> None:
    listing(loopback, "m.gguf", **changes)
    refused(hub, HubError, "does not answer like a Hub")


def test_a_file_that_is_also_a_folder_is_refused(loopback: LoopbackHub, hub: Hub) -> None:
    part = "m-Q4_0-0000{}-of-00002.gguf"
    loopback.add(NAME.repo, {part.format(1): b"GGUF1", part.format(2): b"GGUF2", "x": b""})
    first = pull(NAME, hub=hub).path
    second = first.with_name(part.format(2))
    second.unlink()
    second.mkdir()
    with pytest.raises(DiskError):
        pull(NAME, hub=hub)
    with pytest.raises(HubMissingError, match="lacks parts"):
        find_in(hub)


def find_in(hub: Hub) -> Path:
    from localspec.hub.resolver import find_in_cache

    found = find_in_cache(hub, NAME, ("gguf", "safetensors"))
    assert found is not None
    return found.path


def test_links_that_lead_out_of_the_cache_are_not_followed(loopback: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    commit = loopback.add(NAME.repo, {"sub/m-Q4_0.gguf": b"GGUF"})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    snapshot = hub.root / "models--evil--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "sub").symlink_to(elsewhere)
    with pytest.raises(DiskError, match="leads out of the cache"):
        pull(NAME, hub=hub)
    assert not list(elsewhere.iterdir())
    (elsewhere / "other-Q4_0.gguf").write_bytes(b"GGUF")
    (snapshot / "sub").unlink()
    (snapshot / "m-Q4_0.gguf").symlink_to(elsewhere / "other-Q4_0.gguf")
    (hub.root / "models--evil--model" / "refs").mkdir()
    (hub.root / "models--evil--model" / "refs" / "main").write_text(commit)
    with pytest.raises(LocalspecError, match="is not on this machine"):
        find_model(str(NAME), hub=hub)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "weights.pkl", "tf_model.h5"])
def test_pickled_weights_are_refused(loopback: LoopbackHub, hub: Hub, name: str) -> None:
    loopback.add(NAME.repo, {"config.json": b"{}", name: b"\x80\x04"})
    refused(hub, UntrustedModelError, "can run code .*safetensors or GGUF")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("key", ["auto_map", "model_file"])
def test_models_with_code_of_their_own_are_refused_before_their_weights_are_fetched(
    loopback: LoopbackHub, hub: Hub, mlx_files: dict[str, bytes], file: str, key: str
) -> None:
    config = json.loads(mlx_files[file]) | {key: {"AutoModel": "modeling_tiny.Tiny"}}
    loopback.add(NAME.repo, mlx_files | {file: json.dumps(config).encode()})
    with pytest.raises(UntrustedModelError, match=f"brings its own code.*{key} in {file}"):
        pull(NAME, hub=hub)
    assert not any("safetensors" in request.path for request in loopback.requests if "json" not in request.path)
    assert not (hub.root / "models--evil--model" / "snapshots").exists()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("m-Q4_0.gguf", b"\x80\x04\x95 a pickle"),
        ("m-Q4_0.gguf", b""),
        ("model.safetensors", b"PK\x03\x04 a zip archive"),
        ("model.safetensors", (1 << 62).to_bytes(8, "little") + b"{}"),
        ("model.safetensors", b"version https://git-lfs"),
    ],
)
def test_weights_that_are_something_else_are_deleted(loopback: LoopbackHub, hub: Hub, name: str, data: bytes) -> None:
    loopback.add(NAME.repo, {"config.json": b"{}", name: data})
    with pytest.raises(UntrustedModelError, match="is not what its name says"):
        pull(NAME, hub=hub)
    blobs = [path.read_bytes() for path in hub.root.glob("models--*/blobs/*")]
    assert blobs in ([], [b"{}"])
    assert not list(hub.root.glob("models--*/snapshots"))


@pytest.mark.parametrize(
    ("index", "kind"),
    [
        (b'{"weight_map": {"a": "../../../outside.safetensors"}}', ModelFileError),
        (b'{"weight_map": {"a": "run.py"}}', ModelFileError),
        (b'{"weight_map": {"a": "model-00009-of-00009.safetensors"}}', HubMissingError),
        (b'{"weight_map": []}', ModelFileError),
        (b"[]", ModelFileError),
        (b"[" * 100_000, ModelFileError),
        (b"\xff", ModelFileError),
    ],
)
def test_an_index_can_name_weights_of_its_repository_only(
    loopback: LoopbackHub, hub: Hub, mlx_files: dict[str, bytes], index: bytes, kind: type[LocalspecError]
) -> None:
    loopback.add(NAME.repo, mlx_files | {"model.safetensors.index.json": index})
    with pytest.raises(kind, match=r"index|lacks weights"):
        pull(NAME, hub=hub)
    assert not list(hub.root.glob("models--*/snapshots"))


def test_a_folder_that_lost_a_file_is_no_model(loopback: LoopbackHub, hub: Hub, mlx_files: dict[str, bytes]) -> None:
    loopback.add(NAME.repo, mlx_files)
    folder = pull(NAME, hub=hub).path
    assert find_model(str(NAME), hub=hub) == folder
    (folder / "model-00002-of-00002.safetensors").resolve().unlink()
    with pytest.raises(LocalspecError, match=r"lacks weights.*Run `localspec pull evil/model`"):
        find_model(str(NAME), hub=hub)
    assert pull(NAME, hub=hub).num_files == 1
    assert find_model(str(NAME), hub=hub) == folder
