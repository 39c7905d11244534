"""Faults of servers, networks and disks: a clear outcome each, and never a bad file where a model is looked for."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from localspec.errors import (
    DiskError,
    DownloadError,
    HubAccessError,
    HubBusyError,
    HubError,
    HubMissingError,
    HubOfflineError,
    LocalspecError,
)
from localspec.hub.client import Hub, Patience, RemoteFile
from localspec.hub.name import HubName
from localspec.hub.pull import Pulled, pull
from localspec.hub.transfer import Unwatched
from tests.hub.loopback import (
    Circle,
    Corrupt,
    Cut,
    Endless,
    Fault,
    Hang,
    LoopbackHub,
    NoRanges,
    Slow,
    Status,
    Truncate,
    WrongRange,
)

NAME = HubName.parse("tiny/model-GGUF")
SIZE = 3 << 20
DATA = b"GGUF" + random.Random(0).randbytes(SIZE - 4)


class Notes(Unwatched):
    """Remembers what a person would have read."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.arrived = 0

    def begin(self, file: RemoteFile, num_bytes: int) -> None:
        self.arrived = num_bytes

    def advance(self, num_bytes: int) -> None:
        self.arrived += num_bytes

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(autouse=True)
def repository(loopback: LoopbackHub) -> None:
    loopback.add(NAME.repo, {"model.gguf": DATA, "README.md": b"text"})


def pulled(hub: Hub, notes: Notes | None = None, name: HubName = NAME) -> Pulled:
    result = pull(name, hub=hub, watcher=notes or Notes())
    assert result.path.read_bytes() == DATA
    return result


def refused(hub: Hub, kind: type[LocalspecError], words: str, notes: Notes | None = None) -> None:
    """The pull fails so, and nothing that looks like a model or like checked content is there."""
    with pytest.raises(kind, match=words) as caught:
        pull(NAME, hub=hub, watcher=notes or Notes())
    assert type(caught.value) is kind
    left = [path for path in hub.root.glob("models--*/*/**/*") if path.is_file() or path.is_symlink()]
    assert all(path.name.endswith(".incomplete") for path in left), left


def left_over(hub: Hub) -> list[Path]:
    return list(hub.root.glob("models--*/blobs/*"))


