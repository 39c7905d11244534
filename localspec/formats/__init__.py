"""What model files say about themselves, read from their headers alone. No weight is ever loaded here.

Every length, count and offset is checked against the file before it is used, so no file can crash the
reader or make it allocate without bound; whatever is wrong is a ModelFileError. The bounds: a GGUF header
may have 128 MiB and 4 million texts, a safetensors header 32 MiB, an index 32 MiB, a config 4 MiB, a model
1024 files; reading takes at most 32 times the bytes that are read, and 2 MiB.

    gguf           metadata and tensors of a GGUF file
    safetensors    tensors of a safetensors file, and of the files behind an index
    summary        either of them as a `ModelSummary`
    head           what a trained head is; eagle3, medusa, mtp and block_heads read what each family says
    head_summary   a head as a `ModelSummary`
    states         how large the states of recurrent layers are
    numbers        numbers of metadata, checked
    conversion     writes GGUF files from what a Hugging Face folder holds
"""

from __future__ import annotations

from .head_summary import summarize_head
from .summary import ModelSummary, summarize

__all__ = ["ModelSummary", "summarize", "summarize_head"]
