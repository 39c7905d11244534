"""The MLX backend: Metal on Apple silicon, CUDA or CPU elsewhere, through mlx-lm's model classes.

    __init__ -> backend -> loader -> folder | gguf_model -> model -> network, state, scores

Importing this package imports neither mlx nor mlx-lm; `BACKEND.load` does.
"""

from __future__ import annotations

from .backend import BACKEND

__all__ = ["BACKEND"]
