"""Targets with the cost of a larger model and the function of a small one: true acceptance at realistic cost
without a download. What exactly is preserved: `docs/benchmarks.md`, "Expanded targets"."""

from __future__ import annotations

from localspec.bench.expand.files import FORMATS, Expansion, expand, read_source
from localspec.bench.expand.head import expand_head
from localspec.bench.expand.shape import SIZES, Size

__all__ = ["FORMATS", "SIZES", "Expansion", "Size", "expand", "expand_head", "read_source"]
