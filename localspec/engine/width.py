"""Keeping every target pass inside one width class.

Kernels change with the number of tokens in a pass, and with them the last bits of the logits. A pass
narrower than the class is widened by throw-away nodes below its last token; nobody reads their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from localspec.protocols import Capabilities, HostTokens, Step, WidthClass


def pad(step: Step, width_class: WidthClass, at_least: int = 0) -> Step:
    """The step widened to `width_class.min_width`, or to `at_least`; each step of a pass is, as a backend may run
    them apart.

    Padding copies token 0 in a chain below the last new token, so a chain stays a chain. Which rows
    are scored does not change.
    """
    missing = max(width_class.min_width, at_least) - step.num_tokens
    if missing <= 0 or step.num_tokens == 0:
        return step
    rows = tuple(range(step.num_tokens)) if step.rows is None else step.rows
    last = step.state.num_pending + step.num_tokens - 1
    parents = np.concatenate([step.parents, np.arange(last, last + missing, dtype=np.int32)])
    padding = HostTokens(np.zeros(missing, np.int32))
    return replace(step, tokens=(*step.tokens, padding), parents=parents, rows=rows)


def pass_width(capabilities: Capabilities, steps: Sequence[Step]) -> int:
    """Tokens that one forward over these steps runs, padding included."""
    widths = [step.num_tokens for step in steps]
    if capabilities.batches and len(widths) > 1:
        return len(widths) * max(capabilities.width_class.min_width, *widths)
    return sum(widths)
