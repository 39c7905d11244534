"""The MLX backend against the contract, numpy's noise, other readers of the same files, and bad files."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from localspec import noise
from localspec.errors import (
    BackendError,
    BackendMissingError,
    LocalspecError,
    ModelFileError,
    ModelNotFoundError,
    PromptError,
    SettingError,
    UnsupportedModelError,
)
from localspec.formats.gguf import read_header
from localspec.loading import get_backend
from localspec.noise import Purpose
from localspec.protocols import (
    HostTokens,
    LanguageModel,
    LoadSettings,
    Rewind,
    SequenceState,
    Step,
    Tokens,
    chain_parents,
)
from localspec.testing.conformance import BackendConformance
from localspec.testing.files import write_gguf, write_safetensors
from localspec.types import Logits

BACKEND = get_backend("mlx")
ROOT = Path(__file__).resolve().parents[2]
VOCABULARIES = ROOT.parent / "shared" / "vocabs"
needs_mlx = pytest.mark.skipif(not BACKEND.is_installed(), reason='needs MLX: pip install "localspec[mlx-cpu]"')


def module(name: str) -> Any:
    """A module of the backend, which is loaded under a name of the core's choosing."""
    return import_module(f"{type(BACKEND).__module__.rpartition('.')[0]}.{name}")


def step(state: SequenceState, *tokens: Tokens, rows: tuple[int, ...] | None = None) -> Step:
    """A chain below what is pending."""
    return Step(state, tokens, chain_parents(state, sum(len(part) for part in tokens)), rows)


def host(*ids: int) -> HostTokens:
    return HostTokens(np.array(ids, np.int32))


def rows_of(model: LanguageModel, ids: list[int]) -> Logits:
    """[T, V] rows of a fresh sequence."""
    state = model.open()
    try:
        [scores] = model.forward([step(state, host(*ids))])
        return scores.rows(range(len(ids))).copy()
    finally:
        state.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlx")


# ---------------------------------------------------------------- the contract


@cache
def opened(path: Path, **settings: Any) -> LanguageModel:
    return BACKEND.load(path, LoadSettings(**settings))


@needs_mlx
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gguf"], scope="class")
class TestConformance(BackendConformance):
    """All architectures that GGUF files of ours may have, and a quantised GGUF file."""

    path: ClassVar[Path]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _file(cls, kind: str, folder: Path) -> None:
        if kind == "gguf":
            TestConformance.path = write_gguf(folder / "suite.gguf", quantization="Q4_0")
        else:
            TestConformance.path = write_safetensors(folder / f"suite-{kind}", architecture=kind)

    def model(self) -> LanguageModel:
        return opened(self.path)


@needs_mlx
@pytest.mark.parametrize("kind", ["llama", "qwen3", "window"], scope="class")
class TestManyInOnePass(BackendConformance):
    """Sequences side by side on the batch axis, trees and windows included."""

    num_random_rounds = 5
    opened: ClassVar[LanguageModel]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _file(cls, kind: str, folder: Path) -> None:
        path = write_safetensors(
            folder / f"many-{kind}", architecture="llama" if kind == "window" else kind, num_layers=2
        )
        if kind == "window":
            types = ["full_attention", "sliding_attention"]
            change_json(path / "config.json", layer_types=types, sliding_window=8)
        TestManyInOnePass.opened = BACKEND.load(path, LoadSettings(context=512, num_sequences=6, batch=True))

    def model(self) -> LanguageModel:
        return self.opened

    def test_it_runs_them_together(self) -> None:
        capabilities = self.model().capabilities
        assert capabilities.batches and capabilities.trees


@needs_mlx
@pytest.mark.slow
@pytest.mark.real
class TestConformanceOfTheBundledDraft(BackendConformance):
    """Real weights, whose rows are sharp and whose rounding is not that of random ones."""

    num_random_rounds = 6

    def model(self) -> LanguageModel:
        return opened(ROOT / "models" / "tiny" / "draft.gguf")


