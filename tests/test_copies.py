"""A model that drafts for itself: a copy with fewer bits, made once, kept where the user can find it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localspec import copies
from localspec.copies import is_self, make_copy
from localspec.errors import SettingError, UnsupportedModelError
from localspec.formats import summarize
from localspec.loading import bundled_path, get_backend, open_pair
from localspec.protocols import LoadSettings
from localspec.sampling import SamplingParams
from localspec.testing.files import write_gguf, write_safetensors


def test_what_exists_on_disk_is_a_path_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_self("self") and is_self("self:Q2_K") and not is_self("selfish") and not is_self(None)
    (tmp_path / "self").mkdir()
    assert not is_self("self")


@pytest.mark.real
def test_a_copy_is_made_once_and_is_smaller(tmp_path: Path) -> None:
    backend, target, said = get_backend("llamacpp"), bundled_path("tiny", "target"), list[str]()
    made = make_copy(target, backend, "self", folder=tmp_path, on_progress=said.append)
    assert made.name.endswith("-Q2_K.gguf") and "Q2_K" in said[0], "two bits for a target of four"
    assert summarize(made).total_weight_bytes < 0.8 * summarize(target).total_weight_bytes
    assert [file.name for file in tmp_path.iterdir()] == [made.name], "nothing else is left"
    again = make_copy(target, backend, "self:q2_k", folder=tmp_path, on_progress=said.append)
    assert again == made and len(said) == 2  # ours and the quantizer's, the first time
    other = Path(shutil.copy(target, tmp_path / "target.gguf"))
    with other.open("r+b") as stream:  # another file of the same name and size
        stream.seek(1000)
        stream.write(b"x")
    assert make_copy(target, backend, "self", folder=tmp_path) == made
    assert copies._place(tmp_path, other, "Q2_K") != made


@pytest.mark.real
def test_copies_that_would_not_be_smaller_are_refused(tmp_path: Path) -> None:
    backend, target = get_backend("llamacpp"), bundled_path("tiny", "target")
    with pytest.raises(UnsupportedModelError, match="not worth making"):
        make_copy(target, backend, "self:Q4_0", folder=tmp_path)
    with pytest.raises(UnsupportedModelError, match="few bits already"):
        make_copy(make_copy(target, backend, "self:Q2_K", folder=tmp_path), backend, "self", folder=tmp_path)
    with pytest.raises(SettingError, match="Q2_K"):
        make_copy(target, backend, "self:Q9", folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1, "what was refused is not left behind"


def test_mlx_does_not_quantise_gguf_files(tmp_path: Path) -> None:
    if not get_backend("mlx").is_installed():
        pytest.skip("needs mlx")
    target = write_gguf(tmp_path / "target.gguf")
    with pytest.raises(UnsupportedModelError, match="folders"):
        make_copy(target, get_backend("mlx"), "self:2bit", folder=tmp_path / "copies")


@pytest.mark.parametrize("kind", ["", ":3bit"])
def test_a_folder_that_is_quantised_already_gets_a_coarser_copy_on_mlx(tmp_path: Path, kind: str) -> None:
    backend = get_backend("mlx")
    if not backend.is_installed() or backend.quantizer is None:
        pytest.skip("needs mlx")
    source = write_safetensors(tmp_path / "source")
    backend.quantizer.write(source, tmp_path / "four", "4bit", lambda text: None)
    for target in (source, tmp_path / "four"):
        made = make_copy(target, backend, f"self{kind}", folder=tmp_path / "copies")
        assert summarize(made).total_weight_bytes < 0.9 * summarize(target).total_weight_bytes
    with pytest.raises(UnsupportedModelError, match="already"):  # `convert` still wants the original
        backend.quantizer.write(tmp_path / "four", tmp_path / "two", "2bit", lambda text: None)


@pytest.mark.parametrize("name", ["llamacpp", "mlx"])
def test_text_drafted_by_the_model_itself_is_that_of_plain_decoding(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundled target on llama.cpp, a random one on MLX: the copy agrees with it well enough to be of use."""
    if not get_backend(name).is_installed():
        pytest.skip(f"needs {name}")
    monkeypatch.setattr(copies, "default_folder", lambda: tmp_path / "copies")
    if name == "llamacpp" and not bundled_path("tiny", "target").is_file():
        pytest.skip("needs the bundled pair")
    target = bundled_path("tiny", "target") if name == "llamacpp" else write_safetensors(tmp_path / "target")
    draft = "self" if name == "llamacpp" else "self:3bit"
    settings = LoadSettings(context=256, num_sequences=4)
    with open_pair(str(target), draft, backend=name, settings=settings) as pair:
        assert pair.draft is not None and pair.draft.info.path.parent == tmp_path / "copies"
        prompt = np.arange(40, 60).tolist()
        for temperature in (0.0, 0.8):
            params = SamplingParams(temperature=temperature, seed=3, max_tokens=24, ignore_eos=True)
            with pair.session("nothing") as plain, pair.session("draft_model:num=3") as drafted:
                expected, result = plain.generate(prompt, params), drafted.generate(prompt, params)
            assert result.tokens == expected.tokens
            assert result.stats.num_accepted > 0
    again = replace(settings, context=128)
    open_pair(str(target), draft, backend=name, settings=again).close()
    assert len(list((tmp_path / "copies").iterdir())) == 1
