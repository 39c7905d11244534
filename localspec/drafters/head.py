"""Drafting with a trained head: a small network that reads the target's hidden states."""

from __future__ import annotations

from collections.abc import Sequence

from localspec.context import Context
from localspec.drafters.guesser import COUPLED, Guesser, Manner
from localspec.drafters.shape import MOST_NODES, Shape
from localspec.errors import SettingError
from localspec.protocols import DraftHead, HeadInfo, HeadState, SavedDraft, Scores, SequenceState, Tokens
from localspec.types import Probabilities

KINDS = ("dspark", "dflash", "dflash2", "eagle3", "medusa", "mtp", "jetspec", "early_exit")
"""What heads there are, by the name of their drafter (`HeadInfo.kind`)."""


class HeadDrafter(Guesser):
    """Guesses of `head`, which gives the drafter its name.

    num: most nodes (0: in a chain as many as a head of one pass has levels, else 3; 16 in a tree).  shape, depth,
    min_prob, guess: as of `DraftModel`; never deeper than the head has levels.

    The head's part of the target's sequence is opened by `attach`. A head that says how sure it is decides by that
    how likely the best guess is; where guesses stay on a device unread, nobody asks it. A budget reads a block head's.
    """

    def __init__(
        self,
        head: DraftHead,
        *,
        num: int = 0,
        shape: str = "chain",
        depth: int = 0,
        min_prob: float = 0.0,
        guess: str = COUPLED,
    ) -> None:
        info = head.info
        manner = Manner(info.kind, _shape(info, num, shape, depth), min_prob, guess)
        if not info.trees:
            manner.require_chain(info.notes)
        self.head = head
        self._beside = _Beside(head)
        # how sure it is of each guess is worth more than not to wait for levels that are there anyway
        told = info.one_pass and info.confident
        super().__init__(info.kind, self._beside, manner, host_scores=info.host_scores, worth_reading=told)

    def attach(self, state: SequenceState, *, whole: bool = True) -> None:
        """Open the head's part of the sequence. What was read before the head was there is read again, unless it shall
        not: it would guess poorly for a long while, and a prompt is read once."""
        self._beside.attach(state, whole)

    def detach(self) -> None:
        """Close that part: the target's passes keep no hidden states for it."""
        self._beside.close()


class _Beside:
    """A head's state as a `GuessCache`: what it knows of committed tokens is the target's business."""

    def __init__(self, head: DraftHead) -> None:
        self._head = head
        self._sequence: SequenceState | None = None
        self._state: HeadState | None = None
        self._context = Context()

    def attach(self, sequence: SequenceState, whole: bool) -> None:
        """Guess for this sequence from now on. The head's part of it is opened anew: another drafter of the same head
        may have closed it."""
        if self._sequence is not sequence:
            self.close()
        self._state, self._sequence = self._head.open(sequence), sequence
        if whole and self.state.num_missing:
            sequence.truncate(0)

    @property
    def state(self) -> HeadState:
        """Raises ValueError where there is no sequence yet."""
        if self._state is None:
            raise ValueError(f"the head {self._head.info.name} has no sequence to guess for: attach it first")
        return self._state

    @property
    def room(self) -> int:
        """How many more guesses can be fed."""
        return self.state.room

    @property
    def free(self) -> int:
        """The target's context is the only one."""
        return MOST_NODES

    def begin(self, context: Context) -> None:
        """Follow another context; its sequence was brought there already."""
        self._context = context

    def start(self) -> Scores:
        """Forget earlier guesses; scores [1, V] behind the anchor."""
        return self.state.start(self._context.anchor)

    def extend(self, tokens: Tokens, parents: Sequence[int]) -> Scores:
        """Feed guesses; scores [N, V] of all of them."""
        return self.state.extend(tokens, parents)

    def confidence(self) -> Probabilities | None:
        """Of the rows scored last."""
        return self.state.confidence()

    def observe(self) -> None:
        """The target's `keep` has fed what was emitted."""

    def save(self) -> tuple[SavedDraft, ...]:
        """What the head knows is part of the target's own state."""
        return ()

    def restore(self, saved: Sequence[SavedDraft]) -> None:
        """It came with the target's own state."""

    def close(self) -> None:
        """Leave the sequence."""
        if self._state is not None:
            self._state.close()
            self._state = self._sequence = None


def _shape(info: HeadInfo, num: int, text: str, depth: int) -> Shape:
    """The form that settings ask for, held to the head's levels. Raises SettingError for more than those."""
    levels = info.levels
    if levels is None:
        return Shape.parse(info.kind, text, num, depth)
    is_chain = text == "chain"
    shape = Shape.parse(info.kind, text, num or (levels if is_chain and info.one_pass else 0), depth)
    asked = depth or (len(shape.branching) if not shape.by_score and (num or not is_chain) else 0)
    if asked > levels:
        raise SettingError(
            f"{info.kind}: this head does not guess that far ahead", got=asked, expected=f"at most {levels} levels"
        )
    return shape.cut(levels)