@needs_mlx
class TestSlidingWindowConformance(BackendConformance):
    """Layers with a window of 8 tokens: full-length caches with a mask, so rewinding stays exact."""

    path: ClassVar[Path]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _file(cls, folder: Path) -> None:
        cls.path = write_safetensors(folder / "window", architecture="llama", num_layers=2)
        change_json(cls.path / "config.json", layer_types=["full_attention", "sliding_attention"], sliding_window=8)

    def model(self) -> LanguageModel:
        return opened(self.path)

    def test_rows_equal_those_of_mlx_lm_with_its_ring_buffer(self) -> None:
        """The window is the one that the model was made for."""
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        ids = [int(t) for t in np.random.default_rng(0).integers(3, 200, 30)]
        reference = load_model(self.path)[0]
        cache = make_prompt_cache(reference)
        want = [np.array(reference(mx.array([[token]]), cache=cache)[0, 0]) for token in ids]
        np.testing.assert_allclose(rows_of(self.model(), ids), np.array(want), atol=1e-4)


# ---------------------------------------------------------------- waiting for the device


@needs_mlx
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_round_waits_for_the_device_once(folder: Path, temperature: float) -> None:
    """Four chained draft steps, the verify pass and its winners: one wait, whatever is read afterwards."""
    target = cast(Any, opened(write_gguf(folder / "t.gguf", seed=1)))
    draft = cast(Any, opened(write_gguf(folder / "d.gguf", seed=1, jitter=0.1)))
    states = target.open(), draft.open()
    anchor: Tokens = host(7)
    for round_number in range(3):
        before = target.num_syncs
        segments: list[Tokens] = [anchor]
        for depth in range(4):
            [scores] = draft.forward([step(states[1], segments[-1])])
            keys = noise.keys(5, Purpose.TOKEN, np.array([depth]))
            segments.append(scores.winners(temperature, keys) if temperature else scores.argmax())
        [scores] = target.forward([step(states[0], *segments)])
        keys = noise.keys(5, Purpose.TOKEN, np.arange(5))
        winners = scores.winners(temperature, keys) if temperature else scores.argmax()
        assert target.num_syncs == before, "a pass waited"
        winners.numpy()
        assert target.num_syncs == before + 1
        for segment in segments:
            segment.numpy()
        assert target.num_syncs == before + 1, f"round {round_number}: a drafted token was waited for again"
        anchor = host(int(winners.numpy()[-1]))
        for state in states:
            state.keep((0,))
    for state in states:
        state.close()


@needs_mlx
def test_tokens_made_later_do_not_hold_up_earlier_ones(folder: Path) -> None:
    """Reading one token fetches those made before it, not those made after it."""
    model = cast(Any, opened(write_gguf(folder / "order.gguf")))
    state = model.open()
    [scores] = model.forward([step(state, host(5))])
    first = scores.argmax()
    [scores] = model.forward([step(state, first)])
    second = scores.argmax()
    first.numpy()
    before = model.num_syncs
    second.numpy()
    assert model.num_syncs == before + 1
    state.close()


# ---------------------------------------------------------------- noise and scores


@needs_mlx
def test_the_device_draws_the_bits_that_noise_defines() -> None:
    """32-bit arithmetic wraps alike, for 10,000 tokens under keys with every bit in use."""
    import mlx.core as mx

    keys = np.concatenate(
        [noise.keys(2**64 - 1, Purpose.TOKEN, np.arange(6)), np.array([[0, 0], [2**32 - 1, 2**32 - 1]], np.uint32)]
    )
    got = np.array(module("scores").noise_bits(mx.array(keys), mx.arange(10_000, dtype=mx.uint32)))
    tokens = np.arange(10_000)
    want = np.array([noise.bits((int(low), int(high)), tokens) for low, high in keys])
    assert got.dtype == np.uint32 and np.array_equal(got, want)


@needs_mlx
def test_the_device_noise_is_gumbel_to_the_last_bits() -> None:
    """Logarithms may round differently; nothing else may."""
    import mlx.core as mx

    keys = noise.keys(11, Purpose.TOKEN, np.arange(2))
    for num_tokens in (10_000, 270_000):  # less than a block of groups, and more
        got = np.array(module("scores").gumbel(mx.array(keys), num_tokens))
        for row, (low, high) in zip(got, keys, strict=True):
            want = noise.gumbel((int(low), int(high)), np.arange(num_tokens))
            np.testing.assert_allclose(row, want, rtol=2e-6, atol=2e-6)


def device_scores(rows: NDArray[np.float32], dtype: str = "float32") -> Any:
    import mlx.core as mx

    return module("scores").DeviceScores(mx.array(rows).astype(getattr(mx, dtype)), module("scores").Ledger())


