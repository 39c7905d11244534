"""What an answer may look like: JSON of a schema, a regular expression, a grammar.

A `Grammar` says it in words and travels in `SamplingParams`; `constrain` compiles it for a model into a
`Constraint`, which answers one question: which tokens may follow this much of the answer? The sampler asks it at
every node that is visited, so constrained text under speculation equals constrained plain text, and drafters that
guess through the sampler keep to the grammar, too. `obey` cuts what others guess.
"""

from __future__ import annotations

from localspec.constraint.contract import Constraint
from localspec.constraint.grammar import WHITE_SPACE, Grammar
from localspec.constraint.guidance import constrain, special_token
from localspec.constraint.obey import obey

__all__ = ["WHITE_SPACE", "Constraint", "Grammar", "constrain", "obey", "special_token"]
