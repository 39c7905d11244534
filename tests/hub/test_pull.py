"""Pull, run, pull again, offline, pinned, killed: against a real HTTP server, with the real client library."""

from __future__ import annotations

import multiprocessing
import os
import pty
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir, snapshot_download, try_to_load_from_cache

from localspec.errors import HubMissingError, HubOfflineError, SettingError
from localspec.hub.client import Hub
from localspec.hub.name import HubName
from localspec.hub.pull import pull
from localspec.hub.resolver import find_model
from localspec.testing.files import write_gguf
from tests.hub.conftest import CATALOG, ROOT, Program
from tests.hub.killed import pull_into
from tests.hub.loopback import LoopbackHub, Slow


@pytest.mark.slow
def test_a_pulled_pair_answers_and_is_not_pulled_twice(loopback: LoopbackHub, program: Program, root: Path) -> None:
    tiny = root / "models" / "tiny"
    commit = loopback.add(
        "tiny/pair-GGUF", {"tiny-Q4_0.gguf": tiny / "target.gguf", "tiny-draft-Q8_0.gguf": tiny / "draft.gguf"}
    )
    for choice in ("Q4_0", "q8_0"):
        done = program.run("pull", f"tiny/pair-GGUF:{choice}")
        assert done.returncode == 0, done.stderr
        path = Path(done.stdout.strip())
        assert path.is_file() and f"snapshots/{commit}" in str(path)
    sizes = [(tiny / name).stat().st_size for name in ("target.gguf", "draft.gguf")]
    assert loopback.content_bytes == sum(sizes)

    with loopback.watched() as seen:
        again = program.run("pull", "tiny/pair-GGUF:Q4_0")
    assert "nothing was fetched" in again.stderr and loopback.content_bytes == sum(sizes)
    assert [request.path for request in seen] == ["/api/models/tiny/pair-GGUF?blobs=true"]

    pair = ("--target", "tiny/pair-GGUF:Q4_0", "--draft", "tiny/pair-GGUF:Q8_0", "--backend", "llamacpp")
    with loopback.watched() as seen:
        drafting = ("--drafter", "draft_model", "--max-tokens", "8")
        answer = program.run("generate", "Once", *pair, *drafting, HF_HUB_OFFLINE="1")
        offline = program.run("pull", "tiny/pair-GGUF:Q4_0", HF_HUB_OFFLINE="1")
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr
    assert "drafter draft_model" in answer.stderr
    assert offline.returncode == 0 and "offline" in offline.stderr
    assert not seen, "loading a model asks nobody"


@pytest.mark.slow
def test_a_split_gguf_is_pulled_whole_and_answers(
    loopback: LoopbackHub, program: Program, split_files: dict[str, Path]
) -> None:
    assert len(split_files) == 3
    loopback.add("tiny/split-GGUF", {f"Q8_0/{name}": path for name, path in split_files.items()})
    done = program.run("pull", "tiny/split-GGUF")
    assert done.returncode == 0, done.stderr
    first = Path(done.stdout.strip())
    assert first.name == "draft-Q8_0-00001-of-00003.gguf"
    assert {path.name for path in first.parent.iterdir()} == set(split_files)
    answer = program.run(
        "generate", "Once", "--target", "tiny/split-GGUF", "--backend", "llamacpp", "-n", "4", "--plain"
    )
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr


@pytest.mark.slow
def test_an_mlx_folder_is_pulled_without_what_it_does_not_need_and_answers(
    loopback: LoopbackHub, program: Program, mlx_files: dict[str, bytes]
) -> None:
    loopback.add("tiny/mlx", mlx_files)
    done = program.run("pull", "tiny/mlx", "--backend", "mlx")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in Path(done.stdout.strip()).iterdir()}
    assert names == set(mlx_files) - {
        "README.md",
        "modeling_tiny.py",
        "pytorch_model.bin",
        "adapters/adapter.safetensors",
    }
    fetched = " ".join(request.path for request in loopback.requests)
    assert not any(part in fetched for part in (".py", ".bin", "README", "adapter"))
    options = ("--target", "tiny/mlx", "--backend", "mlx", "--max-tokens", "4", "--ignore-eos")
    answer = program.run("generate", "hello", *options, HF_HUB_OFFLINE="1")
    assert answer.returncode == 0, answer.stderr
    assert "4 tokens" in answer.stderr


