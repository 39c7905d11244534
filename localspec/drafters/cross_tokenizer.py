"""Drafting with a language model of another tokenizer.

Two ways behind one object. *intersection*: only tokens that both vocabularies have, byte for byte, are
guessed; the drafter then works as one of the target's own tokenizer, its guesses coupled to the target's
noise. *bytes*: the draft model writes freely in its own tokens; what it writes is encoded with the target's
tokenizer behind the last word, and the last token is held back until more text has proved where it ends
(`free_text.py`).

The context reaches the draft model as the target's bytes (`mirror.py`), so nothing is lost or replaced.
Whatever is guessed, the acceptance rule alone decides: under the walk the text equals plain decoding.
String-level exact match: Timor et al. 2025 (arXiv 2502.05202), here in bytes and as a tree; intersection:
the same authors' token-level method, here also under the walk.
"""

from __future__ import annotations

from collections.abc import Sequence

from localspec.context import Context
from localspec.drafters.aligned_cache import AlignedCache, SharedTokens
from localspec.drafters.draft_model import DraftModel
from localspec.drafters.free_text import Writer, Written
from localspec.drafters.mirror import SKIP
from localspec.drafters.shape import Shape
from localspec.errors import SettingError
from localspec.fingerprint import Relation
from localspec.protocols import DraftRequest, HostTokens, LanguageModel, Outcome, Proposal, SavedDraft, SequenceState

AUTO, INTERSECTION, BYTES = "auto", "intersection", "bytes"
_MODES = (AUTO, INTERSECTION, BYTES)
_ENOUGH_SHARED = 0.98
"""Measured with one draft model in both modes (`localspec bench cross --cut`): where less of the text is shared,
the restriction costs more guesses than the way through bytes does."""
_RECENT = 1024
_MOST_RATIO = 8.0


class CrossTokenizer:
    """Guesses of `model`, whose tokenizer is not the target's.

    mode: intersection, bytes, or auto: intersection where nearly all recent tokens of the conversation are
    shared, bytes otherwise.  num, shape, depth, min_prob, guess: as of `DraftModel`, counted in the target's
    tokens.  specials: map, text or skip (`Mirror`); skip guessed best (docs/cross-tokenizer.md).

    In bytes mode the target's penalties, bias and truncation do not reach the guesses, and a guess is coupled to
    the target's noise where it is a token of the target's, too.
    """

    name = "cross_tokenizer"

    def __init__(
        self,
        model: LanguageModel,
        relation: Relation,
        num_rows: int,
        *,
        mode: str = AUTO,
        num: int = 0,
        shape: str = "chain",
        depth: int = 0,
        min_prob: float = 0.0,
        guess: str = "coupled",
        specials: str = SKIP,
    ) -> None:
        if mode not in _MODES:
            raise SettingError("cross_tokenizer: unknown mode", got=mode, expected=" or ".join(_MODES))
        self.shape = Shape.parse(self.name, shape, num, depth)
        self.relation = relation
        self.mode = mode
        self.min_prob = min_prob
        self.guess = guess
        self._aligned = AlignedCache(model, relation, specials)
        try:
            shared = SharedTokens(self._aligned, relation, num_rows)
            self._restricted = DraftModel(
                model, shared, num=num, shape=shape, depth=depth, min_prob=min_prob, guess=guess
            )
        except BaseException:
            self._aligned.close()
            raise
        self._writer = Writer(model, self._aligned, relation, min_prob, guess)
        self._current = BYTES if mode == AUTO else mode
        self._context = Context()
        self._told = 0

    @property
    def num(self) -> int:
        """Most nodes of a proposal."""
        return self.shape.num

    @property
    def needs_trees(self) -> bool:
        """True unless it guesses chains."""
        return not self.shape.is_chain

    def attach(self, state: SequenceState) -> None:
        """The target's states are not read."""

    def begin(self, context: Context) -> None:
        """Bring the mirror to the new context, and choose the mode by what it consists of."""
        self._context = context
        self._aligned.begin(context)
        if self.mode == AUTO:
            recent = self.relation.coverage_of(context.tokens[-_RECENT:])
            self._current = INTERSECTION if recent >= _ENOUGH_SHARED else BYTES

    def propose(self, request: DraftRequest) -> Proposal:
        """Guess in the mode that was chosen; a chain where trees were not asked for."""
        counts = {f"{self._current}_rounds": 1, "re_encoded": self._aligned.num_fed_again - self._told}
        self._told = self._aligned.num_fed_again
        if self._aligned.free < 1:
            return Proposal(self.name, counts={**counts, "draft_context_full": 1})
        if self._current == INTERSECTION:
            made = self._restricted.propose(request)
            return Proposal(self.name, made.tokens, made.parents, made.laws, made.log_q, counts=counts)
        if min(request.max_nodes, request.max_depth) < 1:
            return Proposal(self.name, counts=counts)
        written = self._write(request)
        tree = written.tree
        log_q = None if tree.log_q is None else tuple(tree.log_q.tolist())
        counts |= {"held_back": written.held_back, "stepped_back": written.stepped_back}
        return Proposal(self.name, (HostTokens(tree.token),), tree.parent, log_q=log_q, counts=counts)

    def observe(self, outcome: Outcome) -> None:
        """Take in what was emitted."""
        self._aligned.observe()

    def save(self) -> tuple[SavedDraft, ...]:
        """What the draft model has read."""
        return self._aligned.save()

    def restore(self, saved: Sequence[SavedDraft]) -> None:
        """What the draft model had read."""
        self._aligned.restore(saved)

    def close(self) -> None:
        """Give the draft model's cache back (the model itself belongs to the pair)."""
        self._aligned.close()

    # ------------------------------------------------------------ free writing

    def _write(self, request: DraftRequest) -> Written:
        """What the draft model writes, in the target's tokens."""
        branching = self.shape.branching[: request.max_depth]
        if not request.trees:
            branching = (1,) * len(branching)
        return self._writer.write(request, min(self.num, request.max_nodes), branching)