# ---------------------------------------------------------------- wrong content


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Corrupt(at=SIZE // 2), "wrong checksum"),
        (Corrupt(at=SIZE - 1), "wrong checksum"),
        (Truncate(SIZE // 2), "wrong size .*got 1572864 bytes"),
        (Endless(), "wrong size .*more than"),
    ],
)
def test_wrong_content_is_deleted_and_reported(loopback: LoopbackHub, hub: Hub, fault: Fault, words: str) -> None:
    loopback.fault("model.gguf", fault, times=None)
    refused(hub, DownloadError, words)
    assert not left_over(hub)
    loopback.heal()
    pulled(hub)


def test_a_damaged_rest_of_an_earlier_run_is_fetched_again_by_itself(loopback: LoopbackHub, hub: Hub) -> None:
    loopback.fault("model.gguf", Cut(after=SIZE // 2), times=1)
    loopback.fault("model.gguf", Status(503), times=None)
    refused(hub, HubBusyError, "error of its own")
    (partial,) = left_over(hub)
    partial.write_bytes(bytes(partial.stat().st_size))
    loopback.heal()
    notes = Notes()
    pulled(hub, notes)
    assert any("damaged" in text for text in notes.texts)
    assert notes.arrived == SIZE, "the bar ends where the file ends"


def test_small_files_are_checked_as_well(loopback: LoopbackHub, hub: Hub, mlx_files: dict[str, bytes]) -> None:
    loopback.add("tiny/mlx", mlx_files)
    loopback.fault("tokenizer.json", Corrupt(at=100), times=None)
    with pytest.raises(DownloadError, match=r"tokenizer\.json .*checksum"):
        pull(HubName.parse("tiny/mlx"), hub=hub)
    assert not list(hub.root.glob("models--*/snapshots/*/*"))


def test_damage_in_the_cache_is_found_when_asked_for(loopback: LoopbackHub, hub: Hub) -> None:
    path = pulled(hub).path
    blob = path.resolve()
    blob.write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))
    notes = Notes()
    result = pull(NAME, hub=hub, watcher=notes, verify=True)
    assert result.num_files == 1 and path.read_bytes() == DATA and "damaged" in notes.texts[0]
    blob.write_bytes(DATA[:100])
    assert pulled(hub).num_files == 1, "another size is seen without being asked"
    assert pull(NAME, hub=hub, verify=True).num_files == 0


# ---------------------------------------------------------------- broken connections


def test_a_cut_connection_goes_on_where_it_broke(loopback: LoopbackHub, hub: Hub) -> None:
    loopback.fault("model.gguf", Cut(after=SIZE // 3), times=2)
    with loopback.watched() as seen:
        pulled(hub)
    ranges = [request.range for request in seen if request.server == "storage"]
    assert ranges[0] is None and len(ranges) == 3
    starts = [int(str(value).removeprefix("bytes=").rstrip("-")) for value in ranges[1:]]
    assert 0 < starts[0] < starts[1]
    assert loopback.content_bytes == SIZE, "no byte was sent twice"


def test_an_interrupted_pull_goes_on_in_the_next_one(loopback: LoopbackHub, hub: Hub) -> None:
    loopback.fault("model.gguf", Cut(after=SIZE // 2), times=1)
    loopback.fault("model.gguf", Status(503), times=None)
    refused(hub, HubBusyError, "error of its own")
    loopback.heal()
    assert pulled(hub).num_bytes == SIZE // 2


def test_a_server_without_ranges_is_read_from_the_start(loopback: LoopbackHub, hub: Hub) -> None:
    loopback.fault("model.gguf", Cut(after=SIZE // 2), times=1)
    loopback.fault("model.gguf", NoRanges(), times=None)
    notes = Notes()
    pulled(hub, notes)
    assert notes.arrived == SIZE


def test_another_part_than_asked_for_is_refused(loopback: LoopbackHub, hub: Hub) -> None:
    loopback.fault("model.gguf", Cut(after=SIZE // 2), times=1)
    loopback.fault("model.gguf", WrongRange(), times=None)
    refused(hub, HubError, "another part")
    loopback.heal()
    pulled(hub)


def test_two_pulls_at_once_fetch_a_file_once(loopback: LoopbackHub, hub: Hub) -> None:
    loopback.fault("model.gguf", Slow(1e7), times=None)
    threads = [threading.Thread(target=pull, args=(NAME,), kwargs={"hub": hub}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loopback.content_bytes == SIZE
    assert pulled(hub).num_files == 0


def test_retries_end(loopback: LoopbackHub, hub: Hub) -> None:
    loopback.fault("model.gguf", Cut(after=1000), times=None)
    with loopback.watched() as seen:
        refused(hub, HubError, "connection")
    assert len([request for request in seen if request.server == "storage"]) == 3


@pytest.mark.parametrize("part", ["tiny/model-GGUF", "model.gguf"])
def test_a_silent_server_is_given_up(
    loopback: LoopbackHub, hub: Hub, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    loopback.fault(part, Hang(2.0), times=None)
    start = time.monotonic()
    refused(hub, HubBusyError, "does not answer")
    assert time.monotonic() - start < 5


def test_an_unreachable_hub_is_named_at_once(tmp_path: Path, hub: Hub) -> None:
    gone = Hub("http://127.0.0.1:9", tmp_path / "hub", Patience(num_retries=5, first_wait_s=60))
    refused(gone, HubOfflineError, r"cannot reach http://127\.0\.0\.1:9 .*HF_ENDPOINT")


@pytest.mark.parametrize("endpoint", ["no-address", "ftp://127.0.0.1", "http://[::1"])
def test_an_unusable_address_is_named(tmp_path: Path, hub: Hub, endpoint: str) -> None:
    refused(Hub(endpoint, tmp_path / "hub", hub.patience), HubError, "HF_ENDPOINT")


def test_a_token_that_cannot_be_sent_is_not_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secr\u00e9t")
    with pytest.raises(HubError, match="HF_TOKEN") as caught:
        pull(NAME, hub=hub)
    assert "hf_secr" not in str(caught.value)


# ---------------------------------------------------------------- refusals of the server


@pytest.mark.parametrize("part", ["tiny/model-GGUF", "model.gguf"])
def test_too_many_requests_are_waited_for_as_long_as_the_hub_asks(loopback: LoopbackHub, hub: Hub, part: str) -> None:
    loopback.fault(part, Status(429, {"Retry-After": "1"}))
    notes, start = Notes(), time.monotonic()
    pulled(hub, notes)
    assert time.monotonic() - start >= 1
    assert any("too many requests: trying again in 1 s" in text for text in notes.texts)


def test_too_long_waits_are_not_begun(loopback: LoopbackHub, hub: Hub) -> None:
    loopback.fault("tiny/model-GGUF", Status(429, {"Retry-After": "100000"}), times=None)
    refused(hub, HubBusyError, "too many requests .*in 100000 seconds")
    assert len(loopback.requests) == 1


def test_the_hubs_own_rate_limits_are_understood(loopback: LoopbackHub, hub: Hub) -> None:
    loopback.fault("tiny/model-GGUF", Status(429, {"RateLimit": '"api";r=0;t=250'}), times=None)
    refused(hub, HubBusyError, "too many requests .*in 250 seconds")


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_busy_servers_are_asked_again_but_not_for_ever(loopback: LoopbackHub, hub: Hub, code: int) -> None:
    loopback.fault("tiny/model-GGUF", Status(code), times=2)
    pulled(hub)
    loopback.fault("tiny/model-GGUF", Status(code), times=None)
    with loopback.watched() as seen, pytest.raises(HubBusyError, match=str(code)):
        pull(NAME, hub=hub)
    assert len(seen) == 3


@pytest.mark.parametrize("part", ["tiny/model-GGUF", "model.gguf"])
def test_a_circle_of_redirects_is_named(loopback: LoopbackHub, hub: Hub, part: str) -> None:
    loopback.fault(part, Circle(), times=None)
    refused(hub, HubError, "in a circle")


@pytest.mark.parametrize("body", [b"<html>login</html>", b"[]", b'{"siblings": [{}]}', b'{"sha": "../.."}'])
def test_an_answer_that_is_no_hubs_is_refused(loopback: LoopbackHub, hub: Hub, body: bytes) -> None:
    loopback.fault("tiny/model-GGUF", Status(200, body=body), times=None)
    refused(hub, HubError, "does not answer like a Hub")


def test_what_is_not_there_is_named(loopback: LoopbackHub, hub: Hub) -> None:
    with pytest.raises(HubMissingError, match="no repository tiny/other, or it is private"):
        pull(HubName.parse("tiny/other"), hub=hub)
    with pytest.raises(HubMissingError, match=r"tiny/model-GGUF has no revision v9"):
        pull(HubName.parse("tiny/model-GGUF@v9"), hub=hub)
    with pytest.raises(HubMissingError, match=r"no model 'Q8_0' .*one of model"):
        pull(HubName.parse("tiny/model-GGUF:Q8_0"), hub=hub)
    assert not left_over(hub)


def test_gated_models_say_what_to_do_and_open_with_a_token(
    loopback: LoopbackHub, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback.repos[NAME.repo].gated = True
    page = f"{loopback.url}/{NAME.repo}"
    refused(hub, HubAccessError, f"gated.*got 401.*Accept them at {page}.*hf auth login")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    refused(hub, HubAccessError, "gated.*got 403")
    monkeypatch.setenv("HF_TOKEN", loopback.token)
    with loopback.watched() as seen:
        pulled(hub)
    told = {request.server for request in seen if request.authorization}
    assert told == {"hub"}, "the token is for the Hub, not for the storage it redirects to"


def test_private_models_open_with_a_token(loopback: LoopbackHub, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    loopback.repos[NAME.repo].private = True
    refused(hub, HubMissingError, "private")
    monkeypatch.setenv("HF_TOKEN", loopback.token)
    pulled(hub)


@pytest.mark.parametrize("code", [401, 403])
def test_a_refused_token_is_named(loopback: LoopbackHub, hub: Hub, code: int) -> None:
    loopback.fault("tiny/model-GGUF", Status(code, body=b'{"error": "Invalid \\u001b[31mtoken"}'), times=None)
    with pytest.raises(HubAccessError, match=f"{code} .*HF_TOKEN") as caught:
        pull(NAME, hub=hub)
    assert "\x1b" not in str(caught.value), "what a server says does not drive the terminal"


# ---------------------------------------------------------------- disks


def test_a_file_larger_than_the_disk_is_refused_before_the_first_byte(loopback: LoopbackHub, hub: Hub) -> None:
    huge = {"rfilename": "model.gguf", "size": 10**16, "blobId": "0" * 40}
    loopback.repos[NAME.repo].siblings = [huge | {"lfs": {"sha256": "0" * 64, "size": 10**16, "pointerSize": 1}}]
    refused(hub, DiskError, r"not enough room .*expected 10000000\.1 GB")
    assert not left_over(hub)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, loopback: LoopbackHub, hub: Hub) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError, match="cannot write"):
        pull(NAME, hub=Hub(hub.endpoint, tmp_path / "file" / "hub", hub.patience))


def test_a_disk_that_fills_up_keeps_what_arrived(loopback: LoopbackHub, hub: Hub) -> None:
    """A limit on the size of files stands for the full disk: writing fails in the same way."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))
    try:
        refused(hub, DiskError, "no room left .*is kept")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert pulled(hub).num_bytes <= SIZE // 2 + 1


def test_repositories_share_nothing(loopback: LoopbackHub, hub: Hub) -> None:
    """The same content in another repository is content of its own: nothing is shared between owners."""
    loopback.add("other/model-GGUF", {"model.gguf": DATA})
    pulled(hub)
    assert pulled(hub, name=HubName.parse("other/model-GGUF")).num_bytes == SIZE