def test_the_client_library_sees_a_cache_like_its_own(
    loopback: LoopbackHub, hub: Hub, mlx_files: dict[str, bytes]
) -> None:
    commit = loopback.add("tiny/mlx", mlx_files)
    folder = pull(HubName.parse("tiny/mlx"), hub=hub).path
    assert try_to_load_from_cache("tiny/mlx", "config.json", cache_dir=hub.root) == str(folder / "config.json")
    assert snapshot_download("tiny/mlx", cache_dir=hub.root, local_files_only=True) == str(folder)
    info = scan_cache_dir(hub.root)
    assert not info.warnings and not info.incomplete_files
    assert {revision.commit_hash: revision.refs for repo in info.repos for revision in repo.revisions} == {
        commit: frozenset({"main"})
    }
    before = loopback.content_bytes
    names = sorted(path.name for path in folder.iterdir())
    snapshot_download("tiny/mlx", endpoint=loopback.url, cache_dir=hub.root, allow_patterns=names)
    assert loopback.content_bytes == before, "the library finds every file where it would have put it"


def test_what_the_client_library_fetched_is_found(
    loopback: LoopbackHub, hub: Hub, mlx_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    loopback.add("tiny/mlx", mlx_files)
    folder = snapshot_download("tiny/mlx", endpoint=loopback.url, cache_dir=hub.root, ignore_patterns=["*.bin"])
    assert find_model("tiny/mlx", hub=hub) == Path(folder)
    before = loopback.content_bytes
    assert pull(HubName.parse("tiny/mlx"), hub=hub).num_files == 0
    assert loopback.content_bytes == before


def test_disks_without_links_hold_models_too(
    loopback: LoopbackHub, hub: Hub, mlx_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_HUB_DISABLE_SYMLINKS stands for such a disk; two files of the repository have the same content."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    loopback.add("tiny/mlx", mlx_files | {"vocab.txt": b"{}", "added_tokens.json": b"{}"})
    folder = pull(HubName.parse("tiny/mlx"), hub=hub).path
    assert all((folder / path.name).read_bytes() == mlx_files.get(path.name, b"{}") for path in folder.iterdir())
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert find_model("tiny/mlx", hub=hub) == folder
    assert pull(HubName.parse("tiny/mlx"), hub=hub, verify=True).num_files == 0
    weights = folder / "model-00002-of-00002.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert pull(HubName.parse("tiny/mlx"), hub=hub, verify=True).num_files == 1
    assert weights.read_bytes() == mlx_files[weights.name]


# ---------------------------------------------------------------- revisions


def test_a_pinned_revision_stays_what_it_was(loopback: LoopbackHub, hub: Hub) -> None:
    old = loopback.add("tiny/model", {"m-Q4_0.gguf": b"GGUF old"}, ref="v1")
    new = loopback.add("tiny/model", {"m-Q4_0.gguf": b"GGUF new"})
    for text, revision, content in (
        ("tiny/model", "v1", b"GGUF old"),
        ("tiny/model@v1", None, b"GGUF old"),
        (f"tiny/model@{old}:Q4_0", None, b"GGUF old"),
        ("tiny/model", None, b"GGUF new"),
        ("tiny/model:Q4_0", new, b"GGUF new"),
    ):
        result = pull(HubName.parse(text, revision), hub=hub)
        assert result.path.read_bytes() == content
        assert find_model(str(result.name), hub=hub) == result.path
    newest = loopback.add("tiny/model", {"m-Q4_0.gguf": b"GGUF newest"})
    assert find_model("tiny/model", hub=hub).read_bytes() == b"GGUF new", "nothing moves without a pull"
    assert pull(HubName.parse("tiny/model"), hub=hub).commit == newest
    assert find_model("tiny/model", hub=hub).read_bytes() == b"GGUF newest"
    assert find_model(f"tiny/model@{new}", hub=hub).read_bytes() == b"GGUF new", "what was pulled before stays"


def test_offline_nothing_is_asked(loopback: LoopbackHub, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    loopback.add("tiny/model", {"m-Q4_0.gguf": b"GGUF", "m-Q8_0.gguf": b"GGUF8"})
    first = pull(HubName.parse("tiny/model"), hub=hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with loopback.watched() as seen:
        assert pull(HubName.parse("tiny/model"), hub=hub).path == first.path
        with pytest.raises(HubOfflineError, match="HF_HUB_OFFLINE"):
            pull(HubName.parse("tiny/other"), hub=hub)
        with pytest.raises(HubMissingError, match="no model 'Q8_0'"):
            pull(HubName.parse("tiny/model:Q8_0"), hub=hub)
    assert not seen


@pytest.mark.parametrize(
    "text", ["org", "org/", "/name", "a/b/c", "../x", "org/..", "org/a--b", "org/x@../y", "org/x@/y", "org/x:", "o/n@"]
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(SettingError):
        HubName.parse(text)


def test_two_revisions_in_one_name_are_refused() -> None:
    assert HubName.parse("org/x@v1:Q4_0", "v1").revision == "v1"
    with pytest.raises(SettingError, match="two revisions"):
        HubName.parse("org/x@v1", "v2")
    with pytest.raises(SettingError, match="not a revision"):
        HubName.parse("org/x", "")


# ---------------------------------------------------------------- interrupted


@pytest.mark.slow
def test_killed_twenty_times_it_resumes_to_identical_bytes(
    loopback: LoopbackHub, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is 4 MB, sent at 4 MB/s; processes die at random places of it, always within the file."""
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    size = 4 << 20
    data = b"GGUF" + random.Random(1).randbytes(size - 4)
    loopback.add("tiny/model", {"m-Q4_0.gguf": data})
    loopback.fault("m-Q4_0.gguf", Slow(4e6), times=None)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.hub.killed", "huggingface_hub.hf_api", "huggingface_hub.utils"])
    held = 0
    for point in sorted(random.Random(2).sample(range(1, int(0.8 * size)), 20)):
        process = context.Process(target=pull_into, args=(str(hub.root), loopback.url, "tiny/model"))
        process.start()
        partial = _wait_for(hub.root, max(point, held + 1), process)
        process.kill()
        process.join()
        process.close()
        files = [path for path in hub.root.rglob("*") if path.is_file() and path.suffix != ".lock"]
        assert files == [partial], "no model, no link, no ref: only the partial file"
        held = partial.stat().st_size
        assert partial.read_bytes() == data[:held]
    assert held < size
    loopback.heal()
    before = _settled(loopback)
    result = pull(HubName.parse("tiny/model"), hub=hub)
    assert result.path.read_bytes() == data
    assert result.num_bytes == loopback.content_bytes - before == size - held
    starts = [request.range for request in loopback.requests if request.server == "storage"]
    assert len(starts) == 21 and starts[0] is None and all(starts[1:])


def _settled(loopback: LoopbackHub) -> int:
    """What was sent, once the thread that served a killed process has noticed."""
    sent = -1
    while sent != loopback.content_bytes:
        sent = loopback.content_bytes
        time.sleep(0.1)
    return sent


def _wait_for(root: Path, size: int, process: multiprocessing.process.BaseProcess) -> Path:
    """The partial file, once it has reached that size."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for partial in root.glob("models--*/blobs/*.incomplete"):
            if partial.stat().st_size >= size:
                return partial
        assert process.is_alive(), "it ended before it could be killed"
        time.sleep(0.002)
    raise AssertionError("nothing arrived")


@pytest.mark.slow
def test_the_program_is_stopped_and_goes_on(loopback: LoopbackHub, program: Program, tmp_path: Path) -> None:
    data = write_gguf(tmp_path / "m.gguf").read_bytes() + bytes(2 << 20)
    loopback.add("tiny/model", {"m-Q4_0.gguf": data})
    loopback.fault("m-Q4_0.gguf", Slow(1e6), times=1)
    process = program.start("pull", "tiny/model")
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 100_000 for path in program.blobs()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "what has arrived is kept" in err, err
    (partial,) = program.blobs()
    assert partial.suffix == ".incomplete" and 0 < partial.stat().st_size < len(data)
    again = program.run("pull", "tiny/model")
    assert again.returncode == 0 and "going on from" in again.stderr, again.stderr
    assert Path(again.stdout.strip()).read_bytes() == data


# ---------------------------------------------------------------- the command line


def test_errors_of_the_hub_are_one_line_and_an_exit_code(loopback: LoopbackHub, program: Program) -> None:
    loopback.add("tiny/model", {"m-Q4_0.gguf": b"GGUF"})
    done = program.run("pull", "tiny/model:Q9")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.splitlines() == [
        "error: tiny/model has no model 'Q9' (expected one of Q4_0). Write it after a colon: tiny/model:..."
    ]


@pytest.mark.slow
def test_the_chat_asks_before_it_pulls(loopback: LoopbackHub, program: Program, tmp_path: Path) -> None:
    loopback.add("tiny/model", {"m-Q4_0.gguf": write_gguf(tmp_path / "m.gguf", quantization="Q4_0")})
    command = ("chat", "--target", "tiny/model", "--backend", "llamacpp")
    silent = program.run(*command)
    assert silent.returncode == 1 and "Run `localspec pull tiny/model`" in silent.stderr
    assert _on_a_terminal(program, command, b"n\n")[0] == 1
    assert not loopback.requests, "no without a yes"
    code, text = _on_a_terminal(program, command, b"y\n/exit\n")
    assert code == 0 and "Pull it now? [y/N]" in text and "/help" in text, text
    assert loopback.content_bytes


@pytest.mark.slow
def test_the_chat_asks_once_for_both_models_of_a_pair(loopback: LoopbackHub, program: Program, root: Path) -> None:
    tiny = root / "models" / "tiny"
    loopback.add("tiny/pair-GGUF", {"t-Q4_0.gguf": tiny / "target.gguf", "d-Q8_0.gguf": tiny / "draft.gguf"})
    (program.home / "own.toml").write_text(CATALOG)
    command = ("chat", "--pair", "loopback", "--catalog", "own.toml")
    assert program.run(*command).returncode == 1 and not loopback.requests
    code, text = _on_a_terminal(program, command, b"n\n")
    assert code == 1 and "localspec pull tiny/pair-GGUF:Q8_0" in text and not loopback.requests
    code, text = _on_a_terminal(program, command, b"y\n/exit\n")
    assert code == 0 and text.count("Pull it now?") == 1 and "/help" in text, text
    assert len(program.blobs()) == 2


def _on_a_terminal(program: Program, command: tuple[str, ...], typed: bytes) -> tuple[int, str]:
    """Exit code and everything shown, with a pseudo-terminal for all three streams."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *command],
        env=program.environment(TERM="dumb"),
        cwd=program.home,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        close_fds=True,
        start_new_session=True,
    )
    os.close(slave)
    os.write(master, typed)
    shown = b""
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:  # Linux says so when the last writer is gone
        pass
    os.close(master)
    return process.wait(timeout=60), shown.decode(errors="replace")