@needs_mlx
@pytest.mark.parametrize("num_values", [2, 40, 100_000])
def test_argmax_takes_the_lower_id_and_top_the_largest_values(num_values: int) -> None:
    """With 2 values ties reach far beyond the candidates that are fetched first; with 40 they crowd the edge."""
    rng = np.random.default_rng(num_values)
    rows = rng.integers(0, num_values, (3, 5000)).astype(np.float32)
    scores = device_scores(rows)
    assert scores.argmax().numpy().tolist() == rows.argmax(axis=1).tolist()
    for k in (1, 7, 64):
        ids, values = scores.top(k).numpy()
        assert ids.dtype == np.int32 and all(len(set(row)) == k for row in ids.tolist())
        assert np.array_equal(values, -np.sort(-rows, axis=1)[:, :k])
        assert np.array_equal(values, np.take_along_axis(rows, ids, axis=1))


@needs_mlx
def test_scores_of_nothing_are_empty() -> None:
    scores = device_scores(np.zeros((0, 9), np.float32))
    assert (scores.num_rows, len(scores.argmax()), scores.rows(()).shape) == (0, 0, (0, 9))
    assert len(scores.winners(1.0, np.zeros((0, 2), np.uint32)).numpy()) == 0
    assert [part.shape for part in scores.top(3).numpy()] == [(0, 3), (0, 3)]


@needs_mlx
def test_sixteen_bit_logits_are_widened_exactly() -> None:
    rows = np.array([[1.0, 1.0078125, -3.0]], np.float32)
    scores = device_scores(rows, "bfloat16")
    assert np.array_equal(scores.rows((0,)), rows) and scores.argmax().numpy().tolist() == [1]


# ---------------------------------------------------------------- passes


@needs_mlx
def test_a_long_prefill_in_chunks_gives_the_rows_of_short_steps(folder: Path) -> None:
    """Rows on both sides of the cut after 512 tokens, a tree across it included."""
    path = write_safetensors(folder / "long")
    change_json(path / "config.json", max_position_embeddings=2048)
    model = opened(path)
    ids = [int(t) for t in np.random.default_rng(1).integers(3, 200, 700)]
    state = model.open()
    [scores] = model.forward([step(state, host(*ids), rows=(10, 511, 512, 699))])
    whole = scores.rows(range(4)).copy()
    state.keep(())
    parts = []
    for start in range(0, 700, 100):
        [scores] = model.forward([step(state, host(*ids[start : start + 100]))])
        parts.append(scores.rows(range(100)).copy())
        state.keep(range(100))
    np.testing.assert_allclose(whole, np.concatenate(parts)[[10, 511, 512, 699]], atol=1e-5)
    state.truncate(0)
    parents = chain_parents(state, 700)
    parents[600] = -1  # a second root after the cut: its row is that of the token alone
    [scores] = model.forward([Step(state, (host(*ids),), parents, (600,))])
    np.testing.assert_allclose(scores.rows((0,)), rows_of(model, [ids[600]]), atol=1e-5)
    state.close()


@needs_mlx
def test_malformed_steps_are_refused_before_anything_changes(folder: Path) -> None:
    model = opened(write_gguf(folder / "steps.gguf"))
    state, other = model.open(), model.open()
    model.forward([step(state, host(3, 4, 5))])
    wrong = [
        Step(state, (host(1, 2),), np.array([2], np.int32)),
        Step(state, (host(1),), np.array([3], np.int32)),
        Step(state, (host(1),), np.array([-2], np.int32)),
        Step(state, (host(model.vocab_size),), np.array([2], np.int32)),
        Step(state, (host(1, 2),), np.array([2, 3], np.int32), (1, 0)),
        Step(state, (host(1, 2),), np.array([2, 3], np.int32), (2,)),
        Step(opened(write_gguf(folder / "other.gguf")).open(), (host(1),), np.array([-1], np.int32)),
    ]
    for bad in wrong:
        with pytest.raises(ValueError):  # noqa: PT011 - the contract names no more than that
            model.forward([step(other, host(1)), bad])
        assert (state.num_pending, other.num_pending) == (3, 0)
    with pytest.raises(ValueError, match="two steps"):
        model.forward([step(state, host(1)), step(state, host(2))])
    state.close()
    other.close()


