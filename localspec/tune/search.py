"""The search: every set of options in short, the two best ones at length with their width classes, the winner kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from localspec.engine.overhead import round_overhead
from localspec.errors import BackendError, SettingError
from localspec.exactness import Exactness
from localspec.loading import get_backend, open_pair
from localspec.pair import Pair
from localspec.protocols import Capabilities, LanguageModel, LoadSettings, Rewind, WidthClass
from localspec.schedule import bound, classes, measure, store
from localspec.schedule.classes import Classes
from localspec.schedule.cost import Costs
from localspec.schedule.measure import Progress
from localspec.schedule.score import best
from localspec.tune.options import Options, choices, combinations, described, joining
from localspec.tune.result import CONTEXT, Candidate, Result

_log = logging.getLogger("localspec.tune")

_FINALISTS = 2
_FIRST_LOOK = 0.35  # of the time: every set of options in short
_COMPARING = 0.25  # of what a finalist has: its width classes
_BOUNDING = 0.15  # and how far rows lie apart
_DEEPER = 4.0  # seconds that one more trial may take to get deep into the context
_LEAST = 0.2  # seconds, where loading took the time that there was
_FIRST_WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32)


@dataclass(frozen=True, slots=True)
class Plan:
    """How to go about it. seconds: in all, loading included, about.  search: vary the options, or measure what the
    backend chooses only.  fresh: measure although there are results."""

    seconds: float = 45.0
    search: bool = True
    fresh: bool = False


def tune(
    target: str | None,
    draft: str | None,
    *,
    backend: str = "auto",
    settings: LoadSettings | None = None,
    plan: Plan | None = None,
    on_progress: Progress | None = None,
) -> Result:
    """Measure a pair and store the outcome, or give back what is stored (`Plan.fresh`).

    settings: what is fixed; options it leaves open are varied. Costs and classes are stored for the sets measured at
    length; the winning options only where none was fixed, for they are used where none is given.
    """
    started = perf_counter()
    plan = plan or Plan()
    tell = on_progress or (lambda share, what: None)
    load = _Loader(target, draft, backend, settings or LoadSettings(num_sequences=1))
    tell(0.0, "loading")
    with load({}) as pair:
        model, helper = pair.target.info, pair.draft and pair.draft.info
        paths = model.path, helper.path if helper else None
        own_settings = get_backend(model.backend).own_settings
        tried = choices(pair.target, own_settings, load.settings) if plan.search else {}
        options = combinations(tried)
        joined = joining(pair.target, own_settings, load.settings, tried) if plan.search else None
        result = Result(model.name, helper.name if helper else None, model.backend, model.runtime, plan.search)
        result.candidates = [Candidate(one) for one in options]
        if joined is not None:
            result.candidates.append(Candidate(joined, may_join=True))
        keeps = plan.search and not load.fixes(own_settings)
        # of several sets only the best ones have tables; of a single one a report without its table is of no use
        is_kept = len(options) > 1 or store.is_tuned(pair.target, pair.draft)
    if keeps and is_kept and not plan.fresh:
        stored = _stored(paths, result)
        if stored is not None:
            return stored
    _compare(load, result.candidates, started, plan.seconds, tell)
    result.seconds = perf_counter() - started
    result.date = datetime.now(UTC).date().isoformat()
    if keeps:
        store.keep_report(paths[0], result.backend, paths[1], result.winner.options, result.as_dict())
    tell(1.0, "")
    return result


def _stored(paths: tuple[Path, Path | None], wanted: Result) -> Result | None:
    """What an earlier run said of the same sets of options under the same version of the runtime."""
    report = store.find_report(paths[0], wanted.backend, paths[1])
    if report is None:
        return None
    try:
        found = Result.from_dict(report[1])
    except (ValueError, KeyError, TypeError) as error:
        _log.warning("what an earlier run said cannot be used and is measured anew: %s", error)
        return None
    same = [one.options for one in found.candidates] == [one.options for one in wanted.candidates]
    return found if same and found.runtime == wanted.runtime else None


def _compare(load: _Loader, candidates: list[Candidate], started: float, seconds: float, tell: Progress) -> None:
    """All in short, the best ones at length, within `seconds` of `started`. Raises BackendError if none could be
    loaded."""
    usual = [one for one in candidates if not one.may_join]
    first = _FIRST_LOOK if len(usual) > _FINALISTS else 0.0
    for number, candidate in enumerate(usual if first else ()):
        tell(first * number / len(usual), described(candidate.options))
        left = started + first * seconds - perf_counter()
        _look(load, candidate, perf_counter() + left / (len(usual) - number))
    finalists = sorted((one for one in usual if not one.failed), key=lambda one: -one.worth)[:_FINALISTS]
    finalists += [one for one in candidates if one.may_join]  # only the classes tell what it is good for
    for number, candidate in enumerate(finalists):
        share = (1.0 - first) / len(finalists)
        part = _part(tell, first + share * number, share, described(candidate.options))
        left = started + seconds - perf_counter()
        _examine(load, candidate, perf_counter() + left / (len(finalists) - number), part)
    if not any(one.is_finalist for one in usual):
        raise BackendError("no set of options could be loaded", got=candidates[0].failed)


class _Loader:
    """Opens the pair with a set of options over what is fixed."""

    def __init__(self, target: str | None, draft: str | None, backend: str, settings: LoadSettings) -> None:
        self._target, self._draft, self._backend, self.settings = target, draft, backend, settings

    def fixes(self, names: frozenset[str]) -> bool:
        """Is any of these settings given?"""
        return any(getattr(self.settings, name) is not None for name in names)

    @contextmanager
    def __call__(self, options: Options) -> Iterator[Pair]:
        changes: dict[str, Any] = dict(options)
        settings = replace(self.settings, **changes)
        with open_pair(self._target, self._draft, backend=self._backend, settings=settings, use_tuned=False) as pair:
            yield pair


def _look(load: _Loader, candidate: Candidate, until: float) -> None:
    """Costs in short until then, scored in the class that the backend claims."""
    try:
        with load(candidate.options) as pair:
            candidate.device = pair.target.info.device
            seconds = max(until - perf_counter(), _LEAST)
            candidate.costs = measure.costs(
                pair.target, pair.draft, seconds=seconds, widths=_FIRST_WIDTHS, contexts=(CONTEXT,)
            )
            candidate.best = best(candidate.costs, pair.target.capabilities)
    except (SettingError, BackendError) as error:  # BackendError: memory, or a runtime that cannot do it
        candidate.failed = str(error)


def _examine(load: _Loader, candidate: Candidate, until: float, tell: Progress) -> None:
    """Until then costs at length and width classes; both are stored."""
    try:
        with load(candidate.options) as pair:
            known = pair.target.capabilities
            candidate.device = pair.target.info.device
            until += measure.build(pair.target, pair.draft)  # comes on top of the time for measuring
            seconds = max(until - perf_counter(), _LEAST)
            costs = measure.costs(
                pair.target,
                pair.draft,
                seconds=(1.0 - _COMPARING - _BOUNDING) * seconds,
                overhead=round_overhead,
                on_progress=_part(tell, 0.0, 1.0 - _COMPARING - _BOUNDING, ""),
            )
            found = classes.find(
                pair.target,
                seconds=max(until - _BOUNDING * seconds - perf_counter(), _LEAST),
                on_progress=_part(tell, 1.0 - _COMPARING - _BOUNDING, _COMPARING, ""),
            )
            if known.rewind is not Rewind.NEVER:
                candidate.bound = bound.measure(
                    pair.target,
                    seconds=max(until - perf_counter(), _LEAST),
                    on_progress=_part(tell, 1.0 - _BOUNDING, _BOUNDING, ""),
                )
                store.keep_bound(pair.target, candidate.bound)

            found = _deeper(pair.target, found, costs)

            def value(one: WidthClass) -> float:
                return best(costs, _inside(known, one)).tokens_per_second

            serving, candidate.contradiction = classes.class_to_use(known.width_class, found, value)
            candidate.costs, candidate.classes, candidate.width_class = costs, found, serving
            candidate.best = best(costs, _inside(known, serving))
            candidate.free = best(costs, _inside(known, Exactness.off().widths))
            if candidate.contradiction:
                _log.warning("%s (%s)", candidate.contradiction, described(candidate.options))
                candidate.costs = replace(costs, notes=(*costs.notes, candidate.contradiction))
            store.keep_costs(pair.target, pair.draft, candidate.costs)
            store.keep_class(pair.target, serving)
    except (SettingError, BackendError) as error:
        candidate.failed = str(error)


def _deeper(target: LanguageModel, found: Classes, costs: Costs) -> Classes:
    """The same with one more trial deep in the context, if that decides whether width 1 joins the class and reading up
    to there takes no more than a few seconds."""
    widths, rows = classes.worth_a_deeper_look(target.capabilities.width_class, found)
    widest = costs.target.widths[-1]
    reading_seconds = costs.target.at(widest, classes.DEEP) / widest * classes.DEEP / 1e3
    if not widths or reading_seconds > _DEEPER or target.info.context_length < classes.DEEP + 64:
        return found
    return found.plus(classes.find(target, widths, contexts=(classes.DEEP,), seconds=0.5 * _DEEPER, rows=rows))


def _inside(known: Capabilities, width_class: WidthClass) -> Capabilities:
    return replace(known, width_class=width_class)


def _part(tell: Progress, start: float, share: float, before: str) -> Progress:
    """Progress of a part, told as progress of the whole."""
    return lambda done, what: tell(start + share * done, ": ".join(filter(None, (before, what))))
