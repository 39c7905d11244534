"""Both backends write what the model file says, judged by a reference that shares no reader with them.

The reference is the bundled model dequantised by the `gguf` package, in float32, in a safetensors folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from localspec.bench.prompts import Prompt, load_prompts
from localspec.loading import get_backend
from localspec.protocols import HostTokens, LanguageModel, LoadSettings, SequenceState, Step, chain_parents
from localspec.types import Logits

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not get_backend("mlx").is_installed(), reason="the reference runs on MLX"),
]

NUM_TOKENS = 24
MAX_PROMPT = 40
NEARLY_TIED = 0.5  # logits
ROOT = Path(__file__).resolve().parents[2]
CONFIG = {  # config.json: metadata below the architecture's name
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
}
MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}


# ---------------------------------------------------------------- the reference's files


def write_reference(source: Path, folder: Path) -> Path:
    """A qwen3 GGUF file as a float32 Hugging Face folder."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(source)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    weights: dict[str, NDArray[np.float32]] = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        weights[folder_name(tensor.name)] = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {name: metadata[f"qwen3.{key}"] for name, key in CONFIG.items()}
    fixed = {"model_type": "qwen3", "tie_word_embeddings": "output.weight" not in {t.name for t in reader.tensors}}
    write_json(folder / "config.json", config | fixed)
    write_json(folder / "tokenizer.json", tokenizer_json(metadata))
    texts = metadata["tokenizer.ggml.tokens"]
    settings = {
        "eos_token": texts[metadata["tokenizer.ggml.eos_token_id"]],
        "add_bos_token": metadata["tokenizer.ggml.add_bos_token"],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    write_json(folder / "tokenizer_config.json", settings)
    return folder


def folder_name(name: str) -> str:
    """Hugging Face's name for a GGUF tensor."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    assert match, name
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{MODULES[match[2]]}.weight"


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The byte-level BPE inside the file, with GPT-2's own split."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    texts, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={text: token for token, text in enumerate(texts)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = [text for text, kind in zip(texts, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    parsed: dict[str, Any] = json.loads(tokenizer.to_str())
    return parsed


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


# ---------------------------------------------------------------- greedy text and rows


def padded(model: LanguageModel, state: SequenceState, ids: list[int], rows: tuple[int, ...]) -> Step:
    """A chain below the committed tokens, of at least the width class's smallest width."""
    ids = ids + [0] * (model.capabilities.width_class.min_width - len(ids))
    return Step(state, (HostTokens(np.array(ids, np.int32)),), chain_parents(state, len(ids)), rows)


def greedy(model: LanguageModel, prompt: list[int]) -> tuple[list[int], Logits]:
    """`NUM_TOKENS` tokens, one pass each, and the row that each was chosen from."""
    state, text, rows, news = model.open(), list[int](), [], prompt
    try:
        while len(text) < NUM_TOKENS:
            [scores] = model.forward([padded(model, state, news, (len(news) - 1,))])
            text.append(int(scores.argmax().numpy()[0]))
            rows.append(scores.rows((0,)).copy())
            state.keep(range(len(news)))
            news = text[-1:]
    finally:
        state.close()
    return text, np.concatenate(rows)


def rows_on(model: LanguageModel, prompt: list[int], text: list[int]) -> Logits:
    """[NUM_TOKENS, V] the rows that predict each token of a given text, from one pass."""
    ids, state = prompt + text[:-1], model.open()
    wanted = tuple(range(len(prompt) - 1, len(ids)))
    try:
        [scores] = model.forward([padded(model, state, ids, wanted)])
        return scores.rows(range(len(wanted))).copy()
    finally:
        state.close()


@dataclass(frozen=True, slots=True)
class Answer:
    """What the reference wrote after a prompt, and the rows it chose from."""

    prompt: list[int]
    text: list[int]
    rows: Logits


@dataclass(frozen=True, slots=True)
class Reference:
    """The reference's answers. prompts: as given; their tokens in `answers` may be fewer."""

    path: Path
    prompts: list[Prompt]
    answers: list[Answer]


@pytest.fixture(scope="module", params=["target", "draft"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Answers to a prompt of each domain and one more conversation; long texts cut short, for time."""
    name: str = request.param
    path = ROOT / "models" / "tiny" / f"{name}.gguf"
    folder = write_reference(path, tmp_path_factory.mktemp("agreement") / name)
    model = get_backend("mlx").load(folder, LoadSettings(context=512, dtype="float32"))
    prompts = [*load_prompts(per_domain=1), load_prompts(domains=["chat"], per_domain=2)[1]]
    answers = []
    for prompt in prompts:
        ids = prompt.encode(model.tokenizer).tolist()
        ids = ids if prompt.messages else ids[:MAX_PROMPT]
        answers.append(Answer(ids, *greedy(model, ids)))
    model.close()
    return Reference(path, prompts, answers)


def opened(backend: str, reference: Reference) -> LanguageModel:
    if not get_backend(backend).is_installed():
        pytest.skip(f"needs {backend}")
    model = get_backend(backend).load(reference.path, LoadSettings(context=512))
    for prompt, answer in zip(reference.prompts, reference.answers, strict=True):
        assert prompt.encode(model.tokenizer).tolist()[: len(answer.prompt)] == answer.prompt
    return model


# ---------------------------------------------------------------- the comparison


def test_mlx_reads_the_file_as_the_reference_does(reference: Reference) -> None:
    """Same greedy text, same rows. Measured on an x86 CPU: the largest difference of any logit was 0."""
    model = opened("mlx", reference)
    for answer in reference.answers:
        text, rows = greedy(model, answer.prompt)
        assert text == answer.text
        np.testing.assert_allclose(rows, answer.rows, rtol=0, atol=1e-3)
    model.close()


def test_llama_cpp_differs_from_the_reference_only_where_tokens_are_nearly_tied(reference: Reference) -> None:
    """It rounds activations to 8 bits inside its products, so its rows are near, not equal.

    Measured on an x86 CPU on the first prompts of each domain, each text cut to 40 tokens, 24 tokens each:
    target (Q4_0), 9 prompts: 215 of 216 tokens as the reference's, margin at the other one 0.11 logits;
    draft (Q8_0), 30 prompts: 712 of 720, margins at the others at most 0.10. The largest difference of
    any logit was 0.65, where logits have a standard deviation of 3.8. The bounds leave room for other
    kernels.
    """
    model = opened("llamacpp", reference)
    num_equal = 0
    for answer in reference.answers:
        own = rows_on(model, answer.prompt, answer.text).argmax(axis=1)
        for place in np.flatnonzero(own != answer.text).tolist():
            assert margin(answer, place, int(own[place])) < NEARLY_TIED
        num_equal += int(np.count_nonzero(own == answer.text))
        text, _ = greedy(model, answer.prompt)
        parted = [place for place in range(NUM_TOKENS) if text[place] != answer.text[place]][:1]
        for place in parted:  # up to here both had read the same
            assert margin(answer, place, text[place]) < NEARLY_TIED
    assert num_equal >= 0.9 * NUM_TOKENS * len(reference.answers)
    model.close()


def margin(answer: Answer, place: int, other: int) -> float:
    """By how many logits the reference preferred its token to another."""
    return float(answer.rows[place, answer.text[place]] - answer.rows[place, other])
