"""Decoding speed side by side: the same prompts and seeds for everybody, in alternating order, after a warm-up."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from platform import platform, python_version
from typing import Any

from localspec import __version__
from localspec.bench.contenders import Contender
from localspec.bench.prompts import Prompt
from localspec.bench.runs import Run, RunLog
from localspec.bench.workloads import Workload
from localspec.errors import PromptError
from localspec.exactness import AUTO as AUTO_EXACT
from localspec.pair import Pair
from localspec.protocols import LanguageModel
from localspec.sampling import SamplingParams
from localspec.schedule.machine import processor

_WARM_UP_TOKENS = 16


def measure(
    log: RunLog,
    pair: Pair,
    workloads: Sequence[Workload],
    contenders: Sequence[Contender],
    on_run: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> None:
    """Run every contender on every prompt at every temperature, `repeats` times, and keep each answer in the log.

    How long and how often is part of the log's conditions. Repeats are the outermost loop, so what a machine does
    meanwhile hits everybody, and a benchmark that is cut off has something of everything. Runs that the log holds
    are not made again.  on_run: called with (runs done, runs in all, what runs now).
    Raises PromptError, before anything ran, for a prompt that does not fit.
    """
    conditions = log.conditions
    max_tokens, ignore_eos = conditions["max_tokens"], conditions["ignore_eos"]
    encoded = {
        (work.name, prompt.id): prompt.encode(pair.target.tokenizer).tolist()
        for work in workloads
        for prompt in work.prompts
    }
    check_room(pair.target, encoded, max_tokens, conditions.get("padding", 1))
    plan = [
        (work, prompt, temperature, contender, repeat)
        for repeat in range(conditions["repeats"])
        for work in workloads
        for number, prompt in enumerate(work.prompts)
        for temperature in conditions["temperatures"]
        for contender in in_order([one for one in contenders if one.takes(work)], 2 * number + repeat)
    ]
    keys = [(work.name, prompt.id, temperature, one.name, repeat) for work, prompt, temperature, one, repeat in plan]
    left = [(step, key) for step, key in zip(plan, keys, strict=True) if not log.has(key)]
    warm: set[tuple[bool, bool]] = set()
    for done, ((work, prompt, temperature, contender, _), key) in enumerate(left, len(plan) - len(left)):
        on_run(done, len(plan), f"{work.name}, {contender.name}")
        tokens = encoded[work.name, prompt.id]
        kind = work.foreign_draft, temperature > 0.0
        if kind not in warm:
            # First passes allocate, find the machine asleep, and some devices build kernels for them. What one
            # contender builds serves the others, so all come before anything is timed.
            warm.add(kind)
            short = _params(prompt, temperature, min(_WARM_UP_TOKENS, max_tokens), ignore_eos)
            for other in contenders:
                if other.takes(work):
                    other.answer(work, tokens, short)
        answer = contender.answer(work, tokens, _params(prompt, temperature, max_tokens, ignore_eos))
        log.add(Run(*key, answer))
    on_run(len(plan), len(plan), "")


def in_order(contenders: Sequence[Contender], turn: int) -> list[Contender]:
    """Who comes when: rotated by one every second turn, and backwards every other. In 2 * n consecutive turns each of
    n contenders stands at each place twice, and before each other one as often as behind it; two turns of which the
    first is even mirror each other."""
    if not contenders:
        return []
    start = turn // 2 % len(contenders)
    rotated = [*contenders[start:], *contenders[:start]]
    return rotated[::-1] if turn % 2 else rotated


def check_room(
    target: LanguageModel, encoded: Mapping[tuple[str, str], Sequence[int]], max_tokens: int, padding: int
) -> None:
    """Raise PromptError for a prompt that leaves no room for its answer. padding: tokens that a pass over one may need
    room for."""
    room = target.info.context_length - max(target.capabilities.width_class.min_width, padding) + 1 - max_tokens
    for (workload, prompt), tokens in encoded.items():
        if len(tokens) > room:
            raise PromptError(
                f"prompt {prompt} of {workload} is too long for the context",
                got=f"{len(tokens)} tokens",
                expected=f"at most {room} before {max_tokens} new ones",
                fix="Shorten it, or load with a larger --context.",
            )


def describe(
    pair: Pair,
    workloads: Sequence[Workload],
    contenders: Sequence[Contender],
    *,
    runtime: Mapping[str, str],
    exact: str = AUTO_EXACT,
    **settings: Any,
) -> dict[str, Any]:
    """The conditions: what was measured on what. settings: max_tokens, ignore_eos, repeats, temperatures, how
    the models were loaded, and experience: the rounds of earlier runs that drafter auto goes on from.
    runtime: versions of the backend's runtime and of other libraries that take part."""
    exactness = pair.exactness(exact)
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "localspec": __version__,
        "python": python_version(),
        "platform": platform(),
        "processor": processor(),
        "load_average": load_average(),
        "runtime": dict(runtime),
        "target": _model(pair.target),
        "draft": None if pair.draft is None else _model(pair.draft),
        "heads": [f"{head.info.name} ({head.info.kind})" for head in pair.heads],
        "exact": exactness.mode.value,
        "padding": exactness.widest_padding,
        "width_class": str(exactness),
        "width_class_evidence": exactness.widths.evidence,
        "contenders": [{"name": one.name, "kind": one.kind.value} for one in contenders],
        "workloads": [
            {"name": work.name, "about": work.about, "prompts": [prompt.id for prompt in work.prompts]}
            for work in workloads
        ],
        **settings,
    }


def load_average() -> float | None:
    """How many programs wanted the processor in the last minute; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 1)
    except (OSError, AttributeError):
        return None


def _model(model: LanguageModel) -> dict[str, Any]:
    info = model.info
    return {
        "name": info.name,
        "file": info.path.name,
        "quantization": info.quantization,
        "num_parameters": info.num_parameters,
        "context": info.context_length,
        "device": info.device,
        "notes": list(info.notes),
    }


def _params(prompt: Prompt, temperature: float, max_tokens: int, ignore_eos: bool) -> SamplingParams:
    seed = zlib.crc32(prompt.id.encode())  # the same in whatever company a prompt is run
    return SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens, ignore_eos=ignore_eos)
