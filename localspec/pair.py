"""A target with what guesses for it, and the sessions that are opened on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial

from localspec.drafters import (
    AUTO,
    Draft,
    DrafterSpec,
    DraftModel,
    Forced,
    HeadDrafter,
    Nothing,
    Suffix,
    check_settings,
    find_head,
    make_drafter,
)
from localspec.engine.overhead import round_overhead
from localspec.engine.session import Session, require_guardable, require_trees
from localspec.errors import UnknownNameError, UsageError
from localspec.exactness import AUTO as AUTO_EXACT
from localspec.exactness import EXACT_CHOICES, Bound, Exactness, Mode, wants_guarding
from localspec.history import DEFAULT_BYTES, History
from localspec.protocols import Drafter, DraftHead, LanguageModel, WidthClass, require_rewind
from localspec.schedule.cost import Costs
from localspec.schedule.experience import Experience
from localspec.schedule.heads import pays_to_wait
from localspec.schedule.scheduled import Scheduled
from localspec.schedule.score import loss_by_guarding
from localspec.schedule.store import (
    class_that_pays,
    experience_for,
    keep_experience,
    knows_bound,
    load_or_measure,
    load_or_measure_bound,
    look_for_classes,
)
from localspec.verify import make_acceptance


class Pair:
    """A target with its draft model and its trained heads (if any), opened and checked. Close it, or use it with
    `with`.

    found: what was decided or found doubtful before loading, in words.  heads: of different kinds.
    """

    def __init__(
        self,
        target: LanguageModel,
        draft: LanguageModel | None,
        found: Sequence[str] = (),
        heads: Sequence[DraftHead] = (),
    ) -> None:
        self.target = target
        self.draft = draft
        self.history: History | None = None
        self.heads = tuple(heads)
        self._found = tuple(found)
        self._experiences: dict[tuple[int, int | None], Experience] = {}
        self.remembers_speed = True
        """May it go on from what earlier runs learned of this pair, and keep what this one learns?"""

    @cached_property
    def drafting(self) -> Draft | None:
        """The draft model with how its vocabulary relates to the target's."""
        return None if self.draft is None else Draft.of(self.target, self.draft)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided before loading, and worked around for the two models and between them, each thing once."""
        found = [*self._found]
        found += [note for model in (self.target, self.draft) if model is not None for note in model.info.notes]
        found += [note for head in self.heads for note in head.info.notes]
        if self.drafting is not None and not self.drafting.relation.same:
            found.append(f"{self.drafting.relation}: guesses are translated (drafter cross_tokenizer)")
        if self.history is not None:
            found.append(f"what is said is remembered in {self.history.folder} (`localspec kept` lists and deletes it)")
        return tuple(dict.fromkeys(found))

    def remember(self, max_bytes: int = DEFAULT_BYTES) -> None:
        """Keep what is said in the sessions that are opened from now on, and guess from what was kept before
        (`localspec.history`); whoever opens them should know. max_bytes: of all sessions with this vocabulary."""
        self.history = History(self.target.tokenizer, about=self.target.info.name, max_bytes=max_bytes)

    @property
    def experience(self) -> Experience:
        """That of sessions with the default exactness."""
        return self.experience_with(self.exactness())

    def experience_with(self, exactness: Exactness) -> Experience:
        """What the sessions that decide by themselves (drafter "auto") learn together, if they may use the same widths.
        It starts from what passes cost on this machine; if that is not known yet, a few seconds of measuring go
        before: see `localspec tune`. Needs a free sequence then."""
        widths = exactness.widths
        place = (widths.min_width, widths.max_width)
        if place not in self._experiences:
            costs, known = self.costs, replace(self.target.capabilities, width_class=widths)
            make = partial(Experience, costs, known)
            found = experience_for(self.target, self.draft, self.heads, make) if self.remembers_speed else make()
            self._experiences[place] = found
        return self._experiences[place]

    @cached_property
    def costs(self) -> Costs:
        """What passes cost on this machine; looked up, or measured in short, which needs a free sequence."""
        return load_or_measure(self.target, self.draft, overhead=round_overhead, heads=self.heads)

    def exactness(self, exact: str = AUTO_EXACT, *, acceptance: str = "walk") -> Exactness:
        """What a session promises, and the widths it may use (`localspec.exactness`). exact: "class" stays in the
        width class, "guarded" re-checks close choices, "off" promises nothing; "auto" is the class where a measured one
        holds more than one width, else guarded where that is expected to pay, else a class that is looked for, else
        passes of one token.

        The bound of guarded decoding is looked up or measured, which needs a free sequence and a few seconds once.
        Where measuring is switched off and under a rule that cannot be guarded, "auto" is the class that the
        backend claims. Raises UnknownNameError, SettingError, UnsupportedModelError.
        """
        if exact not in EXACT_CHOICES:
            raise UnknownNameError.among("exactness", exact, EXACT_CHOICES)
        rule = make_acceptance(acceptance)
        if exact == AUTO_EXACT:
            guarded = wants_guarding(self.target) and not rule.needs_law and knows_bound(self.target)
            if guarded and (loss := loss_by_guarding(self.costs, self.target.capabilities, self.bound)):
                found = self._looked_class
                return Exactness.one_token(loss) if found is None else Exactness(Mode.CLASS, found)
            exact = (Mode.GUARDED if guarded else Mode.CLASS).value
        mode = Mode(exact)
        if mode is Mode.CLASS:
            return Exactness.of_class(self.target)
        if mode is Mode.OFF:
            return Exactness.off()
        require_rewind(self.target)
        require_guardable(rule)
        return Exactness.guarded(self.bound)

    @cached_property
    def _looked_class(self) -> WidthClass | None:
        """Where guarding does not pay: one that does, of the widths that a short look finds equal."""
        looked = look_for_classes(self.target)
        return None if looked is None else class_that_pays(self.target, looked, self.costs)

    @cached_property
    def bound(self) -> Bound:
        """How far rows of the target lie apart by the width of their passes; looked up, or measured in short."""
        return load_or_measure_bound(self.target)

    def drafter(self, spec: str | DrafterSpec, *, exact: str = AUTO_EXACT, acceptance: str = "walk") -> Drafter:
        """A drafter for one session, which closes it. "auto" decides every round what pays: prompt lookup, the draft
        model and the heads if there are any, how much of each, or nothing; with settings it is the draft model (else
        the first head, else lookup) so set. exact, acceptance: the session's, which say what widths it may use."""
        parsed = DrafterSpec.parse(spec) if isinstance(spec, str) else spec
        if not parsed.decides:
            return make_drafter(parsed, self.drafting, self.heads, history=self.history)
        exactness = self.exactness(exact, acceptance=acceptance)
        if not exactness.leaves_room:  # deciding about guesses that no pass may verify would only cost time
            return Nothing(AUTO)
        # first of all: measuring needs a free sequence
        experience = self.experience_with(exactness)
        capabilities = self.target.capabilities
        # on a device a chain is guessed without waiting for it, a tree waits once per level
        branches = capabilities.trees and capabilities.exact_trees and capabilities.host_scores
        form = "tree" if branches else "chain"
        # the plan cuts what is not worth verifying; what is reached less often than that never is
        lookup = f"{Suffix.name}:num=24,shape={form},min_prob=0.1,min_reach=0.1"
        free = [make_drafter(lookup, None, history=self.history)]
        trees = capabilities.trees and capabilities.exact_trees
        ahead = {DraftModel.name} if self.draft is not None and self.draft.capabilities.runs_ahead else ()
        return Scheduled(free, self._dear(trees, experience.live.costs), experience, forced=Forced(), ahead=ahead)

    def _dear(self, trees: bool, costs: Costs) -> list[Drafter]:
        """The drafters that run a network, in the widest form that the schedule may cut down. trees: can the target
        verify them?"""
        made: list[Drafter] = []
        if self.draft is not None:
            able = trees and self.target.capabilities.host_scores and self.draft.capabilities.trees
            size = 16 if self.drafting is not None and not self.drafting.relation.same else 48
            form = "tree" if able else "chain"
            made.append(make_drafter(f"{DraftModel.name}:num={size},shape={form},depth=16", self.drafting))
        for head in self.heads:
            able = trees and head.info.trees and (head.info.host_scores or pays_to_wait(head.info, costs))
            size, deepest = (48, min(head.info.levels or 16, 16)) if able else (head.info.levels or 16, 0)
            form = "tree" if able else "chain"
            made.append(HeadDrafter(head, num=size, shape=form, depth=deepest))
        return made

    def drafting_with(self, draft: LanguageModel) -> Pair:
        """The same pair with something in front of its draft model; what sessions learn is shared. Not to be closed."""
        other = Pair(self.target, draft, self._found, self.heads)
        other.history = self.history
        other._experiences, other.remembers_speed = self._experiences, self.remembers_speed
        vars(other).update(
            {name: vars(self)[name] for name in ("costs", "bound", "_looked_class") if name in vars(self)}
        )
        return other

    def check_drafter(self, spec: DrafterSpec) -> None:
        """Raise what `drafter` or the first session with it would, as far as that shows without opening anything:
        UsageError for a draft model or head that is not there, UnsupportedModelError for what the target cannot
        verify."""
        parts = spec.resolved(self.draft, self.heads).parts
        if any(part.needs_draft for part in parts) and self.draft is None:
            raise UsageError(f"drafter {spec.name!r} needs a draft model", fix="Load the model with one (--draft).")
        for part in parts:
            if part.needs_head:
                find_head(part.name, self.heads)
        check_settings(parts)
        if not spec.decides and any(part.name != Nothing.name for part in parts):
            require_rewind(self.target)
        if spec.asks_for_trees:
            require_trees(self.target, spec.name)

    def session(
        self,
        drafter: str | DrafterSpec | Drafter = AUTO,
        *,
        acceptance: str = "walk",
        exact: str = AUTO_EXACT,
    ) -> Session:
        """A new conversation. drafter: "auto" decides every round, others do as they are told, e.g. "ngram:max=4"
        ("nothing" is plain decoding); or a drafter of your own; the session closes it. exact: what is promised of its
        text, see `exactness`. Sessions that are open at the same time each need a sequence: see
        `LoadSettings.num_sequences`."""
        rule = make_acceptance(acceptance)
        exactness = self.exactness(exact, acceptance=acceptance)
        if not isinstance(drafter, str | DrafterSpec):
            return Session(self.target, drafter, acceptance=rule, exactness=exactness)
        own = self.drafter(drafter, exact=exact, acceptance=acceptance)
        try:
            return Session(self.target, own, acceptance=rule, exactness=exactness)
        except BaseException:
            own.close()
            raise

    def close(self) -> None:
        """Give all memory back, and keep what was learned for the next run."""
        if self.remembers_speed:
            for experience in self._experiences.values():
                keep_experience(self.target, self.draft, self.heads, experience)
        self._experiences.clear()
        for head in self.heads:
            head.close()
        self.target.close()
        if self.draft is not None:
            self.draft.close()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
