"""Array aliases. One letter per axis, used in signatures and comments everywhere:

    B sequences in a batch      N nodes of a tree (or rows of scores)     D depth of a node
    T tokens in a step          V vocabulary                              K candidates kept

Probabilities are float64, logits float32, token ids and node indices int32.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

TokenIds: TypeAlias = NDArray[np.int32]
"""[T] ids in the target's vocabulary unless said otherwise."""

NodeIndices: TypeAlias = NDArray[np.int32]
"""[N] indices of nodes; -1 stands for the parent of a root."""

Positions: TypeAlias = NDArray[np.int32]
"""[T] places in the sequence, the first token of the context being 0."""

Logits: TypeAlias = NDArray[np.float32]
"""[V] or [N, V] raw scores of the model, before any sampling setting."""

Probabilities: TypeAlias = NDArray[np.float64]
"""[K] non-negative, summing to one."""

NoiseKeys: TypeAlias = NDArray[np.uint32]
"""[N, 2] one 64-bit key per position, as two 32-bit halves (see `noise.py`)."""

BoolMask: TypeAlias = NDArray[np.bool_]
"""[T, T'] true where the row may see the column."""
