"""The static configurations that `--grid` tries: one number for all rounds of all prompts.

The best of them per workload is the oracle: what a scheduler that decides every round should reach without being
told the workload.
"""

from __future__ import annotations

from localspec.pair import Pair

CHAINS = (1, 2, 3, 4, 5, 6, 8, 12)
TREES = (4, 8, 16, 32)
LOOKUPS = (2, 4, 8, 16)


def grid(pair: Pair) -> tuple[list[str], list[str]]:
    """(drafters with their settings, what was left out and why) for what the pair can do as it was loaded."""
    capabilities, widest = pair.target.capabilities, _widest(pair)
    configurations: list[str] = []
    notes: list[str] = []
    if pair.draft is None:
        notes.append("no draft model: chains and trees left out of the grid")
    else:
        configurations += [f"draft_model:num={num}" for num in CHAINS if num <= widest]
        if capabilities.trees and capabilities.exact_trees and pair.draft.capabilities.trees:
            configurations += [f"draft_model:num={num},shape=tree" for num in TREES if num <= widest]
        else:
            notes.append("trees left out of the grid: " + ("; ".join(capabilities.limits) or "chains only here"))
    configurations += [f"ngram:num={num}" for num in LOOKUPS if num <= widest]
    return configurations, notes


def family(configuration: str) -> tuple[str, int]:
    """(what is guessed with, how many) of a configuration of the grid."""
    name, _, rest = configuration.partition(":")
    settings = dict(item.split("=") for item in rest.split(","))
    label = {"draft_model": "chain", "ngram": "lookup"}[name]
    return ("tree" if settings.get("shape") == "tree" else label), int(settings["num"])


def _widest(pair: Pair) -> int:
    """Most guesses that one pass holds, the anchor counted out."""
    capabilities = pair.target.capabilities
    return min(capabilities.max_width, capabilities.width_class.max_width or capabilities.max_width) - 1
