"""Pull, run, pull again, offline, pinned: against a real HTTP server, with the real client library, nothing mocked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hub.conftest import Program
from tests.hub.loopback import LoopbackHub


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
        answer = program.run("generate", "Once", *pair, "--max-tokens", "8", HF_HUB_OFFLINE="1")
        offline = program.run("pull", "tiny/pair-GGUF:Q4_0", HF_HUB_OFFLINE="1")
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr
    assert "drafter draft_model" in answer.stderr
    assert offline.returncode == 0 and "offline" in offline.stderr
    assert not seen, "loading a model asks nobody"
