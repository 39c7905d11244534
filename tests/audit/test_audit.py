"""The audit passes on what is right, and fails with the right explanation on what is planted: in a model, whose tree
mask lets a node see its sibling, and in rules that accept what the target did not choose."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import localspec.loading
from cli import main
from localspec import verify
from localspec.audit.difference import Cause, Difference
from localspec.audit.report import Audit, Part, Plan
from localspec.audit.run import audit_part
from localspec.bench import equality
from localspec.bench.prompts import Prompt, load_prompts
from localspec.exactness import Bound
from localspec.host_scores import HostScores
from localspec.loading import get_backend, open_pair
from localspec.pair import Pair
from localspec.protocols import LanguageModel, LoadSettings, Scores, Step
from localspec.sampling import Tolerance
from localspec.testing.files import write_gguf, write_safetensors
from localspec.testing.reference import Cell, ReferenceModel, ReferenceState
from localspec.tree.mask import ancestor_mask
from localspec.types import BoolMask, NodeIndices
from localspec.verify import Rejection, Trial, Verdict, Walk
from tests.conftest import brief_prompts

TREE = "draft_model:num=8,shape=tree"
PROMPTS = [Prompt(f"p{n}", "made up", "".join(chr(10 + 3 * n + i) for i in range(8)), None) for n in range(3)]


def plan(acceptances: Sequence[str] = ("walk",), num_seeds: int = 2, max_tokens: int = 24) -> Plan:
    return Plan(PROMPTS, (0.0, 0.8), num_seeds, max_tokens, acceptances)


def reference() -> ReferenceModel:
    return ReferenceModel(60, seed=2, sharpness=1.5)


def audited(target: LanguageModel, drafters: Sequence[str], one: Plan) -> Part:
    with Pair(target, reference().perturbed(0.5)) as pair:
        return audit_part(pair, drafters, one)


# ---------------------------------------------------------------- nothing wrong


def test_the_reference_model_passes_everywhere() -> None:
    part = audited(reference(), ["draft_model", "ngram:min=1", TREE], plan(("walk", "rejection"), 4))
    assert part.findings == []
    assert part.walk is not None and part.walk.all_equal and part.rejection is not None and part.rejection.all_equal
    assert {test.drafter for test in part.distributions} == {"draft_model", "ngram:min=1", TREE}
    assert all(test.passed and test.likely.enough and test.likely.smallest_leak < 0.5 for test in part.distributions)
    assert part.rows.trees is not None and part.rows.trees.num_rows == part.rows.trees.num_equal > 20
    found = Audit({"localspec": "1"}, [], [part])
    assert found.holds and found.verdict().startswith("Exactness holds")
    assert json.loads(json.dumps(found.as_dict()))["holds"] is True


def test_nothing_compared_is_no_proof() -> None:
    assert not Audit({}, []).holds


# ---------------------------------------------------------------- a planted mask


class Peeking(ReferenceModel):
    """A model whose tree mask is wrong: a node sees its elder siblings as well."""

    def visible(self, state: ReferenceState) -> list[Cell]:
        parent = state.parents[-1]
        siblings = [state.pending[node] for node, other in enumerate(state.parents[:-1]) if other == parent]
        return super().visible(state) + siblings


def test_a_mask_that_shows_siblings_is_found_in_rows_and_in_texts() -> None:
    part = audited(Peeking(60, seed=2, sharpness=1.5), ["draft_model", TREE], plan())
    trees = part.rows.trees
    assert trees is not None and trees.num_equal < trees.num_rows and trees.worst > 0.1
    assert any("rows of trees are not those of chains" in finding for finding in part.findings)
    assert any("sees what it must not see" in finding for finding in part.findings)
    assert part.walk is not None and part.walk.differences, "no text was changed: the plant is too weak"
    for difference in part.walk.differences:
        assert difference.drafter == TREE, "chains have no siblings"
        assert difference.cause is Cause.ROWS and difference.rounding == 0.0 < difference.apart
        assert difference.plain is not None and difference.plain.from_fresh == 0.0
        assert difference.other is not None and difference.other.branched and difference.other.from_fresh > 0.01
        assert "the speculative row is wrong" in difference.explanation
        assert "saw what it must not see" in difference.line()
    found = Audit({}, [], [part])
    assert not found.holds and "NOT" in found.verdict() and "## Findings" in found.markdown()


@pytest.mark.slow
@pytest.mark.real
def test_a_wrong_mask_in_the_real_mlx_backend_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted after loading, because the backend's own check would refuse such a model."""
    if not get_backend("mlx").is_installed():
        pytest.skip("needs mlx")
    folder = write_safetensors(tmp_path / "model", padding_rows=0)
    draft = write_safetensors(tmp_path / "draft", jitter=0.5)
    prompts = [Prompt("p", "made up", "the return of the world and hello in the", None)]
    settings = LoadSettings(trees=True, num_sequences=6)
    with open_pair(str(folder), str(draft), backend="mlx", settings=settings) as pair:
        one = Plan(prompts, (0.0, 0.8), 2, 12, ("walk",))
        right = audit_part(pair, [TREE], one)
        assert right.rows.trees is not None and not right.rows.trees.worst > right.rows.rounding + 1e-5

        def leaky(parents: NodeIndices) -> BoolMask:
            mask = ancestor_mask(parents)
            for node, parent in enumerate(parents.tolist()):
                mask[node, :node] |= parents[:node] == parent
            return mask

        monkeypatch.setattr(sys.modules["localspec_backend_mlx.layout"], "ancestor_mask", leaky)
        wrong = audit_part(pair, [TREE], one)
    assert wrong.rows.trees is not None and wrong.rows.trees.worst > 0.01
    assert wrong.walk is not None and wrong.walk.differences
    assert {difference.cause for difference in wrong.walk.differences} == {Cause.ROWS}


