"""Text under cross-tokenizer drafting equals plain decoding on both backends.

Tiny random models of two vocabularies; the development model of another tokenizer where it is there. All
prompts of it: `localspec bench equality --draft ...`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from localspec.bench.equality import compare
from localspec.bench.prompts import load_prompts
from localspec.formats.conversion import Checkpoint, write_gguf_file
from localspec.loading import bundled_path, get_backend, open_pair
from localspec.protocols import LoadSettings
from localspec.testing.alignment import random_strings
from localspec.testing.files import write_gguf
from tests.conftest import brief_prompts

CHAINS = ("cross_tokenizer:num=4,mode=bytes", "cross_tokenizer:num=4,mode=intersection")
TREES = ("cross_tokenizer:num=8,shape=tree,mode=bytes", "cross_tokenizer:num=8,shape=tree,mode=intersection")
BACKENDS = ("llamacpp", "mlx")


def need(backend: str) -> None:
    if not get_backend(backend).is_installed():
        pytest.skip(f"needs {backend}: {get_backend(backend).report().install_command}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("drafters", [CHAINS, TREES], ids=["chains", "trees"])
def test_random_models_of_two_vocabularies(tmp_path: Path, backend: str, drafters: tuple[str, ...]) -> None:
    need(backend)
    target = write_gguf(tmp_path / "target.gguf", seed=1)
    draft = write_gguf(tmp_path / "draft.gguf", seed=2, num_merges=20, num_layers=1)
    settings = LoadSettings(context=256, num_sequences=4, trees=drafters is TREES)
    with open_pair(str(target), str(draft), backend=backend, settings=settings) as pair:
        assert pair.drafting is not None and not pair.drafting.relation.same
        prompt = load_prompts(domains=["chat"], per_domain=1)
        report = compare(pair, prompt, drafters, [0.0, 0.8], 16)
    assert report.all_equal


@pytest.mark.shared
def test_the_converted_tokenizer_is_the_folders_on_both_backends(shared_models: Path, tmp_path: Path) -> None:
    """Split of Llama 3, merges ignored where a whole word is a token; all held-out prompts and odd strings."""
    from tokenizers import Tokenizer

    folder, path = shared_models / "draft-xtok", tmp_path / "xtok.gguf"
    write_gguf_file(path, Checkpoint.from_folder(folder), "Q8_0", name="xtok")
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [prompt.text or str((prompt.messages or ())[0]["content"]) for prompt in load_prompts()]
    texts += [raw.decode(errors="replace") for raw in random_strings(200, seed=5)]
    for name in BACKENDS:
        need(name)
        tokenizer = get_backend(name).open_tokenizer(path)
        for text in texts:
            ids = tokenizer.encode(text, special=False).tolist()
            if not any(token.content in text for token in reference.get_added_tokens_decoder().values()):
                assert ids == reference.encode(text, add_special_tokens=False).ids, repr(text)
            assert b"".join(tokenizer.token_bytes(token) for token in ids) == text.encode()


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.real
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("drafters", [CHAINS, TREES], ids=["chains", "trees"])
def test_the_development_model_of_another_tokenizer(
    shared_models: Path, tmp_path: Path, backend: str, drafters: tuple[str, ...]
) -> None:
    need(backend)
    folder = shared_models / "draft-xtok"
    draft = tmp_path / "xtok.gguf"
    write_gguf_file(draft, Checkpoint.from_folder(folder), "F16", name="xtok")
    settings = LoadSettings(context=512, num_sequences=4, trees=drafters is TREES)
    with open_pair(str(bundled_path("tiny", "target")), str(draft), backend=backend, settings=settings) as pair:
        report = compare(pair, brief_prompts("code"), drafters, [0.0, 0.8], 16)
    assert report.all_equal
    assert sum(row.num_tokens for row in report.rows) > 1.2 * sum(row.num_rounds for row in report.rows)
