"""Workloads: all there, fit for the bundled pair, the same every time, and replaced by a user's prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from localspec.bench.stranger import shuffle, write_stranger
from localspec.bench.workloads import WORKLOADS, listing, load_workloads
from localspec.errors import ModelFileError, PromptError, UnknownNameError
from localspec.loading import choose_backend, load_model, open_pair
from localspec.pair import Pair
from localspec.protocols import LoadSettings
from localspec.sampling import SamplingParams
from localspec.testing.files import write_safetensors

NUM_TOKENS = 96


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with open_pair(backend="llamacpp", settings=LoadSettings(num_sequences=4, threads=1)) as opened:
        yield opened


def test_every_workload_has_prompts_of_its_own() -> None:
    loaded = load_workloads(num_prompts=40)
    assert [work.name for work in loaded] == [work.name for work in WORKLOADS]
    for work in loaded:
        assert len(work.prompts) >= 8, work.name
        assert len({prompt.id for prompt in work.prompts}) == len(work.prompts)
        assert {prompt.domain for prompt in work.prompts} == {work.name}
    texts = [str(prompt.text or prompt.messages) for work in loaded[:-1] for prompt in work.prompts]
    assert len(set(texts)) == len(texts)


def test_the_listing_says_what_each_is_in_one_line() -> None:
    lines = listing().splitlines()
    assert [line.split()[0] for line in lines] == [work.name for work in WORKLOADS]
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)


@pytest.mark.real
def test_every_prompt_fits_the_bundled_pair(pair: Pair) -> None:
    for work in load_workloads(num_prompts=1000):
        for prompt in work.prompts:
            tokens = prompt.encode(pair.target.tokenizer)
            assert len(tokens) + NUM_TOKENS < 1024, prompt.id


@pytest.mark.real
@pytest.mark.slow
def test_copies_are_found_in_the_prompt_and_random_words_are_not(pair: Pair) -> None:
    """Lookup guesses copies: on most of `copy` it is accepted, on `words` hardly ever. Counts, no times."""
    lengths = {}
    with pair.session("ngram") as session:
        for work in load_workloads(names=["copy", "words"], num_prompts=8):
            rounds = tokens = 0
            for prompt in work.prompts:
                stats = session.generate(
                    prompt.encode(pair.target.tokenizer).tolist(), SamplingParams(max_tokens=32)
                ).stats
                rounds, tokens = rounds + stats.num_rounds, tokens + stats.num_tokens
            lengths[work.name] = tokens / rounds
    assert lengths["copy"] > 1.6 > 1.4 > lengths["words"]


def test_prompts_are_the_same_every_time() -> None:
    assert load_workloads() == load_workloads()


def test_a_users_folder_replaces_and_adds(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Once upon a time", encoding="utf-8")
    lines = [
        {"id": "x", "domain": "code", "text": "def f(alpha):"},
        {"id": "y", "domain": "mine", "text": "beta gamma"},
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    loaded = {work.name: work for work in load_workloads(tmp_path)}
    assert set(loaded) == {tmp_path.name, "code", "mine"}
    assert [prompt.text for prompt in loaded[tmp_path.name].prompts] == ["Once upon a time"]
    assert [prompt.text for prompt in loaded["code"].prompts] == ["def f(alpha):"]
    [words] = load_workloads(tmp_path, ["words"], 1)
    assert set((words.prompts[0].text or "").split()) <= {"Once", "upon", "time", "def", "alpha", "beta", "gamma"}
    [stranger] = load_workloads(tmp_path, ["stranger"])
    assert stranger.foreign_draft and len(stranger.prompts) == 3
    [copy] = load_workloads(tmp_path, ["copy"], 2)
    assert len(copy.prompts) == 2


def test_wrong_names_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'prose'"):
        load_workloads(names=["prosa"])
    with pytest.raises(PromptError, match="no prompts"):
        load_workloads(tmp_path)
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"id": "a", "domain": "b", "text": "x"}\n' * 2, encoding="utf-8")
    with pytest.raises(PromptError, match="same id"):
        load_workloads(twice)
    with pytest.raises(PromptError, match="hold none for the workload prose"):
        load_workloads(twice, ["prose"])


def test_without_a_draft_model_its_workload_is_left_out_unless_named() -> None:
    assert "stranger" not in [work.name for work in load_workloads(has_draft=False)]
    assert [work.name for work in load_workloads(names=["stranger"], has_draft=False)] == ["stranger"]


# ---------------------------------------------------------------- the stranger


@pytest.mark.real
def test_the_shuffle_moves_ordinary_tokens_only(pair: Pair) -> None:
    tokenizer = pair.target.tokenizer
    order = shuffle(tokenizer, tokenizer.num_tokens + 7)
    special = [token for token in range(tokenizer.num_tokens) if tokenizer.is_special(token)]
    assert sorted(order.tolist()) == list(range(tokenizer.num_tokens + 7))
    assert special and order[special].tolist() == special
    assert order[-7:].tolist() == list(range(tokenizer.num_tokens, tokenizer.num_tokens + 7))
    assert np.count_nonzero(order != np.arange(len(order))) > 0.99 * (tokenizer.num_tokens - len(special))


@pytest.mark.real
def test_the_stranger_is_the_draft_model_in_other_letters(pair: Pair, tmp_path: Path) -> None:
    """Given the same text in its own alphabet it says what the draft model says, in that alphabet; given ours it does
    not. So it costs the same and knows nothing."""
    assert pair.draft is not None
    path = write_stranger(pair.draft.info.path, tmp_path, pair.draft.tokenizer)
    assert path.stat().st_size == pair.draft.info.path.stat().st_size
    model = load_model(path, "llamacpp", LoadSettings(num_sequences=2, threads=1))
    try:
        order = shuffle(pair.draft.tokenizer, pair.draft.vocab_size)  # order[new] = old
        to_new = np.argsort(order)
        prompt = pair.draft.tokenizer.encode("The door was opened, and a man", special=False)
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        with Pair(pair.draft, None).session("nothing") as session:
            said = list(session.generate(prompt.tolist(), params).tokens)
        with Pair(model, None).session("nothing") as session:
            in_its_letters = list(session.generate(to_new[prompt].tolist(), params).tokens)
            in_ours = list(session.generate(prompt.tolist(), params).tokens)
    finally:
        model.close()
    assert order[in_its_letters].tolist() == said
    assert in_ours != said


def test_a_folder_becomes_a_stranger_too(tmp_path: Path) -> None:
    source = write_safetensors(tmp_path / "model")
    tokenizer = choose_backend("mlx", source).open_tokenizer(source)
    (tmp_path / "out").mkdir()
    path = write_stranger(source, tmp_path / "out", tokenizer)
    before, after = load_file(source / "model.safetensors"), load_file(path / "model.safetensors")
    rows = before["model.embed_tokens.weight"]
    assert np.array_equal(after["model.embed_tokens.weight"], rows[shuffle(tokenizer, len(rows))])
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed <= {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_file_without_a_vocabulary_is_refused(tmp_path: Path, pair: Pair) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelFileError, match="no rows of a vocabulary"):
        write_stranger(tmp_path / "empty", tmp_path / "out", pair.target.tokenizer)