@needs_mlx
def test_a_failed_pass_has_not_happened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BackendError with the runtime's message; both sequences go on as before."""
    model = cast(Any, opened(write_gguf(folder / "fails.gguf")))
    states = [model.open(), model.open()]
    for state in states:
        model.forward([step(state, host(3, 4))])
    want = rows_of(model, [3, 4, 5])[2]
    run = model._network.run

    def fail(ids: Any, caches: Any, *rest: Any) -> Any:
        result = run(ids, caches, *rest)
        if caches is states[1].caches:
            raise RuntimeError("the device fell over")
        return result

    monkeypatch.setattr(model._network, "run", fail)
    with pytest.raises(BackendError, match="fell over"):
        model.forward([step(state, host(9, 9)) for state in states])
    monkeypatch.undo()
    for state in states:
        assert (state.length, state.num_pending) == (0, 2)
        [scores] = model.forward([step(state, host(5))])
        assert np.array_equal(scores.rows((0,))[0], want)
        state.close()


# ---------------------------------------------------------------- architectures, judged by what they do

_SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "layer_norm_epsilon": 1e-5, "rope_theta": 1e4,
    "max_position_embeddings": 512, "tie_word_embeddings": True, "n_ctx": 512, "n_embd": 64, "n_head": 4, "n_layer": 2,
    "n_positions": 512, "sliding_window": None, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 16, "kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "qk_nope_head_dim": 16, "n_routed_experts": None, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "rope_parameters": {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16384},
}  # fmt: skip


@needs_mlx
@pytest.mark.parametrize(
    ("architecture", "trees", "width_one_differs"),
    [
        ("gemma2", True, False),
        ("deepseek_v3", True, True),  # latent attention, which goes another way for a single token
        ("gpt2", True, False),  # learned positions
        ("ministral3", False, False),  # scales queries by their position, from 16384 on
    ],
)
def test_the_self_check_finds_what_an_architecture_can_do(
    architecture: str, trees: bool, width_one_differs: bool
) -> None:
    import mlx.core as mx
    from mlx.utils import tree_map

    classes = import_module(f"mlx_lm.models.{architecture}")
    model = classes.Model(classes.ModelArgs.from_dict(_SIZES | {"model_type": architecture}))
    mx.random.seed(0)
    model.update(tree_map(lambda weight: 0.1 * mx.random.normal(weight.shape), model.parameters()))
    network = module("network").Network(model)
    assert (network.trees, network.width_one_differs) == (trees, width_one_differs), network.notes
    assert trees or "No token trees" in network.notes[0]


# ---------------------------------------------------------------- files that agree


@needs_mlx
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("quantization", ["F32", "F16", "Q4_0", "Q8_0"])
def test_gguf_and_safetensors_give_the_same_rows(folder: Path, architecture: str, quantization: str) -> None:
    """The same numbers in either file: same bits, llama's interleaved heads put back included."""
    name = f"{architecture}-{quantization}"
    gguf = write_gguf(folder / f"{name}.gguf", architecture=architecture, quantization=quantization)
    plain = write_safetensors(folder / name, architecture=architecture, quantization=quantization)
    ids = [5, 80, 3, 200, 41, 41, 7]
    first, second = opened(gguf), opened(plain)
    assert np.array_equal(rows_of(first, ids), rows_of(second, ids))
    assert (first.info.quantization, first.info.num_parameters) == (quantization, second.info.num_parameters)
    for text in ("hello world", "  the\n\tend<|im_end|>", "naïve 🙂"):
        for special in (False, True):
            got, want = (model.tokenizer.encode(text, special=special) for model in (first, second))
            assert got.tolist() == want.tolist()
    assert first.tokenizer.stop_tokens == second.tokenizer.stop_tokens == {0, 2}
    assert first.tokenizer.chat_template == second.tokenizer.chat_template


@needs_mlx
@pytest.mark.parametrize("dtype", ["file", "bfloat16"])
def test_quantised_layers_can_be_kept(folder: Path, dtype: str) -> None:
    """Near the expanded ones, and said to be what they are."""
    path = write_gguf(folder / "kept.gguf", quantization="Q8_0")
    ids = [5, 80, 3, 200]
    expanded, kept = opened(path), opened(path, dtype=dtype)
    assert any("expanded" in note for note in expanded.info.notes) and not kept.info.notes
    assert np.abs(rows_of(expanded, ids) - rows_of(kept, ids)).max() < 0.5
    assert kept.capabilities.trees


