"""Tokenizers of GGUF files and of folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localspec.errors import PromptError, UnsupportedModelError
from localspec.formats.gguf import read_header
from localspec.testing.files import write_gguf, write_safetensors
from tests.backends.mlx_backend import ROOT, change_json, module, needs_mlx, opened

VOCABULARIES = ROOT.parent / "shared" / "vocabs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlx")


def vocabularies() -> list[Path]:
    return sorted(VOCABULARIES.glob("*.gguf"))


_REFUSED = {"ggml-vocab-deepseek-llm.gguf": "split", "ggml-vocab-gemma-4.gguf": "model"}


@needs_mlx
@pytest.mark.skipif(not VOCABULARIES.is_dir(), reason="needs the vocabularies in ../shared/vocabs")
@pytest.mark.parametrize("path", vocabularies(), ids=lambda path: path.stem)
def test_vocabularies_encode_as_llama_cpp_does(path: Path) -> None:
    """llama.cpp's own vectors, or a clear refusal."""
    metadata = read_header(path).metadata
    if path.name in _REFUSED:
        with pytest.raises(UnsupportedModelError, match=_REFUSED[path.name]):
            module("gguf_tokenizer").open_gguf_tokenizer(metadata)
        return
    tokenizer = module("gguf_tokenizer").open_gguf_tokenizer(metadata)
    texts = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text(encoding="utf-8").split("\n")
    for text, line in zip(texts, lines, strict=False):
        ids = tokenizer.encode(text, special=False).tolist()
        assert ids == [int(token) for token in line.split()], repr(text)
        back = b"".join(tokenizer.token_bytes(token) for token in ids)
        assert back in (text.encode(), b" " + text.encode())  # sentencepiece puts a space first


@needs_mlx
@pytest.mark.shared
@pytest.mark.parametrize("name", ["target", "draft-xtok"])
def test_folders_encode_as_transformers_does(shared_models: Path, name: str) -> None:
    """All held-out prompts, and every token's bytes come back."""
    from transformers import AutoTokenizer

    tokenizer = module("tokenizer").open_folder_tokenizer(shared_models / name)
    reference = AutoTokenizer.from_pretrained(str(shared_models / name))
    for line in (shared_models / "prompts.jsonl").read_text(encoding="utf-8").splitlines():
        prompt = json.loads(line)
        text = prompt.get("text") or prompt["messages"][0]["content"]
        ids = tokenizer.encode(text, special=True)
        assert ids.tolist() == reference(text, add_special_tokens=False).input_ids
        assert b"".join(tokenizer.token_bytes(int(token)) for token in ids) == text.encode()
    assert tokenizer.bos is None and tokenizer.stop_tokens == {0, 2}


@needs_mlx
def test_special_texts_are_tokens_only_when_asked(folder: Path) -> None:
    tokenizer = opened(write_gguf(folder / "special.gguf")).tokenizer
    assert tokenizer.encode("a<|im_end|>", special=True)[-1] == 2
    assert 2 not in tokenizer.encode("a<|im_end|>", special=False)
    assert tokenizer.token_bytes(2) == b"<|im_end|>" and tokenizer.is_special(2)
    assert tokenizer.token_bytes(10**6) == b"" and tokenizer.token_bytes(-1) == b""
    with pytest.raises(PromptError, match="Unicode"):
        tokenizer.encode("a\ud800", special=False)


@needs_mlx
def test_a_folder_says_what_its_template_bos_and_ends_are(folder: Path) -> None:
    """List templates, a template file, and end tokens named in generation_config.json."""
    path = write_safetensors(folder / "says")
    opened_tokenizer = module("tokenizer").open_folder_tokenizer
    templates = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    change_json(path / "tokenizer_config.json", chat_template=templates, bos_token="<|im_start|>", add_bos_token=True)
    (path / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    tokenizer = opened_tokenizer(path)
    assert (tokenizer.chat_template, tokenizer.bos) == ("D", 1)
    assert tokenizer.stop_tokens == {0, 1, 2} and tokenizer.template_tokens["bos_token"] == "<|im_start|>"
    (path / "chat_template.jinja").write_text("J")
    assert opened_tokenizer(path).chat_template == "J"
