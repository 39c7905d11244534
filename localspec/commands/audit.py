"""`localspec audit`: does this pair keep the promise on this machine?"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localspec.commands.models import open_models
from localspec.commands.options import exact_option, load_options

if TYPE_CHECKING:
    from localspec.audit.report import Audit, Plan
    from localspec.audit.run import Tell


@click.command()
@click.argument("target_argument", metavar="[TARGET]", required=False)
@click.option(
    "--with",
    "drafters",
    multiple=True,
    metavar="DRAFTER",
    help="Audit this drafter; repeatable [default: draft model, heads and lookup, as chains and trees, and together].",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="JSON lines [default: bundled held-out prompts].",
)
@click.option("--domain", "domains", multiple=True, help="chat, code or prose [default: all].")
@click.option("--per-domain", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--tokens", type=click.IntRange(min=2), default=48, show_default=True, help="Longest answer.")
@click.option("--at", "temperatures", multiple=True, type=float, default=(0.0, 0.8), show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=2, show_default=True, help="Answers per prompt above 0.")
@click.option(
    "--acceptance",
    "acceptances",
    multiple=True,
    type=click.Choice(["walk", "rejection"]),
    default=("walk", "rejection"),
    show_default=True,
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("audit.md"),
    show_default=True,
    help="The report; a .json of the same name lies beside it.",
)
@exact_option
@load_options
def audit(target_argument: str | None, output: Path, **options: Any) -> None:
    """Audit TARGET with its draft model (default: the bundled pair): is speculative text that of plain decoding?

    Compares rows of logits across widths and trees, texts token for token, and under rejection every token's
    law. Explains each difference. Writes a report with hashes, versions and settings. Exits with 1 when exactness
    does not hold.
    """
    from localspec.audit.report import Audit, Plan
    from localspec.bench.prompts import load_prompts
    from localspec.errors import SettingError

    if target_argument is not None:
        if options["target"] is not None or options["pair"] is not None:
            raise SettingError("the target is named twice", fix="Leave out TARGET, or --target and --pair.")
        options["target"] = target_argument
    if not output.parent.is_dir():
        raise SettingError(f"--output: no such folder: {output.parent}", fix="Make it first.")
    if output.suffix != ".md":
        raise SettingError("--output names the Markdown report", got=output.name, expected="a name ending in .md")
    prompts = load_prompts(options["prompts"], options["domains"], options["per_domain"])
    plan = Plan(prompts, options["temperatures"], options["seeds"], options["tokens"], options["acceptances"])
    plan = replace(plan, exact=options["exact"])
    found = Audit(_about(options, plan), [])
    with _bar() as tell:
        _fill(found, plan, options, tell)
    output.write_text(found.markdown(), encoding="utf-8")
    output.with_suffix(".json").write_text(json.dumps(found.as_dict(), indent=1), encoding="utf-8")
    click.echo(found.verdict())
    for line in [*found.findings, *found.skipped]:
        click.echo(line)
    click.echo(f"report: {output}, {output.with_suffix('.json')}")
    sys.exit(0 if found.holds else 1)


def _fill(found: Audit, plan: Plan, options: dict[str, Any], tell: Tell) -> None:
    """Audit chains and trees apart: a target may be loaded otherwise so that trees are exact."""
    from localspec.audit.report import head_record, model_record
    from localspec.audit.run import audit_part, default_drafters
    from localspec.drafters import DrafterSpec

    named: Sequence[str] = options["drafters"]
    drafters = named or None
    for trees in (False, True):
        if drafters is not None and not _of(drafters, trees):
            continue
        shape = DrafterSpec.parse("draft_model:shape=tree" if trees else "draft_model")
        specs = [shape] if drafters is None else [DrafterSpec.parse(text) for text in _of(drafters, trees)]
        with open_models(options, *specs, num_sequences=6) as pair:
            if drafters is None:
                drafters = default_drafters(pair)
            if not found.models:
                found.models.append(model_record("target", pair.target))
                found.models += [model_record("draft", pair.draft)] if pair.draft is not None else []
                found.models += [head_record(head) for head in pair.heads]
            able = pair.target.capabilities
            if trees and not named and not (able.trees and able.exact_trees):
                found.skipped.append(f"trees: {'; '.join(able.limits) or 'this target verifies chains only'}")
                continue
            found.parts.append(audit_part(pair, _of(drafters, trees), plan, tell))


def _of(drafters: Sequence[str], trees: bool) -> list[str]:
    from localspec.drafters import DrafterSpec

    return [text for text in drafters if DrafterSpec.parse(text).asks_for_trees == trees]


def _about(options: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Versions, machine and settings."""
    from localspec.doctor import examine

    report = examine()
    loads = ("backend", "context", "threads", "gpu_layers", "flash_attention", "extra_buffers", "cache_type", "dtype")
    return {
        "localspec": report.version,
        "Python": report.python,
        "machine": f"{report.processor}, {report.num_cores} cores, {report.platform}",
        "backends": ", ".join(f"{b.name} {b.version}" for b in report.backends if b.installed),
        "loading": ", ".join(f"{name} {options[name]}" for name in loads if options[name] is not None),
        "prompts": f"{len(plan.prompts)} from {options['prompts'] or 'the bundled ones'}",
        "temperatures": ", ".join(f"{t:g}" for t in plan.temperatures),
        "seeds": plan.num_seeds,
        "tokens": plan.max_tokens,
        "acceptance": ", ".join(plan.acceptances),
        "exact": plan.exact,
    }


@contextmanager
def _bar() -> Iterator[Tell]:
    from localspec.commands.progress import progress_bar

    with progress_bar("audit") as draw:
        yield lambda what, done, total: draw(done, total, what)
