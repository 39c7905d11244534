"""Memory plans: what is added up, when a context is shortened and when it is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from localspec.compatibility import translation
from localspec.errors import OutOfMemoryError, PairMismatchError, UnsupportedModelError
from localspec.hub.fit import examine, plan
from localspec.loading import bundled_path, check_pair, open_pair, plan_parts
from localspec.memory import Machine, largest_context, look, make_plan, settle
from localspec.protocols import LoadSettings
from localspec.testing.files import write_gguf

MIB = 2**20
ROOM = Machine(2**40, 2**40)
SHARED = Path(__file__).resolve().parents[2] / "shared" / "models"


def small(num_mib: int) -> Machine:
    return Machine(num_mib * MIB, None)


@pytest.mark.real
def test_keys_and_values_are_counted_for_each_conversation() -> None:
    one = plan("tiny", context=2048, backend="llamacpp", machine=ROOM)
    four = plan("tiny", context=2048, backend="llamacpp", machine=ROOM, num_sequences=4)
    caches = [line for line in one.lines if line.what.startswith("keys and values")]
    assert [line.total for line in caches] == [15 * MIB, 4 * MIB], "what llama.cpp reports for both models"
    assert four.total - one.total == 3 * sum(
        line.num_bytes for line in one.lines if line.what in ("keys and values (F16)", "cells", "compute buffer",
                                                               "rows of logits"))  # fmt: skip


@pytest.mark.real
def test_a_draft_model_is_planned_as_it_is_loaded_without_trees() -> None:
    def lines(role: str, trees: bool) -> list[int]:
        settings = LoadSettings(trees=trees)
        made = plan("tiny", context=2048, backend="llamacpp", machine=ROOM, settings=settings)
        return [line.total for line in made.lines if line.part == role]

    assert lines("draft model", trees=True) == lines("draft model", trees=False)
    assert lines("target", trees=True) != lines("target", trees=False)


@pytest.mark.real
def test_more_context_than_the_target_was_trained_for_is_said() -> None:
    assert "trained for (2048)" in examine("tiny", context=4096, backend="llamacpp", machine=ROOM).notes[0]
    assert not examine("tiny", context=2048, backend="llamacpp", machine=ROOM).notes


@pytest.mark.real
def test_the_plan_is_within_a_tenth_of_what_was_measured() -> None:
    """Peaks measured by scripts/memory.py, in MiB; docs/fit.md has the conditions."""
    for context, measured in ((2048, 215), (16384, 912)):
        planned = plan("tiny", context=context, backend="llamacpp", machine=ROOM).total / MIB
        assert abs(planned - measured) < 0.1 * measured


@pytest.mark.real
@pytest.mark.slow
def test_the_plan_of_the_expanded_target_is_within_a_tenth_of_what_was_measured(tmp_path: Path) -> None:
    """Peaks measured by scripts/memory.py; the formulas were taken from the tiny pair."""
    from localspec.bench.expand import Size, expand

    half = tmp_path / "half.gguf"
    expand(bundled_path("tiny", "target"), half, Size.named("0.5b"), "gguf", "Q4_0")
    for context, measured in ((2048, 538), (16384, 1802)):
        planned = plan(half, "tiny", context=context, backend="llamacpp", machine=ROOM).total / MIB
        assert abs(planned - measured) < 0.1 * measured


@pytest.mark.real
def test_an_unnamed_context_is_shortened_and_said() -> None:
    parts = plan_parts(bundled_path("tiny", "target"), bundled_path("tiny", "draft"), "llamacpp")
    machine = small(200)
    settings, notes = settle(parts, LoadSettings(num_sequences=1), machine)
    assert settings.context is not None and settings.context % 256 == 0 and settings.context < 2048
    assert "instead of 2048" in notes[0] and "MiB needed" in notes[0]
    assert make_plan(parts, settings, settings.context, machine).fits
    assert not make_plan(parts, settings, settings.context + 256, machine).fits


@pytest.mark.real
def test_a_named_context_is_refused_with_the_longest_that_fits() -> None:
    parts = plan_parts(bundled_path("tiny", "target"), None, "llamacpp")
    machine = small(200)
    longest = largest_context(parts, LoadSettings(), 1 << 20, machine)
    with pytest.raises(OutOfMemoryError, match=f"--context {longest}"):
        settle(parts, LoadSettings(context=1 << 20), machine)
    with pytest.raises(OutOfMemoryError, match="smaller model"):
        settle(parts, LoadSettings(context=2048), small(60))


@pytest.mark.real
def test_conversations_that_do_not_fit_together_are_said_and_not_refused() -> None:
    parts = plan_parts(bundled_path("tiny", "target"), None, "llamacpp")
    settings, notes = settle(parts, LoadSettings(context=2048, num_sequences=8), small(300))
    assert settings.context == 2048 and "not for 8 at once" in notes[0]


@pytest.mark.real
def test_conversations_that_share_a_pass_must_fit_together() -> None:
    """Their caches are made at once, as one."""
    parts = plan_parts(bundled_path("tiny", "target"), None, "llamacpp")
    asked = LoadSettings(context=2048, num_sequences=16, batch=True)
    with pytest.raises(OutOfMemoryError, match="fewer requests at once than 16"):
        settle(parts, asked, small(300))
    assert settle(parts, asked, ROOM) == (asked, ())
    shared = make_plan(parts, asked, 2048, ROOM, num_sequences=16)
    apart = make_plan(parts, LoadSettings(context=2048, num_sequences=16), 2048, ROOM, num_sequences=16)
    assert shared.total < apart.total, "buffers are made once"


def test_where_a_machine_tells_nothing_nothing_is_refused(tmp_path: Path) -> None:
    parts = plan_parts(write_gguf(tmp_path / "m.gguf"), None, "llamacpp")
    settings = LoadSettings(context=1 << 24)
    assert settle(parts, settings, Machine(None, None)) == (settings, ())
    assert settle([], settings, small(1)) == (settings, ()), "no backend that can tell"


def test_this_machine_tells_its_memory() -> None:
    machine = look()
    assert machine.total is not None and machine.total > 100 * MIB
    assert machine.available is None or 0 < machine.available <= machine.total


@pytest.mark.real
def test_loading_refuses_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localspec.loading.look", lambda: small(100))
    monkeypatch.setattr("localspec.loading.load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(OutOfMemoryError, match="needed"):
        open_pair("tiny", backend="llamacpp", settings=LoadSettings(context=8192))


@pytest.mark.real
def test_the_longest_context_stops_at_what_the_target_was_trained_for() -> None:
    fit = examine("tiny", backend="llamacpp", machine=ROOM)
    assert (fit.longest, fit.trained, fit.plan.context) == (2048, 2048, 2048)


# ---------------------------------------------------------------- pairs


def test_another_vocabulary_is_said_and_no_fault(tmp_path: Path) -> None:
    target = write_gguf(tmp_path / "t.gguf")
    draft = tmp_path / "d.gguf"
    length = (5).to_bytes(8, "little")
    draft.write_bytes(target.read_bytes().replace(length + b"hello", length + b"jello", 1))
    said = translation(target, draft)
    assert said is not None and re.search(r"token \d+ is 'hello' in the target and 'jello' in the draft", said)
    assert translation(target, target) is None
    assert said in examine(target, draft, backend="llamacpp", machine=ROOM).notes
    with open_pair(str(target), str(draft), backend="llamacpp") as pair:
        assert pair.drafting is not None and not pair.drafting.relation.same
        assert sum("tokenizer" in note for note in pair.notes) == 1, "said once"


def test_more_rows_than_the_target_are_refused_before_loading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("localspec.loading.load_model", lambda *_: pytest.fail("a model was loaded"))
    target, draft = write_gguf(tmp_path / "t.gguf"), write_gguf(tmp_path / "d.gguf")
    parts = plan_parts(target, draft, "llamacpp")
    narrow = replace(parts[0], model=replace(parts[0].model, vocab_size=parts[0].model.vocab_size - 8))
    with pytest.raises(PairMismatchError, match="more rows"):
        check_pair([narrow, parts[1]])


def test_a_drafter_as_heavy_as_the_target_is_doubted(tmp_path: Path) -> None:
    target = write_gguf(tmp_path / "t.gguf", quantization="Q4_0")
    assert not check_pair(plan_parts(target, None, "llamacpp"))
    notes = check_pair(plan_parts(target, write_gguf(tmp_path / "d.gguf", quantization="Q8_0"), "llamacpp"))
    assert len(notes) == 1 and "Q8_0 and Q4_0" in notes[0]


def test_a_head_is_refused_by_its_target_and_alone(tmp_path: Path) -> None:
    from localspec.compatibility import check_head
    from localspec.formats import summarize

    if not (SHARED / "dspark").is_dir():
        pytest.skip("needs the development models beside the repository")
    head, target = summarize(SHARED / "dspark"), summarize(SHARED / "target")
    assert not check_head(target, head)
    [doubt] = check_head(replace(target, quantization="4 bits in groups of 64"), head)
    assert "4 bits" in doubt
    with pytest.raises(PairMismatchError, match="hidden size differs"):
        check_head(summarize(write_gguf(tmp_path / "t.gguf")), head)
    with pytest.raises(UnsupportedModelError, match="no head"):
        check_head(target, summarize(write_gguf(tmp_path / "t.gguf")))
    with pytest.raises(UnsupportedModelError, match="trained for a target of hidden size 512"):
        open_pair(str(SHARED / "dspark"), backend="mlx")