@needs_mlx
def test_llama3_rope_factors_in_a_gguf_file_equal_the_configuration(folder: Path) -> None:
    """`rope_freqs.weight` stretches wavelengths as rope_type llama3 does."""
    import mlx.core as mx
    from mlx_lm.models.rope_utils import Llama3RoPE

    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    want = Llama3RoPE(16, 512, False, 1e4, scaling)
    base = 1e4 ** (mx.arange(0, 16, 2) / 16)
    ours = module("gguf_model").FactorRope(16, 1e4, want._freqs / base)
    x = mx.random.normal((1, 2, 5, 16))
    assert float(mx.abs(ours(x, offset=37) - want(x, offset=37)).max()) < 1e-5


@needs_mlx
@pytest.mark.shared
def test_rows_of_the_development_model_equal_its_gguf_twin(shared_models: Path) -> None:
    """Q8_0 of real weights is close to the bfloat16 they were made from."""
    folder_model, gguf_model = opened(shared_models / "draft"), opened(ROOT / "models" / "tiny" / "draft.gguf")
    ids = [int(t) for t in folder_model.tokenizer.encode("def add(a, b):\n    return a", special=False)]
    first, second = rows_of(folder_model, ids), rows_of(gguf_model, ids)
    assert np.abs(first - second).max() < 1.0 and (first.argmax(1) == second.argmax(1)).mean() > 0.8


# ---------------------------------------------------------------- tokenizers


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


# ---------------------------------------------------------------- loading errors


def change_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content), encoding="utf-8")


def test_importing_the_backend_imports_no_runtime() -> None:
    """`localspec --help` must not pay for mlx."""
    code = (
        "import sys; from localspec.loading import get_backend; get_backend('mlx').is_installed();"
        "bad = {'mlx.core', 'mlx_lm', 'transformers', 'tokenizers'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_report_never_raises() -> None:
    report = BACKEND.report()
    assert report.installed == BACKEND.is_installed() and report.install_command.startswith("pip install")
    assert report.devices if report.installed else report.notes


def test_a_missing_runtime_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(BACKEND), "is_installed", lambda self: False)
    with pytest.raises(BackendMissingError, match="pip install"):
        BACKEND.load(write_file(tmp_path / "m.gguf", b"GGUF"), LoadSettings())
    assert "pip install" in " ".join(BACKEND.report().notes)


@pytest.mark.parametrize(
    "settings",
    [
        {"threads": 2}, {"gpu_layers": 0}, {"flash_attention": True}, {"extra_buffers": False}, {"dtype": "int4"},
        {"context": 0}, {"num_sequences": 0},
    ],
)  # fmt: skip
def test_settings_that_it_does_not_have_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        BACKEND.load(tmp_path, LoadSettings(**settings))


def test_a_path_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        BACKEND.load(tmp_path / "nowhere.gguf", LoadSettings())
    assert not BACKEND.accepts(tmp_path / "nowhere.gguf") and not BACKEND.accepts(tmp_path)