# ---------------------------------------------------------------- planted rounding


class Rounding(ReferenceModel):
    """A model whose passes of several tokens round coarsely, although it says that all widths are one class."""

    def forward(self, steps: Sequence[Step]) -> list[Scores]:
        found: list[Scores] = []
        for step, scores in zip(steps, super().forward(steps), strict=True):
            rows = np.array(scores.rows(range(scores.num_rows)))
            found.append(HostScores(rows if step.num_tokens == 1 else np.round(rows * 2) / np.float32(2)))
        return found


def test_differences_of_the_size_of_rounding_are_called_ties_and_still_fail() -> None:
    part = audited(Rounding(60, seed=2, sharpness=1.5), ["draft_model"], plan())
    assert part.rows.rounding == pytest.approx(0.25, abs=0.01)
    assert part.walk is not None and part.walk.differences
    assert {difference.cause for difference in part.walk.differences} == {Cause.TIE}
    assert all(abs(difference.margin) <= 2 * part.rows.rounding for difference in part.walk.differences)
    assert "a tie" in part.walk.differences[0].explanation
    assert "are not the same bits" in part.findings[0] and not Audit({}, [], [part]).holds


def test_guarded_texts_are_equal_where_rows_are_not_and_rows_are_no_finding() -> None:
    """The same rounding; a bound that covers it saves the promise, one of nothing does not."""
    prompts = PROMPTS[:2]

    def audited_within(difference: float) -> Part:
        bound = Bound(Tolerance(difference, difference), 8, 64)
        with Pair(Rounding(60, seed=2, sharpness=1.5), reference().perturbed(0.5)) as pair:
            pair.bound = bound
            return audit_part(pair, ["draft_model"], Plan(prompts, (0.0, 0.8), 2, 24, ("walk",), "guarded"))

    part = audited_within(0.6)
    assert part.rows.inside.worst > 0.0 and part.findings == []
    assert part.walk is not None and part.walk.all_equal
    assert "Exactness: guarded" in part.markdown() and part.as_dict()["exact"] == "guarded"
    assert "re-checks per 100 tokens" in part.markdown()
    part = audited_within(0.0)
    assert part.walk is not None and part.walk.differences
    assert {difference.cause for difference in part.walk.differences} == {Cause.TIE}


# ---------------------------------------------------------------- planted rules


class NearlyBest(Walk):
    """Lossy: a guess is taken if its logit is within 1 of the best token's."""

    def accept(self, trial: Trial) -> Verdict:
        verdict = super().accept(trial)
        tree, read = verdict.tree, trial.row_reader()
        if len(verdict.path) == len(tree):
            return verdict
        row = read(verdict.rows[-1])
        above = verdict.path[-1] if verdict.path else -1
        for child in tree.children(above):
            token = int(tree.token[child])
            if token != verdict.tokens[-1] and row[token] > row.max() - 1.0:
                return Verdict(tree, verdict.path, (*verdict.tokens[:-1], token))
        return verdict


class Typical(Rejection):
    """Lossy: a guess is kept whenever it is a third as likely as the best token, instead of in proportion."""

    def accept(self, trial: Trial) -> Verdict:
        tree = trial.proposal.tree()
        if len(tree) and trial.sampler.params.temperature:
            token = int(tree.token[0])
            law = trial.sampler.law(trial.row_reader()(0), trial.context)
            if law.probability(token) > law.probs.max() / 3:
                return Verdict(tree, (), (token,))
        return super().accept(trial)


@pytest.mark.parametrize("drafter", ["draft_model", TREE])
def test_a_lossy_walk_is_named_as_the_cause(monkeypatch: pytest.MonkeyPatch, drafter: str) -> None:
    monkeypatch.setitem(verify.ACCEPTANCES, "walk", NearlyBest())
    part = audited(reference(), [drafter], plan())
    assert part.rows.exact, "the model is not to blame"
    assert part.walk is not None and part.walk.differences
    for difference in part.walk.differences:
        assert difference.cause is Cause.RULE and difference.apart == 0.0
        assert "the rule is lossy" in difference.explanation


