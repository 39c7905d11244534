"""Drafting with a smaller language model that shares the target's tokenizer."""

from __future__ import annotations

from localspec.drafters.draft_cache import DraftCache
from localspec.drafters.guesser import COUPLED, GuessCache, Guesser, Manner
from localspec.drafters.shape import Shape
from localspec.protocols import LanguageModel, SequenceState


class DraftModel(Guesser):
    """Guesses of `model` in the form of a chain, a tree or a fixed fan-out.

    num: most nodes (0: 3 in a chain, 16 in a tree).  shape: chain, tree (best-first by estimated chance of
    acceptance) or children per level, such as 3-2-1.  depth: most levels (0: as many as nodes, at most 12
    in a tree).  min_prob, guess: as in `Manner`.

    The state commits accepted guesses and nothing else.
    cache: what feeds the model, if it is not to read the conversation as it stands.
    """

    name = "draft_model"

    def __init__(
        self,
        model: LanguageModel,
        cache: GuessCache | None = None,
        *,
        num: int = 0,
        shape: str = "chain",
        depth: int = 0,
        min_prob: float = 0.0,
        guess: str = COUPLED,
    ) -> None:
        manner = Manner(self.name, Shape.parse(self.name, shape, num, depth), min_prob, guess)
        if not model.capabilities.trees:
            manner.require_chain(model.capabilities.limits)
        self.model = model
        cache = DraftCache(model) if cache is None else cache
        super().__init__(self.name, cache, manner, host_scores=model.capabilities.host_scores)

    def attach(self, state: SequenceState) -> None:
        """The target's states are not read."""
