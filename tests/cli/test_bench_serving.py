"""`bench serve` and `bench soak`: both ways are measured and compared, and a wrong text is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli import main
from localspec.bench import serving, soak
from localspec.drafters import DrafterSpec
from localspec.engine.session import Session
from localspec.loading import get_backend
from localspec.pair import Pair
from localspec.protocols import Drafter
from localspec.testing.reference import ReferenceModel
from tests.conftest import brief_prompts

needs_llamacpp = pytest.mark.skipif(
    not get_backend("llamacpp").is_installed(), reason="needs llama.cpp: pip install llama-cpp-python"
)


def reference() -> Pair:
    target = ReferenceModel(257, context_length=1024)
    return Pair(target, target.perturbed(0.2))


@needs_llamacpp
def test_bench_soak_compares_every_request(tmp_path: Path) -> None:
    output = tmp_path / "soak.json"
    arguments = ["bench", "soak", "--requests", "8", "--at-once", "3", "--longest", "24", "--context", "256"]
    result = CliRunner().invoke(main, [*arguments, "--backend", "llamacpp", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "compared with the same request alone, decoded plainly: 8, differing 0" in result.output
    assert "alone: 8 of 8" in result.stderr and "together: 8 in" in result.stderr
    stored = json.loads(output.read_text())
    assert stored["num_finished"] + stored["num_cancelled"] == 8 and not stored["failed"]


@needs_llamacpp
def test_bench_serve_measures_both_ways(tmp_path: Path) -> None:
    output = tmp_path / "serve.json"
    arguments = ["bench", "serve", "--at-once", "1", "--at-once", "2", "--tokens", "3", "--turns", "1"]
    more = [
        "--requests",
        "2",
        "--per-domain",
        "1",
        "--context",
        "512",
        "--backend",
        "llamacpp",
        "--output",
        str(output),
    ]
    result = CliRunner().invoke(main, [*arguments, *more])
    assert result.exit_code == 0, result.output
    assert "requests of a round run in one pass" in result.output
    stored = json.loads(output.read_text())
    assert {(run["at_once"], run["how"]) for run in stored["runs"]} == {
        (n, how) for n in (1, 2) for how in ("off", "auto")
    }
    assert set(stored["against_plain"]) == {"1", "2"}


def test_the_ratio_pairs_runs_of_the_same_turn() -> None:
    report = serving.measure(reference(), brief_prompts(), [2], max_tokens=3, turns=2, per_run=2)
    assert [run.how for run in report.runs].count("off") == 2
    plain, fast = ([run for run in report.runs if run.how == how] for how in ("off", "auto"))
    ratios = sorted(a.tokens_per_second / b.tokens_per_second for a, b in zip(fast, plain, strict=True))
    assert report.ratio(2) == pytest.approx(sum(ratios) / 2)
    assert "at once" in serving.table(report)


class Misled(Pair):
    """A pair whose sessions run another model than its batch does."""

    def session(
        self, drafter: str | DrafterSpec | Drafter = "auto", *, acceptance: str = "walk", exact: str = "auto"
    ) -> Session:
        assert isinstance(self.target, ReferenceModel)
        return Pair(self.target.perturbed(2.0), None).session(drafter, acceptance=acceptance, exact=exact)


def test_a_wrong_text_is_found() -> None:
    target = ReferenceModel(257, context_length=1024)
    pair = Misled(target, target.perturbed(0.2))
    report = soak.run(pair, soak.random_requests(pair, 6, 20), at_once=2)
    assert report.differing and not report.is_clean
    assert "differing requests" in soak.table(report)


def test_requests_come_again_until_the_time_is_over() -> None:
    pair = reference()
    report = soak.run(pair, soak.random_requests(pair, 3, 20), at_once=2, seconds=1.0)
    assert report.is_clean and report.num_compared > 3 and report.seconds >= 1.0
    assert len(report.samples) >= 3
    assert [sample.num_ended for sample in report.samples] == sorted(sample.num_ended for sample in report.samples)


@pytest.mark.parametrize("alone", [True, False])
def test_what_is_interrupted_reports_what_was_done(alone: bool) -> None:
    pair = reference()

    def interrupt(report: soak.Report, _: int) -> None:
        if alone or report.num_compared:
            raise KeyboardInterrupt

    report = soak.run(pair, soak.random_requests(pair, 20, 20), at_once=2, on_progress=interrupt)
    assert report.interrupted and report.is_clean
    assert report.num_compared < 20 and bool(report.num_compared) != alone
    assert "interrupted" in soak.table(report)
