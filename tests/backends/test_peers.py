"""Other libraries' decoding, as benchmarks run it: the same text as the library gives when it is called by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from localspec.bench.prompts import load_prompts
from localspec.errors import SettingError, UnknownNameError, UsageError
from localspec.loading import choose_backend, get_backend, get_peer, peer_names
from localspec.peers import Peer, PeerAnswer, PeerMode, PeerRequest
from localspec.protocols import LoadSettings
from localspec.testing.files import write_gguf, write_safetensors
from tests.conftest import Pair

NUM_TOKENS = 16
SETTINGS = LoadSettings(context=512, threads=1, extra_buffers=False)  # as `by_hand`
MLX_SETTINGS = LoadSettings(context=512)


def prompts(path: Path, backend: str, count: int = 2) -> list[list[int]]:
    tokenizer = choose_backend(backend, path).open_tokenizer(path)
    chosen = load_prompts(domains=["chat", "code"], per_domain=count)
    return [prompt.encode(tokenizer).tolist()[:400] for prompt in chosen]


def answer(peer: Peer, tokens: list[int], temperature: float = 0.0, seed: int = 1) -> PeerAnswer:
    return peer.decode(PeerRequest(tokens, NUM_TOKENS, temperature, seed, frozenset()))


# ---------------------------------------------------------------- llama-cpp-python


@contextmanager
def by_hand(path: Path, draft: bool) -> Iterator[Any]:
    """A `Llama` as its documentation makes one; without the buffers that crash some builds."""
    get_backend("llamacpp").report()  # installs the log and finds out about the buffers
    import llama_cpp
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    library: Any = llama_cpp.llama_cpp
    original = library.llama_model_default_params

    def defaults() -> Any:
        params = original()
        params.use_extra_bufts = False
        return params

    library.llama_model_default_params = defaults
    try:
        lookup = LlamaPromptLookupDecoding(num_pred_tokens=4, max_ngram_size=2) if draft else None
        llama = llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, n_threads_batch=1, draft_model=lookup, verbose=False)
    finally:
        library.llama_model_default_params = original
    try:
        yield llama
    finally:
        llama.close()


@pytest.mark.slow
@pytest.mark.real
def test_llama_cpp_python_says_what_it_says_by_hand(tiny_pair: Pair) -> None:
    modes = [PeerMode("llama-cpp-python", {"num": 4})]
    peers = get_peer("llama-cpp-python").open(tiny_pair.target, None, SETTINGS, modes)
    assert [peer.name for peer in peers] == ["llama-cpp-python plain", "llama-cpp-python lookup:num=4,max=2"]
    texts = set()
    try:
        for peer, draft in zip(peers, (False, True), strict=True):
            with by_hand(tiny_pair.target, draft) as llama:
                for tokens in prompts(tiny_pair.target, "llamacpp"):
                    mine = answer(peer, tokens)
                    made = llama.create_completion(tokens, max_tokens=NUM_TOKENS, temperature=0.0, repeat_penalty=1.0)
                    theirs = made["choices"][0]["text"]
                    ended = made["choices"][0]["finish_reason"] == "stop"
                    text = llama.detokenize(list(mine.tokens), prev_tokens=tokens).decode(errors="ignore")
                    assert text.startswith(theirs) if ended else text == theirs
                    assert len(mine.tokens) == NUM_TOKENS
                    texts.add(text)
    finally:
        for peer in peers:
            peer.close()
    assert len(texts) >= 4


@pytest.mark.real
def test_llama_cpp_pythons_passes_are_counted(tiny_pair: Pair) -> None:
    """Plainly a pass per token; with lookup fewer, on a text that repeats."""
    plain, lookup = get_peer("llama-cpp-python").open(tiny_pair.target, None, SETTINGS, [PeerMode("llama-cpp-python")])
    tokens = prompts(tiny_pair.target, "llamacpp", 1)[0][:8] * 6
    try:
        first, second = answer(plain, tokens), answer(lookup, tokens)
        assert first.num_rounds == NUM_TOKENS and first.num_drafted is None
        assert second.num_rounds is not None and second.num_drafted is not None
        assert 1 <= second.num_rounds <= NUM_TOKENS and second.num_drafted > 0
        assert len(second.tokens) <= second.num_rounds + second.num_drafted
        assert first.decode_ms > 0 and first.num_timed == second.num_timed == NUM_TOKENS - 1
    finally:
        plain.close()
        lookup.close()


@pytest.mark.real
def test_llama_cpp_python_samples_by_seed_and_stops(tiny_pair: Pair) -> None:
    [peer] = get_peer("llama-cpp-python").open(tiny_pair.target, None, SETTINGS, [])
    tokens = prompts(tiny_pair.target, "llamacpp", 1)[0]
    try:
        drawn = [answer(peer, tokens, 1.0, seed).tokens for seed in (1, 1, 2, 3)]
        assert drawn[0] == drawn[1] and len(set(drawn)) >= 2
        whole = answer(peer, tokens).tokens
        stopped = peer.decode(PeerRequest(tokens, NUM_TOKENS, 0.0, 1, frozenset({whole[3]}))).tokens
        assert stopped == whole[: whole.index(whole[3]) + 1]
    finally:
        peer.close()


# ---------------------------------------------------------------- mlx-lm


@lru_cache(maxsize=2)
def mlx_model(path: Path) -> Any:
    import mlx.core as mx
    from mlx_lm import load

    model: Any = load(str(path))[0]
    model.set_dtype(mx.float32)  # as our backend computes on a CPU
    return model


def mlx_by_hand(target: Path, draft: Path | None, tokens: list[int]) -> list[int]:
    import mlx.core as mx
    from mlx_lm.generate import generate_step, speculative_generate_step

    model = mlx_model(target)
    if draft is None:
        return [int(token) for token, _ in generate_step(mx.array(tokens), model, max_tokens=NUM_TOKENS)]
    helper = mlx_model(draft)
    steps = speculative_generate_step(mx.array(tokens), model, helper, num_draft_tokens=4, max_tokens=NUM_TOKENS)
    return [int(token) for token, _, _ in steps]


def check_mlx(target: Path, draft: Path, num_prompts: int) -> list[PeerAnswer]:
    """Both modes give what the library gives by hand; the answers."""
    modes = [PeerMode("mlx-lm", {"num": 4})]
    peers = get_peer("mlx-lm").open(target, draft, MLX_SETTINGS, modes)
    assert [peer.name for peer in peers] == ["mlx-lm plain", "mlx-lm draft_model:num=4"]
    answers = []
    for tokens in (tokens[-24:] for tokens in prompts(target, "mlx", num_prompts)[: num_prompts * 2]):
        for peer, helper in zip(peers, (None, draft), strict=True):
            answers.append(answer(peer, tokens))
            assert 0 < answers[-1].num_timed < NUM_TOKENS
            assert list(answers[-1].tokens) == mlx_by_hand(target, helper, tokens)
            again = [answer(peer, tokens, 1.0, 7).tokens for _ in range(2)]
            assert again[0] == again[1]
    for peer in peers:
        peer.close()
    return answers


def test_mlx_lm_says_what_it_says_by_hand(tmp_path: Path) -> None:
    target = write_safetensors(tmp_path / "target")
    draft = write_safetensors(tmp_path / "draft", jitter=0.3)
    answers = check_mlx(target, draft, 1)
    assert answers[0].num_rounds == NUM_TOKENS
    assert answers[1].num_rounds is not None and answers[1].num_rounds <= NUM_TOKENS


@pytest.mark.shared
@pytest.mark.slow
def test_mlx_lm_says_what_it_says_by_hand_on_the_trained_pair(shared_models: Path) -> None:
    answers = check_mlx(shared_models / "target", shared_models / "draft", 1)
    assert len({answer.tokens for answer in answers}) == 2, "two prompts, and greedy text is the same in both modes"
    assert all((one.num_rounds or NUM_TOKENS) < NUM_TOKENS for one in answers[1::2])


def test_mlx_lm_without_a_draft_model_of_the_vocabulary_is_plain(tmp_path: Path) -> None:
    target = write_safetensors(tmp_path / "target")
    other = write_safetensors(tmp_path / "other", num_merges=4)
    library = get_peer("mlx-lm")
    assert len(library.open(target, None, MLX_SETTINGS, [PeerMode("mlx-lm")])) == 1
    assert len(library.open(target, other, MLX_SETTINGS, [PeerMode("mlx-lm")])) == 1
    with pytest.raises(UsageError, match="vocabulary only"):
        library.open(target, other, MLX_SETTINGS, [PeerMode("mlx-lm", {"num": 2})])


# ---------------------------------------------------------------- refusals


def test_libraries_are_found_by_name() -> None:
    assert peer_names() == ["llama-cpp-python", "mlx-lm"]
    with pytest.raises(UnknownNameError, match="Did you mean 'mlx-lm'"):
        get_peer("mlx_lm")


def test_files_that_a_library_does_not_read_are_refused(tmp_path: Path) -> None:
    file, folder = write_gguf(tmp_path / "a.gguf"), write_safetensors(tmp_path / "b")
    with pytest.raises(UsageError, match=r"mlx-lm cannot open a\.gguf"):
        get_peer("mlx-lm").open(file, None, MLX_SETTINGS, [])
    with pytest.raises(UsageError, match="llama-cpp-python cannot open b"):
        get_peer("llama-cpp-python").open(folder, None, SETTINGS, [])


@pytest.mark.parametrize("text", ["mlx-lm:num", "mlx-lm:num=x", "mlx-lm:num=0", "mlx-lm:num=-1"])
def test_modes_are_name_and_number(text: str) -> None:
    with pytest.raises(SettingError, match="name=number"):
        PeerMode.parse(text)


def test_modes_have_known_settings() -> None:
    assert PeerMode.parse("llama-cpp-python:num=4,max=3").get({"num": 10, "max": 2}) == {"num": 4, "max": 3}
    with pytest.raises(SettingError, match="no setting depth"):
        PeerMode.parse("mlx-lm:depth=4").get({"num": 3})