def write_file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def tensor_header(path: Path, edit: Any) -> None:
    """Rewrite a safetensors file with its header changed."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def _truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _drop_tensor(path: Path) -> None:
    """A sound file that lacks one: a hole would be refused before."""
    import mlx.core as mx

    file = str(path / "model.safetensors")
    weights = cast(dict[str, mx.array], mx.load(file))
    mx.eval(weights)  # read before the file is written again
    del weights["model.layers.1.mlp.up_proj.weight"]
    mx.save_safetensors(file, weights)


def _reshape(path: Path) -> None:
    def edit(header: Any) -> None:
        header["model.norm.weight"]["shape"] = [32, 2]

    tensor_header(path / "model.safetensors", edit)


BAD_FOLDERS: dict[str, tuple[Any, type[LocalspecError], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), ModelFileError, "config.json"),
    "config no json": (lambda p: (p / "config.json").write_text("{"), ModelFileError, "config.json"),
    "config a list": (lambda p: (p / "config.json").write_text("[]"), ModelFileError, "config.json"),
    "no type": (lambda p: change_json(p / "config.json", model_type=None), ModelFileError, "model_type"),
    "unknown type": (lambda p: change_json(p / "config.json", model_type="zzz"), UnsupportedModelError, "zzz"),
    "no model": (lambda p: change_json(p / "config.json", model_type="base"), ModelFileError, "base"),
    "own code": (lambda p: change_json(p / "config.json", model_file="x.py"), UnsupportedModelError, "x.py"),
    "bad number": (lambda p: change_json(p / "config.json", hidden_size="many"), ModelFileError, "qwen3"),
    "many layers": (lambda p: change_json(p / "config.json", num_hidden_layers=10**9), ModelFileError, "layers"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), ModelFileError, "no weights"),
    "truncated": (_truncate, ModelFileError, "truncated"),
    "empty": (lambda p: (p / "model.safetensors").write_bytes(b""), ModelFileError, "truncated"),
    "bad header": (
        lambda p: (p / "model.safetensors").write_bytes(b"\4" + bytes(7) + b"{xx}"),
        ModelFileError,
        "header",
    ),
    "huge header": (lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 64), ModelFileError, "truncated"),
    "tensor missing": (_drop_tensor, ModelFileError, "model.layers.1.mlp.up_proj.weight"),
    "tensor reshaped": (_reshape, ModelFileError, "model.norm.weight"),
    "part missing": (
        lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
        ModelFileError,
        "model-2.safetensors",
    ),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), ModelFileError, "tokenizer.json"),
    "bad tokenizer": (lambda p: (p / "tokenizer.json").write_text("{}"), ModelFileError, "tokenizer.json"),
}


@needs_mlx
@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_faults_of_a_folder_are_named(tmp_path: Path, fault: str) -> None:
    damage, kind, words = BAD_FOLDERS[fault]
    path = write_safetensors(tmp_path / "model")
    damage(path)
    with pytest.raises(kind, match=words):
        BACKEND.load(path, LoadSettings())


@needs_mlx
def test_a_recurrent_model_in_a_folder_opens_and_says_that_it_replays(tmp_path: Path) -> None:
    """Told by the type of memory that the model asks for."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.mamba2 import Model, ModelArgs

    path = write_safetensors(tmp_path / "mamba")
    config = {
        "model_type": "mamba2", "num_heads": 4, "head_dim": 32, "vocab_size": 320, "hidden_size": 64,
        "intermediate_size": 128, "state_size": 16, "num_hidden_layers": 1, "layer_norm_epsilon": 1e-5, "n_groups": 1,
        "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "tie_word_embeddings": True,
        "time_step_limit": [0.001, 0.1], "time_step_rank": "auto",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    model = BACKEND.load(path, LoadSettings())
    assert model.capabilities.rewind is Rewind.REPLAY and not model.capabilities.trees
    assert "ArraysCache" in model.capabilities.limits[0] and any("replayed" in note for note in model.info.notes)


# ---------------------------------------------------------------- GGUF models that are refused


def text(value: str) -> bytes:
    """As GGUF writes it."""
    return struct.pack("<Q", len(value)) + value.encode()


def patched(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert content.count(old) and len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    return path


@needs_mlx
def test_gguf_models_of_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    path = patched(write_gguf(tmp_path / "a.gguf"), text("qwen3"), text("mambo"))
    with pytest.raises(UnsupportedModelError, match="mambo"):
        BACKEND.load(path, LoadSettings())
    path = patched(write_gguf(tmp_path / "b.gguf"), text("gpt-2"), text("gpt-9"))
    with pytest.raises(UnsupportedModelError, match="gpt-9"):
        BACKEND.load(path, LoadSettings())
    path = patched(write_gguf(tmp_path / "c.gguf"), text("blk.0.ffn_up.weight"), text("blk.0.ffn_xx.weight"))
    with pytest.raises(UnsupportedModelError, match="ffn_xx"):
        BACKEND.load(path, LoadSettings())


@needs_mlx
def test_gguf_tensor_types_that_are_not_read_are_named(tmp_path: Path) -> None:
    """F16 tensors relabelled as I16, which has the same size."""
    name = text("blk.0.ffn_up.weight")
    content = write_gguf(tmp_path / "k.gguf").read_bytes()
    at = content.index(name) + len(name) + 4 + 16
    path = write_file(tmp_path / "k.gguf", content[:at] + struct.pack("<I", 25) + content[at + 4 :])
    with pytest.raises(UnsupportedModelError, match="I16"):
        BACKEND.load(path, LoadSettings())
