"""What was said in earlier sessions, for drafters to guess from: kept only where the user asks for it.

`store` holds the files, `index` finds in them what followed the words just written.
"""

from __future__ import annotations

from localspec.history.index import Found, SuffixArray
from localspec.history.store import DEFAULT_BYTES, Entry, History

__all__ = ["DEFAULT_BYTES", "Entry", "Found", "History", "SuffixArray"]
