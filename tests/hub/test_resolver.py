"""One resolver: paths, bundled names, the Hub cache, LM Studio's folders, in this order; nothing is fetched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from localspec.errors import ModelNotFoundError, NotPulledError, SettingError, UnknownNameError
from localspec.hub.client import Hub
from localspec.hub.name import HubName
from localspec.hub.pull import pull
from localspec.hub.resolver import find_model
from localspec.loading import readable_formats, resolve_model
from tests.hub.loopback import LoopbackHub


def lm_studio(home: Path, *names: str, root: str = ".lmstudio/models") -> Path:
    folder = home / root
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"GGUF")
    return folder


def test_the_order_is_path_bundled_cache_lm_studio(
    loopback: LoopbackHub, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with pytest.raises(
        NotPulledError, match=r"org/model:Q4_0 is not on this machine\. Run `localspec pull org/model:Q4_0`"
    ):
        find_model("org/model:Q4_0", hub=hub)
    folder = lm_studio(tmp_path, "org/model/m-Q4_0.gguf", "org/model/m-Q8_0.gguf", "org/model/m-Q5_0.gguf.part")
    assert find_model("org/model:Q4_0", hub=hub) == folder / "org/model/m-Q4_0.gguf"
    loopback.add("org/model", {"m-Q4_0.gguf": b"GGUF"})
    path = pull(HubName.parse("org/model"), hub=hub).path
    assert find_model("org/model:Q4_0", hub=hub) == path
    assert find_model("org/model", hub=hub) == path
    assert find_model("org/model:Q8_0", hub=hub) == folder / "org/model/m-Q8_0.gguf", "what the cache lacks"
    (work / "org" / "model").mkdir(parents=True)
    assert find_model("org/model", hub=hub) == Path("org/model")
    assert find_model("tiny", "draft", hub=hub).name == "draft.gguf"
    assert len(loopback.requests) == 3, "one listing, one file, one redirect: all by the pull"


def test_what_is_not_here_says_what_is(loopback: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    loopback.add("org/model", {"m-Q4_0.gguf": b"GGUF", "m-Q8_0.gguf": b"GGUF8"}, ref="v1")
    pull(HubName.parse("org/model@v1:Q4_0"), hub=hub)
    with pytest.raises(NotPulledError, match=r"pulled were org/model@v1\).*localspec pull org/model"):
        find_model("org/model", hub=hub)
    with pytest.raises(NotPulledError, match=r"no model 'Q8_0' \(expected one of Q4_0\).*pull org/model@v1:Q8_0"):
        find_model("org/model@v1:Q8_0", hub=hub)
    lm_studio(tmp_path, "org/other/m-Q4_0.gguf", root=".cache/lm-studio/models")
    assert find_model("org/other", hub=hub).name == "m-Q4_0.gguf"
    with pytest.raises(NotPulledError, match="@v1 is not on this machine"):
        find_model("org/other@v1", hub=hub)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("gone.gguf", ModelNotFoundError),
        ("org/gone.gguf", ModelNotFoundError),
        ("/org/gone", ModelNotFoundError),
        ("a/b/c", ModelNotFoundError),
        ("tinny", UnknownNameError),
        ("org/a--b", SettingError),
    ],
)
def test_what_is_no_hub_id_is_not_looked_for(hub: Hub, text: str, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        find_model(text, hub=hub)
    assert type(caught.value) is kind


def test_without_a_hub_a_hub_id_names_the_command() -> None:
    with pytest.raises(NotPulledError, match=r"localspec pull org/model@v1:sub/m\.gguf"):
        resolve_model("org/model@v1:sub/m.gguf")


def test_backends_say_what_they_read() -> None:
    assert readable_formats("llamacpp") == ("gguf",)
    assert readable_formats("mlx") == ("safetensors", "gguf")
    assert set(readable_formats()) == {"gguf", "safetensors"}


def test_local_paths_cost_no_import_of_the_client_library(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    code = (
        "import sys; from localspec.hub.resolver import find_model; find_model(sys.argv[1]); find_model('tiny');"
        "assert 'huggingface_hub' not in sys.modules and 'httpx2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
