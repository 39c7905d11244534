"""Trained heads on llama.cpp: the contract, and that a head changes neither the target's rows nor another head's."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from localspec.drafters import HeadDrafter, Nothing
from localspec.engine.session import Session
from localspec.protocols import DraftHead, LanguageModel, LoadSettings
from localspec.sampling import SamplingParams
from localspec.testing.files import write_gguf
from localspec.testing.gguf_architectures import write_architecture
from localspec.testing.gguf_heads import write_block_head, write_eagle3_head
from localspec.testing.heads import HeadConformance
from localspec.types import Logits
from tests.backends.llamacpp_backend import BACKEND, module
from tests.backends.llamacpp_heads import (
    LOOSE,
    SETTINGS,
    assert_close,
    chain_behind,
    commit,
    features_of,
    forward,
    ids,
    listen,
    loaded,
    write_head,
)
from tests.folders import kept_folder

pytestmark = pytest.mark.skipif(not BACKEND.is_installed(), reason="needs llama.cpp: pip install llama-cpp-python")


# ---------------------------------------------------------------- the contract


@cache
def beside(kind: str, batch: bool = False) -> tuple[LanguageModel, DraftHead]:
    """A head of this kind and its target, kept for all tests of the suite."""
    folder = kept_folder()
    if kind == "mtp":
        target = write_architecture(folder / "target.gguf", "qwen35", mtp=True)
    else:
        target = write_gguf(folder / "target.gguf", quantization="F32", num_layers=4)
    model = BACKEND.load(target, LoadSettings(context=512, num_sequences=4, threads=1, batch=batch))
    head = BACKEND.load_head(target if kind == "mtp" else write_head(folder / "head.gguf", target, kind), model)
    return model, head


class OfKind(HeadConformance):
    """Bits are not promised: what a head reads is cut into passes elsewhere, and its kernels change with the width."""

    tolerance = 0.02
    kind: ClassVar[str] = "dspark"
    batch: ClassVar[bool] = False

    def head(self) -> DraftHead:
        return beside(self.kind, self.batch)[1]

    def target(self) -> LanguageModel:
        return beside(self.kind, self.batch)[0]


class TestDSpark(OfKind):
    pass


class TestDSparkInStreams(OfKind):
    batch = True


class TestJetSpec(OfKind):
    kind = "jetspec"


class TestDFlash2(OfKind):
    kind = "dflash2"


class TestEagle3(OfKind):
    kind = "eagle3"


class TestMtp(OfKind):
    kind = "mtp"


# ---------------------------------------------------------------- what is written


def test_text_is_the_same_to_the_last_bit_with_taps(tiny_pair: Any, tmp_path: Path) -> None:
    """Chains, trees, single tokens padded and prompts that are cut: rows with and without a head beside them."""
    path = write_block_head(tmp_path / "head.gguf", tiny_pair.target, taps=[2, 8, 13])
    settings = LoadSettings(context=512, num_sequences=2, threads=2, trees=True)
    model = BACKEND.load(tiny_pair.target, settings)

    def rows() -> list[Logits]:
        state = model.open()
        if head is not None:
            head.open(state)
        commit(model, state, ids(90))
        found = [forward(model, state, [5, 9])]
        state.keep([0])
        found.append(forward(model, state, ids(8, 200), [-1, 0, 0, 1, 2, 2, 5, 3]))
        state.keep([0, 2, 5, 6])
        found.append(forward(model, state, ids(6, 300)))
        state.close()
        return found

    head: DraftHead | None = None
    try:
        plain = rows()
        head = BACKEND.load_head(path, model)
        tapped = rows()
        head.close()
        head = None
        after = rows()
    finally:
        model.close()
    for want, got, last in zip(plain, tapped, after, strict=True):
        assert np.array_equal(want, got) and np.array_equal(want, last)


def test_hidden_states_are_kept_while_somebody_listens(target_path: Path, tmp_path: Path) -> None:
    """The same passes before, then listened to, and no more: what is heard does not depend on it, nor do rows."""
    path = write_block_head(tmp_path / "head.gguf", target_path)
    with loaded(target_path, path) as (model, head):
        memory: Any = vars(model)["memory"]
        context, want, rows = memory.context, features_of(model, head, ids(12)), []
        state: Any = model.open()
        heard: Any = None
        for _ in range(3):
            forward(model, state, ids(4))
        state.truncate(0)
        for start in range(0, 28, 4):
            if start == 4:
                heard = listen(model, state, head)
            elif start == 12:
                state.recording = None
            rows.append(forward(model, state, ids(4, start)))
            assert context.is_tapped is (4 <= start < 20), "no more behind three passes that nobody listened to"
            state.keep(range(4))
        assert_close(np.array([row for _, row in heard]), want[4:])
        state.truncate(4)
        assert np.array_equal(forward(model, state, ids(4, 4)), rows[1])
        state.close()


@pytest.mark.parametrize("changes", [False, True])
def test_where_keeping_them_changes_rows_they_always_are(
    changes: bool, target_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed at once where nobody looks in between may round otherwise. It is tried when a head is loaded."""
    real = module("model").LlamaModel._decode

    def decode(model: Any, context: Any, part: Any) -> Any:
        rows = real(model, context, part)
        off = 1.0 if changes and context.is_tapped else 0.0
        return replace(rows, fetch=lambda: rows.fetch() + np.float32(off))

    monkeypatch.setattr(module("model").LlamaModel, "_decode", decode)
    path = write_block_head(tmp_path / "head.gguf", target_path)
    with loaded(target_path, path) as (model, head):
        one: Any = model.open()
        other: Any = model.open()  # in a context that is made now
        for state in (one, other):
            for _ in range(4):
                forward(model, state, ids(4))
            assert state.cache.context.is_tapped is changes
        one.close()
        other.close()
        head.close()
        last: Any = model.open()
        forward(model, last, ids(4))
        assert not last.cache.context.is_tapped
        last.close()