@pytest.mark.slow
def test_a_lossy_rejection_rule_fails_the_distribution_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels of one in 1,000; with the right rule the same seeds pass."""
    one = Plan(PROMPTS, (0.8,), 10, 32, ("rejection",))

    def test() -> Part:
        with Pair(reference(), reference().perturbed(1.0)) as pair:
            return audit_part(pair, ["draft_model"], one)

    assert test().findings == []
    monkeypatch.setitem(verify.ACCEPTANCES, "rejection", Typical())
    part = test()
    [found] = part.distributions
    assert found.enough and not found.passed and found.overrated.p_value < 1e-3
    assert "not the target's" in part.findings[0]


def test_a_text_that_does_not_differ_again_is_not_explained_away() -> None:
    one = Difference("p", "d", "walk", 0.0, 1, 3, -1, -1, Cause.GONE, 0.0, 0.0, 0.0, None, None)
    assert "not reproducible" in one.line()


# ---------------------------------------------------------------- bench equality is the same engine


def test_bench_equality_explains_its_differences_too() -> None:
    with Pair(Peeking(60, seed=2, sharpness=1.5), reference().perturbed(0.5)) as pair:
        report = equality.compare(pair, PROMPTS, [TREE], [0.0, 0.8], 24)
    assert report.differences and "not rounding" in equality.table(report)
    assert report.as_dict()["differences"][0]["cause"] == "rows"


def test_seeds_differ_between_turns() -> None:
    with Pair(reference(), None) as pair:
        report = equality.compare(pair, PROMPTS, ["ngram:min=1"], [0.0, 0.8], 4, num_seeds=3)
    assert [row.num_prompts for row in report.rows] == [3, 9]


# ---------------------------------------------------------------- the command


@pytest.fixture
def small_pair(tmp_path: Path) -> list[str]:
    """Target, draft and prompts for the command line: random weights, real files."""
    if not get_backend("llamacpp").is_installed():
        pytest.skip("needs llamacpp")
    write_gguf(tmp_path / "target.gguf")
    write_gguf(tmp_path / "draft.gguf", jitter=0.3)
    lines = [{"id": "a", "domain": "made up", "text": "the world and hello in the"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return [
        "audit",
        str(tmp_path / "target.gguf"),
        *("--draft", str(tmp_path / "draft.gguf"), "--prompts", str(tmp_path / "prompts.jsonl")),
        *("--backend", "llamacpp", "--threads", "1", "--tokens", "16", "--seeds", "2"),
        *("--output", str(tmp_path / "audit.md")),
    ]


def test_the_command_writes_both_reports_and_exits_with_0(small_pair: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, small_pair)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Exactness holds")
    data = json.loads((tmp_path / "audit.json").read_text())
    target = data["models"][0]
    assert target["sha256"]["target.gguf"] == hashlib.sha256((tmp_path / "target.gguf").read_bytes()).hexdigest()
    assert data["holds"] and len(data["parts"]) == 2 and data["about"]["localspec"]
    assert [part["row_comparisons"]["inside"]["worst"] for part in data["parts"]] == [0.0, 0.0]
    text = (tmp_path / "audit.md").read_text()
    assert target["sha256"]["target.gguf"] in text and "too few" in text  # 32 tokens prove nothing, and it says so


def test_the_command_exits_with_1_when_a_rule_is_lossy(
    small_pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(verify.ACCEPTANCES, "walk", NearlyBest())
    result = CliRunner().invoke(main, [*small_pair, "--with", "draft_model", "--acceptance", "walk"])
    assert result.exit_code == 1, result.output
    assert "does NOT hold" in result.stdout and "the rule is lossy" in result.stdout
    assert json.loads((tmp_path / "audit.json").read_text())["parts"][0]["walk"]["differences"][0]["cause"] == "rule"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny", "--target", "tiny"], "named twice"),
        (["--output", "nowhere/audit.md"], "no such folder"),
        (["--output", "audit.txt"], "ending in .md"),
    ],
)
def test_wrong_requests_are_refused_before_a_model_is_opened(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(localspec.loading, "open_pair", fail)
    result = CliRunner().invoke(main, ["audit", *arguments])
    assert result.exit_code == 2 and words in result.stderr


# ---------------------------------------------------------------- the bundled pair


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(("backend", "tokens"), [("llamacpp", 24), ("mlx", 6)])
def test_the_bundled_pair_passes(backend: str, tokens: int) -> None:
    if not get_backend(backend).is_installed():
        pytest.skip(f"needs {backend}")
    prompts = brief_prompts("code") if backend == "mlx" else load_prompts(domains=["code"], per_domain=1)
    settings = LoadSettings(context=1024, trees=True, num_sequences=6)
    with open_pair(backend=backend, settings=settings) as pair:
        part = audit_part(pair, ["draft_model", TREE], Plan(prompts, (0.0, 0.8), 1, tokens, ("walk", "rejection")))
    assert part.findings == []
