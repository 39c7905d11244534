"""localspec: local language models several times faster, word for word the same.

    import localspec

    with localspec.open_pair() as pair, pair.session() as session:
        for piece in session.stream("Once upon a time", localspec.SamplingParams(max_tokens=40)):
            print(piece.text, end="", flush=True)

Names are imported when first used, so that `import localspec` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localspec.constraint import Grammar
    from localspec.engine.answer import Generation, Piece
    from localspec.engine.chat import Chat
    from localspec.engine.session import Session, Stream
    from localspec.errors import LocalspecError
    from localspec.loading import open_pair
    from localspec.pair import Pair
    from localspec.protocols import LoadSettings
    from localspec.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "Chat",
    "Generation",
    "Grammar",
    "LoadSettings",
    "LocalspecError",
    "Pair",
    "Piece",
    "SamplingParams",
    "Session",
    "Stream",
    "__version__",
    "open_pair",
]

_HOMES = {
    "Chat": "engine.chat",
    "Generation": "engine.answer",
    "Grammar": "constraint",
    "LoadSettings": "protocols",
    "LocalspecError": "errors",
    "Pair": "pair",
    "Piece": "engine.answer",
    "SamplingParams": "sampling",
    "Session": "engine.session",
    "Stream": "engine.session",
    "open_pair": "loading",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'localspec' has no attribute {name!r}")
    return getattr(import_module(f"localspec.{_HOMES[name]}"), name)