@pytest.mark.parametrize("kind", ["dspark", "dflash2", "eagle3", "mtp"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_is_written_with_a_head_is_what_is_written_without(kind: str, temperature: float) -> None:
    """In sessions, over two turns; the target of the MTP layer runs tokens again."""
    model, head = beside(kind)
    texts = []
    for drafter in ("nothing", head.info.kind):
        made = Nothing() if drafter == "nothing" else HeadDrafter(head, num=4)
        with Session(model, made) as session:
            asked = SamplingParams(temperature=temperature, max_tokens=20, seed=3)
            first = session.generate(ids(30), asked)
            second = session.generate([*ids(30), *first.tokens, *ids(10, 70)], asked)
            texts.append([*first.tokens, *second.tokens])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 3


# ---------------------------------------------------------------- several heads


def test_several_heads_of_one_target_do_not_disturb_each_other(target_path: Path, tmp_path: Path) -> None:
    """They read other layers, hear the same sequence, and go one after another."""
    paths = {
        "dspark": write_block_head(tmp_path / "d.gguf", target_path, taps=[2, 1]),
        "eagle3": write_eagle3_head(tmp_path / "e.gguf", target_path, taps=[3, 0, 2]),
    }
    text, alone = ids(40), {}
    for kind, path in paths.items():
        with loaded(target_path, path) as (model, head):
            state = model.open()
            guesses = head.open(state)
            commit(model, state, text)
            alone[kind] = chain_behind(guesses, 40, [9, 12])
    model = BACKEND.load(target_path, SETTINGS)
    try:
        heads = {kind: BACKEND.load_head(path, model) for kind, path in paths.items()}
        assert model.memory.taps.layers == (2, 1, 3, 0)  # type: ignore[attr-defined]
        state = model.open()
        beside = {kind: head.open(state) for kind, head in heads.items()}
        commit(model, state, text)
        copy = state.fork()
        for kind, guesses in beside.items():
            assert np.array_equal(chain_behind(guesses, 40, [9, 12]), alone[kind])
            assert np.array_equal(chain_behind(heads[kind].open(copy), 40, [9, 12]), alone[kind])
        saved = state.save()
        heads["dspark"].close()
        commit(model, state, ids(70, 300))  # nobody is fed that is gone
        state.truncate(40)
        with pytest.raises(ValueError, match="closed"):
            beside["dspark"].start(40)
        assert_close(chain_behind(beside["eagle3"], 40, [9, 12]), alone["eagle3"], LOOSE)
        back = saved.open()
        assert np.array_equal(chain_behind(heads["eagle3"].open(back), 40, [9, 12]), alone["eagle3"])
        heads["eagle3"].close()
        for one in (state, copy, back):
            commit(model, one, ids(70, 300))
            one.close()
        again = BACKEND.load_head(paths["dspark"], model)
        assert model.memory.taps.layers == (2, 1)  # type: ignore[attr-defined]
        again.close()
    finally:
        model.close()
