"""Where test models come from, and what is skipped without them."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from localspec.schedule import store

ROOT = Path(__file__).resolve().parent.parent
SHARED_MODELS = ROOT.parent / "shared" / "models"


@dataclass(frozen=True, slots=True)
class Pair:
    """A target and its draft model on disk."""

    target: Path
    draft: Path


def pytest_configure() -> None:
    """A shell that runs the tests in the background has them ignore SIGINT, and so would the programs they start
    and mean to interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def a_cache_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests, and the programs they start, leave the user's measurements and sessions alone, and measure nothing that
    a test did not ask for."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        patch.delenv("LOCALSPEC_REMEMBER", raising=False)
        patch.setenv("LOCALSPEC_MEASURE", "0")
        patch.setattr(store, "default_folder", lambda: folder / "tune")
        patch.setattr(store, "_automatic", False)
        yield


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Skip tests marked `shared` where the development models are absent, and say which they are."""
    if (SHARED_MODELS / "prompts.jsonl").is_file():
        return
    skip = pytest.mark.skip(reason="needs the development models (safetensors, prompts) in ../shared/models")
    for item in items:
        if item.get_closest_marker("shared"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_pair() -> Pair:
    """The bundled pair. It is part of the repository, so its absence is a failure, not a skip."""
    folder = ROOT / "models" / "tiny"
    pair = Pair(folder / "target.gguf", folder / "draft.gguf")
    assert pair.target.is_file(), f"{pair.target} is missing; see models/tiny/README.md"
    assert pair.draft.is_file(), f"{pair.draft} is missing; see models/tiny/README.md"
    return pair


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of development models; only for tests marked `shared`."""
    return SHARED_MODELS
